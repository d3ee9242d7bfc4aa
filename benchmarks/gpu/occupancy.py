"""Count how many programs of a kernel a multiprocessor (compute unit) holds at once."""

from typing import NamedTuple


class Room(NamedTuple):
    """What a multiprocessor has for programs, from the manufacturers' manuals."""

    registers: int  # of 32 bits
    shared: int  # Bytes of shared memory, the `reserved` ones of each program included.
    threads: int
    reserved: int  # Bytes of shared memory that the system takes for each program.
    tensor_columns: int = 0  # of tensor memory, whose columns have 128 lanes of 32 bits


ROOM = {
    "sm_80": Room(64 << 10, 164 << 10, 2048, 1 << 10),
    "sm_86": Room(64 << 10, 100 << 10, 1536, 1 << 10),
    "sm_89": Room(64 << 10, 100 << 10, 1536, 1 << 10),
    "sm_90": Room(64 << 10, 228 << 10, 2048, 1 << 10),
    "sm_100": Room(64 << 10, 228 << 10, 2048, 1 << 10, 512),
    "sm_120": Room(64 << 10, 100 << 10, 1536, 1 << 10),
    "gfx90a": Room(128 << 10, 64 << 10, 2048, 0),
    "gfx942": Room(128 << 10, 64 << 10, 2048, 0),
    "gfx1100": Room(96 << 10, 64 << 10, 1024, 0),
}
REGISTER_STEP = 8  # A thread is given its registers in steps of so many.


def programs_at_once(arch: str, threads: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Return how many programs of so many threads, registers of a thread, bytes and columns of memory fit; at least 1."""
    room = ROOM[arch]
    fit = [room.threads // threads, room.registers // (threads * -(-registers // REGISTER_STEP) * REGISTER_STEP)]
    fit.append(room.shared // max(1, shared + room.reserved))
    if tensor_columns:
        fit.append(room.tensor_columns // tensor_columns)
    return max(1, min(fit))
