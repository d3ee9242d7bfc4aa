"""A pytest plugin of `make gpu`: each finished test is a line of JSON in ``--journal``, and the next run leaves it out.

An access out of bounds ends the context of the GPU, in which all later tests of the process would fail. So such a process ends
after its test, and pytest-xdist starts another.
"""

import json
import os
from pathlib import Path

MESSAGE = 4000  # Characters that are kept of a failure's message, its end.


def read(path: Path) -> list[dict]:
    """Return the finished tests. A line that was cut off is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def pytest_addoption(parser):
    parser.addoption("--journal", type=Path, required=True)


def pytest_configure(config):
    config.pluginmanager.register(_Worker() if hasattr(config, "workerinput") else _Recorder(config.getoption("journal")))


def pytest_collection_modifyitems(config, items):
    """Leave out what was done before this run. All processes must see the same tests, so that they read a file at rest."""
    done = set(json.loads(_before(config.getoption("journal")).read_text()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def _before(journal: Path) -> Path:
    return journal.with_suffix(".before.json")


class _Recorder:
    """Write the journal, in the process that starts the others."""

    def __init__(self, path: Path):
        self.path = path
        _before(path).write_text(json.dumps([row["test"] for row in read(path)]))

    def pytest_runtest_logreport(self, report):
        if report.when in ("setup", "teardown") and report.outcome == "passed":
            return
        message = "" if report.outcome == "passed" else str(report.longreprtext)[-MESSAGE:]
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            message = report.longrepr[2]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "message": message}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class _Worker:
    """End a process whose GPU is lost, once its test is reported."""

    failed = False

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed

    def pytest_runtest_logfinish(self):
        if not self.failed:
            return
        from suite.device import gpu_is_lost  # Here, because it imports torch.

        if gpu_is_lost():
            os._exit(1)
