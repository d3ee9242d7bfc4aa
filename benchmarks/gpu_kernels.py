"""Compile the Triton kernels for GPUs that are not here, and print what they are made of.

python benchmarks/gpu_kernels.py                    # every GPU, pass, head_dim and dtype, causal or not; the latent's passes
python benchmarks/gpu_kernels.py --cover            # a subset: every GPU, pass, head_dim and dtype; few passes with tangents
python benchmarks/gpu_kernels.py --latent           # the latent's passes: a subset of its dtypes and kinds of calls
python benchmarks/gpu_kernels.py --features         # every feature once; a line for each kernel
python benchmarks/gpu_kernels.py --predict          # bfloat16's share of the tensor peak, from the hot loop's instructions
python benchmarks/gpu_kernels.py --host             # the host's microseconds before a kernel starts, on sm_80 and sm_90
python benchmarks/gpu_kernels.py --interpret        # the kernels' PTX, interpreted (tests/support/ptx)

--gpu sm_90 chooses GPUs; --host knows NVIDIA's. Nothing here runs on a GPU, and no figure is a measurement of one. The exit
code is 1 if a kernel does not compile. Triton caches what it has compiled.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from gpu import features, host, latent, roofline, variants
from rich.console import Console

ROOT = Path(__file__).parents[1]
INTERPRETED = ("sm_80", "sm_90", "sm_100", "sm_120")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cover", action="store_true", help="the subset")
    what.add_argument("--latent", action="store_true", help="a subset of the latent's")
    what.add_argument("--features", action="store_true", help="every feature once")
    what.add_argument("--predict", action="store_true", help="a table of predicted shares of peak")
    what.add_argument("--host", action="store_true", help="a table of the host's time before a kernel starts")
    what.add_argument("--interpret", action="store_true", help="interpret the PTX")
    parser.add_argument("--gpu", action="append", choices=variants.GPUS, help="only for this GPU; may be given several times")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.features:
        warnings.simplefilter("ignore")
        return 1 if sum(map(features.failures, options.gpu or variants.GPUS)) else 0
    if options.host:
        if other := [gpu for gpu in options.gpu or () if not gpu.startswith("sm_")]:
            parser.error(f"--host knows NVIDIA's GPUs; got {', '.join(other)}")
        Console().print(host.table(options.gpu or host.GPUS))
        return 0
    if options.predict:
        asked = roofline.default_variants(tuple(options.gpu or roofline.DEFAULT_GPUS))
        Console().print(roofline.table(roofline.table_rows(asked)))
        return 0
    if options.interpret:
        return max(map(_interpret, options.gpu or INTERPRETED))
    failed = 0
    for row in _rows(options):
        failed += "error" in row
        print(json.dumps(row), flush=True)
    return 1 if failed else 0


def _interpret(gpu: str) -> int:
    """Interpret every call for a GPU in a process of its own, which prints its rows; return its exit code."""
    settings = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'benchmarks'}"}
    return subprocess.run([sys.executable, "-m", "support.ptx.check", gpu, "--all"], env=settings, check=False).returncode


def _rows(options: argparse.Namespace) -> Iterator[dict]:
    """Yield the rows of the variants that are asked for."""

    def chosen(asked: list) -> list:
        return [variant for variant in asked if not options.gpu or variant.arch in options.gpu]

    if not options.latent:
        asked = variants.covering_variants() if options.cover else variants.every_variant()
        yield from variants.inspect_all(chosen(asked), options.jobs)
    if not options.cover:
        yield from map(latent.inspect, chosen(latent.covering_variants() if options.latent else latent.every_variant()))


if __name__ == "__main__":
    sys.exit(main())
