"""Test the weights that multiply-adds share with the unit for exponentials, in an interpreter of PTX."""

import math
import re

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton")

from fastlm.kernels.attention.exp2 import WEIGHTS  # noqa: E402
from support.ptx.handwritten import run  # noqa: E402

COUNT = 8  # Weights of a thread. The scores come first in its row, then their factors, then their offsets.
LOAD = "\n".join(f"ld.global.b32 %r{10 + i}, [%d3+{4 * i}];" for i in range(3 * COUNT))
COMPUTE = re.sub(r"\$(\d+)", lambda operand: f"%r{2 + int(operand[1])}", WEIGHTS.value)
STORE = "\n".join(f"st.global.b32 [%d3+{4 * i}], %r{2 + i};" for i in range(COUNT))


def weights(scores: torch.Tensor, factor: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    """Return 2^(scores * factor + offset) of float32 scores (32, 8), as the GPU computes it."""
    rows = torch.cat([scores, torch.full_like(scores, factor), torch.full_like(scores, offset)], 1)
    run(f"{LOAD}\n{COMPUTE}\n{STORE}", rows)
    return rows[:, :COUNT]


def test_every_weight_has_the_precision_of_the_unit():
    scores = torch.linspace(-125.9, 8, 32 * COUNT)[torch.randperm(32 * COUNT, generator=torch.Generator().manual_seed(0))]
    scores = scores.view(32, COUNT)
    golden = scores.double().exp2()
    assert ((weights(scores) - golden) / golden).abs().max() < 2**-22


def test_the_exponent_is_one_fused_multiply_add():
    """Choose numbers whose product, rounded before the sum, would be off by a third of the weight."""
    scores, factor = torch.full((32, COUNT), 2.0**24 + 2), 1 + 2.0**-22
    offset = -(2.0**24 + 6)
    golden = 2.0 ** ((2.0**24 + 2) * factor + offset)
    assert weights(scores, factor, offset).tolist() == [[pytest.approx(golden, rel=2**-22)] * COUNT] * 32


@pytest.mark.parametrize(
    ("score", "weight"),
    [(0.0, 1.0), (-1.0, 0.5), (7.0, 128.0), (-127.0, 0.0), (-1e30, 0.0), (-math.inf, 0.0), (math.nan, math.nan)],
)
def test_some_weights_are_exact(score, weight):
    expected = torch.full((32, COUNT), weight)
    torch.testing.assert_close(weights(torch.full((32, COUNT), score)), expected, rtol=0, atol=0, equal_nan=True)
