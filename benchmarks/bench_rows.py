"""Times every row on pytest-benchmark: fastlm's implementations beside what a user would write or pick instead.

    pytest benchmarks/bench_rows.py --benchmark-json=rows.json     # `--full` adds the long sizes and every dtype
    fastlm bench                                                   # the same, and memory, the digits VAE and a report

Each fastlm row is first checked against the reference. The implementations of one setting (section, size, dtype) take turns, so
that what else the machine is doing hits all alike; a row's percentiles are taken over the rounds of all its turns.
"""

import gc
import math
from functools import cache, lru_cache

import pytest
from op_check import worst
from row_items import DONE
from rows import Row, Selection, Setting, Step, Unavailable, rows_of, sections, settings, threads_of

TURNS = 3
ROUNDS, SECONDS = 3, 0.12  # of a turn, at least
ENOUGH = 0.5  # seconds of calls after which a turn of a slow one ends, be it the first round
ROUND_SECONDS = 0.002  # of a round, at least: a short call is repeated, so that the clock and cold caches do not weigh in


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    selection = Selection(option("--full"), option("--only"), tuple(option("--size")))
    done = metafunc.config.stash.get(DONE, ())
    rows = [
        (*row[:3], turn, row.implementation)
        for setting in settings(selection)
        if setting not in done
        for turn in range(TURNS)
        for row in rows_of(setting, selection.full)
    ]
    metafunc.parametrize(("op", "workload", "dtype", "turn", "implementation"), rows)


class Entrants:
    """The steps of a setting's implementations, each made once; why there is none is kept, so that no turn fails anew."""

    def __init__(self, setting: Setting):
        self.contest = sections()[setting.op].contest(setting)
        self.step, self.errors, self.seconds = cache(self._step), cache(self.contest.errors), cache(self._seconds)

    def _step(self, implementation: str) -> Step | Unavailable:
        try:
            return self.contest.step(implementation)
        except Unavailable as reason:
            return reason

    def _seconds(self, implementation: str) -> float:
        return self.contest.seconds(implementation, self.step(implementation))


@lru_cache(maxsize=1)  # the tensors of one setting at a time
def entrants(setting: Setting) -> Entrants:
    gc.collect()  # the last setting's models and tensors, which refer to each other
    return Entrants(setting)


@pytest.mark.benchmark(min_rounds=ROUNDS, max_time=SECONDS, min_time=ROUND_SECONDS, disable_gc=True)
def test_row(benchmark, op, workload, dtype, turn, implementation):
    row = Row(op, workload, dtype, implementation)
    with threads_of(row.setting):
        setting = entrants(row.setting)
        step = setting.step(implementation)
        if isinstance(step, Unavailable):
            pytest.skip(str(step))
        benchmark.group = " ".join(row.setting)
        judged = setting.errors(implementation)
        benchmark.extra_info |= {"errors": judged, "flops": setting.contest.flops, **worst(judged)}
        wrong = [(name, j["error"], j["allowed"]) for name, j in judged.items() if not j["error"] <= j["allowed"]]
        if row.own:
            assert not wrong, "wrong: " + ", ".join(
                f"{name} by {error:.1e} ({most:.1e} allowed)" for name, error, most in wrong
            )
        rounds = math.ceil(ENOUGH / setting.seconds(implementation))
        if rounds <= ROUNDS:
            benchmark.pedantic(step, rounds=rounds)
        else:
            benchmark(step)
