"""List every section, from the workloads of the ops and from the table of models, and select the rows of a run."""

import contextlib
from collections.abc import Iterator
from functools import cache
from itertools import groupby

import torch
from workloads import BENCHMARKS, models

from suite.model_section import ModelSection
from suite.op_section import OpSection
from suite.rows import GPU, GROWTH, MODELS, OPS, Filter, Row, Section, Setting, Step

MODEL_WEIGHT = 6  # A model's row takes about so many times as long as an op's.


@cache
def sections() -> dict[str, Section]:
    every = [OpSection(benchmark) for benchmark in BENCHMARKS]
    every += [ModelSection(name, found) for name, found in groupby(models.MODELS, key=lambda model: model.name)]
    order = OPS, GPU, MODELS, GROWTH  # What matters least comes last, as a slow machine may have no time for it.
    return {section.name: section for section in sorted(every, key=lambda section: order.index(section.group))}


def selected(row_filter: Filter) -> list[Section]:
    """Return the sections of a run on the devices that are here.

    Raises:
        ValueError: no section has that name, or sizes are asked for of more than one.
    """
    only, here = row_filter.only, {name: section for name, section in sections().items() if section.device.available()}
    if only is None:
        found = list(here.values())
    elif only in here:
        found = [here[only]]
    else:
        found = [section for name, section in here.items() if only.lower() in name.lower()]
    if not found:
        raise ValueError(f"OP must be a part of a section's name; got {only!r}. Sections: {'; '.join(here)}")
    if row_filter.sizes and len(found) > 1:
        names = "; ".join(section.name for section in found)
        raise ValueError(f"--sizes needs one section, by its whole name; {only!r} is in the names of: {names}")
    return found


def settings(row_filter: Filter) -> list[Setting]:
    return [setting for section in selected(row_filter) for setting in section.settings(row_filter)]


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
    """Return a row's step with arguments of its own, for memory.py to measure in a process of its own."""
    row = Row(**row)
    torch.set_num_threads(sections()[row.op].threads(row.setting) or torch.get_num_threads())
    return sections()[row.op].runner(row.setting).step(row.implementation)
