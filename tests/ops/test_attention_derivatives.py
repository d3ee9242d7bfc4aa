"""Test attention's forward mode, its gradient, and double backward on the kernels, with every feature, by the error rule."""

from functools import cache

import pytest
import torch
from cases import SPECS
from hypothesis import given, settings
from hypothesis import strategies as st
from support.derivatives import TANGENT, add_tangents, and_tangents, with_tangents
from support.oracle import ISAS, Oracle, run
from test_attention_sweep import attention_calls, varlen_calls

import fastlm
from fastlm.backend import cpu as native
from fastlm.testing import seeded_normal

CASES = [(name, case, torch.float32) for name in ("attention", "varlen_attention") for case in SPECS[name].cases]
HALF = ["plain", "causal", "head_dim 40 and 24", "mask per key", "softcap", "dropout", "everything"]
CASES += [("attention", case, torch.bfloat16) for case in HALF]


@cache
def oracle(name, case, dtype) -> Oracle:
    """Return the golden (out, lse), their tangents, and the gradients of all four for the inputs and the inputs' tangents."""
    spec = SPECS[name]
    arguments = add_tangents(spec.cases[case](dtype), spec.differentiable)
    return Oracle(with_tangents(spec.function), arguments, and_tangents(spec.differentiable), set())


@pytest.mark.parametrize(("name", "case", "dtype"), CASES)
def test_tangents_and_their_gradients_are_as_good_as_plain_pytorch(name, case, dtype, isa):
    oracle(name, case, dtype).check(backend="cpu")


DIFFERENTIABLE = SPECS["attention"].differentiable
SOME = st.sets(st.sampled_from(DIFFERENTIABLE[2:])).map(tuple)
LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([47, 49, 64, 65, 130]))
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128]))


@settings(max_examples=50)
@given(attention_calls(LENGTHS, DIMS), st.sampled_from(["query", "key"]), SOME)
def test_attention_anywhere(call, first, others):
    """Some of the tensors have tangents; with one of the first two the log-sum-exp has one, too."""
    call = add_tangents(call, (first, *others))
    Oracle(with_tangents(fastlm.attention), call, and_tangents(DIFFERENTIABLE), set()).check_on_every_isa()


@settings(max_examples=20)
@given(varlen_calls(LENGTHS, DIMS))
def test_varlen_attention_anywhere(call):
    call = add_tangents(call, DIFFERENTIABLE)
    Oracle(with_tangents(fastlm.varlen_attention), call, and_tangents(DIFFERENTIABLE), set()).check_on_every_isa()


def test_the_tangent_of_the_value_alone_is_a_forward(isa):
    call = SPECS["attention"].cases["causal"](torch.float32)
    results = with_tangents(fastlm.attention)(**add_tangents(call, ("value",)), backend="cpu")
    moved = fastlm.attention(**{**call, "value": add_tangents(call, ("value",))["value" + TANGENT]}, backend="cpu")
    torch.testing.assert_close(results[2], moved[0])
    assert not results[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_tangents_of_scores_lose_no_digits(dtype, isa):
    """All of a row's scores move by nearly the same, which cancels."""
    call = {name: seeded_normal(i, (1, 2, 200, 64), dtype) for i, name in enumerate(("query", "key", "value"))}
    call["key"] = call["key"] + 1.0
    tangent = (30.0 * seeded_normal(5, (1, 2, 200, 64), torch.float64) + 20.0).to(dtype)
    Oracle(with_tangents(fastlm.attention), {**call, "query" + TANGENT: tangent}, (), set()).check(backend="cpu")


# ---- double backward --------------------------------------------------------------------------------------------------------


def gradient(**arguments):
    """Return the gradients of the outputs, weighted by themselves, so that they depend on all that the backward takes."""
    names = [name for name in DIFFERENTIABLE if arguments.get(name) is not None and arguments[name].requires_grad]
    outputs = fastlm.attention(**arguments)
    loss = sum((out.float() if out.dtype.itemsize < 4 else out).square().where(out.isfinite(), 0).sum() for out in outputs)
    return torch.autograd.grad(loss, [arguments[name] for name in names], create_graph=True)


@cache
def gradient_oracle(case, dtype) -> Oracle:
    return Oracle(gradient, SPECS["attention"].cases[case](dtype), DIFFERENTIABLE, set())


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "everything", "sinks", "masked out", "head_dim 40 and 24"])
def test_the_gradient_of_a_gradient_is_as_good_as_plain_pytorch(case, isa):
    gradient_oracle(case, torch.float32).check(backend="cpu")


# ---- the same bits, and little memory ---------------------------------------------------------------------------------------


def second_order(dtype, **options):
    call = SPECS["attention"].cases["everything"](dtype)
    return run(with_tangents(fastlm.attention), add_tangents(call, DIFFERENTIABLE), and_tangents(DIFFERENTIABLE), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, threads, isa):
    threads(1)
    expected = second_order(dtype)
    for count in (2, 3, 5):
        threads(count)
        for what, result in second_order(dtype).items():
            assert torch.equal(result, expected[what]), what


def test_an_example_does_not_depend_on_its_batch(widest_isa):
    shapes = {"query": (3, 4, 70, 24), "key": (3, 2, 90, 24), "value": (3, 2, 90, 24)}
    call = add_tangents(
        {name: seeded_normal(i, shape, torch.float32) for i, (name, shape) in enumerate(shapes.items())}, tuple(shapes)
    )
    whole = run(with_tangents(fastlm.attention), call, and_tangents(tuple(shapes)), lambda outs, dtype: list(outs), causal=True)
    last = {name: tensor[2:] for name, tensor in call.items()}
    alone = run(with_tangents(fastlm.attention), last, and_tangents(tuple(shapes)), lambda outs, dtype: list(outs), causal=True)
    for what, result in alone.items():
        assert torch.equal(result, whole[what][2:]), what


def test_the_outputs_have_the_bits_of_the_forward(isa):
    call = SPECS["attention"].cases["everything"](torch.float32)
    outputs = with_tangents(fastlm.attention)(**add_tangents(call, ("query", "sinks")), backend="cpu")
    assert all(map(torch.equal, outputs[:2], fastlm.attention(**call, backend="cpu")))


def test_every_instruction_set_is_tested():
    assert native.C is None or native.C.isas() == ISAS
