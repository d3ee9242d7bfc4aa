"""The pictures of the report. Lines and bars carry their own labels: there is no legend to look up."""

from itertools import groupby
from pathlib import Path

import torch
from bench_results import Result, size
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from op_rows import axis_of, implementations
from plot_style import BLUE, COLOURS, GREY, ORANGE, new_figure, save

LABEL_GAP = 0.06  # between labels, as a share of the axis


def throughput(results: list[Result], machine: dict, path: Path) -> None:
    """Throughput against size of one op: a panel per dtype, a line per implementation, and what the machine allows."""
    timed = [r for r in results if r.seconds]
    dtypes = list(dict.fromkeys(r.dtype for r in timed))
    colours = colours_of(results[0].op)
    columns = min(2, len(dtypes))
    lines = -(-len(dtypes) // columns)
    figure = new_figure(1.2 + 5.4 * columns, 0.4 + 4.2 * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    ends = [_throughput_lines(axis, [r for r in timed if r.dtype == d], colours) for axis, d in zip(panels, dtypes)]
    for axis in panels[len(dtypes) :]:
        axis.axis("off")
    for axis, dtype, labels in zip(panels, dtypes, ends):
        limit = max(r.limit(machine) for r in timed if r.dtype == dtype)
        axis.axhline(limit, color=GREY, linestyle=(0, (5, 4)), linewidth=1.5)
        axis.set_title(f"{results[0].op}, {dtype}")
        labels["limit"] = limit
    figure.supxlabel(axis_of(results[0].op), fontsize=12)
    figure.supylabel(f"throughput ({results[0].cost.unit})", fontsize=12)
    ticks = sorted({r.cost.size for r in timed})
    panels[0].set_xticks(ticks, [_count(n) for n in ticks])
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    for axis, labels in zip(panels, ends):  # only now that every line has widened the shared axis
        _label_ends(axis, labels, colours)
    save(figure, path)


def _throughput_lines(axis: Axes, rows: list[Result], colours: dict[str, str]) -> dict[str, float]:
    """One line per implementation; the height that each ends at."""
    ends = {}
    for name, colour in colours.items():
        line = sorted((r.cost.size, r.throughput) for r in rows if r.implementation == name)
        if line:
            axis.plot(*zip(*line), "o-", color=colour, markersize=7)
            ends[name] = line[-1][1]
    axis.set(xscale="log", yscale="log")
    axis.margins(x=0.08, y=0.12)
    return ends


def _label_ends(axis: Axes, heights: dict[str, float], colours: dict[str, str]) -> None:
    """Names to the right of a logarithmic axis, at the heights where their lines end, moved apart where they would touch."""
    low, high = (torch.tensor(y).log() for y in axis.get_ylim())
    previous = -1.0
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        share = ((torch.tensor(height).log() - low) / (high - low)).item()
        previous = max(share, previous + LABEL_GAP)
        axis.text(1.02, previous, name, transform=axis.transAxes, va="center", color=colours.get(name, GREY), weight="bold")


def memory(results: list[Result], path: Path) -> None:
    """Peak extra memory, a panel per op and size, a bar per implementation; the paler part is the call's results themselves."""
    measured = [r for r in results if r.peak_bytes]
    panels = [list(rows) for _, rows in groupby(measured, key=lambda r: r.setting)]
    figure = new_figure(8.5, 0.6 + 0.45 * len(measured) + 0.75 * len(panels))
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(rows) + 0.4 for rows in panels])[:, 0]
    for axis, rows in zip(axes, panels):
        _memory_bars(axis, rows)
    axes[-1].set_xlabel("peak extra memory of a call (MiB); the paler part is its results, gradients included")
    save(figure, path)


def _memory_bars(axis: Axes, rows: list[Result]) -> None:
    colours = colours_of(rows[0].op)
    for row in rows:
        total, result = row.peak_bytes / 2**20, min(row.result_bytes, row.peak_bytes) / 2**20
        axis.barh(row.implementation, total, color=colours[row.implementation], height=0.72)
        axis.barh(row.implementation, result, color="white", alpha=0.45, height=0.72)
        ratio = f"  {row.peak_ratio:.2f} ×" if row.peak_ratio and row.peak_ratio != 1 else ""
        axis.annotate(
            size(row.peak_bytes) + ratio, (total, row.implementation), (5, 0), textcoords="offset points", va="center"
        )
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.25)
    axis.set_title(f"{rows[0].op}, {rows[0].workload}, {rows[0].dtype}")


def losses(digits: dict, path: Path) -> None:
    """The trainings side by side: their losses, and how far each strays from the one in float64."""
    curves = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in digits["curves"].items()}
    steps = digits["steps_per_epoch"]
    figure = new_figure(12, 4.4)
    left, right = figure.subplots(1, 2)
    for name, colour, width in (("eager", ORANGE, 6), ("fused", BLUE, 1.6)):
        left.plot(curves[name].unfold(0, steps, steps).mean(dim=1), color=colour, linewidth=width, label=name)
        distance = (curves[name] - curves["float64"]).abs().cummax(dim=0).values
        right.plot(range(1, len(distance) + 1), distance, color=colour, linewidth=width, label=name)
    left.set(xlabel="epoch", ylabel="mean loss (nats per image)", title="Digits VAE: one seed, one noise, two latents")
    right.set(xlabel="step", ylabel="largest distance so far (nats)", title="Distance from the same training in float64")
    right.set(xscale="log", yscale="log")
    check = digits["agreement"]
    right.hlines(check["first_allowed"], 1, check["first_steps"], color=GREY, linestyle=(0, (5, 4)), linewidth=1.5)
    right.text(1, check["first_allowed"] * 1.25, f"allowed over the first {check['first_steps']} steps", color=GREY)
    left.legend(frameon=False)
    right.legend(frameon=False, loc="upper left")
    save(figure, path)


def colours_of(op: str) -> dict[str, str]:
    """A colour per implementation, the same in every picture: fastlm's own comes first."""
    return dict(zip(implementations(op), COLOURS))


def _count(n: int) -> str:
    """3200 -> "3,200", 65536 -> "64K", 1048576 -> "1M"."""
    return f"{n / 2**20:.3g}M" if n >= 2**20 else f"{n / 2**10:.3g}K" if n >= 2**14 else f"{n:,}"
