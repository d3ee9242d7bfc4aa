"""What an op tells the benchmarks of itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ON_GPU = "GPU: "  # how the names of sections on a GPU begin


@dataclass(frozen=True)
class Workload:
    """One thing to time: a size of a benchmark."""

    name: str  # what a reader of the report sees, e.g. "32 x 100"
    make: Callable[[torch.dtype], dict]  # the keyword arguments of the call
    size: int  # where it stands on the axis of the plot
    work: int  # what throughput counts, in the benchmark's unit without its "G"
    numbers: int  # how many of the dtype must cross the memory bus, where each tensor crosses it once
    quick: tuple[torch.dtype, ...] = (torch.float32,)  # the dtypes in `make bench`; the long run has all
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
    axis: str  # what the sizes count
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str, ...]
    workloads: tuple[Workload, ...]
    peers: tuple[str, ...]
    sizes: str  # how a size of one's own is written, e.g. "BxHxSxD", ...
    sized: Callable[..., Workload]  # ... and what makes a workload of its numbers
    differentiable: tuple[str, ...] = ()  # forward and backward are timed together; without any, the forward alone
    slow_in_half: tuple[str, ...] = ()  # peers that half precision makes so slow that only the long run times them there
    device: str = "cpu"  # where it runs, by torch's name
    own_noise: bool = False  # peers draw noise of their own: how wrong they are cannot be told
    growth: bool = False  # whether nothing but the size differs between workloads, so that growth exponents say something
