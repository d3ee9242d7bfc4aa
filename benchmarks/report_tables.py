"""The tables of the report, in Markdown, and those of the terminal."""

from itertools import groupby

from bench_results import Result, duration, markdown_table, size
from op_rows import FASTLM
from rich import box
from rich.table import Table
from speed_goals import SPEED_UP, Verdict, judge

FULL = ("size", "dtype", "", "time", "p20 – p80", "{unit}", "of limit", "speed-up", "peak memory", "ratio", "error")

OTHERS = "share of the CPU time that other programs had while the ops were timed"


def goals_table(results: list[Result], machine: dict) -> str:
    """Each goal against each row it covers, where the row stands against what the machine allows, and where the goal does."""
    head = ("benchmark", "size", "dtype", "figure", "goal", "measured", "", "throughput", "of limit", "the goal's")
    return markdown_table(head, [_goal_cells(verdict, machine) for verdict in judge(results)])


def _goal_cells(v: Verdict, machine: dict) -> tuple[str, ...]:
    reach, throughput, limit = "", "", v.row.limit(machine)
    if v.row.seconds and v.figure.startswith(SPEED_UP):
        throughput, reach = f"{v.row.throughput:.3g} {v.row.cost.unit}", f"{v.row.throughput / limit:.0%}"
    outcome = "not measured" if v.measured is None else "met" if v.met else "**missed**"
    if not v.met and v.needed and v.needed > limit:
        outcome = "**out of reach here**"
    measured, needed = _or_dash(v.measured, "{:.3g}".format), f"{v.needed / limit:.0%}" if v.needed else ""
    return v.row.op, v.row.workload, v.row.dtype, v.figure, v.goal, measured, outcome, throughput, reach, needed


def full_table(results: list[Result], machine: dict) -> str:
    """All there is to say of the rows of one op; what was not measured is a dash."""
    head = tuple(column.format(unit=results[0].cost.unit) for column in FULL)
    return markdown_table(head, [_full_cells(r, machine) for r in results])


def _full_cells(r: Result, machine: dict) -> tuple[str, ...]:
    return (
        r.workload,
        r.dtype,
        f"**{r.implementation}**" if r.implementation.startswith(FASTLM) else r.implementation,
        _or_dash(r.seconds, duration),
        f"{duration(r.fast)} – {duration(r.slow)}" if r.seconds else "–",
        _or_dash(r.throughput, "{:.3g}".format),
        _or_dash(r.throughput, lambda throughput: f"{throughput / r.limit(machine):.0%}"),
        _or_dash(r.speed_up, "{:.2f} ×".format),
        _or_dash(r.peak_bytes, size),
        _or_dash(r.peak_ratio, "{:.2f} ×".format),
        _or_dash(r.error, lambda error: f"{error:.0e} (≤ {r.allowed:.0e})"),
    )


def _or_dash(value: float | None, write) -> str:
    return "–" if value is None else write(value)


def missing_list(results: list[Result]) -> str:
    """Why the dashes are there, a line per implementation and reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for r in results:
        reason = f"Not timed: {r.why_not}" if r.why_not else f"Memory not measured: {r.why_no_peak}" if r.why_no_peak else None
        if reason:
            where.setdefault((r.implementation, reason), []).append(f"{r.workload} {r.dtype}")
    return "\n".join(f"- **{name}**, {', '.join(rows)}. {reason}" for (name, reason), rows in where.items())


def memory_table(results: list[Result]) -> str:
    head = ("op", "size", "", "peak extra memory", "results and gradients", "beyond them", "ratio of peaks")
    rows = [
        (
            r.op,
            r.workload,
            r.implementation,
            size(r.peak_bytes),
            size(r.result_bytes),
            size(max(0, r.peak_bytes - r.result_bytes)),
            _or_dash(r.peak_ratio, "{:.3f} ×".format),
        )
        for r in results
        if r.peak_bytes
    ]
    return markdown_table(head, rows)


def machine_table(machine: dict) -> str:
    machine = {**machine, **{f"{dtype} GEMM (GFLOP/s)": rate for dtype, rate in machine["gemm_gflop_s"].items()}}
    units = {"memory_gb": "memory (GB)", "copy_gb_s": "copy (GB/s)", "read_gb_s": "read (GB/s)", "others_share": OTHERS}
    shown = [key for key in machine if key not in ("backends", "bandwidth_gb_s", "gemm_gflop_s")]
    rows = [(units.get(key, key.replace("_", " ")), machine[key]) for key in shown]
    rows += [(f"backend {name}", state) for name, state in machine["backends"].items()]
    return markdown_table(("", ""), rows)


def terminal_table(op: str, results: list[Result]) -> Table:
    """A line per setting with every implementation's time, then what the first one, fastlm's, reaches."""
    implementations = list(dict.fromkeys(r.implementation for r in results))
    table = Table(
        title=op,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, column in enumerate(("size", "dtype", *implementations, "speed-up", results[0].cost.unit, "memory")):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for _, rows in groupby(results, key=lambda r: r.setting):
        rows = {r.implementation: r for r in rows}
        first = rows[implementations[0]]
        table.add_row(
            first.workload,
            first.dtype,
            *(_or_dash(rows[name].seconds if name in rows else None, duration) for name in implementations),
            _or_dash(first.speed_up, "{:.1f} ×".format),
            _or_dash(first.throughput, "{:.3g}".format),
            _or_dash(first.peak_ratio, "{:.2f} ×".format),
        )
    return table
