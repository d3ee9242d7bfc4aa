"""Predict from machine code what share of a GPU's matrix throughput a Triton kernel can reach: a roofline of its hot loop.

A multiprocessor holds a few programs. One program's steps depend on each other, and its warps wait for each other at the end of
each pass through the loop: by itself, it uses one unit at a time. While it does, the other programs use the other units. So a
pass takes the cycles of the busiest unit or, where these are more, the sum of all units' over the number of programs.

These are predictions from disassembly. Nothing here was measured on a GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

from report.tables import listed
from rich.table import Table

from gpu import variants
from gpu.occupancy import programs_at_once
from gpu.variants import Variant

# Floating-point operations for each score, divided by head_dim: 2 for each product that a pass computes.
FLOPS_PER_SCORE = {"forward": 4, "grad_key_value": 8, "grad_query": 6, "kvcache": 4}
FLOPS_PER_SCORE |= {"jvp": 12, "jvp_grad_key_value": 16, "jvp_grad_query": 14}
BYTES = 2  # of an element in half precision


# The side of a tile whose blocks the loop loads, and how many tensors it loads of them.
LOADED = {name: ("q" if "key_value" in name else "k", 4 if "jvp" in name else 2) for name in FLOPS_PER_SCORE}


class Rates(NamedTuple):
    """What a multiprocessor (compute unit) does in a cycle, from the manufacturers' manuals.

    A unit without a comment is counted in lanes.
    """

    tensor: int  # Floating-point operations of dense bfloat16 products with float32 sums.
    float: int
    integer: int
    exp: int
    shared: int
    l2: int  # Bytes from the L2 cache: 5,120 of an A100 or H100, 2,048 of 38 units of gfx942; others are assumed.
    issue: int  # Instructions of a warp (wavefront).
    warp: int  # Threads of a warp (wavefront).
    rows: int = 0  # of a product that reads operands in shared memory; 0 where all come from registers


RATES = {
    "sm_80": Rates(2048, 64, 64, 16, 32, 47, 4, 32),
    "sm_86": Rates(1024, 128, 64, 16, 32, 32, 4, 32),
    "sm_89": Rates(1024, 128, 64, 16, 32, 32, 4, 32),
    "sm_90": Rates(4096, 128, 64, 16, 32, 39, 4, 32, 64),
    "sm_100": Rates(8192, 128, 64, 16, 32, 69, 4, 32, 128),
    "sm_120": Rates(1024, 128, 64, 16, 32, 32, 4, 32),
    "gfx90a": Rates(1024, 64, 64, 16, 32, 37, 5, 64),
    "gfx942": Rates(2048, 64, 64, 16, 32, 54, 5, 64),
    "gfx1100": Rates(512, 64, 64, 16, 32, 32, 4, 32),
}
# The rate that counts for the instructions of each unit.
UNITS = {"exp": "exp", "float": "float", "integer": "integer", "convert": "integer", "shared": "shared"}


class Prediction(NamedTuple):
    """Predicted shares of the peak of matrix products."""

    expected: float  # As many programs as a multiprocessor holds work side by side.
    best: float  # All units overlap, so that only the busiest counts.
    worst: float  # No two units overlap.
    busiest: str
    programs: int  # on a multiprocessor


def predict(row: dict) -> Prediction:
    """Return the prediction for a row of variants.inspect of a half-precision dtype.

    Where warps are specialized, it takes the loop of those that compute the softmax. The others' work beside them, which the
    model leaves out, so that `best` is a limit.
    """
    loop = row.get("softmax", row)
    rates, threads = RATES[row["arch"]], row["num_warps"] * RATES[row["arch"]].warp
    tensor = FLOPS_PER_SCORE[row["pass_name"]] * row["head_dim"] * row["q"] * row["k"] / rates.tensor
    cycles = {"tensor": _tensor_cycles(row, rates)}
    for unit, rate in UNITS.items():
        cycles[rate] = cycles.get(rate, 0.0) + loop["units"].get(unit, 0) * threads / getattr(rates, rate)
    in_turn = sum(cycles.values())
    side, tensors = LOADED[row["pass_name"]]
    cycles["l2"] = tensors * row[side] * row["head_dim"] * BYTES / rates.l2  # These copies run beside, as instructions do.
    cycles["issue"] = loop["instructions"] * row["num_warps"] / rates.issue
    busiest = max(cycles, key=cycles.get)
    all_threads = row["all_warps"] * rates.warp
    programs = programs_at_once(row["arch"], all_threads, row["registers"], row["shared_bytes"], row["tensor_columns"])
    expected = max(cycles[busiest], in_turn / programs)
    shares = (tensor / limit for limit in (expected, cycles[busiest], in_turn))
    return Prediction(*shares, busiest, programs)


def _tensor_cycles(row: dict, rates: Rates) -> float:
    """Return the cycles of the tensor cores in a pass through the loop.

    Where products read shared memory, each instruction reads its second operand there. The half of the products that makes
    scores reads its first operand there, too. An instruction of fewer rows takes as long.
    """
    looped = row[LOADED[row["pass_name"]][0]]
    kept = row["q"] * row["k"] // looped
    products, product = FLOPS_PER_SCORE[row["pass_name"]] / 2, 2 * kept * looped * row["head_dim"] / rates.tensor
    if not rates.rows:
        return products * product
    instructions = -(-kept // rates.rows)
    second, first = (rows * row["head_dim"] * BYTES / (4 * rates.shared) for rows in (instructions * looped, kept))
    product *= instructions * rates.rows / kept
    of_scores = -(-products // 2)
    return of_scores * max(product, first + second) + (products - of_scores) * max(product, second)


DEFAULT_GPUS = ("sm_80", "sm_90", "gfx942")


def default_variants(gpus: tuple[str, ...]) -> list[Variant]:
    """Return the variants of the report's table."""
    return [
        Variant(arch, name, head_dim, "bfloat16", False)
        for arch in gpus
        for name in ("forward", "grad_key_value", "grad_query")
        for head_dim in (64, 128)
    ]


HEADER = ("GPU", "pass", "head_dim", "tile", "warps", "registers", "spilled", "shared KiB", "programs", "share of peak")


def table_rows(asked: list[Variant], go_on: Callable[[], bool] = lambda: True) -> list[tuple[str, ...]]:
    """Return the table's row of each variant that is asked for, in their order. Stop once ``go_on`` returns False."""
    found = {}
    for row in variants.inspect_all(asked, 2):
        found[tuple(row[name] for name in Variant._fields)] = row
        if not go_on():
            break
    return [_table_row(found[tuple(variant)]) for variant in asked if tuple(variant) in found]


def _table_row(row: dict) -> tuple[str, ...]:
    if "error" in row:
        return (row["arch"], row["pass_name"], str(row["head_dim"]), row["error"], *[""] * 6)
    prediction = predict(row)
    limit = "" if prediction.busiest == "tensor" else f"; {prediction.busiest} is the limit"
    if row["specialized"]:
        share = f"at most {prediction.best:.0%}{limit}"
    else:
        share = f"{prediction.expected:.0%} ({prediction.worst:.0%} – {prediction.best:.0%}{limit})"
    return (
        row["arch"], row["pass_name"], str(row["head_dim"]), f"{row['q']} x {row['k']}", str(row["num_warps"]),
        str(row["registers"]), str(row["spilled_bytes"]), f"{row['shared_bytes'] / 1024:.0f}", str(prediction.programs), share,
    )  # fmt: skip


def table(rows: list[tuple[str, ...]]) -> Table:
    """Return the table for the terminal."""
    return listed("Predicted from machine code, bfloat16, nothing masked; not measured", HEADER, rows)
