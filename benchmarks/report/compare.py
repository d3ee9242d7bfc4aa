"""Tell what got slower or faster between two runs: `fastlm bench --compare A.json B.json`.

How noise is told from change. The peers are the control group: their code is the same in both runs, and what they changed by is
the machine's doing. The median of the peers' changes is the machine's drift, and fastlm's times in B are divided by it. A row
of fastlm has changed if

- its 20th to 80th percentiles in A and in B, drift taken out, do not overlap,
- and its median changed by more than the drift-free changes of nine in ten of the peers, and by more than LEAST.

With fewer than FEW peers in both runs there is no drift to take out, and a change has to be more than ALONE. Two runs whose
torch differs have no control group: their peers changed too.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from suite.rows import Row
from suite.units import duration, percentiles

from report.results import read, times_of

LEAST, ALONE, FEW = 0.03, 0.10, 5
SLOWER, FASTER, SAME = "slower", "faster", "same"


@dataclass(frozen=True)
class Change:
    """A row of fastlm in both runs. Times are in seconds."""

    row: Row
    before: tuple[float, float, float]  # the 20th, 50th and 80th percentiles
    after: tuple[float, float, float]  # as measured
    change: float  # of the median, drift taken out; 0.1 is 10 % more time
    verdict: str


@dataclass(frozen=True)
class Comparison:
    drift: float  # the median ratio of a peer's time in B to that in A
    threshold: float  # a row counts from this change on
    control: int  # rows of peers that tell both
    changes: list[Change]
    gone: list[Row]  # rows of fastlm that only A has
    new: list[Row]

    def of(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]


def compare(before: dict, after: dict) -> Comparison:
    """Compare the JSON of two runs."""
    a, b = ({row: percentiles(times) for row, times in times_of(run).items()} for run in (before, after))
    same_torch = _torch(before) == _torch(after)
    logs = [math.log(b[row][1] / a[row][1]) for row in a if row in b and not row.own and same_torch]
    drift, threshold = 0.0, ALONE
    if len(logs) >= FEW:
        drift = statistics.median(logs)
        ninth = statistics.quantiles([abs(log - drift) for log in logs], n=10, method="inclusive")[-1]
        threshold = max(LEAST, math.exp(ninth) - 1)
    own = [row for row in a if row.own]
    changes = [_change(row, a[row], b[row], math.exp(drift), threshold) for row in own if row in b]
    gone, new = [row for row in own if row not in b], [row for row in b if row.own and row not in a]
    return Comparison(math.exp(drift), threshold, len(logs), changes, gone, new)


def _torch(run: dict) -> str | None:
    return run.get("machine", {}).get("torch")


def _change(row: Row, before: tuple, after: tuple, drift: float, threshold: float) -> Change:
    fast, median, slow = (seconds / drift for seconds in after)
    change, verdict = median / before[1] - 1, SAME
    # As factors, so that half the time is as far from the same as twice the time.
    if fast > before[2] and median / before[1] > 1 + threshold:
        verdict = SLOWER
    elif slow < before[0] and before[1] / median > 1 + threshold:
        verdict = FASTER
    return Change(row, before, after, change, verdict)


def show(paths: tuple[Path, Path], console: Console) -> int:
    """Print the comparison of two runs' files. Return 1 where something got slower, else 0.

    Raises:
        ValueError: a file is not a run's.
    """
    runs = [read(path) for path in paths]
    found = compare(*runs)
    for name, run in zip("AB", runs):
        machine = run.get("machine", {})
        console.print(
            f"{name}: {', '.join(str(machine.get(key)) for key in ('date', 'commit', 'cpu', 'torch'))}", highlight=False
        )
    console.print(_how(found), highlight=False)
    for verdict in (SLOWER, FASTER):
        if changes := sorted(found.of(verdict), key=lambda change: -abs(math.log1p(change.change))):
            console.print(_table(f"{verdict}: {len(changes)}", changes))
    console.print(f"{len(found.of(SAME))} rows of fastlm are the same, {len(found.gone)} are gone, {len(found.new)} are new.")
    for row in found.gone:
        console.print(f"  gone: {' '.join(row)}", highlight=False)
    return 1 if found.of(SLOWER) else 0


def _how(found: Comparison) -> str:
    if found.control < FEW:
        return f"No control group ({found.control} rows of peers under the same torch): changes beyond {ALONE:.0%} count."
    return (
        f"By {found.control} rows of peers, whose code did not change, the machine took {found.drift:.3f} times as long in B; "
        f"that is taken out. Nine in ten of them then changed by less than the threshold, {found.threshold:.1%} (at least "
        f"{LEAST:.0%}): what changed more, and has its 20th to 80th percentiles outside the other run's, counts."
    )


def _table(title: str, changes: list[Change]) -> Table:
    table = Table("row", "A: p20 – p50 – p80", "B", "time, drift taken out", title=title, title_justify="left")
    for each in changes:
        spans = [" – ".join(duration(seconds) for seconds in span) for span in (each.before, each.after)]
        table.add_row(" ".join(each.row), *spans, f"{each.change:+.1%}")
    return table
