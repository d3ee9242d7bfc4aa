"""What an op tells the tests and the benchmarks of itself. A new op enters both by adding its specs to `all_specs`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Workload:
    """One thing to time: a size of an op."""

    name: str  # what a reader of the report sees, e.g. "32 x 100"
    make: Callable[[torch.dtype], dict]  # the keyword arguments of the call
    elements: int  # what throughput counts
    numbers_moved: int  # per element, where each tensor crosses the memory bus once: what bandwidth counts
    quick: bool = True  # in `make bench`, or only in the long run


@dataclass(frozen=True)
class Spec:
    """An op as the tests and the benchmarks see it.

    ``cases`` builds the keyword arguments of calls that between them cover the features; tests run each on every backend, dtype
    and instruction set against the reference in float64. ``peers`` are what a user would write or pick instead; they take a
    workload's arguments. The tensors named in ``differentiable`` get gradients.
    """

    name: str
    function: Callable
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str, ...]
    differentiable: tuple[str, ...]
    cases: dict[str, Callable[[torch.dtype], dict]]
    workloads: tuple[Workload, ...] = ()
    peers: dict[str, Callable] = field(default_factory=dict)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def all_specs() -> tuple[Spec, ...]:
    """The specs of every op."""
    from . import attention_spec, noise, reparameterize  # each imports this module

    return noise.SPECS + reparameterize.SPECS + attention_spec.SPECS


def seeded_normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normals for a test or a benchmark, the same in every run; drawn in float64, so that dtypes differ by rounding alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
