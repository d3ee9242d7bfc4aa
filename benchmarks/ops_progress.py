"""Runs bench_ops.py under pytest, with a progress bar and a line per setting in place of pytest's own output."""

import os
import statistics
from pathlib import Path

import pytest
from bench_results import duration
from op_rows import Setting
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent


def run_ops(json_path: Path, full: bool) -> int:
    """Time every op into ``json_path`` (pytest-benchmark's format, and "missing"); pytest's exit code, 0 where all is right."""
    arguments = [str(HERE / "bench_ops.py"), f"--benchmark-json={json_path}", "--benchmark-quiet"]
    # None of the tests' settings; and no terminal output but ours.
    isolation = ["-c", os.devnull, f"--rootdir={HERE}", "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:warnings"]
    return int(pytest.main(arguments + isolation + ["--full"] * full, plugins=[_Display()]))


def bar(console: Console) -> Progress:
    """A progress bar that leaves nothing behind, and nothing at all in a log file."""
    columns = TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class _Display:
    """A pytest plugin that shows how far it is, and each setting's medians when its turns are over."""

    def __init__(self):
        # A copy of the standard output: pytest captures the original while a row runs.
        self.console = Console(file=os.fdopen(os.dup(1), "w"), soft_wrap=True)
        self.progress = bar(self.console)
        self.setting, self.lines, self.failures = None, {}, set()

    def pytest_collection_finish(self, session):
        self.task = self.progress.add_task("", total=len(session.items))
        self.progress.start()

    def pytest_runtest_logreport(self, report):
        if report.failed and (message := report.longrepr.reprcrash.message) not in self.failures:  # each turn fails alike
            self.failures.add(message)
            self.console.print(f"{report.nodeid}\n{report.longreprtext}", style="red", markup=False, highlight=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        row, benchmark = pyfuncitem.callspec.params, pyfuncitem.funcargs["benchmark"]
        setting = row["op"], row["workload"], row["dtype"]
        if setting != self.setting:
            self._show_line()
            self.setting, self.lines = setting, {}
        self.progress.update(self.task, description=f"{_title(setting)}, {row['implementation']}")
        try:
            return (yield)
        finally:
            self.progress.advance(self.task)
            self.lines.setdefault(row["implementation"], []).extend(benchmark.stats.stats.data if benchmark.stats else [])

    def pytest_sessionfinish(self):
        self._show_line()
        self.progress.stop()

    def _show_line(self):
        if self.setting:
            medians = [f"{name} {duration(statistics.median(t)) if t else '-'}" for name, t in self.lines.items()]
            self.console.print(f"  {_title(self.setting)}: {', '.join(medians)}", highlight=False)


def _title(setting: Setting) -> str:
    return " ".join(setting)
