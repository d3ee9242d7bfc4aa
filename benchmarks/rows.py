"""What there is to time: sections of workloads, and the implementations that compete in each of a section's settings.

A *section* is a function or a whole model at several sizes; a *setting* is one size in one dtype; a *row* is one implementation
of a setting. Sections come from what the ops say of themselves (op_section.py) and from the table of models (bench_models.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OPS, GROWTH, MODELS = "ops", "growth", "models"  # in GROWTH nothing but the size differs between workloads
MODEL_WEIGHT = 6  # A model's row takes about so many times as long as an op's.
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
class Selection:
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

    def throughput(self, seconds: float) -> float:
        return self.work / seconds / (1e9 if self.unit.startswith("G") else 1.0)


class Contest(Protocol):
    """The implementations of one setting, ready to run on the same inputs."""

    flops: int | None  # of a call, where they are counted as the baseline's first one runs
    first_seconds: dict[str, float]  # what each implementation's first run took, compiling included

    def step(self, implementation: str) -> Step:
        """It has run once.

        Raises Unavailable where a peer fails to import, to compile or to run, or fastlm does not have it here.
        """

    def errors(self, implementation: str) -> dict[str, dict[str, float]]:
        """How wrong each result is, and may be, as op_check.judge has it; empty where that cannot be told. Asked once."""


class Section(Protocol):
    """One heading of the report. Raises Unavailable where a setting cannot be had at all."""

    name: str
    axis: str  # what the sizes count
    baseline: str  # the implementation that speed-ups are counted from
    group: str  # OPS, GROWTH or MODELS: the part of the report that it belongs to

    def settings(self, selection: Selection) -> Iterator[Setting]: ...

    def implementations(self, setting: Setting, full: bool) -> list[str]:
        """fastlm's own come first."""

    def cost(self, setting: Setting) -> Cost: ...

    def threads(self, setting: Setting) -> int | None: ...

    def has_memory(self, setting: Setting) -> bool:
        """Whether peak memory is worth a row."""

    def contest(self, setting: Setting) -> Contest: ...


@cache
def sections() -> dict[str, Section]:
    import bench_models
    from model_section import ModelSection
    from op_section import OpSection

    from fastlm.ops.spec import all_benchmarks

    every = [OpSection(benchmark) for benchmark in all_benchmarks()] + [ModelSection(model) for model in bench_models.MODELS]
    order = OPS, MODELS, GROWTH  # what matters least comes last, where a slow machine may have no time for it
    return {section.name: section for section in sorted(every, key=lambda section: order.index(section.group))}


def selected(selection: Selection) -> list[Section]:
    """The sections of a run.

    Raises:
        ValueError: no section has that name, or sizes are asked for of more than one.
    """
    only = selection.only
    if only is None:
        found = list(sections().values())
    elif only in sections():
        found = [sections()[only]]
    else:
        found = [section for name, section in sections().items() if only.lower() in name.lower()]
    if not found:
        raise ValueError(f"OP must be a part of a section's name; got {only!r}. Sections: {'; '.join(sections())}")
    if selection.sizes and len(found) > 1:
        names = "; ".join(section.name for section in found)
        raise ValueError(f"--sizes needs one section, by its whole name; {only!r} is in the names of: {names}")
    return found


def settings(selection: Selection) -> list[Setting]:
    return [setting for section in selected(selection) for setting in section.settings(selection)]


def rows_of(setting: Setting, full: bool) -> list[Row]:
    return [Row(*setting, name) for name in sections()[setting.op].implementations(setting, full)]


def weight(setting: Setting, full: bool) -> int:
    """Estimate the setting's part of a run's time, in any unit."""
    return len(rows_of(setting, full)) * (MODEL_WEIGHT if sections()[setting.op].group == MODELS else 1)


@contextlib.contextmanager
def threads_of(setting: Setting) -> Iterator[None]:
    """Run on the threads that the setting asks for."""
    before, wanted = torch.get_num_threads(), sections()[setting.op].threads(setting)
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fresh_step(**row: str) -> Step:
    """A row's step with arguments of its own: what memory.py measures in a process of its own."""
    row = Row(**row)
    torch.set_num_threads(sections()[row.op].threads(row.setting) or torch.get_num_threads())
    return sections()[row.op].contest(row.setting).step(row.implementation)
