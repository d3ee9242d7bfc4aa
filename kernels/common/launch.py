"""A launch: a kernel with all that it is started with, to be run, compiled ahead of time, or read."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A kernel with its grid, arguments and compiler options."""

    kernel: Any
    grid: int
    arguments: dict
    options: dict


def make_launch(kernel, grid: int, arguments: dict, warps: int = 4, stages: int = 1) -> Launch:
    """Return the launch of a kernel in which the compiler fuses nothing.

    Kernels write `fma` themselves: a maximum minus itself, fused with the product that it came from, would not be 0, and the
    noise would not have the same bits everywhere.
    """
    return Launch(kernel, grid, arguments, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False})


def run(launches: Iterable[Launch]) -> None:
    """Start the kernels in their order."""
    for kernel, grid, arguments, options in launches:
        if grid:
            kernel[(grid,)](**arguments, **options)
