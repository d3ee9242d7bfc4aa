"""Interpret the PTX that Triton compiles the kernels to (tests/support/ptx): values and gradients obey the rule.

A process for each GPU does it, because the interpreter of Triton that other tests turn on replaces the compiler.
`make gpu-kernels KERNELS=--interpret` interprets many more calls, for more GPUs.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import HANG
from support.ptx.calls import COVERING
from support.ptx.faults import FAULTS

pytest.importorskip("triton", reason="the Triton kernels need Triton")

ROOT = Path(__file__).parents[2]


def of_gpu(gpu: str, *values):
    """Return the parameters of a test that runs among the first, because the first of a GPU does the work of all."""
    return pytest.param(gpu, *values, marks=pytest.mark.xdist_group(f"ptx {gpu}"))


@pytest.fixture
def rows(made_once) -> Callable[[str], dict]:
    """Return the function of a GPU that tells its rows."""
    return lambda gpu: made_once(f"ptx_{gpu}", functools.partial(_interpreted, gpu))


def _interpreted(gpu: str) -> dict[str, dict]:
    """Return what support/ptx/check.py says of each call and each fault."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    settings["PYTHONPATH"] = f"{ROOT / 'tests'}:{ROOT / 'benchmarks'}"
    command = [sys.executable, "-m", "support.ptx.check", gpu]
    process = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=HANG, check=False)
    told = {row["call"]: row for row in map(json.loads, process.stdout.splitlines())}
    assert told.keys() == {*COVERING[gpu], *FAULTS[gpu]}, process.stderr
    return told


@pytest.mark.parametrize(("gpu", "call"), [of_gpu(gpu, call) for gpu, calls in COVERING.items() for call in calls])
def test_values_and_gradients_are_as_good_as_plain_pytorch(gpu, call, rows):
    assert rows(gpu)[call]["error"] is None, rows(gpu)[call]["error"]


@pytest.mark.parametrize(("gpu", "fault"), [of_gpu(gpu, fault) for gpu, faults in FAULTS.items() for fault in faults])
def test_planted_faults_are_noticed(gpu, fault, rows):
    assert rows(gpu)[fault]["error"] is None, rows(gpu)[fault]["error"]
