"""Looks for better tiles of the Triton kernels than the table has (kernels/tiles.py), and prints them best first.

python benchmarks/tune_tiles.py --gpu sm_90 --pass forward --head-dim 128       # by what they compile to, with no GPU
python benchmarks/tune_tiles.py --pass forward --head-dim 128 --time            # by timing them on the GPU of this machine

Without --time the order is a prediction from machine code (gpu/roofline.py) of the share of peak if nothing overlapped.
"""

import argparse
import itertools
import multiprocessing

import torch
from fastlm.kernels import attention
from fastlm.kernels.attention import tiles
from fastlm.kernels.attention.tiles import BY_DESCRIPTORS, FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, Tile, tile
from gpu.roofline import predict
from gpu.variants import DTYPES, GPUS, HEAD_DIMS, Variant, inspect, launch_of

PASSES = (FORWARD, GRAD_KEY_VALUE, GRAD_QUERY)
Candidate = tuple[Variant, Tile]


def candidates(variant: Variant) -> list[Candidate]:
    """Tiles that hold 1024 to 16384 scores."""
    sizes = [(q, k) for q, k in itertools.product((16, 32, 64, 128), (16, 32, 64, 128)) if 1024 <= q * k <= 16384]
    return [(variant, Tile(q, k, warps, stages)) for (q, k), warps, stages in itertools.product(sizes, (4, 8), (1, 2, 3))]


def _put(candidate: Candidate) -> None:
    """The tile into this process's table, for every head_dim."""
    variant, shape = candidate
    table = tiles.SINGLE if variant.dtype == "float32" else tiles.HALF
    name = tiles.SAME.get(variant.arch, variant.arch)
    own = {of: (tile(of, variant.arch, getattr(torch, variant.dtype), variant.head_dim),) * 3 for of in PASSES}
    for family in (name, name + BY_DESCRIPTORS):
        table[family] = own | table.get(family, {}) | {variant.of: (shape,) * 3}


def compiled(candidate: Candidate) -> tuple[float, str, Tile]:
    """(rank, what the tile compiles to, tile); the rank is below 0 where it does not, spills, or does not fit."""
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
    """The same by the time that one launch takes on this machine's GPU."""
    from triton.testing import do_bench

    rank, text, shape = compiled(candidate)
    if rank < 0:
        return rank, text, shape
    launch = launch_of(candidate[0], "cuda")
    seconds = do_bench(lambda: attention.run([launch])) / 1e3
    return 1 / seconds, f"{text}, {seconds * 1e6:.0f} us measured", shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, help="without --time, the GPU to compile for")
    parser.add_argument("--pass", dest="of", choices=PASSES, default=FORWARD)
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--time", action="store_true", help="time on the GPU of this machine")
    parser.add_argument("--jobs", type=int, default=2, help="compilations side by side")
    arguments = parser.parse_args()
    if not arguments.time and not arguments.gpu:
        parser.error("name a --gpu to compile for, or --time to use this machine's")
    arch = tiles.architecture(torch.device("cuda")) if arguments.time else arguments.gpu
    todo = candidates(Variant(arch, arguments.of, arguments.head_dim, arguments.dtype, arguments.causal))
    if arguments.time:
        found = map(timed, todo)
    else:
        found = multiprocessing.get_context("spawn").Pool(arguments.jobs).imap_unordered(compiled, todo)
    for rank, text, shape in sorted(found, key=lambda row: -row[0]):
        if rank >= 0:
            print(f"Tile({shape.q}, {shape.k}, {shape.warps}, {shape.stages})  {text}")


if __name__ == "__main__":
    main()
