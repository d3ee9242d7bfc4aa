"""Run the main job, `make bench` or `fastlm bench`: check, time and measure each op and model, train the digits VAE, report.

    fastlm bench                                             # at most twelve minutes on two cores, on slow ones with fewer rows
    fastlm bench --full                                      # the long sizes and every dtype too
    fastlm bench "attention, forward" --sizes 1x8x512x64     # one section, at sizes of your own
    fastlm bench --resume                                    # go on with a run that was interrupted
    fastlm bench --compare A.json B.json                     # what got slower between two runs; exit code 1 where something did

Leaves in --out (build/bench) report.html, report.md and its pictures, and bench.json: all that was measured, the times in
pytest-benchmark's format. While it runs, what is finished is in bench.jsonl. The exit code is 1 where an answer was wrong.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from context_parallel.section import run_section
from digits.compare_latents import run_digits
from gpu.steps import GPU_LOST
from report import DEFAULT_OUT, RUN, compare, warning, write_report
from rich.console import Console
from suite import machine
from suite.budget import Budget
from suite.catalog import rows_of, sections, settings
from suite.device import CUDA, stand_in_for_gpu
from suite.journal import Journal
from suite.memory import SECONDS, peak_extra_bytes
from suite.rows import Filter, Row
from suite.terminal import Activity
from suite.timing import GPULost, benchmark_json, time_rows
from suite.units import size
from workloads.workload import ON_GPU

from fastlm.backend import triton as triton_kernels

LOG_WIDTH = 128  # The output has so many columns where it is no terminal.
ONCE = "machine", "context_parallel", "digits", "predictions"  # These steps have one row each.
# What --only runs, without a GPU's rows.
PARTS = {"ops": ("rows",), "context-parallel": ("context_parallel",), "digits": ("digits",), "gpu": ("predictions",)}
EVERYTHING = "rows", "context_parallel", "digits", "predictions"
RUN_SECONDS = 640.0  # A whole run takes so many before its report, and so ends within twelve minutes.
LEAST = 8.0  # The memory of a row is measured for so many seconds at least.
AFTER_ROWS, AFTER_MEMORY = 185.0, 115.0  # So many seconds are kept for what follows.
PART_AFTER_ROWS = 0.2  # The same, where nothing but the memory of rows follows, as a part of the run's time.


def main() -> int:
    options = parse_options()
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        if options.compare:
            return compare.show(tuple(options.compare), console)
        return run(options, console)
    except ValueError as error:
        print(f"fastlm bench: {error}", file=sys.stderr)
        return 2
    except GPULost as lost:
        print(f"\nfastlm bench: {lost}; what is finished is kept, and --resume goes on behind it", file=sys.stderr)
        return GPU_LOST
    except KeyboardInterrupt:
        print("\nfastlm bench: interrupted; what is finished is kept, and --resume goes on", file=sys.stderr)
        return 130


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastlm bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "op", nargs="?", metavar="OP", help="one section, or all whose names have this in them, and nothing else"
    )
    parser.add_argument("--sizes", default="", help="in place of OP's own, with commas between: 1x8x512x64,1x8x1024x64")
    parser.add_argument("--only", choices=PARTS, help="one part of the run; the report has that part alone")
    parser.add_argument("--seconds", type=float, help="the time of the whole run; rows that do not fit in say so")
    parser.add_argument(
        "--dry-run", action="store_true", help="a GPU's sections in Triton's interpreter, at one tiny size each"
    )
    parser.add_argument("--full", action="store_true", help="the long sizes and every dtype too")
    parser.add_argument("--resume", action="store_true", help="go on with a run of the same options that was interrupted")
    parser.add_argument("--publish", action="store_true", help="also write benchmarks/RESULTS.md and its pictures")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="two runs' bench.json; runs nothing"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        stand_in_for_gpu()
        options.op = options.op or ON_GPU
        if ON_GPU not in options.op:
            parser.error(f"--dry-run is for the sections of a GPU, whose names begin with {ON_GPU!r}")
    if options.sizes and not options.op:
        parser.error("--sizes needs OP, the section that they are sizes of")
    if options.publish and (options.op or options.only):
        parser.error("--publish is for a whole run, without OP and --only")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure what was asked for and report it. Return 1 where an answer was wrong, else 0."""
    gpu_alone = options.only == "gpu" and CUDA.available()
    sizes = tuple(filter(None, options.sizes.split(",")))
    row_filter = Filter(options.full, ON_GPU if gpu_alone else options.op, sizes, options.dry_run)
    settings(row_filter)  # It raises where there is no such section or size, before anything is measured.
    parts = ("rows",) if options.op else ("rows", "predictions") if gpu_alone else PARTS.get(options.only, EVERYTHING)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    what = {"op": row_filter.only, "sizes": row_filter.sizes, "tiny": row_filter.tiny, "full": row_filter.full, "parts": parts}
    journal = Journal(out / "bench.jsonl", what | {"commit": machine.commit(), "torch": torch.__version__}, options.resume)
    limit = options.seconds or (None if options.full or options.op else RUN_SECONDS)
    right = measure(journal, row_filter, parts, console, out, Budget(limit))
    console.rule("Report")
    content = benchmark_json(journal) | {"memory": journal.of("memory")} | {name: journal.one(name) for name in ONCE}
    content["machine"] |= machine.best_peaks(journal.of("peaks"))
    content["machine"]["others_share"] = max(journal.of("others_share"), default=None)
    content["command"] = command_of(options)
    out.joinpath(RUN).write_text(json.dumps(content, indent=1))
    with Activity(console, 1) as activity:
        activity.say("drawing and writing the report")
        tables = write_report(out, options.publish)
    for name in ("report.html", "report.md", RUN):
        console.print(f"  {out / name}", soft_wrap=True)
    console.print(*tables)
    console.print(warning(content["machine"]), style="bold red")
    if not right:
        print("fastlm bench: a check of the answers failed, see above", file=sys.stderr)
    return 0 if right else 1


def measure(journal: Journal, row_filter: Filter, parts: tuple[str, ...], console: Console, out: Path, budget: Budget) -> bool:
    """Take every step that the journal does not have yet. Return whether all answers were right."""
    console.rule("The machine")
    description = journal.once("machine", machine.describe)
    peaks = journal.once("peaks", lambda: machine.peaks(console))
    console.print(
        f"  {description['cpu']}, {description['threads']} threads, {peaks['bandwidth_gb_s']} GB/s, "
        f"{peaks['peak_gflop_s']['float32']} GFLOP/s"
    )
    right = True
    if "rows" in parts:
        console.rule("Is the answer right, and how fast is it? (medians)")
        with machine.OthersShare() as others:
            # A run of rows alone has nothing but their memory to come.
            kept = AFTER_ROWS if len(parts) > 1 or budget.unlimited else PART_AFTER_ROWS * budget.seconds
            right &= time_rows(journal, row_filter, budget.before(kept))
        journal.add("others_share", others.share or 0.0)
        journal.add("peaks", machine.peaks(console))
        console.rule("Peak extra memory")
        measure_memory(journal, row_filter, console, budget.before(AFTER_MEMORY) if len(parts) > 1 else budget)
    if "context_parallel" in parts:
        console.rule("Context parallel: two processes and one")
        right &= "failed" not in journal.once("context_parallel", lambda: two_processes(console, budget))
    if "digits" in parts:
        console.rule("Digits VAE: fused and eager")
        with Activity(console, 1, bar=False) as activity:
            right &= journal.once("digits", lambda: run_digits(activity, out))["agreement"]["agree"]
    if "predictions" in parts:
        console.rule("GPU kernels")
        journal.once("predictions", lambda: predict(console, budget))
    return right


def measure_memory(journal: Journal, row_filter: Filter, console: Console, budget: Budget) -> None:
    """Measure the peak extra memory of the settings that are worth it, each row in a process of its own."""
    worth = [setting for setting in settings(row_filter) if sections()[setting.op].has_memory(setting)]
    done = {Row(*(row[name] for name in Row._fields)) for row in journal.of("memory")}
    rows = [row for setting in worth for row in rows_of(setting, row_filter.full) if row not in done]
    budget.plan(dict.fromkeys(rows, 1))
    left_out = 0
    with Activity(console, len(rows)) as activity:
        for row in rows:
            activity.say(" ".join(row))
            budget.enter(row)
            if budget.left > 0:
                found = peak_extra_bytes(
                    "suite.catalog:fresh_step", seconds=min(SECONDS, max(LEAST, budget.most)), **row._asdict()
                )
                text = size(found["bytes"]) if "bytes" in found else found["why_not"]
                activity.print(f"  {' '.join(row)}: {text}", highlight=False, soft_wrap=True, markup=False)
            else:
                found = {"why_not": budget.why_not("it")}
                left_out += 1
            journal.add("memory", row._asdict() | found)
            activity.advance()
    if left_out:
        console.print(f"  {left_out} more rows: {budget.why_not('them')}", highlight=False, soft_wrap=True)


def two_processes(console: Console, budget: Budget) -> dict:
    """Measure two processes against one, unless the run is over its time."""
    if budget.left <= 0:
        return {"why_not": budget.why_not("it")}
    with Activity(console, 1, bar=False) as activity:
        return run_section(activity.say)


def predict(console: Console, budget: Budget) -> dict:
    """Predict the speed of the Triton kernels on GPUs from their machine code. No GPU is needed, and none is measured."""
    if triton_kernels.NOT_INSTALLED:
        return {"why_not": triton_kernels.NOT_INSTALLED}
    if budget.left <= 0:
        return {"why_not": budget.why_not("them")}
    from gpu import roofline  # This imports Triton.

    variants = roofline.default_variants(roofline.DEFAULT_GPUS)
    with Activity(console, len(variants)) as activity:
        activity.say("compiling Triton kernels for GPUs")

        def go_on() -> bool:
            activity.advance()
            return budget.left > 0

        rows = roofline.table_rows(variants, go_on)
    console.print(roofline.table(rows))
    missing = len(variants) - len(rows)
    why_not_all = budget.why_not(f"{missing} more") if missing else None
    return {"head": roofline.HEADER, "rows": rows, "why_not_all": why_not_all}


def command_of(options: argparse.Namespace) -> str:
    """Return what a reader types to have these figures of their own machine."""
    words = ["fastlm bench"]
    words += [f'"{options.op}"'] if options.op else []
    words += [f"--sizes {options.sizes}"] if options.sizes else []
    words += [f"--only {options.only}"] if options.only else []
    return " ".join(words + ["--dry-run"] * options.dry_run + ["--full"] * options.full)


if __name__ == "__main__":
    sys.exit(main())
