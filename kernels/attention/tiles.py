"""The tiles of attention's kernels for each GPU: the one table that launches, ahead-of-time compilation and tests read.

A row of the table has three tiles: for head_dims (the larger of the keys' and the values') up to 64, 128 and 256. The figures
were found by compiling for each GPU and reading registers, spills and instructions (benchmarks/tune_tiles.py), not by timing,
because no GPU was at hand. By the model (kernels/README.md) several programs on a multiprocessor beat one larger one.

Rows of LoopKind.DESCRIPTORS hold where the tensor memory accelerator copies the tiles. Pointers take no registers then, and
tiles can be larger. On sm_100 the plain forward has specialized warps. On sm_90 it has not: there Triton's compiler (3.9)
specializes only kernels of one loop with descriptors made on the device, and these need an allocator, which a library must not
set. Two warp groups do all the work instead.
"""

import functools
import os
from enum import Enum
from typing import NamedTuple

import torch

from .timed_tiles import TIMED


class Tile(NamedTuple):
    """The block sizes of a program, and the compiler's settings for it."""

    q: int  # Query rows per block.
    k: int  # Keys per block.
    warps: int
    stages: int
    spilled: int = 0  # The most bytes that a thread may spill.
    specialized: bool = False  # True if some warps copy, some multiply, and some compute the softmax.


class LoopKind(Enum):
    """What the loop over blocks does, as far as the tile depends on it."""

    PLAIN = "plain"  # Pointers copy the blocks, and the loop reads no mask and draws no dropout.
    DESCRIPTORS = "descriptors"  # The same loop, but descriptors copy the blocks.
    MASKED = "masked"  # The loop reads a mask or draws dropout.


FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, KVCACHE = "forward", "grad_key_value", "grad_query", "kvcache"
JVP, JVP_GRAD_KEY_VALUE, JVP_GRAD_QUERY = "jvp", "jvp_grad_key_value", "jvp_grad_query"
GRAD_MASK, JVP_GRAD_MASK = "grad_mask", "jvp_grad_mask"  # The passes over a mask: without tangents, and with them.
FORWARD_STATS, GRAD_KEY_VALUE_STATS, GRAD_QUERY_STATS = "forward_stats", "grad_key_value_stats", "grad_query_stats"
KEY_MASS, MASS_MEAN = "key_mass", "mass_mean"
DELTA_ROWS = 64  # Rows per block of the pass that computes delta.
L2_BUDGET = 24 << 20  # Bytes of the L2 cache that the keys and values of heads scheduled together may fill.

# GPUs that share the tiles of another GPU.
ALIASES = {"sm_89": "sm_86", "sm_121": "sm_120", "sm_103": "sm_100", "gfx90a": "gfx942", "gfx950": "gfx942"}

# Tiles for bfloat16 and float16, by (GPU, kind of loop), then by pass.
HALF = {
    # Where these spill on NVIDIA, it is around the loops of causal edges or packed sequences, and not in the inner loop.
    ("sm_80", LoopKind.PLAIN): {
        FORWARD: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 64, 8, 2)),
        GRAD_QUERY: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        KVCACHE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    ("sm_86", LoopKind.PLAIN): {  # It has 99 KiB of shared memory.
        FORWARD: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(64, 32, 8, 1)),
        KVCACHE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    ("sm_120", LoopKind.PLAIN): {
        FORWARD: (Tile(64, 64, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(64, 32, 8, 1)),
        KVCACHE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    ("sm_90", LoopKind.PLAIN): {
        FORWARD: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2, spilled=8)),
        GRAD_KEY_VALUE: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 1), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 16, 8, 2)),
        KVCACHE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    ("sm_100", LoopKind.PLAIN): {
        FORWARD: (Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 8, 2)),
        GRAD_QUERY: (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(64, 32, 8, 2)),
        KVCACHE: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    },
    ("sm_90", LoopKind.DESCRIPTORS): {
        FORWARD: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        GRAD_KEY_VALUE: (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 8, 2)),
        GRAD_QUERY: (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 1, spilled=16)),
    },
    ("sm_100", LoopKind.DESCRIPTORS): {  # A specialized kernel keeps two values in local memory from one loop to the next.
        FORWARD: (
            Tile(128, 128, 8, 2, spilled=8, specialized=True),
            Tile(128, 128, 8, 2, spilled=8, specialized=True),
            Tile(128, 64, 8, 2),
        ),
        GRAD_KEY_VALUE: (Tile(32, 128, 4, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1)),
        GRAD_QUERY: (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(128, 64, 8, 1)),
    },
    ("sm_120", LoopKind.DESCRIPTORS): {
        FORWARD: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY: (Tile(64, 32, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 8, 1)),
    },
    ("gfx942", LoopKind.PLAIN): {  # It has 64 KiB of shared memory and 64 lanes in a warp.
        FORWARD: (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(64, 16, 4, 2)),
        GRAD_KEY_VALUE: (Tile(16, 128, 4, 2), Tile(16, 64, 4, 1), Tile(16, 64, 4, 1)),
        GRAD_QUERY: (Tile(128, 32, 4, 2), Tile(128, 16, 4, 2), Tile(64, 16, 8, 1)),
        KVCACHE: (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
    },
    # Its matrix instructions want each operand twice, in both halves of a warp: too much for 256 registers.
    ("gfx1100", LoopKind.PLAIN): {
        FORWARD: (Tile(64, 32, 4, 2, spilled=120), Tile(128, 16, 8, 1, spilled=8), Tile(32, 16, 8, 1, spilled=600)),
        GRAD_KEY_VALUE: (Tile(16, 64, 4, 1, spilled=500), Tile(16, 32, 8, 1, spilled=900), Tile(16, 16, 8, 1, spilled=2300)),
        GRAD_QUERY: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1, spilled=600), Tile(16, 16, 8, 1, spilled=2200)),
        KVCACHE: (Tile(16, 32, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 8, 1, spilled=450)),  # Between its loops.
    },
}
# Loops that read a mask or draw dropout hold more per tile, in registers and in shared memory. The same tiles fit all of
# NVIDIA's GPUs, except for the first dK/dV, which would keep a value in local memory in sm_100's loop.
HALF |= dict.fromkeys(
    [(arch, LoopKind.MASKED) for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")],
    {
        FORWARD: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE: (Tile(32, 128, 8, 1), Tile(32, 64, 8, 2), Tile(16, 32, 8, 1)),
        GRAD_QUERY: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
    },
)
HALF["sm_100", LoopKind.MASKED] = HALF["sm_100", LoopKind.MASKED] | {
    GRAD_KEY_VALUE: (Tile(32, 64, 8, 1), Tile(32, 64, 8, 2), Tile(16, 32, 8, 1)),
}
# Tiles for float32 in full precision, which runs on multiply-adds: only gfx9 has matrix instructions for it. Triton keeps a
# thread's operands along the whole head_dim in registers. These are too few for the backward at 256, for the backward with a
# mask at 128, and on gfx11 for more.
SINGLE = {
    ("sm_86", LoopKind.PLAIN): {
        FORWARD: (Tile(64, 32, 8, 2, spilled=8), Tile(32, 16, 8, 1, spilled=8), Tile(16, 16, 8, 1, spilled=8)),
        GRAD_KEY_VALUE: (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=400)),
        GRAD_QUERY: (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, spilled=24), Tile(16, 16, 8, 1, spilled=400)),
        KVCACHE: (Tile(16, 16, 4, 2, spilled=8), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    },
    ("gfx942", LoopKind.PLAIN): {
        FORWARD: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
        GRAD_KEY_VALUE: (Tile(16, 64, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
        GRAD_QUERY: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
        KVCACHE: (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 8, 1)),
    },
    ("gfx1100", LoopKind.PLAIN): {
        FORWARD: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=200), Tile(16, 16, 8, 1, spilled=1300)),
        GRAD_KEY_VALUE: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=1100), Tile(16, 16, 8, 1, spilled=2600)),
        GRAD_QUERY: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=900), Tile(16, 16, 8, 1, spilled=2400)),
        KVCACHE: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=700)),
    },
}
# The passes with tangents hold two operands where the others hold one. All their loops copy by pointers.
JVP_HALF = {
    ("sm_80", LoopKind.PLAIN): {
        JVP: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 1), Tile(16, 32, 8, 1)),
        JVP_GRAD_QUERY: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 1)),
    },
    ("sm_80", LoopKind.MASKED): {
        JVP: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 64, 8, 1), Tile(16, 64, 8, 2), Tile(16, 32, 8, 1)),
        JVP_GRAD_QUERY: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(16, 16, 8, 1)),
    },
    ("sm_86", LoopKind.PLAIN): {
        JVP: (Tile(128, 32, 8, 2), Tile(64, 16, 8, 1), Tile(32, 16, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 1), Tile(16, 32, 8, 1)),
        JVP_GRAD_QUERY: (Tile(64, 32, 8, 2), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    ("sm_86", LoopKind.MASKED): {
        JVP: (Tile(128, 32, 8, 2), Tile(64, 16, 8, 1), Tile(32, 16, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 32, 8, 2), Tile(16, 64, 8, 2), Tile(16, 32, 8, 1)),
        JVP_GRAD_QUERY: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
    },
    ("sm_90", LoopKind.PLAIN): {
        JVP: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 32, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 128, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        JVP_GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 16, 8, 1)),
    },
    ("sm_90", LoopKind.MASKED): {
        JVP: (Tile(128, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(16, 128, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
        JVP_GRAD_QUERY: (Tile(128, 32, 8, 2), Tile(128, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    ("sm_100", LoopKind.PLAIN): {  # At 256 two sums of larger tiles do not fit into the memory of its tensor cores.
        JVP: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(16, 32, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 128, 8, 2), Tile(16, 128, 8, 1), Tile(16, 16, 8, 1)),
        JVP_GRAD_QUERY: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 16, 8, 1)),
    },
    ("sm_100", LoopKind.MASKED): {
        JVP: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 1), Tile(16, 32, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 128, 8, 1), Tile(16, 128, 8, 1), Tile(16, 32, 8, 1)),
        JVP_GRAD_QUERY: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(16, 16, 8, 1)),
    },
    ("sm_120", LoopKind.PLAIN): {
        JVP: (Tile(128, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        JVP_GRAD_QUERY: (Tile(64, 32, 8, 2), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    ("sm_120", LoopKind.MASKED): {
        JVP: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 32, 8, 2), Tile(16, 64, 8, 1), Tile(16, 16, 8, 1)),
        JVP_GRAD_QUERY: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
    },
    ("gfx942", LoopKind.PLAIN): {
        JVP: (Tile(128, 32, 4, 2), Tile(128, 16, 4, 1), Tile(64, 16, 8, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(32, 64, 4, 1), Tile(16, 64, 8, 1), Tile(16, 16, 4, 1)),
        JVP_GRAD_QUERY: (Tile(64, 32, 4, 1), Tile(64, 16, 4, 1), Tile(32, 16, 8, 1)),
    },
    ("gfx1100", LoopKind.PLAIN): {
        JVP: (Tile(32, 16, 4, 1), Tile(16, 16, 8, 1, spilled=600), Tile(16, 16, 8, 1, spilled=2500)),
        JVP_GRAD_KEY_VALUE: (
            Tile(16, 32, 8, 1, spilled=900),
            Tile(16, 16, 8, 1, spilled=2500),
            Tile(16, 16, 8, 1, spilled=5000),
        ),
        JVP_GRAD_QUERY: (Tile(16, 16, 8, 1, spilled=200), Tile(16, 16, 8, 1, spilled=1500), Tile(16, 16, 8, 1, spilled=3500)),
    },
}
JVP_SINGLE = {
    ("sm_86", LoopKind.PLAIN): {
        JVP: (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=600)),
        JVP_GRAD_KEY_VALUE: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=64), Tile(16, 16, 8, 1, spilled=700)),
        JVP_GRAD_QUERY: (Tile(16, 16, 8, 1, spilled=16), Tile(16, 16, 8, 1, spilled=64), Tile(16, 16, 8, 1, spilled=700)),
    },
    ("gfx942", LoopKind.PLAIN): {
        JVP: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
        JVP_GRAD_KEY_VALUE: (Tile(16, 16, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1, spilled=100)),
        JVP_GRAD_QUERY: (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
    },
    ("gfx1100", LoopKind.PLAIN): {
        JVP: (Tile(16, 16, 8, 1, spilled=300), Tile(16, 16, 8, 1, spilled=1500), Tile(16, 16, 8, 1, spilled=4000)),
        JVP_GRAD_KEY_VALUE: (
            Tile(16, 16, 8, 1, spilled=900),
            Tile(16, 16, 8, 1, spilled=2800),
            Tile(16, 16, 8, 1, spilled=4500),
        ),
        JVP_GRAD_QUERY: (Tile(16, 16, 8, 1, spilled=600), Tile(16, 16, 8, 1, spilled=2200), Tile(16, 16, 8, 1, spilled=5000)),
    },
}
# The passes with statistics hold more of a row. The forward keeps the tiles that it has without statistics where they do not
# spill: its sums, and so the bits of its output, are the same. The backward takes smaller tiles where it must. The last two
# passes compute the weights again and read no values; all their loops copy by pointers.
STATS_HALF = {
    ("sm_80", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3, spilled=8), Tile(64, 64, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2, spilled=8), Tile(16, 64, 8, 2, spilled=8)),
        GRAD_QUERY_STATS: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    ("sm_86", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY_STATS: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
    },
    ("sm_120", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY_STATS: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
    },
    ("sm_90", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 128, 8, 1), Tile(16, 64, 8, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY_STATS: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 16, 8, 2)),
    },
    ("sm_100", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        GRAD_QUERY_STATS: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    },
    ("sm_90", LoopKind.DESCRIPTORS): {
        FORWARD_STATS: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_QUERY_STATS: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 16, 8, 2)),
    },
    ("sm_100", LoopKind.DESCRIPTORS): {
        FORWARD_STATS: (
            Tile(128, 64, 8, 2, spilled=8, specialized=True),
            Tile(128, 64, 8, 2, spilled=8, specialized=True),
            Tile(128, 32, 8, 2),
        ),
        GRAD_KEY_VALUE_STATS: (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        GRAD_QUERY_STATS: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    },
    ("sm_120", LoopKind.DESCRIPTORS): {
        FORWARD_STATS: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        GRAD_QUERY_STATS: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 1)),
    },
    ("gfx942", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(64, 16, 4, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(16, 128, 4, 2), Tile(32, 64, 4, 1), Tile(16, 64, 4, 1)),
        GRAD_QUERY_STATS: (Tile(128, 32, 4, 2), Tile(128, 16, 4, 2), Tile(64, 16, 8, 1)),
    },
    ("gfx1100", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(64, 32, 4, 2, spilled=120), Tile(128, 16, 8, 1, spilled=40), Tile(32, 16, 8, 1, spilled=600)),
        GRAD_KEY_VALUE_STATS: (
            Tile(16, 64, 4, 1, spilled=500),
            Tile(16, 32, 8, 1, spilled=1000),
            Tile(16, 16, 8, 1, spilled=2400),
        ),
        GRAD_QUERY_STATS: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1, spilled=600), Tile(16, 16, 8, 1, spilled=2200)),
    },
}
STATS_HALF |= dict.fromkeys(
    [(arch, LoopKind.MASKED) for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")],
    {
        FORWARD_STATS: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        GRAD_KEY_VALUE_STATS: (Tile(16, 128, 8, 1), Tile(16, 64, 8, 2), Tile(16, 32, 8, 1)),
        GRAD_QUERY_STATS: (Tile(128, 32, 8, 2), Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),
    },
)
STATS_HALF["sm_100", LoopKind.MASKED] = STATS_HALF["sm_100", LoopKind.MASKED] | {
    FORWARD_STATS: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    GRAD_KEY_VALUE_STATS: (Tile(32, 64, 8, 1), Tile(32, 64, 8, 2), Tile(16, 32, 8, 1)),
}
STATS_HALF["sm_120", LoopKind.MASKED] = STATS_HALF["sm_120", LoopKind.MASKED] | {
    GRAD_QUERY_STATS: (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),
}
STATS_SINGLE = {
    ("sm_86", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(64, 32, 8, 2, spilled=8), Tile(32, 16, 8, 1, spilled=8), Tile(16, 16, 8, 1)),
        GRAD_KEY_VALUE_STATS: (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=400)),
        GRAD_QUERY_STATS: (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, spilled=24), Tile(16, 16, 8, 1, spilled=400)),
        KEY_MASS: (Tile(32, 64, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        MASS_MEAN: (Tile(64, 32, 8, 1, spilled=8), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    ("gfx942", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
        GRAD_KEY_VALUE_STATS: (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
        GRAD_QUERY_STATS: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
        KEY_MASS: (Tile(32, 64, 8, 1), Tile(32, 64, 8, 1), Tile(16, 32, 8, 1)),
        MASS_MEAN: (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
    },
    ("gfx1100", LoopKind.PLAIN): {
        FORWARD_STATS: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=200), Tile(16, 16, 8, 1, spilled=1300)),
        GRAD_KEY_VALUE_STATS: (
            Tile(16, 16, 8, 1, spilled=100),
            Tile(16, 16, 8, 1, spilled=1100),
            Tile(16, 16, 8, 1, spilled=2600),
        ),
        GRAD_QUERY_STATS: (
            Tile(16, 16, 8, 1, spilled=100),
            Tile(16, 16, 8, 1, spilled=900),
            Tile(16, 16, 8, 1, spilled=2400),
        ),
        KEY_MASS: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=200), Tile(16, 16, 8, 1, spilled=1300)),
        MASS_MEAN: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spilled=200), Tile(16, 16, 8, 1, spilled=1300)),
    },
}
for row in [row for row in STATS_HALF if row[1] == LoopKind.PLAIN]:
    STATS_HALF[row] |= {
        KEY_MASS: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 64, 8, 2)),
        MASS_MEAN: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    }
STATS_HALF["gfx1100", LoopKind.PLAIN] |= {
    KEY_MASS: (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(16, 16, 8, 1, spilled=400)),
    MASS_MEAN: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1, spilled=500)),
}
for table, passes_by_row in ((HALF, JVP_HALF), (SINGLE, JVP_SINGLE), (HALF, STATS_HALF), (SINGLE, STATS_SINGLE)):
    for row, passes in passes_by_row.items():
        table[row] = table.get(row, {}) | passes
# The passes over a mask go through a tile's columns in chunks, so that one tile fits every GPU and head_dim. Without tangents
# they keep a few values in local memory around the chunks on some of NVIDIA's: float32's without dropout, and half precision's
# with statistics on sm_120.
MASK_HALF = {GRAD_MASK: (Tile(64, 64, 8, 2, spilled=24),) * 3, JVP_GRAD_MASK: (Tile(64, 32, 8, 2),) * 3}
MASK_SINGLE = {GRAD_MASK: (Tile(64, 32, 8, 2, spilled=16),) * 3, JVP_GRAD_MASK: (Tile(32, 32, 8, 2),) * 3}
for table, passes in ((HALF, MASK_HALF), (SINGLE, MASK_SINGLE)):
    for row in [row for row in table if row[1] == LoopKind.PLAIN]:
        table[row] |= passes
# FASTLM_GPU_SETTINGS=safe tells a bad tile from a bad kernel: this tile fits every GPU, pass, dtype and head_dim, nothing is
# copied ahead of the loop that needs it, and no product is large enough for the instructions of several warps (wgmma, tcgen05).
SAFE_TILE = Tile(16, 16, 4, 1)
INTERPRETER = {  # They are small and uneven, so that short sequences have several blocks.
    FORWARD: Tile(32, 16, 4, 1),
    GRAD_KEY_VALUE: Tile(16, 32, 4, 1),
    GRAD_QUERY: Tile(16, 32, 4, 1),
    KVCACHE: Tile(16, 32, 4, 1),
    JVP: Tile(32, 16, 4, 1),
    JVP_GRAD_KEY_VALUE: Tile(16, 32, 4, 1),
    JVP_GRAD_QUERY: Tile(16, 32, 4, 1),
    GRAD_MASK: Tile(16, 32, 4, 1),
    JVP_GRAD_MASK: Tile(16, 32, 4, 1),
    FORWARD_STATS: Tile(32, 16, 4, 1),
    GRAD_KEY_VALUE_STATS: Tile(16, 32, 4, 1),
    GRAD_QUERY_STATS: Tile(16, 32, 4, 1),
    KEY_MASS: Tile(16, 32, 4, 1),
    MASS_MEAN: Tile(16, 32, 4, 1),
}


def _uses_safe_settings(settings: str) -> bool:
    """Read FASTLM_GPU_SETTINGS.

    Raises:
        ValueError: it is neither unset, empty nor "safe".
    """
    if settings not in ("", "safe"):
        raise ValueError(f"FASTLM_GPU_SETTINGS must be unset or 'safe'; got {settings!r}")
    return settings == "safe"


SAFE = _uses_safe_settings(os.environ.get("FASTLM_GPU_SETTINGS", ""))


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the architecture of a GPU, such as 'sm_90' or 'gfx942'; 'interpreter' for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# KiB of shared memory that one program may take, from the manufacturers' manuals.
_SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}


def shared_memory(arch: str) -> int:
    """Return how many bytes of shared memory one program may take."""
    return _SHARED_KIB.get(arch, 64 if arch.startswith("gfx") else 99) << 10


def has_tf32(arch: str) -> bool:
    """Tell whether a GPU has matrix products of float32 rounded to TF32."""
    return arch.startswith(("sm_", "gfx94"))


def has_descriptors(arch: str, dtype: torch.dtype) -> bool:
    """Tell whether a GPU copies tiles of a dtype by descriptor.

    It does so where it has a tensor memory accelerator, for the dtypes that tensor instructions take. Multiply-adds want
    float32 in another order than the accelerator copies it in, and spill.
    """
    has_accelerator = arch == "interpreter" or (arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90)
    return has_accelerator and dtype != torch.float32 and not SAFE


WIDTHS = (64, 128, 256)  # The tables have a tile for every head_dim up to each of these.


def _column(head_dim: int) -> int:
    """Return which of WIDTHS a head_dim belongs to."""
    return 0 if head_dim <= WIDTHS[0] else 1 if head_dim <= WIDTHS[1] else 2


def timed_key(name: str, arch: str, dtype: torch.dtype, head_dim: int, kind: LoopKind) -> tuple[str, str, str, str, int]:
    """Return the key of a tile in TIMED."""
    return arch, "single" if dtype == torch.float32 else "half", kind.value, name, WIDTHS[_column(head_dim)]


def tile_for(name: str, arch: str, dtype: torch.dtype, head_dim: int, kind: LoopKind = LoopKind.PLAIN) -> Tile:
    """Return the tile of the pass `name` on a GPU; head_dim is the larger of the keys' and the values'."""
    if SAFE:
        return SAFE_TILE
    if timed := TIMED.get(timed_key(name, arch, dtype, head_dim, kind)):
        return Tile(*timed)
    if arch == "interpreter":
        return INTERPRETER[name]
    table, arch = SINGLE if dtype == torch.float32 else HALF, ALIASES.get(arch, arch)
    arch = arch if (arch, LoopKind.PLAIN) in table else _closest(arch)
    passes = table[arch, LoopKind.PLAIN] | table.get((arch, kind), {})
    return passes[name][_column(head_dim)]


def _closest(arch: str) -> str:
    """Return the GPU whose tiles fit every GPU of the manufacturer, for one that a table does not name."""
    if arch.startswith("gfx"):
        return "gfx942" if arch.startswith("gfx9") else "gfx1100"
    return "sm_86"
