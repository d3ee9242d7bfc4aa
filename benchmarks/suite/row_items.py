"""Read pytest's items as rows, and share state between timing.py, which runs pytest, and the files that pytest loads."""

from collections.abc import Callable

import pytest

from suite.budget import Budget
from suite.rows import Row, Setting

DONE = pytest.StashKey[set[Setting]]()  # settings that an interrupted run has already
BUDGET = pytest.StashKey[Budget]()  # the time of the run
SAY = pytest.StashKey[Callable[[Row, str], None]]()  # a function that is told which part of a row begins
MISSING = pytest.StashKey[dict[Row, str]]()  # the rows that have no time, and why


def row_of(item: pytest.Item) -> Row:
    return Row(*(item.callspec.params[name] for name in Row._fields))


def missing(config: pytest.Config, setting: Setting | None = None) -> list[dict[str, str]]:
    """Return the rows without a time, of one setting or of all, each with "why_not"."""
    why_not = config.stash[MISSING]
    return [row._asdict() | {"why_not": why} for row, why in why_not.items() if setting in (None, row.setting)]
