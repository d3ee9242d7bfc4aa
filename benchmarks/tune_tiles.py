"""Look for better tiles of the Triton kernels than those in kernels/attention/tiles.py, by compiling or by timing them.

python benchmarks/tune_tiles.py --gpu sm_90 --pass forward --head-dim 128    # by what they compile to, without a GPU
python benchmarks/tune_tiles.py --time                                       # on the GPU of this machine, pass by pass
python benchmarks/tune_tiles.py --time --pass kvcache --head-dim 128         # one row of the table

Without --time, machine code predicts the order (gpu/roofline.py): by the share of the peak that it expects. With it,
the tiles that are faster than today's become a patch, build/tiles/tiles.patch (--out). Run again, it goes on where it was.
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from fastlm.kernels.attention import tiles
from gpu import tuning
from gpu.roofline import predict
from gpu.steps import GPU_LOST
from gpu.variants import DTYPES, GPUS, HEAD_DIMS, LOOPS, Variant
from suite.budget import Budget
from suite.journal import Journal

OUT = Path(__file__).parents[1] / "build" / "tiles"


def show_predictions(variant: Variant, jobs: int) -> None:
    """Compile all candidates of a variant, and print those that fit, the best first."""
    found = []
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        todo = [(variant, tile) for tile in tuning.candidates(variant)]
        for tile, row in pool.imap_unordered(tuning.inspect_with, todo):
            if tuning.why_not(row, variant.arch) is None:
                prediction = predict(row)
                text = f"{row['registers']} registers, {row['spilled_bytes']} bytes spilled, {row['shared_bytes'] >> 10} KiB"
                text += f", {prediction.programs} at once, predicted {prediction.expected:.0%}"
                text += f" ({prediction.worst:.0%} to {prediction.best:.0%})"
                found.append(((prediction.expected, prediction.worst), text, tile))
    for _, text, tile in sorted(found, key=lambda row: row[0], reverse=True):
        print(f"Tile({tile.q}, {tile.k}, {tile.warps}, {tile.stages})  {text}")


def time_here(variants: list[Variant], options: argparse.Namespace) -> int:
    """Time the candidates of the variants, and write what was found; return the exit code."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "tiles.jsonl"
    journal = Journal(path, {"gpu": variants[0].arch, "torch": torch.__version__}, resume=path.exists())
    in_time = tuning.time_all(variants, journal, Budget(options.seconds), options.jobs, lambda text: print(text, flush=True))
    found = tuning.timings(journal)
    better = tuning.better_tiles(found)
    options.out.joinpath("tiles.patch").write_text(tuning.patch_of(better))
    options.out.joinpath("tiles.md").write_text(tuning.page_of(found))
    print(f"\n{tuning.page_of(found)}\n{len(better)} tiles are better than today's: {options.out / 'tiles.patch'}")
    return 0 if in_time else GPU_LOST


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, help="without --time, the GPU to compile for")
    parser.add_argument("--pass", dest="pass_name", choices=tuning.PASSES, help="with --time, all by default; else forward")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--loop", choices=LOOPS, default="plain")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--time", action="store_true", help="time on the GPU of this machine")
    parser.add_argument("--seconds", type=float, help="with --time, the time of the whole run")
    parser.add_argument("--out", type=Path, default=OUT, help=f"with --time; default: {OUT}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations side by side")
    options = parser.parse_args()
    if not options.time and not options.gpu:
        parser.error("name a --gpu to compile for, or --time to use this machine's")
    arch = tiles.architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu")) if options.time else options.gpu
    if arch == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--time needs a GPU, or TRITON_INTERPRET=1 for a dry run; torch sees no GPU")
    one = Variant(arch, options.pass_name or "forward", options.head_dim, options.dtype, options.causal, options.loop)
    if not options.time:
        show_predictions(one, options.jobs)
        return 0
    return time_here([one] if options.pass_name else tuning.default_variants(arch), options)


if __name__ == "__main__":
    sys.exit(main())
