"""A launch: a kernel with all that it is started with, to be run, compiled ahead of time, or read."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from triton.compiler import CompiledKernel


class Launch(NamedTuple):
    """A kernel with its grid, arguments and compiler options."""

    kernel: Any
    grid: int
    arguments: dict  # In the order of the kernel's parameters.
    options: dict
    binaries: list  # What the kernel was compiled to, once it has run. The launches of a plan share it (plans.py).


def make_launch(kernel, grid: int, arguments: dict, warps: int = 4, stages: int = 1) -> Launch:
    """Return the launch of a kernel in which the compiler fuses nothing.

    Kernels write `fma` themselves: a maximum minus itself, fused with the product that it came from, would not be 0, and the
    noise would not have the same bits everywhere.

    Raises:
        TypeError: the arguments are not those of the kernel.
    """
    if arguments.keys() != set(kernel.arg_names):
        raise TypeError(f"{kernel.__name__} takes {kernel.arg_names}; got {list(arguments)}")
    arguments = {name: arguments[name] for name in kernel.arg_names}
    return Launch(kernel, grid, arguments, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}, [])


def run(launches: Iterable[Launch]) -> None:
    """Start the kernels in their order.

    Triton takes tens of microseconds to find the binary for a launch, and a few to start it. So it is found once for a plan. It
    depends on the layouts of tensors, and on integers that are 1 or multiples of 16, all of which a plan knows. The interpreter
    has none, and while Triton compiles asynchronously it may not be there yet.
    """
    for kernel, grid, arguments, options, binaries in launches:
        if not grid:
            continue
        if binaries:
            binaries[0][(grid, 1, 1)](*arguments.values())
            continue
        binary = kernel[(grid,)](**arguments, **options)
        if isinstance(binary, CompiledKernel):
            binaries.append(binary)
