"""Compile the Triton kernels for GPUs that are not here, and print what they are made of.

python benchmarks/gpu_kernels.py                    # every GPU, pass, head_dim and dtype, causal or not
python benchmarks/gpu_kernels.py --cover            # a subset: every GPU, pass, head_dim and dtype; few passes with tangents
python benchmarks/gpu_kernels.py --features         # every feature once; a line for each kernel
python benchmarks/gpu_kernels.py --predict          # bfloat16's share of the tensor peak, from the hot loop's instructions

--gpu sm_90 chooses GPUs. Nothing here runs on a GPU, and no figure is a measurement. The exit code is 1 if a kernel does not
compile. Triton caches what it has compiled.
"""

import argparse
import json
import sys
import warnings

from gpu import features, roofline, variants
from rich.console import Console


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cover", action="store_true", help="the subset")
    what.add_argument("--features", action="store_true", help="every feature once")
    what.add_argument("--predict", action="store_true", help="a table of predicted shares of peak")
    parser.add_argument("--gpu", action="append", choices=variants.GPUS, help="only for this GPU; may be given several times")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.features:
        warnings.simplefilter("ignore")
        return 1 if sum(map(features.failures, options.gpu or variants.GPUS)) else 0
    if options.predict:
        asked = roofline.default_variants(tuple(options.gpu or roofline.DEFAULT_GPUS))
        Console().print(roofline.table(roofline.table_rows(asked)))
        return 0
    asked = variants.covering_variants() if options.cover else variants.every_variant()
    failed = 0
    for row in variants.inspect_all([v for v in asked if not options.gpu or v.arch in options.gpu], options.jobs):
        failed += "error" in row
        print(json.dumps(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
