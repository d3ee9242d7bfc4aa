"""Draw the model's plots, and the measured points over the model's lines."""

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from report.plot_style import BLUE, COLOURS, DASHES, GREEN, GREY, INK, VERMILION, new_figure
from suite.units import count

from context_parallel.links import H100, LINKS, Link, Processor, layer_of
from context_parallel.measure import LEAST_THROUGHPUT, RANKS, case_of
from context_parallel.steps import ALONE, ONE_PROCESS
from context_parallel.tables import RANKS as MANY
from context_parallel.times import TOLERABLE, exposed_share, one_process_seconds, seconds
from context_parallel.traffic import METHODS

SHOWN_LINKS = "NVLink 4", "PCIe 5 x16", "InfiniBand NDR", "InfiniBand HDR", "Ethernet 100 Gb/s", "Ethernet 10 Gb/s"
SHOWN_MODEL = "Llama-3-8B"
LENGTHS = [1 << n for n in range(12, 22)]
MODEL = "A model, not a measurement"


def exposed() -> Figure:
    """Draw the exposed transfer over the length of the sequence: a line per link, a panel per method, causal and full."""
    figure = new_figure(12.5, 9.6)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, causal in zip(axes, (True, False)):
        for axis, (name, plan) in zip(line, METHODS.items()):
            for colour, link in zip(COLOURS, [link for link in LINKS if link.name in SHOWN_LINKS]):
                share = [100 * exposed_share(plan(layer_of(SHOWN_MODEL, n, causal), MANY), link, H100) for n in LENGTHS]
                axis.plot(LENGTHS, share, color=colour, label=f"{link.name} ({_speed(link)})")
            axis.axhspan(0.01, 100 * TOLERABLE, color=GREY, alpha=0.12, linewidth=0)
            axis.set_title(f"{name}, {'causal' if causal else 'full'}")
            axis.set(xscale="log", yscale="log", ylim=(0.3, 1000))
            _lengths(axis, LENGTHS[::2])
            axis.set_yticks([1, 10, 100, 1000], ["1 %", "10 %", "100 %", "1,000 %"])
    axes[0, 0].text(LENGTHS[0] * 1.1, 0.4, f"at most {100 * TOLERABLE:.0f} % of the computation", color=GREY)
    for axis in axes[:, 0]:
        axis.set_ylabel("transfer that nothing hides,\nas a share of the computation")
    for axis in axes[1]:
        axis.set_xlabel("rows of the whole sequence")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, title="bandwidth in one direction")
    figure.suptitle(
        f"{MODEL}: one layer of {SHOWN_MODEL}, forward and backward, bfloat16,\n"
        f"on {MANY} ranks that compute {H100.flops / 1e12:.0f} TFLOP/s each",
        x=0.01, ha="left", fontsize=14,
    )  # fmt: skip
    return figure


def measured(found: dict) -> Figure:
    """Draw the throughput of two processes as a share of one's: measured points, and the model's lines by what was measured."""
    groups: dict[tuple, list[dict]] = {}
    for row in found["rows"]:
        groups.setdefault((row["dtype"], row["query_heads"], row["key_heads"], row["causal"]), []).append(row)
    lines = -(-len(groups) // 2)
    figure = new_figure(12.5, 1.6 + 2.9 * lines)
    axes = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
    link = Link("measured", found["link"]["bandwidth"], found["link"]["latency"])
    for axis, ((dtype, query_heads, key_heads, causal), rows) in zip(axes.flatten(), groups.items()):
        _measured_panel(axis, rows, link)
        axis.set_title(f"{dtype}, {'causal' if causal else 'full'}, {query_heads} query heads on {key_heads}")
    for axis in axes.flatten()[len(groups) :]:
        axis.remove()
    for axis in axes[-1]:
        axis.set_xlabel("rows of the whole sequence")
    figure.supylabel("throughput, over that of one process", fontsize=12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "Points: measured. Lines: a model, by two other measurements: the link between the processes\n"
        f"({link.bandwidth / 1e9:.2g} GB/s, {link.latency * 1e6:.0f} µs), and processes that send nothing",
        x=0.01, ha="left", fontsize=13,
    )  # fmt: skip
    return figure


def _measured_panel(axis: Axes, rows: list[dict], link: Link) -> None:
    lengths = sorted({row["sequence"] for row in rows})
    times = {(row["way"], row["sequence"]): statistics.median(row["seconds"]) for row in rows}
    axis.axhline(1, color=INK, linewidth=1.5)
    axis.axhline(LEAST_THROUGHPUT, color=GREY, linestyle=DASHES, linewidth=1.5, label=f"the goal: {LEAST_THROUGHPUT}")
    axis.plot(
        lengths, [times[ONE_PROCESS, n] / times[ALONE, n] for n in lengths], "s", color=GREEN, label="sending nothing, measured"
    )
    for way, colour, aside in (("all-to-all", BLUE, 0.97), ("ring", VERMILION, 1.03)):
        points = [times[ONE_PROCESS, n] / times[way, n] for n in lengths]
        axis.plot([aside * n for n in lengths], points, "o", color=colour, markersize=9, label=f"{way}, measured")
        model = [times[ONE_PROCESS, n] / _modelled_seconds(rows[0], way, n, link, times[ALONE, n]) for n in lengths]
        axis.plot(lengths, model, color=colour, label=f"{way}, model")
    axis.set(xscale="log", ylim=(0, None))
    _lengths(axis, lengths)


def _modelled_seconds(row: dict, method: str, sequence: int, link: Link, alone: float) -> float:
    """Return the model's time of all processes, which compute so long where nothing is sent."""
    layer = case_of(row)._replace(sequence=sequence).layer
    processor = Processor("measured", one_process_seconds(layer, Processor("", 1.0)) / RANKS / alone)
    return seconds(METHODS[method](layer, RANKS), link, processor)


def _lengths(axis: Axes, lengths: list[int]) -> None:
    axis.set_xticks(lengths, [count(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())


def _speed(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.3g} GB/s"
