"""What fastlm set out to reach, and whether this run did: ratios to the baseline of the same run, on the same threads."""

from dataclasses import dataclass

from bench_results import Result
from op_rows import FASTLM, LARGE, baseline

SPEED_UP, MEMORY = "speed-up over", "peak extra memory, as a share of that of"


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio to the baseline, for fastlm's float32 rows of an op with ``fewest`` to ``most`` elements."""

    op: str
    ratio: str  # SPEED_UP: at least the bound; MEMORY: at most
    bound: float
    fewest: int = 0
    most: int = 1 << 62

    def covers(self, result: Result) -> bool:
        row = result.op, result.dtype, result.implementation.startswith(FASTLM)
        return row == (self.op, "float32", True) and self.fewest <= result.elements <= self.most


@dataclass(frozen=True)
class Verdict:
    """A goal held against one row."""

    figure: str
    row: Result
    measured: float | None
    goal: str
    met: bool


GOALS = (
    Goal("reparameterize_with_kl", SPEED_UP, 12.0, fewest=LARGE),
    Goal("reparameterize_with_kl", SPEED_UP, 5.0, most=32 * 100),
    Goal("reparameterize_with_kl", MEMORY, 1 / 3, fewest=LARGE),
    Goal("normal", SPEED_UP, 8.0),
)


def judge(results: list[Result]) -> list[Verdict]:
    """Every goal against every row it covers. What was not measured does not meet it."""
    return [_verdict(goal, row) for goal in GOALS for row in results if goal.covers(row)]


def _verdict(goal: Goal, row: Result) -> Verdict:
    figure = f"{goal.ratio} {baseline(goal.op)}"
    if goal.ratio == SPEED_UP:
        measured, sign = row.speed_up, "≥"
        met = measured is not None and measured >= goal.bound
    else:
        measured, sign = row.peak_ratio, "≤"
        met = measured is not None and measured <= goal.bound
    return Verdict(figure, row, measured, f"{sign} {goal.bound:.3g}", met)
