"""pytest's items as rows, and what the files that pytest loads share with timing.py, which runs pytest."""

from collections.abc import Callable

import pytest

from suite.budget import Budget
from suite.rows import Row, Setting

DONE = pytest.StashKey[set[Setting]]()  # what an interrupted run has already
BUDGET = pytest.StashKey[Budget]()  # how much time there is
SAY = pytest.StashKey[Callable[[Row, str], None]]()  # is told which part of a row begins
MISSING = pytest.StashKey[dict[Row, str]]()  # the rows that have no time, and why


def row_of(item: pytest.Item) -> Row:
    return Row(*(item.callspec.params[name] for name in Row._fields))


def missing(config: pytest.Config, setting: Setting | None = None) -> list[dict[str, str]]:
    """The rows without a time, of one setting or of all, each with "why_not"."""
    why_not = config.stash[MISSING]
    return [row._asdict() | {"why_not": why} for row, why in why_not.items() if setting in (None, row.setting)]
