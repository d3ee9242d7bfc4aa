"""A roofline from machine code: what share of a GPU's matrix throughput a Triton kernel could reach, by its hot loop.

These are predictions from disassembly. None of it was measured on a GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

from report.tables import listed
from rich.table import Table

from gpu import variants
from gpu.variants import Variant

FLOPS_PER_PAIR = {"forward": 4, "grad_key_value": 8, "grad_query": 6, "decode": 4}  # and head_dim, for each score


class Rates(NamedTuple):
    """What a multiprocessor (compute unit) does in a cycle, by the makers' manuals: operations of dense bfloat16 products with
    float32 sums, and lanes of each other unit; `issue` is in instructions of a warp (wavefront)."""

    tensor: int
    float: int
    integer: int
    exp: int
    shared: int
    issue: int
    warp: int


RATES = {
    "sm_80": Rates(2048, 64, 64, 16, 32, 4, 32),
    "sm_86": Rates(1024, 128, 64, 16, 32, 4, 32),
    "sm_89": Rates(1024, 128, 64, 16, 32, 4, 32),
    "sm_90": Rates(4096, 128, 64, 16, 32, 4, 32),
    "sm_100": Rates(8192, 128, 64, 16, 32, 4, 32),
    "sm_120": Rates(1024, 128, 64, 16, 32, 4, 32),
    "gfx90a": Rates(1024, 64, 64, 16, 32, 5, 64),
    "gfx942": Rates(2048, 64, 64, 16, 32, 5, 64),
    "gfx1100": Rates(512, 64, 64, 16, 32, 4, 32),
}
UNITS = {"exp": "exp", "float": "float", "integer": "integer", "convert": "integer", "shared": "shared"}


class Prediction(NamedTuple):
    """Shares of the peak of matrix products: if all units overlap, so that the busiest alone counts, and if none do."""

    best: float
    worst: float
    busiest: str
    float_per_score: float


def predict(row: dict) -> Prediction:
    """Of a row of gpu_kernels.inspect, for a half-precision dtype."""
    rates, threads = RATES[row["arch"]], row["num_warps"] * RATES[row["arch"]].warp
    cycles = {"tensor": FLOPS_PER_PAIR[row["of"]] * row["head_dim"] * row["q"] * row["k"] / rates.tensor}
    for unit, rate in UNITS.items():
        cycles[rate] = cycles.get(rate, 0.0) + row["units"].get(unit, 0) * threads / getattr(rates, rate)
    issue = row["instructions"] * row["num_warps"] / rates.issue
    busiest = max(cycles | {"issue": issue}, key=(cycles | {"issue": issue}).get)
    float_per_score = row["units"].get("float", 0) * threads / (row["q"] * row["k"])
    return Prediction(
        cycles["tensor"] / max(*cycles.values(), issue), cycles["tensor"] / sum(cycles.values()), busiest, float_per_score
    )


DEFAULT_GPUS = ("sm_80", "sm_90", "gfx942")


def default_variants(gpus: tuple[str, ...]) -> list[Variant]:
    return [
        Variant(arch, of, head_dim, "bfloat16", False)
        for arch in gpus
        for of in ("forward", "grad_key_value", "grad_query")
        for head_dim in (64, 128)
    ]


HEADER = ("GPU", "pass", "head_dim", "tile", "warps", "registers", "spilled", "shared KiB", "float per score", "share of peak")


def table_rows(asked: list[Variant], go_on: Callable[[], bool] = lambda: True) -> list[tuple[str, ...]]:
    """Return a row of the table for each variant that is asked for, in their order, as far as ``go_on`` says yes."""
    found = {}
    for row in variants.inspect_all(asked, 2):
        found[tuple(row[name] for name in Variant._fields)] = row
        if not go_on():
            break
    return [_table_row(found[tuple(variant)]) for variant in asked if tuple(variant) in found]


def _table_row(row: dict) -> tuple[str, ...]:
    if "error" in row:
        return (row["arch"], row["of"], str(row["head_dim"]), row["error"], *[""] * 6)
    if row["specialized"]:  # what its warps do, they do in loops of their own
        float_per_score, share = "", "not predicted: warps are specialized"
    else:
        prediction = predict(row)
        float_per_score, share = f"{prediction.float_per_score:.1f}", f"{prediction.worst:.0%} – {prediction.best:.0%}"
        share += "" if prediction.busiest == "tensor" else f" ({prediction.busiest} is the limit)"
    return (
        row["arch"], row["of"], str(row["head_dim"]), f"{row['q']} x {row['k']}", str(row["num_warps"]), str(row["registers"]),
        str(row["spilled_bytes"]), f"{row['shared_bytes'] / 1024:.0f}", float_per_score, share,
    )  # fmt: skip


def table(rows: list[tuple[str, ...]]) -> Table:
    """For the terminal."""
    return listed("Predicted from machine code, bfloat16, nothing masked; not measured", HEADER, rows)
