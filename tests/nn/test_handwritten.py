"""Test that attention spelled out in any way becomes one call inside ``with fastlm.use():``, or else stays torch's."""

import pytest
import torch
from hypothesis import assume, given, settings
from support.spelled_attention import Spelling, spellings
from torch import Tensor

import fastlm
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_within, seeded_normal, ulp_of_largest, worst_error


@pytest.fixture(autouse=True, scope="module")
def any_size():
    """Let products of any size be found."""
    patch = pytest.MonkeyPatch()
    patch.setattr("fastlm.nn.handwritten.products.LEAST", ((1, 1), (1, 1)))
    yield
    patch.undo()


def run(spelling: Spelling, inputs: dict[str, Tensor], grad: bool) -> list[Tensor]:
    """Return the output, what else was seen, and the gradients of all floating inputs."""
    leaves = {name: t.clone().requires_grad_(grad and t.is_floating_point()) for name, t in inputs.items()}
    outputs = spelling.attend(**leaves)
    results = [out.detach().clone() for out in outputs]
    if grad:
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        differentiable = [out for out in outputs if out.requires_grad]
        normals = [seeded_normal(50 + i, out.shape, out.dtype) for i, out in enumerate(differentiable)]
        grads = torch.autograd.grad(differentiable, wanted, normals, allow_unused=True)
        results += [leaf.new_zeros(leaf.shape) if g is None else g for leaf, g in zip(wanted, grads)]
    return results


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spelling=spellings(touched=False))
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_every_spelling_is_one_call_and_as_exact_as_torch(spelling, grad):
    inputs = spelling.inputs()
    with fastlm.use() as report:
        actual = run(spelling, inputs, grad)
    assert (report.routed, dict(report.left)) == (1, {}), str(report)
    plain, golden = run(spelling, inputs, grad), run(spelling, in_float64(inputs), grad)
    for i, (ours, theirs, exact) in enumerate(zip(actual, plain, golden, strict=True)):
        assert ours.dtype == theirs.dtype and (i > 0 or ours.stride() == theirs.stride())
        factor = GRADIENT_FACTOR if i else VALUE_FACTOR
        slack = ulp_of_largest(exact, spelling.dtype)
        assert_within(ours, exact, factor * worst_error(theirs, exact) + 8 * slack, f"result {i}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spelling=spellings(touched=True))
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_what_else_looks_at_scores_and_weights_gets_torch_s_bits(spelling, grad):
    """Nothing is fused where scores were looked at first, and then everything is torch's, to the bit."""
    assume(spelling.is_touched())
    inputs = spelling.inputs()
    try:
        theirs = run(spelling, inputs, grad)
    except RuntimeError as error:  # Something saved the scores for its gradient that were then changed in place.
        with fastlm.use(), pytest.raises(RuntimeError, match=str(error)[:40]):
            run(spelling, inputs, grad)
        return
    with fastlm.use() as report:
        actual = run(spelling, inputs, grad)
    pairs = list(zip(actual, theirs, strict=True))
    if report.routed:  # What was seen has been computed by itself, as in torch.
        pairs = pairs[1:2]
    for i, (ours, plain) in enumerate(pairs):
        assert ours.dtype == plain.dtype and ours.stride() == plain.stride()
        assert torch.equal(ours, plain), f"result {i} of {report}"
