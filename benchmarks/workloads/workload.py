"""Describe what an op tells the benchmarks of itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ON_GPU = "GPU: "  # The names of sections on a GPU begin so.


@dataclass(frozen=True)
class Workload:
    """One size of a benchmark."""

    name: str  # for the reader of the report, e.g. "32 x 100"
    make: Callable[[torch.dtype], dict]  # returns the keyword arguments of the call
    size: int  # its place on the axis of the plot
    work: int  # throughput counts this, in the benchmark's unit without its "G"
    numbers: int  # elements that must cross the memory bus, where each tensor crosses it once
    quick: tuple[torch.dtype, ...] = (torch.float32,)  # the dtypes of `make bench`; the long run has all
    memory: bool = False  # whether its peak memory is worth a row, in float32
    threads: int | None = None  # torch's threads; None: as many as the process has
    without: tuple[str, ...] = ()  # peers that this size is too large for


@dataclass(frozen=True)
class Benchmark:
    """A section of the benchmark's report: one function and its peers at several sizes.

    ``peers`` name what a user would write or pick instead, the first of them the baseline; workloads/peers.py has them.
    """

    name: str
    function: Callable
    unit: str  # of throughput: "Gelem/s", "GFLOP/s" or "GB/s"
    axis: str  # the label of the sizes' axis
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str, ...]
    workloads: tuple[Workload, ...]
    peers: tuple[str, ...]
    sizes: str  # the form of a size of one's own, e.g. "BxHxSxD"
    sized: Callable[..., Workload]  # makes a workload of the numbers of such a size
    differentiable: tuple[str, ...] = ()  # arguments that get gradients; without any, the forward alone is timed
    slow_in_half: tuple[str, ...] = ()  # peers so slow in half precision that only the long run times them
    device: str = "cpu"  # torch's name of the device that it runs on
    own_noise: bool = False  # whether peers draw noise of their own, so that their errors are unknown
    by_rule: bool = False  # whether fastlm is called without a backend's name, because it may leave a call to torch
    checked_whole: bool = False  # whether an answer depends on so much that no part of it can be checked alone
    graph: bool = False  # whether calls are replayed from a CUDA graph
    tiny: str = "1x2x40x16"  # the size of a dry run, in the form of ``sizes``
    growth: bool = False  # whether only the size differs between workloads, so that growth exponents mean something
