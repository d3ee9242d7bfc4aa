"""What an op tells the tests and the benchmarks of itself. A new op enters them by way of `all_specs` and `all_benchmarks`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """An op as the tests see it.

    ``cases`` builds the keyword arguments of calls that between them cover the features; tests run each on every backend, dtype
    and instruction set against the reference in float64. The tensors named in ``differentiable`` get gradients.
    """

    name: str
    function: Callable
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str, ...]
    differentiable: tuple[str, ...]
    cases: dict[str, Callable[[torch.dtype], dict]]


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

    ``peers`` name what a user would write or pick instead, the first of them the baseline; benchmarks/peers.py has them.
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
    own_noise: bool = False  # peers draw noise of their own: how wrong they are cannot be told
    growth: bool = False  # whether nothing but the size differs between workloads, so that growth exponents say something


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def all_specs() -> tuple[Spec, ...]:
    """The specs of every op."""
    from . import attention_spec, noise, reparameterize  # each imports this module

    return noise.SPECS + reparameterize.SPECS + attention_spec.SPECS


def all_benchmarks() -> tuple[Benchmark, ...]:
    """The sections of the benchmark's report, in their order."""
    from . import attention_benchmarks, noise, reparameterize

    return attention_benchmarks.BENCHMARKS + noise.BENCHMARKS + reparameterize.BENCHMARKS


def seeded_normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normals for a test or a benchmark, the same in every run; drawn in float64, so that dtypes differ by rounding alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
