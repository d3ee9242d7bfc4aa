"""Time tiles on the GPU of this machine, and write a patch of their table: kernels/attention/timed_tiles.py.

A candidate is compiled in a process of its own first, and left out if it does not compile, does not fit or spills. One that
fails when it runs is a row that says why, and the next one goes on. What has been timed is in a journal.
"""

import difflib
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from fastlm.kernels import attention
from fastlm.kernels.attention import tiles, timed_tiles
from fastlm.kernels.attention.tiles import FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, KVCACHE, Tile, tile_for, timed_key
from suite.budget import Budget
from suite.device import gpu_is_lost
from suite.journal import Journal

from gpu.variants import STATS_PASSES, TANGENT_PASSES, Variant, inspect, kind_of, launch_named, launches_of

TABLE_NAME = "kernels/attention/timed_tiles.py"
TABLE = Path(__file__).parents[2] / TABLE_NAME
PASSES = (FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, KVCACHE, *TANGENT_PASSES, *STATS_PASSES)
LEAST_GAIN = 1.02  # A tile must be so many times as fast as today's, or today's stays.
A_FEW = 32  # Bytes that a thread may spill, around a loop.
WARM_UP, REPEAT = 5, 30  # Milliseconds of each measurement.
STEP = "tile"  # the journal's


class Timing(NamedTuple):
    """One tile of a variant, with its time or the reason why there is none."""

    variant: Variant
    tile: Tile
    seconds: float | None
    text: str


def candidates(variant: Variant) -> list[Tile]:
    """Return all tiles that hold 1024 to 16384 scores; of decoding, whose rows are few, those with the fewest rows."""
    sizes = [(q, k) for q, k in itertools.product((16, 32, 64, 128), (16, 32, 64, 128)) if 1024 <= q * k <= 16384]
    if variant.pass_name == KVCACHE:
        sizes = [(16, k) for k in (16, 32, 64, 128)]
    found = [Tile(q, k, warps, stages) for (q, k), warps, stages in itertools.product(sizes, (4, 8), (1, 2, 3))]
    specialized = [tile._replace(specialized=True) for tile in found if tile.stages == 2]
    return found + specialized if tile_of(variant).specialized else found


def tile_of(variant: Variant) -> Tile:
    """Return the tile that the table has for a variant."""
    return tile_for(variant.pass_name, variant.arch, getattr(torch, variant.dtype), variant.head_dim, kind_of(variant))


def key_of(variant: Variant) -> tuple:
    """Return the key of a variant's tile in the table of those that were timed."""
    dtype = getattr(torch, variant.dtype)
    return timed_key(variant.pass_name, variant.arch, dtype, variant.head_dim, kind_of(variant))


def _program(tile: Tile) -> Tile:
    """Return what a program depends on: a tile without what it may spill."""
    return tile._replace(spilled=0)


def put(variant: Variant, tile: Tile) -> None:
    """Put a tile into this process's table."""
    timed_tiles.TIMED[key_of(variant)] = tuple(tile)
    attention.forget_plans()


def inspect_with(candidate: tuple[Variant, Tile]) -> tuple[Tile, dict]:
    """Return the tile, and what the variant compiles to with it (variants.inspect)."""
    variant, tile = candidate
    put(variant, tile)
    return tile, inspect(variant)


def why_not(row: dict, arch: str) -> str | None:
    """Return why a tile that was compiled is left out, or None."""
    if "error" in row:
        return row["error"].splitlines()[0][:160]
    if row["shared_bytes"] > tiles.shared_memory(arch):
        return f"it takes {row['shared_bytes'] >> 10} KiB of shared memory"
    return f"it spills {row['spilled_bytes']} bytes" if row["spilled_bytes"] > A_FEW else None


# ---- one tile ---------------------------------------------------------------------------------------------------------------


def time_tile(variant: Variant, tile: Tile) -> float:
    """Return the seconds of one launch of the variant with the tile, on normals."""
    put(variant, tile)
    small = {"heads": 4, "length": 17} if variant.arch == "interpreter" else {}
    launches = launches_of(variant, "cpu" if small else "cuda", **small)
    attention.run(launches)  # These fill what the variant's own launch reads.
    own = [launch_named(variant, launches)]
    if small:
        start = time.perf_counter()
        attention.run(own)
        return time.perf_counter() - start
    from triton.testing import do_bench

    return do_bench(lambda: attention.run(own), warmup=WARM_UP, rep=REPEAT, return_mode="median") / 1e3


def _compiled(variant: Variant, todo: list[Tile], pool) -> Iterator[tuple[Tile, str | None, str]]:
    """Yield each tile, with what it may spill, why it is left out, and what it takes, in the order in which they are done."""
    if pool is None:  # The interpreter compiles nothing.
        yield from ((tile, None, "interpreted") for tile in todo)
        return
    for tile, row in pool.imap_unordered(inspect_with, [(variant, tile) for tile in todo]):
        reason = why_not(row, variant.arch)
        text = reason or f"{row['registers']} registers, {row['spilled_bytes']} bytes spilled, {row['shared_bytes'] >> 10} KiB"
        yield tile._replace(spilled=0 if reason else row["spilled_bytes"]), reason, text


# ---- all of them ------------------------------------------------------------------------------------------------------------


def default_variants(arch: str) -> list[Variant]:
    """Return the variants to time, the most common ones first.

    Where nothing is copied by descriptor, packed loops have the tiles of plain ones, and come once.
    """
    if arch == "interpreter":
        return [Variant(arch, name, 64, "float16", name == FORWARD) for name in (FORWARD, KVCACHE)]
    loops = [("plain", 128), ("plain", 64), ("masked", 64), ("masked", 128), ("packed", 128), ("packed", 64), ("plain", 256)]
    main = [Variant(arch, name, dim, "bfloat16", True, loop) for loop, dim in loops for name in PASSES[:3]]
    decoding = [Variant(arch, KVCACHE, dim, "bfloat16", False) for dim in (128, 64, 256)]
    rest = [Variant(arch, name, dim, "bfloat16", True) for name in PASSES[4:] for dim in (64, 128)]
    rest += [Variant(arch, name, dim, "float32", True) for name in PASSES[:3] for dim in (64, 128)]
    return list({key_of(variant): variant for variant in reversed([*main[:6], *decoding, *main[6:], *rest])}.values())[::-1]


def time_all(variants: list[Variant], journal: Journal, budget: Budget, jobs: int, say) -> bool:
    """Time the tiles of the variants that the journal does not have, as far as the budget goes.

    Return False where the GPU is lost: a tile ended its context, and a new process must go on.
    """
    done = {(Variant(*row["variant"]), _program(Tile(*row["tile"]))) for row in journal.of(STEP)}
    budget.plan(dict.fromkeys(variants, 1))
    interpreted = variants[0].arch == "interpreter"
    pool = None if interpreted else multiprocessing.get_context("spawn").Pool(jobs)
    for variant in variants:
        budget.enter(variant)
        today, key = tile_of(variant), key_of(variant)
        before = timed_tiles.TIMED.get(key)
        todo = [today, *(tile for tile in candidates(variant) if tile != _program(today))][: 2 if interpreted else None]
        todo = [tile for tile in todo if (variant, _program(tile)) not in done]
        started = time.monotonic()
        for tile, reason, text in _compiled(variant, todo, pool):
            seconds = None
            if reason is None:
                try:
                    seconds = time_tile(variant, tile)
                except Exception as error:  # A tile that fails is a finding, and the others go on.
                    text = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            journal.add(STEP, {"variant": variant, "tile": tile, "seconds": seconds, "text": text})
            say(f"{' '.join(map(str, variant))}: {tuple(tile)}: {text}" + (f", {seconds * 1e6:.0f} us" if seconds else ""))
            if seconds is None and reason is None and gpu_is_lost():
                return False
            if time.monotonic() - started > budget.most:
                break
        timed_tiles.TIMED.pop(key, None)
        if before:
            timed_tiles.TIMED[key] = before
        attention.forget_plans()
        if budget.left <= 0:
            break
    return True


# ---- what was found ---------------------------------------------------------------------------------------------------------


def timings(journal: Journal) -> dict[Variant, list[Timing]]:
    """Return what the journal has of each variant."""
    found: dict[Variant, list[Timing]] = {}
    for row in journal.of(STEP):
        variant = Variant(*row["variant"])
        found.setdefault(variant, []).append(Timing(variant, Tile(*row["tile"]), row["seconds"], row["text"]))
    return found


def best_of(found: list[Timing]) -> tuple[Timing | None, Timing | None]:
    """Return a variant's timing with today's tile and the fastest; None where nothing ran."""
    ran = [timing for timing in found if timing.seconds]
    today = next((timing for timing in ran if _program(timing.tile) == _program(tile_of(timing.variant))), None)
    return today, min(ran, key=lambda timing: timing.seconds, default=None)


def better_tiles(found: dict[Variant, list[Timing]]) -> dict[tuple, Tile]:
    """Return the tiles that are worth a row of the table, by its keys."""
    better = {}
    for variant, rows in found.items():
        today, best = best_of(rows)
        if best and (today is None or today.seconds > LEAST_GAIN * best.seconds):
            better[key_of(variant)] = best.tile
    return better


def patch_of(better: dict[tuple, Tile]) -> str:
    """Return a patch of the table that puts these tiles into it."""
    before = TABLE.read_text()
    head, name = before.split("TIMED: ")[0], before.split("TIMED: ")[1].split(" = ")[0]
    table = timed_tiles.TIMED | {key: tuple(tile) for key, tile in better.items()}
    rows = "".join(f"    {key}: {value},\n" for key, value in sorted(table.items())).replace("'", '"')
    after = head + f"TIMED: {name} = {{\n{rows}}}\n"
    names = f"a/{TABLE_NAME}", f"b/{TABLE_NAME}"
    return "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), *names)) if better else ""


def page_of(found: dict[Variant, list[Timing]]) -> str:
    """Return a table of today's and the fastest tiles, in Markdown."""
    lines = ["| pass | head_dim | dtype | loop | today's tile | us | the fastest | us | tiles that ran |", "|" + "---|" * 9]
    for variant, rows in found.items():
        today, best = best_of(rows)
        cells = [variant.pass_name, variant.head_dim, variant.dtype, variant.loop]
        cells += [*_cells(today), *_cells(best), f"{sum(row.seconds is not None for row in rows)} of {len(rows)}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _cells(timing: Timing | None) -> tuple[str, str]:
    return (str(tuple(timing.tile)), f"{timing.seconds * 1e6:.0f}") if timing else ("none ran", "")
