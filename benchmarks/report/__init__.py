"""Write the report of a run from its JSON file: one HTML page, the same in Markdown, and tables for the terminal."""

import re
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.table import Table
from suite.catalog import sections
from suite.rows import GPU, GROWTH, MODELS, OPS

from report import plots
from report.blocks import Block, Code, Details, Heading, Plot, Text, Warn, plain
from report.context_parallel import context_parallel_blocks
from report.digits import digits_blocks
from report.gpu import NOT_MEASURED, prediction_blocks
from report.html import write_html
from report.markdown import write_markdown
from report.results import Result, read, results_of
from report.tables import full_table, goals_table, growth_table, machine_table, memory_table, missing_list, terminal_table
from report.texts import ABOUT_GOALS, ABOUT_GROWTH, ABOUT_MEMORY, ABOUT_MODELS, ABOUT_ROOFLINE, ABOUT_SPEED_UPS, METHOD

BENCHMARKS = Path(__file__).parents[1]
DEFAULT_OUT = BENCHMARKS.parent / "build" / "bench"
RUN = "bench.json"  # the run's file in its folder
DISTURBED = 0.05  # The report warns where others had more than this share of the CPU time.


def write_report(out: Path, publish: bool = False) -> list[Table]:
    """Write report.html and report.md into a run's folder, and with ``publish`` RESULTS.md. Return tables for the terminal."""
    run = read(out / RUN)
    results = results_of(run)
    blocks = blocks_of(run, results, out)
    write_html(blocks, out / "report.html")
    write_markdown(blocks, out / "report.md", out)
    if publish:
        for picture in (BENCHMARKS / "results").glob("*.png"):
            picture.unlink()  # Its section may be no more.
        write_markdown(blocks, BENCHMARKS / "RESULTS.md", BENCHMARKS / "results")
    return [terminal_table(op, rows) for op, rows in _by_op(results)]


def blocks_of(run: dict, results: list[Result], out: Path) -> list[Block]:
    """Return the report without what was not measured. ``out`` has the pictures of the digits."""
    machine = run["machine"]
    groups = {group: [r for r in results if sections()[r.row.op].group == group] for group in (OPS, GPU, MODELS, GROWTH)}
    return [
        Heading(1, "fastlm: benchmark report"),
        Text(_summary(machine)),
        Code(run["command"]),
        *[Warn(text) for text in [warning(machine)] if text],
        *_overview([*groups[MODELS], *groups[OPS]], machine),
        *_models(groups[MODELS], machine),
        *_sections(groups[OPS], machine),
        *_growth(groups[GROWTH], machine),
        *_memory(results),
        *_goals(results, machine),
        *context_parallel_blocks(run.get("context_parallel")),
        *digits_blocks(run.get("digits"), out),
        *(_sections(groups[GPU], machine) or NOT_MEASURED),
        *prediction_blocks(run.get("predictions")),
        *METHOD,
        Heading(2, "The machine"),
        machine_table(machine),
    ]


def _summary(machine: dict) -> str:
    return plain(
        f"Measured {machine['date']}: {machine['cpu']}, {machine['threads']} threads, memory bandwidth "
        f"{machine['bandwidth_gb_s']} GB/s, peak {machine['peak_gflop_s']['float32']:.0f} GFLOP/s in float32. "
        f"torch {machine['torch']}; fastlm {machine['fastlm']} ({machine['commit']}), its C++ kernels "
        f"{machine['backends']['cpu']}."
    )


def warning(machine: dict) -> str:
    """Return a warning for a run that was not alone on the machine, or nothing where it was."""
    share = machine.get("others_share") or 0.0
    if share <= DISTURBED:
        return ""
    return f"Do not trust these times: while rows were timed, other programs or guests had {share:.0%} of the CPU time."


def _overview(results: list[Result], machine: dict) -> list[Block]:
    blocks: list[Block] = []
    if any(r.speed_up for r in results):
        drawn = Plot("speed_ups", "times as fast as the fastest other", partial(plots.speed_ups, results))
        blocks += [Heading(2, "Speed-ups"), Text(ABOUT_SPEED_UPS), drawn]
    if any(r.seconds and r.cost.flops for r in results):
        drawn = Plot("roofline", "throughput under the roofline", partial(plots.roofline, results, machine))
        blocks += [Heading(2, "Roofline"), Text(ABOUT_ROOFLINE), drawn]
    return blocks


def _models(results: list[Result], machine: dict) -> list[Block]:
    if not results:
        return []
    blocks: list[Block] = [Heading(2, "Whole models"), Text(ABOUT_MODELS)]
    for op, rows in _by_op(results):
        blocks += [Heading(3, plain(op)), full_table(rows, machine), *missing_list(rows)]
    return blocks


def _sections(results: list[Result], machine: dict) -> list[Block]:
    blocks: list[Block] = []
    for op, rows in _by_op(results):
        table = [full_table(rows, machine), *missing_list(rows)]
        blocks.append(Heading(2, plain(op)))
        if _sizes(rows) > 1:
            name = "throughput_" + re.sub(r"\W+", "_", op)
            blocks.append(Plot(name, f"throughput of {op}", partial(plots.throughput, rows, machine)))
            blocks.append(Details(f"Every row of {plain(op)}", table))
        else:
            blocks += table
    return blocks


def _growth(results: list[Result], machine: dict) -> list[Block]:
    if not results:
        return []
    blocks: list[Block] = [Heading(2, "Growth"), Text(ABOUT_GROWTH), growth_table(results)]
    for op, rows in _by_op(results):
        if _sizes(rows) > 1:
            blocks.append(Plot(re.sub(r"\W+", "_", op), op, partial(plots.growth, rows)))
        blocks += [Details(f"Every row of {plain(op)}", [full_table(rows, machine), *missing_list(rows)])]
    return blocks


def _memory(results: list[Result]) -> list[Block]:
    measured = [r for r in results if r.peak_bytes and sections()[r.row.op].group != GROWTH]
    if not measured:
        return []
    drawn = Plot("memory", "peak extra memory", partial(plots.memory, measured))
    return [Heading(2, "Memory"), Text(ABOUT_MEMORY), drawn, Details("Every row of memory", [memory_table(results)])]


def _goals(results: list[Result], machine: dict) -> list[Block]:
    table = goals_table(results, machine)
    if not table.rows:
        return []
    return [Heading(2, "Goals"), Text(ABOUT_GOALS), Details("Each goal against each row it covers", [table])]


def _by_op(results: list[Result]) -> list[tuple[str, list[Result]]]:
    return [(op, list(rows)) for op, rows in groupby(results, key=lambda r: r.row.op)]


def _sizes(results: list[Result]) -> int:
    return len({r.cost.size for r in results if r.seconds})
