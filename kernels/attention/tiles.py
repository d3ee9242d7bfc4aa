"""How attention's kernels are cut for each GPU: the one table that launches, ahead-of-time compilation and tests read.

A row holds for head_dims (the larger of keys' and values') up to 64, 128 and 256. The figures were found by compiling for each
GPU and reading registers, spills and instructions (benchmarks/tune_tiles.py), not by timing: no GPU was at hand.

Rows "by descriptors" hold where the tensor memory accelerator copies the tiles: pointers take no registers then, and tiles can
be larger. On sm_100 the plain forward's warps are specialized; on sm_90 Triton's compiler (3.9) specializes kernels of one loop
with descriptors made on the device alone, which want an allocator that a library must not set: two warp groups do all there.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows of queries and of keys that a program works on at a time, and what the compiler is told."""

    q: int
    k: int
    warps: int
    stages: int
    spilled: int = 0  # bytes that a thread spills at most
    specialized: bool = False  # whether warps share the work by kind: copies, products, softmax


FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, DECODE = "forward", "grad_key_value", "grad_query", "decode"
ROWS = 64  # of a tile where little is computed: delta, the mask's lists and its gradient, appended rows
CACHE_SHARE = 24 << 20  # bytes of keys and values that heads worked on at the same time may fill of the second-level cache

# GPUs whose tables are the same go by one name.
SAME = {"sm_89": "sm_86", "sm_121": "sm_120", "sm_103": "sm_100", "gfx90a": "gfx942", "gfx950": "gfx942"}

HALF = {  # bfloat16 and float16
    "sm_80": {  # the first keeps a few numbers in local memory around the loops of packed sequences
        FORWARD: (Tile(128, 64, 4, 3, spilled=24), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 128, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 8, 2)),
        GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        DECODE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    "sm_86": {  # 99 KiB of shared memory
        FORWARD: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
        DECODE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    "sm_120": {
        FORWARD: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
        DECODE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    "sm_90": {
        FORWARD: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(64, 128, 8, 1), Tile(32, 128, 8, 1), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 16, 8, 2)),
        DECODE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    "sm_100": {
        FORWARD: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        DECODE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    "sm_90 by descriptors": {
        FORWARD: (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        # The second keeps a few numbers in local memory around the loops of causal edges, not in the loop inside.
        GRAD_KEY_VALUE: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2, spilled=24), Tile(64, 32, 8, 2)),
        GRAD_QUERY: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 1)),
    },
    "sm_100 by descriptors": {  # a specialized kernel keeps two numbers in local memory from one loop to the next
        FORWARD: (
            Tile(128, 128, 8, 2, spilled=8, specialized=True),
            Tile(128, 128, 8, 2, spilled=8, specialized=True),
            Tile(128, 64, 8, 2),
        ),
        GRAD_KEY_VALUE: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1)),
        GRAD_QUERY: (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 1)),
    },
    "sm_120 by descriptors": {
        FORWARD: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 1), Tile(64, 32, 8, 1)),
    },
    "gfx942": {  # 64 KiB of shared memory, 64 lanes in a warp
        FORWARD: (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(64, 16, 4, 2)),
        GRAD_KEY_VALUE: (Tile(16, 128, 4, 2), Tile(32, 64, 4, 1), Tile(16, 64, 4, 1)),
        GRAD_QUERY: (Tile(128, 32, 4, 2), Tile(128, 16, 4, 2), Tile(64, 16, 8, 1)),
        DECODE: (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
    },
    "gfx1100": {  # its matrix instructions want each operand twice, in both halves of a warp: too much for 256 registers
        FORWARD: (Tile(64, 32, 4, 2, spilled=120), Tile(128, 16, 8, 1, spilled=8), Tile(32, 16, 8, 1, spilled=600)),
        GRAD_KEY_VALUE: (Tile(16, 64, 4, 1, spilled=500), Tile(16, 32, 8, 1, spilled=900), Tile(16, 16, 8, 1, spilled=2300)),
        GRAD_QUERY: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1, spilled=600), Tile(16, 16, 8, 1, spilled=2200)),
        DECODE: (Tile(16, 32, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 8, 1)),
    },
}
# Loops that read a mask or draw dropout besides: their tiles hold more, in registers and in shared memory. One cut fits all of
# NVIDIA's, but for the first dK/dV: that of the others keeps a number in local memory in sm_100's loop.
HALF |= dict.fromkeys(
    ("sm_80 busy", "sm_86 busy", "sm_90 busy", "sm_100 busy", "sm_120 busy"),
    {
        FORWARD: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 128, 8, 1), Tile(32, 64, 8, 2), Tile(16, 32, 8, 1)),
        GRAD_QUERY: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
    },
)
HALF["sm_100 busy"] = HALF["sm_100 busy"] | {
    GRAD_KEY_VALUE: (Tile(32, 64, 8, 1), Tile(32, 64, 8, 2), Tile(16, 32, 8, 1)),
}
# float32 in full precision is multiply-adds on NVIDIA's GPUs and on gfx11; only gfx9 has matrix instructions for it. Triton
# keeps what a thread multiplies along the whole head_dim in registers: too few for the backward at 256, with a mask
# at 128, and on gfx11 for more.
SINGLE = {
    "sm_86": {
        FORWARD: (Tile(64, 32, 8, 2, spilled=8), Tile(32, 16, 8, 1, spilled=8), Tile(16, 16, 8, 1)),
        GRAD_KEY_VALUE: (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=400)),
        GRAD_QUERY: (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, spilled=24), Tile(16, 16, 8, 1, spilled=400)),
        DECODE: (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    },
    "gfx942": {
        FORWARD: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
        GRAD_KEY_VALUE: (Tile(32, 64, 8, 1, spilled=32), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
        GRAD_QUERY: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
        DECODE: (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 8, 1)),
    },
    "gfx1100": {
        FORWARD: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=200), Tile(16, 16, 8, 1, spilled=1300)),
        GRAD_KEY_VALUE: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=1100), Tile(16, 16, 8, 1, spilled=2600)),
        GRAD_QUERY: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=900), Tile(16, 16, 8, 1, spilled=2400)),
        DECODE: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=500)),
    },
}
INTERPRETER = {  # small and uneven, so that short sequences have several blocks
    FORWARD: Tile(32, 16, 4, 1),
    GRAD_KEY_VALUE: Tile(16, 32, 4, 1),
    GRAD_QUERY: Tile(16, 32, 4, 1),
    DECODE: Tile(16, 32, 4, 1),
}


def architecture(device: torch.device) -> str:
    """'sm_90', 'gfx942', …; 'interpreter' for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# KiB of shared memory that one program may take, by the makers' manuals.
_SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that one program may take at most."""
    return _SHARED.get(arch, 64 if arch.startswith("gfx") else 99) << 10


def has_tf32(arch: str) -> bool:
    """Whether there are products of float32 rounded to TF32."""
    return arch.startswith(("sm_", "gfx94"))


def has_descriptors(arch: str, dtype: torch.dtype) -> bool:
    """Whether tiles are copied by a descriptor of their tensor: where there is a tensor memory accelerator, and for the numbers
    that tensor instructions take. Multiply-adds want float32 in another order than it copies them, and spill."""
    has_accelerator = arch == "interpreter" or (arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90)
    return has_accelerator and dtype != torch.float32


BY_DESCRIPTORS, BUSY = " by descriptors", " busy"  # the kinds of loops that have rows of their own


def tile(kernel: str, arch: str, dtype: torch.dtype, head_dim: int, kind: str = "") -> Tile:
    """The tile of a kernel for the larger of the two head_dims; `kind`: of its loop."""
    if arch == "interpreter":
        return INTERPRETER[kernel]
    table, name = SINGLE if dtype == torch.float32 else HALF, SAME.get(arch, arch)
    name = name if name in table else _closest(arch)
    family = table[name] | table.get(name + kind, {})
    return family[kernel][0 if head_dim <= 64 else 1 if head_dim <= 128 else 2]


def _closest(arch: str) -> str:
    """For a GPU that a table does not name: what fits all of its maker's."""
    if arch.startswith("gfx"):
        return "gfx942" if arch.startswith("gfx9") else "gfx1100"
    return "sm_86"
