"""Run bench_rows.py under pytest. Each finished setting goes into the journal and gets a line above the progress bar."""

import os
import statistics
from pathlib import Path

import pytest
from pytest_benchmark import __version__
from rich.console import Console

from suite.budget import Budget
from suite.catalog import rows_of, weight
from suite.device import gpu_is_lost
from suite.journal import Journal
from suite.row_items import BUDGET, DONE, MISSING, SAY, missing, row_of
from suite.rows import Filter, Row, Setting
from suite.terminal import Activity
from suite.units import duration

HERE = Path(__file__).parent
HEAD, STEP = "head", "rows"  # steps of the journal


class GPULost(Exception):
    """An error in a row has ended the GPU's context, so that no later row of this process can run."""


def time_rows(journal: Journal, row_filter: Filter, budget: Budget) -> bool:
    """Time every row that the journal does not have yet, as far as the budget goes. Return whether all answers were right.

    Raises:
        KeyboardInterrupt: it was interrupted; the journal has the settings that were finished.
        GPULost: the GPU takes no more calls; the journal has the setting, too, in which that happened.
    """
    arguments = [str(HERE / "bench_rows.py"), "--benchmark-quiet", *["--full"] * row_filter.full]
    arguments += ["--tiny"] * row_filter.tiny
    arguments += [f"--only={row_filter.only}"] * (row_filter.only is not None) + [f"--size={size}" for size in row_filter.sizes]
    # None of the tests' settings; and no terminal output but ours.
    isolation = ["-c", os.devnull, f"--rootdir={HERE}", "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:warnings"]
    recorder = _Recorder(journal, row_filter, budget)
    code = pytest.main(arguments + isolation, plugins=[recorder])
    if recorder.lost:
        raise GPULost(f"the GPU was lost by {' '.join(recorder.lost)}")
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest could not run bench_rows.py: exit code {code!r}")
    return code != pytest.ExitCode.TESTS_FAILED  # Nothing is collected where the journal has all.


def benchmark_json(journal: Journal) -> dict:
    """Return the rows in pytest-benchmark's own format, and as "missing" those that have no time."""
    finished = journal.of(STEP)
    parts = {part: [row for setting in finished for row in setting[part]] for part in ("benchmarks", "missing")}
    return {**(journal.one(HEAD) or {}), **parts}


class _Recorder:
    """A pytest plugin that keeps what is finished, and shows its progress and each setting's medians."""

    def __init__(self, journal: Journal, row_filter: Filter, budget: Budget):
        self.journal, self.row_filter, self.budget = journal, row_filter, budget
        # A copy of the standard output: pytest captures the original while a row runs.
        self.console = Console(file=os.fdopen(os.dup(1), "w"), soft_wrap=True)
        self.failures: set[str] = set()
        self.why_not: str | None = None  # the reason of the last setting, where nothing of it was timed
        self.lost: Row | None = None  # the row by which the GPU was lost

    def pytest_configure(self, config):
        config.stash[DONE] = {Setting(*setting["setting"]) for setting in self.journal.of(STEP)}
        config.stash[BUDGET], config.stash[SAY] = self.budget, self._say

    def pytest_collection_finish(self, session):
        if not self.journal.of(HEAD):
            self.journal.add(HEAD, _head(session.config))
        self.left = {}  # turns of each setting
        for item in session.items:
            setting = row_of(item).setting
            self.left[setting] = self.left.get(setting, 0) + 1
        self.budget.plan({setting: weight(setting, self.row_filter.full) for setting in self.left})
        self.activity = Activity(self.console, len(session.items))
        self.activity.__enter__()

    def pytest_runtest_logreport(self, report):
        if report.failed and (message := report.longrepr.reprcrash.message) not in self.failures:  # Each turn fails alike.
            self.failures.add(message)
            self.activity.print(f"{report.nodeid}\n{report.longreprtext}", style="red", markup=False, highlight=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Run a turn of a row, with what pytest reports of it, and finish the setting after its last turn."""
        row = row_of(item)
        result = yield
        self.activity.advance()
        self.left[row.setting] -= 1
        if row in item.config.stash[MISSING] and gpu_is_lost():
            self.lost, item.session.shouldstop = row, "the GPU was lost"
        if self.lost or not self.left[row.setting]:
            self._finish(row.setting, item.config)
        return result

    def _finish(self, setting: Setting, config: pytest.Config) -> None:
        entries = [entry.as_dict() for entry in config._benchmarksession.benchmarks if not entry.has_error]
        entries = [entry for entry in entries if Setting(*(entry["params"][n] for n in Setting._fields)) == setting]
        self.journal.add(STEP, {"setting": setting, "benchmarks": entries, "missing": missing(config, setting)})
        rounds = {row.implementation: [] for row in rows_of(setting, self.row_filter.full)}
        for entry in entries:
            rounds[entry["params"]["implementation"]] += entry["stats"]["data"]
        medians = [f"{name} {duration(statistics.median(times)) if times else '-'}" for name, times in rounds.items()]
        why_not = None if entries else next((row["why_not"] for row in missing(config, setting)), "-")
        told = ", ".join(medians) if entries else "as above" if why_not == self.why_not else why_not
        self.why_not = why_not
        self.activity.print(f"  {' '.join(setting)}: {told}", highlight=False, markup=False)

    def _say(self, row: Row, part: str) -> None:
        self.activity.say(f"{' '.join(row.setting)}, {row.implementation}: {part}")

    def pytest_sessionfinish(self):
        if activity := getattr(self, "activity", None):
            activity.__exit__()


def _head(config: pytest.Config) -> dict:
    """Return what pytest-benchmark writes beside its benchmarks."""
    session, hook = config._benchmarksession, config.hook
    commit = hook.pytest_benchmark_generate_commit_info(config=config)
    return {"machine_info": session.get_machine_info(), "commit_info": commit, "version": __version__}
