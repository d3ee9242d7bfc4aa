"""Read from a compiled kernel its registers and spills, and the instructions of its hot loop by the unit that runs them.

NVIDIA's machine code is read with the disassembler that comes with Triton; AMD's is read from the compiler's assembly.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

# Patterns of opcodes by unit; the first that matches counts. An opcode that matches none is control flow or addressing, which
# runs beside.
_NVIDIA = (
    ("tensor", r"HMMA|HGMMA|DMMA|UTC\w*MMA|QMMA|OMMA"),
    ("exp", r"MUFU"),
    ("local", r"LDL|STL"),
    ("shared", r"LDS|STS|LDT|STT"),
    ("global", r"LDG|STG|UTMALDG|UTMASTG|RED|ATOM"),
    ("float", r"F(ADD|MUL|FMA|MNMX|MNMX3|ADD2|MUL2|FMA2)\b"),
    ("convert", r"F2F|F2I|I2F|HADD2|HFMA2|HMUL2"),
    ("integer", r"I|LOP|SHF|LEA|PRMT|SEL|FSEL|FSETP|MOV|VOTE|PLOP|R2P|VIADD|VIMNMX|FCHK|UIADD"),
)
_AMD = (
    ("tensor", r"v_mfma|v_wmma|v_smfmac"),
    ("exp", r"v_exp|v_log|v_rcp|v_sqrt|v_rsq|v_sin|v_cos"),
    ("local", r"scratch_"),
    ("shared", r"ds_"),
    ("global", r"buffer_|global_|flat_"),
    ("float", r"v_(pk_|dual_)?(add|sub|subrev|mul|fma|fmac|fmamk|fmaak|mac|max|max3|min|maximum|minimum|mad)\w*_f32"),
    ("convert", r"v_cvt"),
    ("integer", r"v_"),
)


class Usage(NamedTuple):
    """The registers and memory that a kernel takes."""

    registers: int  # per thread
    spilled_bytes: int  # per thread
    shared_bytes: int  # per program
    tensor_columns: int  # of tensor memory, per program
    all_warps: int  # of a program, those included that only copy or multiply


class Loop(NamedTuple):
    """The instructions of one pass through a loop, by one warp."""

    opcodes: tuple[str, ...]
    units: Counter  # Number of instructions by unit.


def usage(binary, arch: str) -> Usage:
    """Return what a kernel takes that ahead_of_time.compile_launch made."""
    program = binary.metadata.shared, getattr(binary.metadata, "tmem_size", 0), binary.metadata.num_warps
    if arch.startswith("sm_"):
        text = _tool(binary.asm["cubin"], "cuobjdump", "--dump-resource-usage")
        registers, stack = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
        return Usage(registers, stack, *program)
    text = binary.asm["amdgcn"]
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    return Usage(registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1]), *program)


def wide_loads(binary, arch: str) -> int:
    """Return how many instructions of a kernel load 16 bytes for each thread."""
    opcodes = (name for kind, name in _lines(binary, arch) if kind == "op")
    return sum(bool(re.match(r"LDG\b.*\.128|(global|buffer|flat)_load_(dwordx4|b128)", opcode)) for opcode in opcodes)


def hot_loop(loops: list[Loop]) -> Loop:
    """Return the hot loop: of the loops with matrix products, the one that does least besides, which is the one without masks.

    The result is empty if no loop has matrix products.
    """
    if not any(loop.units["tensor"] for loop in loops):
        loops = [loop for loop in loops if loop.units["float"] > 32]
    return _shortest(loops, "tensor")


def softmax_loop(loops: list[Loop]) -> Loop:
    """Return the loop without masks of the warps that compute the softmax, in a kernel whose warps are specialized."""
    return _shortest(loops, "exp")


def loops_of(binary, arch: str) -> list[Loop]:
    """Return the innermost loops of a kernel that ahead_of_time.compile_launch made."""
    return [_loop(body, arch) for body in _loop_bodies(_lines(binary, arch))]


def _shortest(loops: list[Loop], unit: str) -> Loop:
    """Return the shortest of the loops that have the most instructions of a unit; an empty one if there are no loops."""
    most = max((loop.units[unit] for loop in loops), default=0)
    full = [loop for loop in loops if loop.units[unit] == most]
    return min(full, key=lambda loop: len(loop.opcodes), default=Loop((), Counter()))


def _loop(body: list[str], arch: str) -> Loop:
    """Count the instructions of a loop by unit."""
    table = _NVIDIA if arch.startswith("sm_") else _AMD
    return Loop(tuple(body), Counter(unit for opcode in body if (unit := _unit(opcode, table))))


def _unit(opcode: str, table: tuple) -> str | None:
    """Return the unit that runs an opcode."""
    return next((unit for unit, pattern in table if re.match(pattern, opcode)), None)


def _loop_bodies(lines: list[tuple[str, str]]) -> list[list[str]]:
    """Return the opcodes of the innermost loops, each from a label to a branch back to it."""
    labels = {name: i for i, (kind, name) in enumerate(lines) if kind == "label"}
    spans = {(labels[name], i) for i, (kind, name) in enumerate(lines) if kind == "branch" and labels.get(name, i) < i}
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[name for kind, name in lines[begin:end] if kind == "op"] for begin, end in inner]


def _lines(binary, arch: str) -> list[tuple[str, str]]:
    """Return ('label', name), ('op', opcode) and ('branch', label) in the order of the code."""
    is_nvidia = arch.startswith("sm_")
    # Without the analysis of data flow, which takes a fourth of its time: branches through registers are no loops.
    text = _tool(binary.asm["cubin"], "nvdisasm", "-c", "-ndf") if is_nvidia else binary.asm["amdgcn"]
    lines = []
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/|;.*|//.*", "", line).strip()
        if label := re.match(r"(\.?L\w+):", line):
            lines.append(("label", label[1]))
        elif code := re.match(r"(?:@!?U?P\w+\s+)?([A-Za-z]\w*(?:\.\w+)*)", line):
            lines.append(("op", code[1]))
            if target := re.search(r"^(?:@\S+\s+)?(?:BRA|s_c?branch)\S*\s.*?(\.?L\w+)", line):
                lines.append(("branch", target[1]))
    return lines


def _tool(cubin: bytes, name: str, *options: str) -> str:
    """Run one of Triton's tools on a binary for NVIDIA's GPUs; return what it prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)
