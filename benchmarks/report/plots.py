"""Draw the pictures of the report. Lines and bars carry their own labels wherever there is room, in place of a legend."""

import math
import statistics
from collections.abc import Iterable
from itertools import groupby

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from suite.catalog import sections
from suite.rows import GROWTH, Filter
from suite.units import count, growth_exponent, size, times

from report.plot_style import BLUE, COLOURS, DASHES, GREY, INK, ORANGE, VERMILION, new_figure
from report.results import Result

MANY_TICKS = 300  # A logarithmic axis of a larger range has ticks at powers of ten alone.
LABEL_GAP = 0.065  # Labels are so far apart at least, as a share of the axis.
PANEL, ALONE = (5.6, 4.0), (4.4, 3.4)  # Inches of a panel: several side by side, or one above the other.


def panels_of(number: int, columns: int, share: bool = True) -> tuple[Figure, list[Axes]]:
    """Make that many axes, at most ``columns`` of them side by side."""
    single, columns = columns == 1, min(columns, number)
    lines = -(-number // columns)
    width, height = ALONE if single else PANEL
    figure = new_figure(0.6 + width * columns, 0.3 + height * lines)
    figure.get_layout_engine().set(h_pad=0.14, w_pad=0.1)
    axes = list(figure.subplots(lines, columns, sharex=share, sharey=share, squeeze=False).flatten())
    for axis in axes[number:]:
        axis.remove()
    for axis in axes[:number]:
        axis.tick_params(labelbottom=True, labelleft=True)
    return figure, axes[:number]


def colours_of(op: str) -> dict[str, str]:
    """Choose a colour per implementation, the same in every picture of a section. fastlm's own comes first."""
    section = sections()[op]
    names = [name for setting in section.settings(Filter()) for name in section.implementations(setting, full=True)]
    return dict(zip(dict.fromkeys(names), COLOURS))


# ---- lines over sizes -------------------------------------------------------------------------------------------------------


def throughput(results: list[Result], machine: dict, columns: int) -> Figure:
    """Draw throughput against size of a section: a panel per dtype, a line per implementation, and the machine's limit."""
    timed = [r for r in results if r.seconds]
    dtypes = list(dict.fromkeys(r.row.dtype for r in timed))
    figure, axes = panels_of(len(dtypes), columns)
    ends = []
    for axis, dtype in zip(axes, dtypes):
        rows = [r for r in timed if r.row.dtype == dtype]
        labels = _lines(axis, rows, lambda r: r.throughput)
        if limits := [r.limit(machine) for r in rows if r.limit(machine)]:
            axis.axhline(max(limits), color=GREY, linestyle=DASHES, linewidth=1.5)
            labels["limit"] = max(limits)
        axis.set_title(dtype if columns == 1 else f"{results[0].row.op}, {dtype}")
        axis.set_ylabel(f"throughput ({results[0].cost.unit})")
        ends.append(labels)
    _finish(axes, ends, results)
    return figure


def growth(results: list[Result], columns: int) -> Figure:
    """Draw time, and memory where it was measured, against size. Each line's growth exponent is beside its name."""
    figures = {
        "time (ms)": lambda r: r.seconds and r.seconds * 1e3,
        "extra memory (MiB)": lambda r: (r.peak_bytes or 0) / 2**20,
    }
    shown = {label: value for label, value in figures.items() if any(value(r) for r in results)}
    figure, axes = panels_of(len(shown), columns, share=False)
    ends = []
    for axis, (label, value) in zip(axes, shown.items()):
        ends.append(_lines(axis, [r for r in results if value(r)], value))
        axis.set_ylabel(label)
        axis.set_title(results[0].row.op.removeprefix("growth of "))
        _finish([axis], ends[-1:], results)
    return figure


def _lines(axis: Axes, rows: list[Result], value) -> dict[str, float]:
    """Draw a line per implementation. Return the height that each ends at."""
    ends = {}
    for name, colour in colours_of(rows[0].row.op).items():
        line = sorted((r.cost.size, value(r)) for r in rows if r.row.implementation == name)
        if line:
            axis.plot(*zip(*line), "o-", color=colour, markersize=6)
            exponent = growth_exponent(*zip(*line)) if sections()[rows[0].row.op].group == GROWTH else None
            ends[name + ("" if exponent is None else f" ∝ n^{exponent:.2f}")] = line[-1][1]
    axis.set(xscale="log", yscale="log")
    axis.margins(x=0.08, y=0.12)
    return ends


def _finish(axes: list[Axes], ends: list[dict[str, float]], results: list[Result]) -> None:
    """Set ticks, and names where lines end, after every line has widened the axes that panels may share."""
    ticks = sorted({r.cost.size for r in results})
    for axis, labels in zip(axes, ends):
        axis.set_xlabel(sections()[results[0].row.op].axis)
        axis.set_xticks(ticks, [count(n) for n in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        _logarithmic(axis.yaxis, axis.get_ylim())
        _label_ends(axis, labels, colours_of(results[0].row.op))


def _logarithmic(axis: Axis, limits: tuple[float, float], text: str = "{x:g}") -> None:
    """Set ticks at 1, 2, 5, 10, ..., or where those would crowd, at powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if limits[1] / limits[0] < MANY_TICKS else (1,)))
    axis.set_major_formatter(text)
    axis.set_minor_locator(NullLocator())


def _label_ends(axis: Axes, heights: dict[str, float], colours: dict[str, str]) -> None:
    """Write names right of a logarithmic axis, at the heights where lines end, moved apart where they would touch."""
    low, high = (math.log(y) for y in axis.get_ylim())
    shares = {name: (math.log(height) - low) / (high - low) for name, height in heights.items()}
    for (name, _), place in zip(sorted(shares.items(), key=lambda item: item[1]), apart(sorted(shares.values()), LABEL_GAP)):
        colour = next((c for key, c in colours.items() if name == key or name.startswith(key + " ∝")), GREY)
        axis.text(1.02, place, name, transform=axis.transAxes, va="center", color=colour, weight="bold", fontsize=10)


def apart(places: list[float], gap: float) -> list[float]:
    """Move rising places apart, each at least a gap above the one before, and none above 1 where there is room below."""
    moved = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    top = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top)
        top = moved[i] - gap
    return moved


# ---- the roofline -----------------------------------------------------------------------------------------------------------


def roofline(results: list[Result], machine: dict, columns: int) -> Figure:
    """Draw throughput against arithmetic intensity under this machine's roofs, of rows that count operations."""
    rows = [r for r in results if r.seconds and r.cost.flops]
    dtypes = list(dict.fromkeys(r.row.dtype for r in rows))
    figure, axes = panels_of(len(dtypes), columns)
    for axis, dtype in zip(axes, dtypes):
        settings = groupby((r for r in rows if r.row.dtype == dtype), key=lambda r: r.setting)
        for _, group in settings:
            _roofline_points(axis, list(group))
        _roof(axis, machine, dtype)
    return figure


def _roofline_points(axis: Axes, rows: list[Result]) -> None:
    """Draw fastlm's point, full, and the fastest other's, hollow, with a line between."""
    x = rows[0].cost.work / rows[0].cost.bytes_moved
    own, others = best(rows, own=True), best(rows, own=False)
    heights = [r.throughput for r in (own, others) if r]
    axis.plot([x] * len(heights), heights, color=GREY, linewidth=0.9, zorder=1)
    if own:
        axis.plot(x, own.throughput, "o", color=BLUE, markersize=6)
    if others:
        axis.plot(x, others.throughput, "o", markerfacecolor="none", color=VERMILION, markersize=6, markeredgewidth=1.5)


def _roof(axis: Axes, machine: dict, dtype: str) -> None:
    peak, bandwidth = machine["peak_gflop_s"][dtype], machine["bandwidth_gb_s"]
    axis.set(xscale="log", yscale="log")
    axis.margins(y=0.1)  # The peak's figure needs room.
    left, right = axis.get_xlim()
    left = min(left, peak / bandwidth / 4)
    right = max(right, peak / bandwidth * 8)
    axis.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color=INK, linewidth=1.6)
    axis.text(right, peak * 1.06, f"{peak:.0f} GFLOP/s", color=INK, ha="right", va="bottom", fontsize=10)
    axis.text(left * 1.1, left * bandwidth, f"{bandwidth:.0f} GB/s", color=INK, va="top", fontsize=10, rotation=0)
    axis.set_title(f"Roofline, {dtype}: ● fastlm, ○ the fastest other", fontsize=11)
    axis.set(xlabel="operations per byte that must move", ylabel="GFLOP/s")
    _logarithmic(axis.xaxis, axis.get_xlim())
    _logarithmic(axis.yaxis, axis.get_ylim())


def best(rows: Iterable[Result], own: bool) -> Result | None:
    """Return the fastest of fastlm's rows, or of the others'."""
    return min((r for r in rows if r.seconds and r.row.own == own), key=lambda r: r.seconds, default=None)


# ---- speed-ups --------------------------------------------------------------------------------------------------------------

DTYPE_COLOURS = {"float32": BLUE, "bfloat16": ORANGE, "float16": VERMILION, "float64": GREY}


def speed_ups(results: list[Result], columns: int) -> Figure:
    """Draw a bar per section and dtype, from 1 × to the median speed-up over the fastest other, and a dot for each size."""
    bars: dict[str, dict[str, list[float]]] = {}
    for setting, rows in groupby(results, key=lambda r: r.setting):
        rows = list(rows)
        own, others = best(rows, own=True), best(rows, own=False)
        if own and others:
            bars.setdefault(setting.op, {}).setdefault(setting.dtype, []).append(others.seconds / own.seconds)
    number = sum(len(by_dtype) for by_dtype in bars.values())
    figure = new_figure(5.0 if columns == 1 else 9.5, 1.3 + 0.23 * number + 0.42 * len(bars))
    axis = figure.subplots()
    place = 0.0
    for name, by_dtype in bars.items():
        where = (1, place), (4, 0), "data", "offset points"  # The line would strike it through.
        axis.annotate(name, *where, va="center", weight="bold", fontsize=10 if columns > 1 else 9)
        for dtype, ratios in by_dtype.items():
            place -= 0.55 if dtype == next(iter(by_dtype)) else 0.36
            _speed_up_bar(axis, place, dtype, ratios)
        place -= 0.75
    axis.axvline(1, color=INK, linewidth=1.8)
    axis.set(xscale="log", ylim=(place + 0.2, 0.6), xlabel="times as fast as the fastest other")
    axis.margins(x=0.12)
    _logarithmic(axis.xaxis, axis.get_xlim(), "{x:g} ×")
    axis.set_yticks([])
    axis.grid(axis="y", visible=False)
    return figure


def _speed_up_bar(axis: Axes, place: float, dtype: str, ratios: list[float]) -> None:
    middle, colour = math.exp(statistics.median(map(math.log, ratios))), DTYPE_COLOURS[dtype]
    axis.barh(place, middle - 1, left=1, height=0.3, color=colour, alpha=0.75)
    axis.plot(ratios, [place] * len(ratios), "o", color=INK, markersize=3)
    far = max(*ratios, 1.0)
    label = f"{dtype} {times(middle)}"
    axis.annotate(label, (far, place), (6, 0), textcoords="offset points", va="center", fontsize=9, color=INK)


# ---- memory -----------------------------------------------------------------------------------------------------------------


def memory(results: list[Result], columns: int) -> Figure:
    """Draw peak extra memory, a panel per setting, a bar per implementation. The paler part is the call's results."""
    panels = [list(rows) for _, rows in groupby((r for r in results if r.peak_bytes), key=lambda r: r.setting)]
    figure = new_figure(5.0 if columns == 1 else 8.5, 0.6 + sum(0.34 * len(rows) + 0.6 for rows in panels))
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(rows) + 0.4 for rows in panels])[:, 0]
    for axis, rows in zip(axes, panels):
        _memory_bars(axis, rows)
    axes[-1].set_xlabel("peak extra memory of a call (MiB)")
    return figure


def _memory_bars(axis: Axes, rows: list[Result]) -> None:
    colours = colours_of(rows[0].row.op)
    for row in rows:
        name, total = row.row.implementation, row.peak_bytes / 2**20
        result = min(row.result_bytes, row.peak_bytes) / 2**20
        axis.barh(name, result, color=colours.get(name, GREY), alpha=0.45, height=0.72)
        axis.barh(name, total - result, left=result, color=colours.get(name, GREY), height=0.72)
        ratio = f"  {row.peak_ratio:.2f} ×" if row.peak_ratio and row.peak_ratio != 1 else ""
        axis.annotate(size(row.peak_bytes) + ratio, (total, name), (5, 0), textcoords="offset points", va="center", fontsize=10)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.3)
    axis.set_title(f"{rows[0].row.op}, {rows[0].row.workload}", fontsize=11)


# ---- the digits -------------------------------------------------------------------------------------------------------------


def losses(digits: dict, columns: int) -> Figure:
    """Draw the trainings side by side: their losses, and how far each strays from the one in float64."""
    curves = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in digits["curves"].items()}
    steps = digits["steps_per_epoch"]
    figure, (left, right) = panels_of(2, columns, share=False)
    for name, colour, width in (("eager", ORANGE, 6), ("fused", BLUE, 1.6)):
        left.plot(curves[name].unfold(0, steps, steps).mean(dim=1), color=colour, linewidth=width, label=name)
        distance = (curves[name] - curves["float64"]).abs().cummax(dim=0).values
        right.plot(range(1, len(distance) + 1), distance, color=colour, linewidth=width, label=name)
    left.set(xlabel="epoch", ylabel="mean loss (nats per image)", title="One seed, one noise, two latents")
    right.set(xlabel="step", ylabel="largest distance so far (nats)", title="How far from the training in float64")
    right.set(xscale="log", yscale="log")
    check = digits["agreement"]
    right.hlines(check["first_allowed"], 1, check["first_steps"], color=GREY, linestyle=DASHES, linewidth=1.5)
    right.text(1, check["first_allowed"] * 1.25, f"allowed over the first {check['first_steps']} steps", color=GREY)
    left.legend(frameon=False)
    right.legend(frameon=False, loc="upper left")
    return figure
