"""Look for better tiles of the Triton kernels than those in kernels/attention/tiles.py, and print them, the best first.

python benchmarks/tune_tiles.py --gpu sm_90 --pass forward --head-dim 128       # by what they compile to, without a GPU
python benchmarks/tune_tiles.py --pass forward --head-dim 128 --time            # by timing them on the GPU of this machine

Without --time, machine code predicts the order (gpu/roofline.py): by the share of the peak if no two units overlap.
"""

import argparse
import itertools
import multiprocessing

import torch
from fastlm.kernels import attention
from fastlm.kernels.attention import tiles
from fastlm.kernels.attention.tiles import FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, LoopKind, Tile, tile_for
from gpu.roofline import predict
from gpu.variants import DTYPES, GPUS, HEAD_DIMS, STATS_PASSES, TANGENT_PASSES, Variant, inspect, launch_of

PASSES = (FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, *TANGENT_PASSES, *STATS_PASSES)
Candidate = tuple[Variant, Tile]


def candidates(variant: Variant) -> list[Candidate]:
    """Return all tiles that hold 1024 to 16384 scores."""
    sizes = [(q, k) for q, k in itertools.product((16, 32, 64, 128), (16, 32, 64, 128)) if 1024 <= q * k <= 16384]
    return [(variant, Tile(q, k, warps, stages)) for (q, k), warps, stages in itertools.product(sizes, (4, 8), (1, 2, 3))]


def _put(candidate: Candidate) -> None:
    """Put the tile into this process's table, for every head_dim."""
    variant, tile = candidate
    table = tiles.SINGLE if variant.dtype == "float32" else tiles.HALF
    arch = tiles.ALIASES.get(variant.arch, variant.arch)
    own = {name: (tile_for(name, variant.arch, getattr(torch, variant.dtype), variant.head_dim),) * 3 for name in PASSES}
    for row in ((arch, LoopKind.PLAIN), (arch, LoopKind.DESCRIPTORS)):
        table[row] = own | table.get(row, {}) | {variant.pass_name: (tile,) * 3}


def compiled(candidate: Candidate) -> tuple[float, str, Tile]:
    """Return (rank, what the tile compiles to, tile). The rank is below 0 if it does not compile, spills or does not fit."""
    _put(candidate)
    row = inspect(candidate[0])
    if "error" in row:
        return -2.0, row["error"].splitlines()[0][:80], candidate[1]
    text = f"{row['registers']} registers, {row['spilled_bytes']} bytes spilled, {row['shared_bytes'] >> 10} KiB"
    if row["spilled_bytes"] or row["shared_bytes"] > tiles.shared_memory(candidate[0].arch):
        return -1.0, text, candidate[1]
    prediction = predict(row)
    return prediction.worst, f"{text}, predicted {prediction.worst:.0%} to {prediction.best:.0%}", candidate[1]


def timed(candidate: Candidate) -> tuple[float, str, Tile]:
    """Return the same as `compiled`, ranked by the time of one launch on this machine's GPU."""
    from triton.testing import do_bench

    rank, text, tile = compiled(candidate)
    if rank < 0:
        return rank, text, tile
    launch = launch_of(candidate[0], "cuda")
    seconds = do_bench(lambda: attention.run([launch])) / 1e3
    return 1 / seconds, f"{text}, {seconds * 1e6:.0f} us measured", tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, help="without --time, the GPU to compile for")
    parser.add_argument("--pass", dest="pass_name", choices=PASSES, default=FORWARD)
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--time", action="store_true", help="time on the GPU of this machine")
    parser.add_argument("--jobs", type=int, default=2, help="compilations side by side")
    options = parser.parse_args()
    if not options.time and not options.gpu:
        parser.error("name a --gpu to compile for, or --time to use this machine's")
    arch = tiles.architecture(torch.device("cuda")) if options.time else options.gpu
    todo = candidates(Variant(arch, options.pass_name, options.head_dim, options.dtype, options.causal))
    if options.time:
        found = map(timed, todo)
    else:
        found = multiprocessing.get_context("spawn").Pool(options.jobs).imap_unordered(compiled, todo)
    for rank, text, tile in sorted(found, key=lambda row: -row[0]):
        if rank >= 0:
            print(f"Tile({tile.q}, {tile.k}, {tile.warps}, {tile.stages})  {text}")


if __name__ == "__main__":
    main()
