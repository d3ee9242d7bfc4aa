"""The kernel that draws nothing but noise, and its launcher.

A normal takes 4 bytes, which are written once. The limit is the arithmetic of the generator.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, make_launch, run
from ..common.philox import normal_blocks

__all__ = ["TILE", "Launch", "noise_normal", "plan_normal", "run"]

TILE = 1024  # Normals of a program.


@triton.jit
def noise_normal(seed, first_block, skipped, count, out, TILE: tl.constexpr):
    """Fill out, float32 (count,), with the stream of seed, int64 (1,), from a block on, of which the first few are skipped.

    A program draws whole blocks of four. Those at the ends may reach past `out`.
    """
    first = tl.program_id(0).to(tl.int64) * TILE
    block = (tl.cast(first_block, tl.int64) + first // 4 + tl.arange(0, TILE // 4)).to(tl.uint64)  # (TILE / 4,)
    i = first - skipped + tl.arange(0, TILE)  # (TILE,)
    tl.store(out + i, normal_blocks(tl.load(seed), block), mask=(i >= 0) & (i < count))


def plan_normal(seed: Tensor, position: int, out: Tensor) -> list[Launch]:
    """Plan the launch that fills out, float32 and contiguous, from that position of the stream of seed, int64 (1,)."""
    (first_block, skipped), count = divmod(position, 4), out.numel()
    arguments = {"seed": seed, "first_block": first_block, "skipped": skipped, "count": count, "out": out, "TILE": TILE}
    return [make_launch(noise_normal, triton.cdiv(skipped + count, TILE) if count else 0, arguments)]
