"""Test what bounds a run: its budget of time, a peak that ends by the clock, a log that moves, and processes that end."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from suite import bench_rows, memory, peak
from suite.budget import GENEROUS, GUARANTEED, UNLIMITED_SHARE, Budget
from suite.catalog import settings, weight
from suite.device import CLEAR_REFS, CPU
from suite.journal import Journal
from suite.rows import Filter, Row
from suite.terminal import Activity
from support.bench import HANG, Clock

TESTS = Path(__file__).parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"
ROW = Row("attention, a tiny call", "B1 H1 S16", "float32", "fastlm cpu")
LINUX = pytest.mark.skipif(not CLEAR_REFS.exists(), reason="memory is measured on Linux only")


# ---- the peak ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "largest"), [(0.05, 256), (0.9, 512), (20.0, 1024), (500.0, 2048)])
def test_products_grow_while_there_is_time(rate, largest, monkeypatch):
    clock, sizes = Clock(), []
    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=clock))
    device = replace(CPU, clock=clock)

    def product(a, b):
        sizes.append(len(a))
        clock.spend(2 * len(a) ** 3 / (rate * 1e9))

    assert peak.gemm_rate(torch.bfloat16, product, device) == pytest.approx(rate, abs=0.05)
    assert max(sizes) == largest
    assert clock.now < 2 * peak.GEMM_SECONDS


def test_a_measurement_of_something_slow_ends_after_one_run(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=clock))
    assert peak._least_seconds(lambda: clock.spend(10.0), device=replace(CPU, clock=clock)) == 10.0
    assert clock.now == 20.0  # the warm-up, and one run


# ---- the budget -------------------------------------------------------------------------------------------------------------


def run_of(call_seconds: list[float], seconds: float | None) -> tuple[float, list[int]]:
    """Time settings of one implementation whose calls take so long. Return the seconds in all, and each one's calls."""
    clock = Clock()
    budget = Budget(seconds, clock)
    budget.plan({setting: 1 for setting in range(len(call_seconds))})
    calls = [0] * len(call_seconds)
    for setting, each in enumerate(call_seconds):

        def call(setting=setting, each=each):
            calls[setting] += 1
            clock.spend(each)

        budget.enter(setting)
        if budget.allows_first():
            call()
            if budget.allows_second(each):
                call()
                for _ in range(2):
                    if budget.allows_repeating(each):
                        call()
    return clock.now, calls


def test_a_fast_machine_repeats_everything():
    assert run_of([0.1] * 50, 100.0) == (pytest.approx(20.0), [4] * 50)


def test_a_slow_machine_ends_in_time_and_leaves_none_out_while_there_is_time():
    took, calls = run_of([0.1] * 25 + [8.0] * 25, 200.0)
    assert took <= 200.0 + 8.0  # a call that was begun ends
    assert calls[:25] == [4] * 25 and max(calls[25:]) <= 3 and max(calls[30:]) <= 2  # late: nothing is repeated
    assert sum(n > 0 for n in calls[25:]) >= 12


def test_one_slow_setting_leaves_time_for_the_others():
    took, calls = run_of([30.0] + [0.1] * 20, 40.0)
    assert calls[0] == 1, "its first call is as much as 40 s allow"
    assert min(calls[1:]) >= 3
    assert took <= 40.0


def test_the_settings_behind_keep_most_of_what_they_were_to_have():
    """However slow those in front are, three quarters of 10 s are kept for each behind."""
    clock = Clock()
    budget = Budget(100.0, clock)
    budget.plan({setting: 1 for setting in range(10)})
    for setting in range(9):
        budget.enter(setting)
        clock.spend(budget.most)
        assert budget.left >= GUARANTEED * 10.0 * (9 - setting) - 1e-6
    assert clock.now > 90.0 - 1e-6


def test_settings_are_left_out_so_that_those_behind_them_have_their_turn():
    """Ten models of 20 s each are followed by forty ops of 1 s. Not the models alone may run."""
    clock = Clock()
    budget = Budget(200.0, clock)
    budget.plan({("model", i): 10 for i in range(10)} | {("op", i): 2 for i in range(40)})
    ran = {"model": 0, "op": 0}
    for kind, i in list(budget.weights):
        budget.enter((kind, i))
        needed = budget.allows_first(needed=True)
        assert needed or not budget.allows_first(), "a peer alone says nothing"
        if needed:
            ran[kind] += 1
            clock.spend(20.0 if kind == "model" else 1.0)
    assert 5 <= ran["model"] < 10 and ran["op"] >= 15, ran
    assert clock.now <= 201.0


def test_a_check_that_took_long_does_not_cost_a_quick_row_its_time():
    clock = Clock()
    budget = Budget(100.0, clock)
    budget.plan({"a": 1, "b": 9})
    budget.enter("a")
    clock.spend(50.0)
    assert budget.allows_second(0.1) and budget.allows_first(needed=True)
    assert not budget.allows_first() and not budget.allows_second(60.0, needed=True)


def test_the_two_that_a_setting_is_about_get_more_time_than_others_where_the_run_is_late():
    clock = Clock()
    budget = Budget(100.0, clock)
    budget.plan({"a": 1, "b": 1, "c": 8})
    clock.spend(60.0)
    budget.enter("a")
    assert budget.share == budget.most == 4.0
    assert budget.allows_second(10.0, needed=True) and not budget.allows_second(10.0)


def test_a_run_without_a_limit_does_not_repeat_what_is_slow_for_hours():
    assert run_of([20.0], None) == (3 * 20.0, [3])
    assert run_of([GENEROUS * UNLIMITED_SHARE + 1], None)[1] == [1]


def test_models_get_more_time_than_ops():
    every = {setting.op: weight(setting, full=False) for setting in settings(Filter())}
    assert every["GPT-2, small, training"] > every["attention, forward, causal"]


# ---- rows without time ------------------------------------------------------------------------------------------------------


class Slow:
    """A runner whose first call took so long."""

    flops = None

    def __init__(self, seconds: float, error: float = 0.0):
        self.first_seconds, self.error = {ROW.implementation: seconds}, error

    def step(self, implementation):
        return lambda: pytest.fail("called again")

    def errors(self, implementation):
        return {"output 0": {"error": self.error, "allowed": 0.5}}


@pytest.fixture
def row_of(monkeypatch):
    """Run the first turn of a row whose first call took so long, with so much time."""

    def run(slow: Slow, seconds: float):
        monkeypatch.setattr(
            bench_rows, "sections", lambda: {ROW.op: SimpleNamespace(runner=lambda setting: slow, baseline="SDPA", device=CPU)}
        )
        bench_rows.runner_cache.cache_clear()
        budget, parts = Budget(seconds), []
        budget.plan({ROW.setting: 1})
        budget.enter(ROW.setting)
        fixture = SimpleNamespace(extra_info={})
        try:
            bench_rows.first_turn(fixture, ROW, budget, parts.append)
        finally:
            bench_rows.next_turn(fixture, ROW, budget, parts.append)  # calls nothing
            bench_rows.runner_cache.cache_clear()
        return parts

    return run


def test_a_row_says_that_there_was_no_time(row_of):
    with pytest.raises(pytest.skip.Exception, match="no time for another call, where the first one took 100 s"):
        row_of(Slow(100.0), 20.0)


def test_a_wrong_answer_is_told_where_there_is_no_time_to_repeat_it(row_of):
    with pytest.raises(AssertionError, match="wrong: output 0 by 1.0e"):
        row_of(Slow(100.0, error=1.0), 20.0)


def test_rows_that_were_not_reached_are_in_the_journal_with_the_reason(tmp_path):
    """The run has a process of its own, as pytest cannot run within a run."""
    path = tmp_path / "bench.jsonl"
    code = (
        "from pathlib import Path; from suite.budget import Budget; from suite.journal import Journal\n"
        "from suite.rows import Filter; from suite.timing import time_rows\n"
        f"print(time_rows(Journal(Path({str(path)!r}), {{}}), Filter(only={ROW.op!r}), Budget(0.0)))"
    )
    ran = python(code)
    assert ran.returncode == 0 and ran.stdout.rstrip().endswith("True"), ran.stdout + ran.stderr
    (finished,) = Journal(path, {}, resume=True).of("rows")
    assert finished["benchmarks"] == []
    assert [row["implementation"] for row in finished["missing"]] == ["fastlm cpu", "SDPA"]
    assert all("this run had no time for its first call" in row["why_not"] for row in finished["missing"])


def test_predictions_stop_where_there_is_no_time(monkeypatch):
    roofline = pytest.importorskip("gpu.roofline")  # imports Triton
    variants, asked = roofline.default_variants(("sm_80",)), []

    def inspect_all(variants, jobs):
        for variant in variants:
            asked.append(variant)
            yield {**variant._asdict(), "error": "not compiled"}

    monkeypatch.setattr(roofline.variants, "inspect_all", inspect_all)
    assert len(roofline.table_rows(variants)) == len(variants)
    asked.clear()
    rows = roofline.table_rows(variants, lambda: len(asked) < 2)
    assert len(rows) == len(asked) == 2


def python(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, env=environment)


# ---- what a run says --------------------------------------------------------------------------------------------------------


def test_a_log_gets_a_line_when_nothing_was_printed_for_a_while():
    log = io.StringIO()
    with Activity(Console(file=log, width=100), 2, silence=0.1) as activity:
        activity.say("compiling")
        end = time.monotonic() + HANG
        while log.getvalue().count("…") < 2 and time.monotonic() < end:
            time.sleep(0.01)
        activity.print("  compiled")
    assert log.getvalue().startswith("  … compiling, 0 s\n  … compiling, 0 s\n")
    assert log.getvalue().endswith("  compiled\n")


def test_a_log_moves_where_many_short_things_are_done():
    log = io.StringIO()
    with Activity(Console(file=log, width=100), 2, silence=0.1) as activity:
        end = time.monotonic() + HANG
        while "…" not in log.getvalue() and time.monotonic() < end:
            activity.say("a short thing")
    assert "  … a short thing, 0 s\n" in log.getvalue()


def test_a_log_gets_no_such_line_where_something_is_printed_often_enough():
    log = io.StringIO()
    with Activity(Console(file=log, width=100), 2, silence=HANG) as activity:
        activity.say("compiling")
        time.sleep(0.3)
    assert log.getvalue() == ""


# ---- memory's processes -----------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    """Say whether the process has ended, even if its parent has not asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(condition) -> bool:
    """Wait until the condition holds. Return whether it did before a time that only a hang takes."""
    end = time.monotonic() + HANG
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


@pytest.fixture
def pids(tmp_path, monkeypatch):
    """Return the pids of memory's server and of its fork, once `bench.sleep_for_long` says them; kill them in the end."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, BENCHMARKS))))
    path, found = tmp_path / "pids", []

    def wait() -> list[int]:
        assert until(lambda: path.exists() and path.read_text().endswith("\n"))
        found.extend(map(int, path.read_text().split()))
        return found

    wait.path = str(path)
    yield wait
    for pid in found:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


@LINUX
def test_no_process_outlives_a_killed_run(pids):
    code = f"from suite import memory; memory.peak_extra_bytes('support.bench:sleep_for_long', path={pids.path!r})"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server, fork = pids()
        assert not gone(server) and not gone(fork)
    finally:
        run.kill()
        run.wait()
    assert until(lambda: gone(server) and gone(fork))


@LINUX
@pytest.mark.parametrize("way", ["its standard input ends", "it is killed"])
def test_the_fork_that_measures_ends_with_its_server(way, pids):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, memory.__file__], text=True, **pipes)
    try:
        print(json.dumps(["support.bench:sleep_for_long", {"path": pids.path}, HANG]), file=server.stdin, flush=True)
        _, fork = pids()
        assert not gone(fork)
        if way == "it is killed":
            server.kill()
        else:
            server.stdin.close()
        assert until(lambda: gone(fork) and server.poll() is not None)
    finally:
        server.kill()
        server.wait()


@LINUX
def test_memory_that_takes_too_long_is_given_up_and_the_next_one_is_measured(pids):
    memory._server.cache_clear()
    found = memory.peak_extra_bytes("support.bench:sleep_for_long", seconds=0.5, path=pids.path)
    assert found == {"why_not": "it was not measured within 0.5 s"}
    assert memory.peak_extra_bytes("support.bench:sleep_for_long", path=pids.path, seconds=0.5).get("why_not")
    assert memory.peak_extra_bytes("builtins:dict") == {"why_not": "TypeError: 'dict' object is not callable"}
    memory._server().stdin.close()
    assert memory._server().wait(HANG) == 0
    memory._server.cache_clear()
