"""Test FASTLM_GPU_SETTINGS=safe: one small tile and no descriptors, right in the interpreter, and compiled for GPUs."""

import pytest
from support.processes import printed, python

pytest.importorskip("triton", reason="the Triton kernels need Triton")

SAFE = {"FASTLM_GPU_SETTINGS": "safe"}
ATTENTION = """
import torch, fastlm
from fastlm.kernels import attention as kernels
from fastlm.testing import assert_as_good_as_plain, seeded_normal

launched, run = [], kernels.run
kernels.run = lambda launches: (launched.extend(launches), run(launches))

def call(dtype, backend):
    inputs = [seeded_normal(i, (1, 4 if i == 0 else 2, 40, 24), torch.float16).to(dtype).requires_grad_() for i in range(3)]
    out = fastlm.attention(*inputs, causal=True, backend=backend)
    return out, *torch.autograd.grad(out.square().sum(), inputs)

results = [call(*each) for each in ((torch.float16, "triton"), (torch.float16, "reference"), (torch.float64, "reference"))]
for i, tensors in enumerate(zip(*results)):
    assert_as_good_as_plain(*tensors, 3 if i else 2, f"result {i}")
tiles = {(each.arguments["BLOCK_Q"], each.arguments["BLOCK_K"]) for each in launched if "BLOCK_K" in each.arguments}
descriptors = [value for each in launched for name, value in each.arguments.items() if name.endswith("_desc")]
print(tiles == {(16, 16)}, [each is None for each in descriptors])
"""
COMPILED = """
import sys
sys.path.append(%r)
from fastlm.kernels.attention.tiles import shared_memory
from gpu.variants import Variant, inspect
for arch, name, dtype in (("sm_90", "grad_key_value", "bfloat16"), ("sm_100", "forward", "float16")):
    row = inspect(Variant(arch, name, 256, dtype, True))
    fits = "error" not in row and row["shared_bytes"] <= shared_memory(arch)
    assert fits and (row["q"], row["k"], row["num_stages"], row["specialized"]) == (16, 16, 1, False), row
"""


def test_safe_settings_are_right_and_take_neither_large_tiles_nor_descriptors():
    assert printed(ATTENTION, TRITON_INTERPRET="1", **SAFE) == f"True {[True] * 6}"


def test_safe_settings_compile_and_fit():
    from test_triton_compile import SCRIPT

    printed(COMPILED % str(SCRIPT.parent), **SAFE)


def test_other_settings_are_refused():
    process = python("import fastlm.kernels.attention", FASTLM_GPU_SETTINGS="fast")
    assert "ValueError: FASTLM_GPU_SETTINGS must be unset or 'safe'; got 'fast'" in process.stderr
