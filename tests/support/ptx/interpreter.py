"""Compile the interpreter, and call it."""

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
from filelock import FileLock

from .program import LANES, Program

ROOT = Path(__file__).parents[3]
SOURCES = Path(__file__).parent / "interpreter"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fwrapv", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]


class Fault(Exception):
    """What a GPU would trap at, or silently do wrong; with the block and the line of the PTX text."""


@functools.cache
def library() -> ctypes.CDLL:
    """Load the interpreter, and compile it if needed."""
    common = ROOT / "csrc" / "common"
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{common}", *map(str, sorted(SOURCES.glob("*.cpp")))]
    texts = [path.read_text() for path in (*sorted(SOURCES.iterdir()), common / "half.h", common / "macros.h")]
    digest = hashlib.sha256("\0".join([*command, *texts]).encode()).hexdigest()
    path = ROOT / "build" / "ptx" / digest[:16] / "interpreter.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # The first process compiles, and the others wait for it.
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            subprocess.run([*command, "-o", unfinished], check=True)
            unfinished.rename(path)
    return ctypes.CDLL(path)


class _Launch(ctypes.Structure):
    """The interpreter's Launch (run.cpp)."""

    _fields_ = [
        ("names", ctypes.c_char_p),
        ("lines", ctypes.c_void_p),
        ("guards", ctypes.c_void_p),
        ("operands", ctypes.c_void_p),
        ("first_operands", ctypes.c_void_p),
        ("num_instructions", ctypes.c_int),
        ("registers", ctypes.c_void_p),
        ("num_registers", ctypes.c_int),
        ("num_blocks", ctypes.c_int),
        ("num_warps", ctypes.c_int),
        ("registers_per_thread", ctypes.c_int),
        ("shared_bytes", ctypes.c_uint64),
        ("parameters", ctypes.c_char_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("addresses", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
        ("num_tensors", ctypes.c_int),
        ("late", ctypes.c_int),
        ("seed", ctypes.c_uint),
    ]


def interpret(
    program: Program,
    grid: int,
    shared_bytes: int,
    parameters: bytes,
    tensors: list[tuple[int, int]],
    late: bool = False,
    seed: int = 1,
) -> None:
    """Run a program over memory at the (address, bytes) of `tensors`.

    Asynchronous copies and products land as late as they may if `late`, and as early otherwise. The seed draws which warp runs
    when.
    """
    registers = program.registers()
    addresses, sizes = (np.array(column, np.uint64) for column in zip(*tensors))
    pointers = [array.ctypes.data for array in (program.lines, program.guards, program.operands, program.first_operands)]
    launch = _Launch(
        program.names, *pointers, len(program.lines), registers.ctypes.data, len(registers), grid,
        program.kernel.threads // LANES, program.kernel.registers_per_thread, shared_bytes, parameters, len(parameters),
        addresses.ctypes.data, sizes.ctypes.data, len(tensors), late, seed,
    )  # fmt: skip
    text = ctypes.create_string_buffer(300)
    if library().ptx_run(ctypes.byref(launch), text, len(text)):
        raise Fault(text.value.decode())
