"""The tiles that were timed on a GPU. They go before those of tiles.py, which were found by compiling; none has been timed yet.

`benchmarks/tune_tiles.py --time` writes a patch of this file, and `make gpu GPU=--apply` applies it.
"""

# By GPU, precision ("half" or "single"), kind of loop, pass, and head_dim up to: the fields of a Tile.
TIMED: dict[tuple[str, str, str, str, int], tuple[int, int, int, int, int, bool]] = {}
