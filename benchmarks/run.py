"""The main job, `make bench`: check, time and measure each op, train the digits VAE, compile GPU kernels, and write a report.

    python benchmarks/run.py [--only ops|digits|gpu] [--full] [--out DIR]

Leaves in DIR (build/bench): report.md and its pictures, and machine.json, ops.json (pytest-benchmark's format), memory.json,
digits.json, gpu.json, gpu_latent.json and predictions.json, from which `report.py` can write it again. The exit code is 1 where
an answer was wrong.
"""

import argparse
import json
import sys
from pathlib import Path

import bench_gpu
import bench_gpu_latent
import machine
import torch
from bench_digits import run_digits
from bench_results import size
from memory import peak_extra_bytes
from op_rows import all_rows, find
from ops_progress import bar, run_ops
from report import DEFAULT_OUT, warning, write_report
from rich.console import Console

from fastlm import cuda_kernels, triton_kernels

STEPS = "machine", "ops", "memory", "digits", "gpu", "gpu_latent", "predictions"
LOG_WIDTH = 128  # where the output is no terminal


def main() -> None:
    options = parse_options()
    out, console = options.out.resolve(), Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    out.mkdir(parents=True, exist_ok=True)
    for name in STEPS:
        out.joinpath(f"{name}.json").unlink(missing_ok=True)  # a report is of one run
    right = True
    console.rule("The machine")
    description = machine.describe()
    console.print(
        f"  {description['cpu']}, {description['threads']} threads, {description['bandwidth_gb_s']} GB/s, "
        f"{description['gemm_gflop_s']['float32']} GFLOP/s"
    )
    if options.only in (None, "ops"):
        console.rule("Ops: is the answer right, and how fast is it? (medians)")
        with machine.OthersShare() as others:
            right &= run_ops(out / "ops.json", options.full) == 0
        description["others_share"] = others.share
        console.rule("Ops: peak extra memory")
        _save(out, "memory", measure_memory(console, options.full))
    if options.only in (None, "digits"):
        console.rule("Digits VAE: fused and eager")
        right &= run_digits(console, out)
    if options.only in (None, "gpu"):
        console.rule("GPU kernels")
        _save(out, "predictions", predict(console))
        if torch.cuda.is_available():
            rows = _save(out, "gpu", bench_gpu.run())
            console.print(bench_gpu.table(rows))
            _bench_latent(out, console)
    console.rule("Report")
    _save(out, "machine", description)
    tables = write_report(out)
    console.print(f"  {out / 'report.md'}", soft_wrap=True)
    console.print(*tables)
    console.print(warning(description), style="bold red")
    if not right:
        sys.exit("fastlm's benchmark: a check of the answers failed, see above")


def _bench_latent(out: Path, console: Console) -> None:
    """The CUDA kernels, where this build has them."""
    if reason := cuda_kernels.unavailable(torch.cuda.current_device()):
        console.print(f"  the latent: {reason}")
        return
    rows = _save(out, "gpu_latent", bench_gpu_latent.run())
    console.print(bench_gpu_latent.table(rows))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("ops", "digits", "gpu"), help="one part; the report has that part alone")
    parser.add_argument("--full", action="store_true", help="the long sizes and every dtype too")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    return parser.parse_args()


def measure_memory(console: Console, full: bool) -> list[dict]:
    """Peak extra memory in float32 of the sizes that are worth it, each in a process of its own."""
    names = ("op", "workload", "dtype", "implementation")
    rows = [dict(zip(names, row)) for row in all_rows(full) if row[2] == "float32" and find(*row[:2])[1].memory]
    with bar(console) as progress:
        task = progress.add_task("", total=len(rows))
        for row in rows:
            name = " ".join(row.values())
            progress.update(task, description=name)
            row |= peak_extra_bytes("op_rows:fresh_step", **row)
            progress.advance(task)
            console.print(
                f"  {name}: {size(row['bytes']) if 'bytes' in row else row['why_not']}", highlight=False, soft_wrap=True
            )
    return rows


def predict(console: Console) -> dict:
    """What the machine code of the Triton kernels lets expect of GPUs; no GPU is needed, and none is measured."""
    if triton_kernels.NOT_INSTALLED:
        return {"why_not": triton_kernels.NOT_INSTALLED}
    import static_roofline  # imports Triton

    with console.status("compiling"):
        rows = static_roofline.table_rows(static_roofline.default_variants(static_roofline.DEFAULT_GPUS))
    console.print(static_roofline.table(rows))
    return {"head": static_roofline.HEADER, "rows": rows}


def _save(out: Path, name: str, content):
    out.joinpath(f"{name}.json").write_text(json.dumps(content, indent=1))
    return content


if __name__ == "__main__":
    main()
