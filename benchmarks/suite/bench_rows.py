"""Time every row with pytest-benchmark: fastlm's implementations beside what a user would write or pick instead.

    pytest benchmarks/suite/bench_rows.py --benchmark-json=rows.json   # `--full` adds the long sizes and every dtype
    fastlm bench                                                       # the same, and memory, the digits VAE and a report

Each fastlm row is first checked against the reference. The implementations of one setting (section, size, dtype) take turns, so
that what else the machine is doing hits all alike; a row's percentiles are taken over the rounds of all its turns. A slow row
is called once to see how long that takes, and again only where there is time (budget.py).
"""

import gc
import math
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from suite.budget import Budget
from suite.catalog import rows_of, sections, settings, threads_of
from suite.check import worst
from suite.device import Device
from suite.row_items import BUDGET, DONE, SAY
from suite.rows import Filter, Row, Runner, Setting, Step, Unavailable
from suite.units import duration

TURNS = 3  # of each implementation
ROUNDS, SECONDS = 3, 0.12  # A turn takes at least so many rounds and seconds.
ENOUGH = 0.5  # A turn of a slow call ends after so many seconds, even if that is the first round.
MOST_ROUNDS = 200  # A turn takes at most so many where each round is one call with a cold cache.
ROUND_SECONDS = 0.002  # A round takes at least so many, as short calls are repeated to outweigh the clock and cold caches.


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    row_filter = Filter(option("--full"), option("--only"), tuple(option("--size")), option("--tiny"))
    done = metafunc.config.stash.get(DONE, ())
    rows = [
        pytest.param(*row[:3], turn, row.implementation, marks=mark_of(setting))
        for setting in settings(row_filter)
        if setting not in done
        for turn in range(TURNS)
        for row in rows_of(setting, row_filter.full)
    ]
    metafunc.parametrize(("op", "workload", "dtype", "turn", "implementation"), rows)


def mark_of(setting: Setting) -> pytest.MarkDecorator:
    """Return pytest-benchmark's options for the rows of a setting."""
    clock = sections()[setting.op].device.clock
    return pytest.mark.benchmark(timer=clock, min_rounds=ROUNDS, max_time=SECONDS, min_time=ROUND_SECONDS, disable_gc=True)


class RunnerCache:
    """Make the step of each implementation of a setting once. Keep why there is none, so that no turn fails anew."""

    def __init__(self, setting: Setting):
        self.setting, self.device = setting, sections()[setting.op].device
        self.step, self.errors = cache(self._step), cache(lambda implementation: self.runner.errors(implementation))
        self.seconds: dict[str, float] = {}  # of a call, by implementation

    @cached_property
    def runner(self) -> Runner:
        """Make the inputs when the first row asks for them, as there may be no time for any."""
        return sections()[self.setting.op].runner(self.setting)

    def _step(self, implementation: str) -> Step | Unavailable:
        try:
            return self.runner.step(implementation)
        except Unavailable as reason:
            return reason


@lru_cache(maxsize=1)  # One setting's tensors are kept at a time.
def runner_cache(setting: Setting) -> RunnerCache:
    gc.collect()  # The last setting's models and tensors refer to each other.
    return RunnerCache(setting)


def test_row(benchmark, pytestconfig, op, workload, dtype, turn, implementation):
    row = Row(op, workload, dtype, implementation)
    budget, say = pytestconfig.stash.get(BUDGET, Budget()), pytestconfig.stash.get(SAY, lambda row, part: None)
    budget.enter(row.setting)
    with threads_of(row.setting):
        if turn == 0:
            first_turn(benchmark, row, budget, partial(say, row))
        else:
            next_turn(benchmark, row, budget, partial(say, row))


def first_turn(benchmark: BenchmarkFixture, row: Row, budget: Budget, say: Callable[[str], None]) -> None:
    """Make the row's step, check what it computes, and time it where there is time for another call."""
    needed = row.own or row.implementation == sections()[row.op].baseline  # Without these two a setting says nothing.
    if not budget.allows_first(needed):
        pytest.skip(budget.why_not("its first call"))
    say("first call")
    runners = runner_cache(row.setting)
    step = runners.step(row.implementation)
    if isinstance(step, Unavailable):
        pytest.skip(str(step))
    say("checking")
    check(benchmark, runners, row)
    first = runners.runner.first_seconds[row.implementation]
    if not budget.allows_second(first, needed):
        pytest.skip(budget.why_not(f"another call, where the first one took {duration(first)}"))
    say("timing")
    if first > ENOUGH:  # It is slow, or it was compiled.
        runners.seconds[row.implementation] = timed(benchmark, runners.device, step, 1)
    else:
        start = runners.device.clock()
        step()
        seconds = runners.seconds[row.implementation] = runners.device.clock() - start
        timed(benchmark, runners.device, step, math.ceil(ENOUGH / seconds))


def next_turn(benchmark: BenchmarkFixture, row: Row, budget: Budget, say: Callable[[str], None]) -> None:
    """Time the row again, where there is time."""
    if budget.left <= 0:
        return
    runners = runner_cache(row.setting)
    seconds = runners.seconds.get(row.implementation)
    if seconds is None or not budget.allows_repeating(max(seconds, SECONDS)):
        return  # The row has the rounds of its first turn, or the reason why there are none.
    say("timing")
    check(benchmark, runners, row)
    timed(benchmark, runners.device, runners.step(row.implementation), math.ceil(ENOUGH / seconds))


def check(benchmark: BenchmarkFixture, runners: RunnerCache, row: Row) -> None:
    """Record the errors of the row's results. A row of fastlm's own fails where they are larger than allowed."""
    benchmark.group = " ".join(row.setting)
    errors = runners.errors(row.implementation)
    benchmark.extra_info |= {"errors": errors, "flops": runners.runner.flops, **worst(errors)}
    wrong = [(name, each["error"], each["allowed"]) for name, each in errors.items() if not each["error"] <= each["allowed"]]
    if row.own:
        assert not wrong, "wrong: " + ", ".join(f"{name} by {error:.1e} ({most:.1e} allowed)" for name, error, most in wrong)


def timed(benchmark: BenchmarkFixture, device: Device, step: Step, rounds: int) -> float:
    """Time so many calls and return the fastest in seconds. Where they are many, time as many as fit into SECONDS.

    Where the device has a cache to clear, each round is one call, and there are at most MOST_ROUNDS.
    """
    if device.clear_cache:
        benchmark.pedantic(step, setup=device.clear_cache, rounds=min(rounds, MOST_ROUNDS))
    elif rounds <= ROUNDS:
        benchmark.pedantic(step, rounds=rounds)
    else:
        benchmark(step)
    return benchmark.stats.stats.min
