"""The words of the benchmark: sections of workloads, and the implementations that compete in each of a section's settings.

A *section* is a function or a whole model at several sizes; a *setting* is one size in one dtype; a *row* is one implementation
of a setting. catalog.py lists the sections.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from suite.device import Device

OPS, GPU, MODELS, GROWTH = "ops", "gpu", "models", "growth"  # In GROWTH nothing but the size differs between workloads.
FASTLM = "fastlm "  # how the names of fastlm's own implementations begin

Step = Callable[[], tuple[Tensor, ...]]  # what is timed; returns all that a call computes


class Unavailable(Exception):
    """An implementation that cannot run here, and why."""


class Setting(NamedTuple):
    """What implementations are compared within."""

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
        """Whether it is fastlm's."""
        return self.implementation.startswith(FASTLM)


@dataclass(frozen=True)
class Filter:
    """Which rows a run has."""

    full: bool = False  # the long sizes, and every dtype
    only: str | None = None  # of this section, or of all whose names have this in them
    sizes: tuple[str, ...] = ()  # in place of the section's own, e.g. "1x8x512x64"


@dataclass(frozen=True)
class Cost:
    """What a call of a workload takes, whoever makes it."""

    unit: str  # of throughput
    size: int  # on the axis of the plot
    work: float  # what throughput counts
    bytes_moved: int | None = None  # what must cross the memory bus; None: unknown, and so there is no limit to compare with
    flops: bool = False  # whether ``work`` is floating-point operations
    device: str = "cpu"

    def throughput(self, seconds: float) -> float:
        return self.work / seconds / (1e9 if self.unit.startswith("G") else 1.0)


class Runner(Protocol):
    """The implementations of one setting, ready to run on the same inputs."""

    flops: int | None  # of a call, where they are counted as the baseline's first one runs
    first_seconds: dict[str, float]  # what each implementation's first run took, compiling included

    def step(self, implementation: str) -> Step:
        """It has run once.

        Raises Unavailable where a peer fails to import, to compile or to run, or fastlm does not have it here.
        """

    def errors(self, implementation: str) -> dict[str, dict[str, float]]:
        """How wrong each result is, and may be, as check.check_result has it; empty where that cannot be told. Asked once."""


class Section(Protocol):
    """One heading of the report. Raises Unavailable where a setting cannot be had at all."""

    name: str
    axis: str  # what the sizes count
    baseline: str  # the implementation that speed-ups are counted from
    group: str  # OPS, GPU, MODELS or GROWTH: the part of the report that it belongs to
    device: Device  # where it runs

    def settings(self, row_filter: Filter) -> Iterator[Setting]: ...

    def implementations(self, setting: Setting, full: bool) -> list[str]:
        """fastlm's own come first."""

    def cost(self, setting: Setting) -> Cost: ...

    def threads(self, setting: Setting) -> int | None: ...

    def has_memory(self, setting: Setting) -> bool:
        """Whether peak memory is worth a row."""

    def runner(self, setting: Setting) -> Runner: ...
