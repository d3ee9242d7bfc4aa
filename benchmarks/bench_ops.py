"""Times every benchmark of the ops, on pytest-benchmark: fastlm's backends beside what a user would write or pick instead.

    pytest benchmarks/bench_ops.py              # `--full` adds the long sizes and every dtype
    make bench                                  # the same, and memory, the digits VAE and a report

Each fastlm row is first checked against the reference. The implementations of one setting (op, size, dtype) take turns, so
that what else the machine is doing hits all alike; a row's median is taken over the rounds of all its turns.
"""

import time
from collections.abc import Callable
from functools import cache, lru_cache

import pytest
from op_check import errors, worst
from op_rows import FASTLM, Unavailable, arguments_of, find, settings, step_of, timed

TURNS = 3
ROUNDS, SECONDS = 3, 0.12  # of a turn, at least
SLOW = 0.5  # seconds of a call from which a turn is one round
ROUND_SECONDS = 0.002  # of a round, at least: a short call is repeated, so that the clock and cold caches do not weigh in


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    rows = [
        (*setting, turn, implementation)
        for setting in settings(full)
        for turn in range(TURNS)
        for implementation in timed(setting[0], setting[2], full)
    ]
    metafunc.parametrize(("op", "workload", "dtype", "turn", "implementation"), rows)


class Contest:
    """The implementations of one setting, ready to run on the same inputs."""

    def __init__(self, op: str, workload: str, dtype: str):
        self.benchmark, _ = find(op, workload)
        self.arguments = arguments_of(op, workload, dtype)
        self.step, self.errors, self.seconds = cache(self._step), cache(self._errors), cache(self._seconds)

    def _step(self, implementation: str) -> Callable | Unavailable:
        try:
            return step_of(self.benchmark, implementation, self.arguments)
        except Unavailable as reason:
            return reason  # kept, so that each turn need not fail anew

    def _seconds(self, implementation: str) -> float:
        start = time.perf_counter()
        self.step(implementation)()
        return time.perf_counter() - start

    def _errors(self, implementation: str) -> dict:
        return errors(self.benchmark, self.arguments, implementation.removeprefix(FASTLM))


@lru_cache(maxsize=1)  # the tensors of one setting at a time
def contest(op: str, workload: str, dtype: str) -> Contest:
    return Contest(op, workload, dtype)


@pytest.mark.benchmark(min_rounds=ROUNDS, max_time=SECONDS, min_time=ROUND_SECONDS, disable_gc=True)
def test_op(benchmark, op, workload, dtype, turn, implementation):
    setting = contest(op, workload, dtype)
    step = setting.step(implementation)
    if isinstance(step, Unavailable):
        pytest.skip(str(step))
    benchmark.group = f"{op} {workload} {dtype}"
    if implementation.startswith(FASTLM):
        judged = setting.errors(implementation)
        benchmark.extra_info |= {"errors": judged, **worst(judged)}
        wrong = [(name, j["error"], j["allowed"]) for name, j in judged.items() if not j["error"] <= j["allowed"]]
        assert not wrong, "wrong: " + ", ".join(f"{name} by {error:.1e} ({most:.1e} allowed)" for name, error, most in wrong)
    if setting.seconds(implementation) > SLOW:
        benchmark.pedantic(step)  # one round
    else:
        benchmark(step)
