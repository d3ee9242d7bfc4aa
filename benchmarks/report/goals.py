"""List the goals of fastlm and check them against a run, as ratios to its baseline on the same threads."""

from dataclasses import dataclass

from suite.catalog import sections
from suite.rows import Row

from report.results import Result

SPEED_UP, MEMORY = "speed-up over", "peak extra memory, as a share of that of"


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio to a peer, for fastlm's rows of a benchmark, of one dtype and of sizes ``fewest`` to ``most``."""

    op: str
    ratio: str  # SPEED_UP has to be at least the bound, MEMORY at most
    bound: float
    dtype: str = "float32"
    fewest: int = 0
    most: int = 1 << 62
    over: str | None = None  # the peer; None is the baseline

    def covers(self, result: Result) -> bool:
        row = result.row.op, result.row.dtype, result.row.own
        in_reach = self.fewest <= result.cost.size <= self.most and (self.ratio == SPEED_UP or result.peak_bytes is not None)
        return row == (self.op, self.dtype, True) and in_reach


@dataclass(frozen=True)
class Verdict:
    """A goal held against one row."""

    figure: str
    result: Result
    measured: float | None
    goal: str
    met: bool
    needed: float | None = None  # the throughput that would meet it


_FORWARD, _BOTH = "attention, forward", "attention, forward + backward"
_WINDOW, _DECODING = "attention, forward, window 256", "kvcache_attention, decoding"

GOALS = (
    Goal(_FORWARD, SPEED_UP, 2.5, "bfloat16", fewest=512, most=4096),
    Goal(_FORWARD, SPEED_UP, 2.0, "float16"),
    Goal(_FORWARD, SPEED_UP, 1.2, "float32", fewest=2048),
    Goal(_FORWARD + ", causal", SPEED_UP, 1.8, most=512),
    Goal(_FORWARD + ", causal", SPEED_UP, 1.8, "bfloat16", most=512),
    Goal(_WINDOW, SPEED_UP, 8.0),
    Goal(_WINDOW, SPEED_UP, 8.0, "bfloat16"),
    Goal(_WINDOW, SPEED_UP, 1.5, over="FlexAttention"),
    Goal(_WINDOW, SPEED_UP, 1.5, "bfloat16", over="FlexAttention"),
    Goal(_BOTH, SPEED_UP, 2.0, "bfloat16"),
    Goal(_BOTH, SPEED_UP, 6.5, "float16"),  # 2 x in the forward and 8 x in the backward come to this.
    Goal(_BOTH, MEMORY, 1.0),
    Goal("attention, a tiny call", SPEED_UP, 0.5),
    Goal(_DECODING, SPEED_UP, 4.0, fewest=4096, most=4096),
    Goal(_DECODING, SPEED_UP, 25.0, "bfloat16", fewest=4096, most=4096),
    Goal("reparameterize_with_kl", SPEED_UP, 12.0, fewest=1 << 20),
    Goal("reparameterize_with_kl", SPEED_UP, 5.0, most=32 * 100),
    Goal("reparameterize_with_kl", MEMORY, 1 / 3, fewest=1 << 20),
    Goal("normal", SPEED_UP, 8.0),
)


def judge(results: list[Result]) -> list[Verdict]:
    """Hold every goal against every row that it covers. What was not measured does not meet it."""
    by_row = {r.row: r for r in results}
    return [_verdict(goal, result, by_row) for goal in GOALS for result in results if goal.covers(result)]


def _verdict(goal: Goal, result: Result, by_row: dict[Row, Result]) -> Verdict:
    over = goal.over or sections()[goal.op].baseline
    peer = by_row.get(result.row._replace(implementation=over))
    needed = None
    if goal.ratio == SPEED_UP:
        measured, sign = _ratio(peer and peer.seconds, result.seconds), "≥"
        met = measured is not None and measured >= goal.bound
        needed = peer.throughput * goal.bound if measured else None
    else:
        measured, sign = _ratio(result.peak_bytes, peer and peer.peak_bytes), "≤"
        met = measured is not None and measured <= goal.bound
    return Verdict(f"{goal.ratio} {over}", result, measured, f"{sign} {goal.bound:.3g}", met, needed)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
