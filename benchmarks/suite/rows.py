"""Define the words of the benchmark: sections of workloads, and the implementations that compete in each setting.

A *section* is a function or a whole model at several sizes; a *setting* is one size in one dtype; a *row* is one implementation
of a setting. catalog.py lists the sections.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from suite.device import Device

OPS, GPU, MODELS, GROWTH = "ops", "gpu", "models", "growth"  # In GROWTH nothing but the size differs between workloads.
FASTLM = "fastlm "  # The names of fastlm's own implementations begin so.

Step = Callable[[], tuple[Tensor, ...]]  # It is what is timed, and returns all that a call computes.


class Unavailable(Exception):
    """An implementation that cannot run here, and why."""


class Setting(NamedTuple):
    """The size and dtype within which implementations are compared."""

    op: str  # the section's name
    workload: str
    dtype: str


class Row(NamedTuple):
    op: str
    workload: str
    dtype: str
    implementation: str

    @property
    def setting(self) -> Setting:
        return Setting(*self[:3])

    @property
    def own(self) -> bool:
        """Say whether the implementation is fastlm's."""
        return self.implementation.startswith(FASTLM)


@dataclass(frozen=True)
class Filter:
    """The rows that a run has."""

    full: bool = False  # whether the long sizes and every dtype are run too
    only: str | None = None  # the one section, or a part of the names of several
    sizes: tuple[str, ...] = ()  # sizes in place of the section's own, e.g. "1x8x512x64"
    tiny: bool = False  # whether each section has one size of a few rows, in float16, for a dry run


@dataclass(frozen=True)
class Cost:
    """The work of a call, whichever implementation does it."""

    unit: str  # of throughput
    size: int  # on the axis of the plot
    work: float  # throughput counts this
    bytes_moved: int | None = None  # bytes that must cross the memory bus; None where that is unknown, and with it the limit
    flops: bool = False  # whether ``work`` is floating-point operations
    device: str = "cpu"

    def throughput(self, seconds: float) -> float:
        return self.work / seconds / (1e9 if self.unit.startswith("G") else 1.0)


class Runner(Protocol):
    """The implementations of one setting, ready to run on the same inputs."""

    flops: int | None  # of a call, where they are counted during the baseline's first one
    first_seconds: dict[str, float]  # of each implementation's first run, compiling included

    def step(self, implementation: str) -> Step:
        """Return the step after its first run.

        Raises:
            Unavailable: a peer fails to import, to compile or to run, or fastlm does not have it here.
        """

    def errors(self, implementation: str) -> dict[str, dict[str, float]]:
        """Return how wrong each result is and may be (check.check_result), or nothing where that is unknown. Call it once."""


class Section(Protocol):
    """One heading of the report. It raises Unavailable where a setting cannot be had at all."""

    name: str
    axis: str  # what the sizes count
    baseline: str  # the implementation that speed-ups are counted from
    group: str  # the part of the report that it belongs to: OPS, GPU, MODELS or GROWTH
    device: Device  # the device that it runs on

    def settings(self, row_filter: Filter) -> Iterator[Setting]: ...

    def implementations(self, setting: Setting, full: bool) -> list[str]:
        """Return the names of the implementations, fastlm's own first."""

    def cost(self, setting: Setting) -> Cost: ...

    def threads(self, setting: Setting) -> int | None: ...

    def has_memory(self, setting: Setting) -> bool:
        """Say whether peak memory is worth a row."""

    def runner(self, setting: Setting) -> Runner: ...
