"""Write the tables of the report, as rows of marked text, and those of the terminal."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.table import Table as Shown
from suite.catalog import sections
from suite.rows import GROWTH
from suite.units import duration, growth_exponent, or_dash, rate, size

from report.blocks import Bullets, Table, plain
from report.goals import SPEED_UP, Verdict, judge
from report.results import Result

HEAD = ("size", "dtype", "", "p50", "p20 – p80", "{unit}", "of limit", "speed-up", "peak memory", "ratio", "error")

OTHERS = "share of the CPU time that other programs had while rows were timed"
NOISE = " ≈"  # It follows a speed-up that is within the noise.


def goals_table(results: list[Result], machine: dict) -> Table:
    """List each goal against each row that it covers, with the shares of the machine's limit of the row and the goal."""
    head = ("benchmark", "size", "dtype", "figure", "goal", "measured", "", "throughput", "of limit", "the goal's")
    return Table(head, [_goal_cells(verdict, machine) for verdict in judge(results)])


def _goal_cells(v: Verdict, machine: dict) -> tuple[str, ...]:
    reach, throughput, limit = "", "", v.result.limit(machine)
    if v.result.seconds and v.figure.startswith(SPEED_UP):
        throughput, reach = f"{rate(v.result.throughput)} {v.result.cost.unit}", f"{v.result.throughput / limit:.0%}"
    outcome = "not measured" if v.measured is None else "met" if v.met else "**missed**"
    if not v.met and v.needed and v.needed > limit:
        outcome = "**out of reach here**"
    measured, needed = or_dash(v.measured, "{:.3g}".format), f"{v.needed / limit:.0%}" if v.needed else ""
    return *v.result.row[:3], v.figure, v.goal, measured, outcome, throughput, reach, needed


def full_table(results: list[Result], machine: dict) -> Table:
    """List all figures of the rows of one section. What was not measured is a dash."""
    head = tuple(column.format(unit=results[0].cost.unit) for column in HEAD)
    return Table(head, [_full_cells(r, machine) for r in results])


def _full_cells(r: Result, machine: dict) -> tuple[str, ...]:
    name = plain(r.row.implementation)
    return (
        plain(r.row.workload),
        r.row.dtype,
        f"**{name}**" if r.row.own else name,
        or_dash(r.seconds, duration),
        f"{duration(r.fast)} – {duration(r.slow)}" if r.seconds else "–",
        or_dash(r.throughput, rate),
        or_dash(r.share(machine), "{:.0%}".format),
        or_dash(r.speed_up, "{:.2f} ×".format) + NOISE * r.noisy,
        or_dash(r.peak_bytes, size),
        or_dash(r.peak_ratio, "{:.2f} ×".format),
        or_dash(r.error, lambda error: f"{error:.0e} (≤ {r.allowed:.0e})"),
    )


def missing_list(results: list[Result]) -> list[Bullets]:
    """Say why the dashes are there, a line per implementation and reason; no block where there are none."""
    where: dict[tuple[str, str], list[str]] = {}
    for r in results:
        reason = f"Not timed: {r.why_not}" if r.why_not else f"Memory not measured: {r.why_no_peak}" if r.why_no_peak else None
        if reason:
            where.setdefault((r.row.implementation, reason), []).append(f"{r.row.workload} {r.row.dtype}")
    items = [f"**{plain(name)}**, {plain(', '.join(rows))}. {plain(reason)}" for (name, reason), rows in where.items()]
    return [Bullets(items)] if items else []


def memory_table(results: list[Result]) -> Table:
    head = ("section", "size", "", "peak extra memory", "results and gradients", "beyond them", "ratio of peaks")
    rows = [
        (
            plain(r.row.op),
            plain(r.row.workload),
            plain(r.row.implementation),
            size(r.peak_bytes),
            size(r.result_bytes),
            size(max(0, r.peak_bytes - r.result_bytes)),
            or_dash(r.peak_ratio, "{:.3f} ×".format),
        )
        for r in results
        if r.peak_bytes
    ]
    return Table(head, rows)


def growth_table(results: list[Result]) -> Table:
    """List the exponents of the sections in which nothing but one size grows."""
    rows = []
    of_growth = [r for r in results if sections()[r.row.op].group == GROWTH]
    for (op, dtype, name), group in _grouped(of_growth, lambda r: (r.row.op, r.row.dtype, r.row.implementation)).items():
        sizes = sorted({r.cost.size for r in group if r.seconds})
        time = growth_exponent([r.cost.size for r in group if r.seconds], [r.seconds for r in group if r.seconds])
        memory = growth_exponent([r.cost.size for r in group if r.peak_bytes], [r.peak_bytes for r in group if r.peak_bytes])
        if time is not None:
            cells = f"{sizes[0]:,} – {sizes[-1]:,}", f"{time:.2f}", or_dash(memory, "{:.2f}".format)
            rows.append((plain(op.removeprefix("growth of ")), dtype, plain(name), *cells))
    return Table(("", "dtype", "", "from – to", "time's exponent", "memory's"), rows)


def _grouped(results: list[Result], key) -> dict[tuple, list[Result]]:
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def machine_table(machine: dict) -> Table:
    rates = {"gemm_gflop_s": "torch's product", "fma_gflop_s": "multiply-adds", "peak_gflop_s": "peak"}
    units = {"memory_gb": "memory (GB)", "copy_gb_s": "copy (GB/s)", "read_gb_s": "read (GB/s)", "others_share": OTHERS}
    shown = [key for key in machine if key not in ("backends", "bandwidth_gb_s", "gpu_peaks", *rates)]
    rows = [(units.get(key, key.replace("_", " ")), machine[key]) for key in shown]
    for key, name in rates.items():
        rows += [
            (f"{name}, {dtype}" + (" (GFLOP/s)" if dtype != "why_not" else ""), rate) for dtype, rate in machine[key].items()
        ]
    if gpu := machine.get("gpu_peaks"):
        rows += [(f"the GPU's {units[key]}", gpu[key]) for key in ("copy_gb_s", "read_gb_s")]
        rows += [(f"the GPU's product, {dtype} (GFLOP/s)", rate) for dtype, rate in gpu["peak_gflop_s"].items()]
    rows += [(f"backend {name}", state) for name, state in machine["backends"].items()]
    return Table(("", ""), [(plain(name), plain(value)) for name, value in rows])


def listed(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Shown:
    """Return rows as they are, for the terminal."""
    table = Shown(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def terminal_table(op: str, results: list[Result]) -> Shown:
    """List every implementation's time, a line per setting, then the figures of the first one, fastlm's."""
    implementations = list(dict.fromkeys(r.row.implementation for r in results))
    table = Shown(title=op, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(("size", "dtype", *implementations, "speed-up", results[0].cost.unit, "memory")):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for _, rows in groupby(results, key=lambda r: r.setting):
        rows = {r.row.implementation: r for r in rows}
        first = next(iter(rows.values()))
        table.add_row(
            first.row.workload,
            first.row.dtype,
            *(or_dash(rows[name].seconds if name in rows else None, duration) for name in implementations),
            or_dash(first.speed_up, "{:.1f} ×".format) + NOISE * first.noisy,
            or_dash(first.throughput, rate),
            or_dash(first.peak_ratio, "{:.2f} ×".format),
        )
    return table
