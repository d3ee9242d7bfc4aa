"""Compile the Triton kernels for GPUs that are not here: they spill nothing, fit, and use the matrix instructions.

The tests read a subset of all variants (benchmarks/gpu_kernels.py --cover). It is compiled in a process of its own, because the
interpreter that other tests turn on replaces the compiler. `make gpu-kernels` compiles all variants, the latent's too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastlm.kernels.attention.tiles import shared_memory
from support.processes import HANG

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.xdist_group("compiled for GPUs")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"


@pytest.fixture
def rows(made_once) -> list[dict]:
    """Return a row of facts about each variant."""
    return made_once("triton_variants", _compiled)


def _compiled(which: str = "--cover") -> list[dict]:
    """Compile the variants that an option of the script asks for."""
    command = [sys.executable, str(SCRIPT), which]
    process = subprocess.run(command, env=_settings(), capture_output=True, text=True, timeout=HANG, check=False)
    assert process.stdout, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def _settings() -> dict[str, str]:
    """Return the environment without the interpreter."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}


def _name(row: dict) -> str:
    causal = " causal" if row["causal"] else ""
    return f"{row['arch']} {row['pass_name']} head_dim {row['head_dim']} {row['dtype']} {row['loop']}{causal}"


def _wrong(rows: list[dict], is_right) -> list[str]:
    return [_name(row) for row in rows if not is_right(row)]


def test_every_variant_compiles(rows):
    assert len(rows) == 9 * (4 * 3 + 3 * 2 + 3 + 2) + 3 * (3 + 5 + 3) + 1 + 3 * 3 * 2
    assert not [f"{_name(row)}: {row['error']}" for row in rows if "error" in row]


A_FEW = 32  # Bytes that may stay in local memory around a loop.


def test_no_kernel_spills_more_than_the_table_allows(rows):
    assert not [f"{_name(row)}: {row['spilled_bytes']} bytes" for row in rows if row["spilled_bytes"] > row["may_spill"]]
    assert not _wrong(rows, lambda row: row["dtype"] == "float32" or row["arch"] == "gfx1100" or row["may_spill"] <= A_FEW)


def test_no_hot_loop_goes_through_local_memory(rows):
    """Exceptions are variants to which the table allows more than a few bytes, or any for float32's multiply-adds."""
    spills = [row for row in rows if row["may_spill"] > (0 if row["dtype"] == "float32" else A_FEW)]
    assert not _wrong([row for row in rows if row not in spills], lambda row: "local" not in row["units"])
    assert not _wrong([row for row in rows if "softmax" in row], lambda row: "local" not in row["softmax"]["units"])


def test_multiply_adds_compute_a_quarter_of_the_weights_where_exp2_limits_the_loop(rows):
    """Count those that are left to the unit for exponentials, and the one that rescales what a row has so far."""
    specialized = [row for row in rows if "softmax" in row]
    assert {row["arch"] for row in specialized} == {"sm_100"}
    for row in specialized:
        weights = row["q"] * row["k"] / (32 * row["num_warps"])  # of a thread
        assert row["softmax"]["units"]["exp"] == 3 / 4 * weights + 1, _name(row)


def test_shared_memory_fits(rows):
    assert not _wrong(rows, lambda row: row["shared_bytes"] <= shared_memory(row["arch"]))


def test_products_are_on_the_matrix_instructions(rows):
    """float32 is an exception: only AMD's datacenter GPUs have its products in full precision."""
    on_matrix_units = [row for row in rows if row["dtype"] != "float32" or row["arch"] in ("gfx90a", "gfx942")]
    assert not _wrong(on_matrix_units, lambda row: row["units"].get("tensor"))


def test_the_latent_s_kernels_spill_nothing():
    """Compile each pass for every GPU. The widest program has 512 threads, for which there are 128 registers each."""
    rows = _compiled("--latent")
    assert len(rows) == 9 * 2
    assert not [row for row in rows if "error" in row or row["spilled_bytes"] or row["registers"] > 128]
    assert not [
        row for row in rows if row["kind"] == "plain" and row["wide_loads"] < (2 if row["pass_name"] == "forward" else 3)
    ]


def test_every_feature_compiles():
    """Compile for one GPU of each manufacturer, side by side."""
    commands = [[sys.executable, str(SCRIPT), "--features", "--gpu", arch] for arch in ("sm_90", "gfx942")]
    options = {"env": _settings(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for process in [subprocess.Popen(command, **options) for command in commands]:
        lines = process.communicate(timeout=HANG)[0].splitlines()
        assert process.returncode == 0, [line for line in lines if "FAILED" in line] or lines
        assert len(lines) > 80
