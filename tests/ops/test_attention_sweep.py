"""Test attention on random calls: lengths, heads, dims, strides, dtypes, masks, options, seeds, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import Oracle, output_gradients

import fastlm
from fastlm.testing import seeded_normal

DIFFERENTIABLE = ("query", "key", "value", "mask", "sinks")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([47, 48, 49, 63, 64, 65, 97, 128, 131, 200]))
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 72, 80, 96, 100, 128, 160, 256]))
LAYOUTS = ("contiguous", "rows first", "one tensor", "columns first", "expanded", "offset", "stepped")


def dtypes_beside(dtype) -> st.SearchStrategy:
    """Draw a dtype for masks, slopes and sinks that has no more digits than the query's.

    Kernels take more digits, too. But the gradients are computed from the output rounded to the query's dtype (CONTRIBUTING.md,
    'Numbers'), and have no more digits.
    """
    return st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64] if dtype == torch.float32 else [dtype])


LIMITS = st.one_of(st.none(), st.integers(0, 30), st.sampled_from([63, 64, 1000, 2**62]))


def laid_out(layout: str, shape: tuple, dtype, seed: int) -> torch.Tensor:
    """Make normals (batch, heads, rows, dim), in memory as ``layout`` says."""
    batch, heads, rows, dim = shape

    def normals(*sizes):
        return seeded_normal(seed, sizes, dtype)

    if layout == "rows first":  # Models have this transpose.
        return normals(batch, rows, heads, dim).transpose(1, 2)
    if layout == "one tensor":  # A third of the output of one linear layer.
        return normals(batch, rows, 3, heads, dim)[:, :, seed % 3].transpose(1, 2)
    if layout == "columns first":
        return normals(batch, heads, dim, rows).mT
    if layout == "expanded":  # One head for all, one example for all.
        return normals(1, 1, rows, dim).expand(shape)
    if layout == "offset":  # The address is a multiple of only the element's size.
        return normals(batch * heads * rows * dim + 1)[1:].view(shape)
    if layout == "stepped":
        return normals(batch, heads, 2 * rows, dim + 3)[:, :, ::2, :dim]
    return normals(*shape)


@st.composite
def tensors(draw, batch: int, heads: int, kv_heads: int, q_len: int, k_len: int, dtype, dims=DIMS) -> dict:
    dim, value_dim = draw(dims), draw(dims)
    shapes = {"query": (heads, q_len, dim), "key": (kv_heads, k_len, dim), "value": (kv_heads, k_len, value_dim)}
    return {
        name: laid_out(draw(st.sampled_from(LAYOUTS)), (batch, *shape), dtype, i)
        for i, (name, shape) in enumerate(shapes.items())
    }


@st.composite
def options(draw, batch: int, heads: int, dtype) -> dict:
    """Draw the options that all functions take."""
    call = {"return_lse": True}
    if draw(st.booleans()):
        call["causal"] = True
    if draw(st.booleans()):
        call["window"] = (draw(LIMITS), draw(LIMITS))
    if draw(st.booleans()):
        call["scale"] = draw(st.sampled_from([0.05, 0.3, 1.0, -0.4, 0.0]))
    if draw(st.integers(0, 2)) == 0:
        call["softcap"] = draw(st.sampled_from([0.5, 3.0, 30.0]))
    if draw(st.integers(0, 2)) == 0:
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        call["alibi_slopes"] = seeded_normal(7, shape, draw(dtypes_beside(dtype))).abs() / 8
    if draw(st.integers(0, 2)) == 0:
        call["sinks"] = seeded_normal(8, (heads,), draw(dtypes_beside(dtype)))
    return call


@st.composite
def dropout(draw, batch: int) -> dict:
    if draw(st.booleans()):
        return {}
    seeds = st.integers(-(2**63), 2**63 - 1)
    seed = draw(
        st.one_of(seeds, seeds.map(torch.tensor), st.lists(seeds, min_size=batch, max_size=batch).map(torch.LongTensor))
    )
    return {"dropout_p": draw(st.sampled_from([0.1, 0.5, 0.9])), "seed": seed}


@st.composite
def masks(draw, shape: tuple, dtype) -> dict:
    """Draw None, or a bool or floating mask without some leading dimensions, some of size 1, and with empty rows and blocks."""
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind == "none":
        return {}
    own = tuple(draw(st.sampled_from([1, size])) for size in shape[draw(st.integers(0, 4)) :])
    normals = seeded_normal(draw(st.integers(0, 3)) + 20, own, torch.float64)
    seen = normals > draw(st.sampled_from([-10.0, 0.0, 1.5]))
    if own and draw(st.booleans()):
        seen[..., : own[-1] // 2] = False
    if kind == "bool":
        return {"mask": seen}
    hidden = draw(st.booleans())
    mask = normals.masked_fill(~seen, -torch.inf) if hidden else normals
    mask = mask.to(draw(dtypes_beside(dtype)))
    return {"mask": mask.mT.contiguous().mT if mask.dim() > 1 and draw(st.booleans()) else mask}


@st.composite
def attention_calls(draw, lengths=LENGTHS, dims=DIMS, most: int = 3, groups=(1, 1, 2, 3, 8)) -> dict:
    """Draw up to ``most`` examples and key heads, each shared by a group of query heads whose size is one of ``groups``."""
    batch, kv_heads, group = draw(st.integers(0, most)), draw(st.integers(1, most)), draw(st.sampled_from(groups))
    heads, q_len, k_len, dtype = kv_heads * group, draw(lengths), draw(lengths), draw(DTYPES)
    return {
        **draw(tensors(batch, heads, kv_heads, q_len, k_len, dtype, dims)),
        **draw(masks((batch, heads, q_len, k_len), dtype)),
        **draw(options(batch, heads, dtype)),
        **draw(dropout(batch)),
    }


@st.composite
def varlen_calls(draw, lengths=LENGTHS, dims=DIMS, groups=(1, 2, 5)) -> dict:
    sequences, kv_heads, group = draw(st.integers(0, 5)), draw(st.integers(1, 2)), draw(st.sampled_from(groups))
    lengths = [[draw(lengths) for _ in range(sequences)] for _ in range(2)]
    dtype = draw(DTYPES)
    made = draw(tensors(1, kv_heads * group, kv_heads, *map(sum, lengths), dtype, dims))
    names = "cu_seqlens_q", "cu_seqlens_k"
    return {
        **{name: tensor[0].transpose(0, 1) for name, tensor in made.items()},
        **{name: torch.tensor([0, *row]).cumsum(0).int() for name, row in zip(names, lengths)},
        **draw(options(sequences, kv_heads * group, dtype)),
        **draw(dropout(sequences)),
    }


def gradients_laid_out(layout: str):
    """Return a function that makes the outputs' gradients with other strides: one expanded number (as of sum) or transposed."""

    def make(outputs, dtype):
        gradients = output_gradients(outputs, dtype)
        if layout == "transposed":
            return [g.transpose(0, 1).contiguous().transpose(0, 1) for g in gradients]
        if layout == "expanded":
            return [seeded_normal(7, (), dtype).to(g.dtype).expand(g.shape) for g in gradients]
        return gradients

    return make


GRADIENT_LAYOUTS = st.sampled_from(["contiguous", "transposed", "expanded"])


@settings(max_examples=250)
@given(attention_calls(), GRADIENT_LAYOUTS)
def test_attention_anywhere(call, layout):
    Oracle(fastlm.attention, call, DIFFERENTIABLE, set(), gradients_laid_out(layout)).check_on_every_isa()


@settings(max_examples=80)
@given(varlen_calls(), GRADIENT_LAYOUTS)
def test_varlen_attention_anywhere(call, layout):
    Oracle(fastlm.varlen_attention, call, DIFFERENTIABLE, set(), gradients_laid_out(layout)).check_on_every_isa()


@pytest.mark.parametrize("needed", DIFFERENTIABLE)
def test_only_the_gradients_asked_for_are_given(needed, isa):
    shapes = {"query": (2, 4, 9, 8), "key": (2, 2, 11, 8), "value": (2, 2, 11, 8), "mask": (9, 11), "sinks": (4,)}
    call = {name: seeded_normal(i, shape, torch.float32) for i, (name, shape) in enumerate(shapes.items())}
    call[needed].requires_grad_()
    fastlm.attention(**call, backend="cpu").sum().backward()
    assert [name for name, tensor in call.items() if tensor.grad is not None] == [needed]


@pytest.mark.parametrize("wanted", [0, 1], ids=["out", "lse"])
def test_a_loss_may_use_one_of_the_outputs_alone(wanted, isa):
    leaves = [seeded_normal(i, (2, 3, 9, 8), torch.float32).requires_grad_() for i in range(3)]

    def gradients(backend):
        output = fastlm.attention(*leaves, return_lse=True, backend=backend)[wanted]
        return torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True, materialize_grads=True)

    for actual, expected in zip(gradients("cpu"), gradients("reference")):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["mask", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mask_and_sinks_may_have_more_digits_than_the_query(name, dtype, isa):
    call = {tensor: seeded_normal(i, (2, 3, 9, 8), dtype) for i, tensor in enumerate(("query", "key", "value"))}
    like = seeded_normal(5, (9, 9) if name == "mask" else (3,), dtype)
    gradients = []
    for other in (dtype, torch.float32, torch.float64):
        leaf = like.to(other).requires_grad_()
        gradients += torch.autograd.grad(fastlm.attention(**call, **{name: leaf}, backend="cpu").sum(), leaf)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float64]
    assert torch.equal(gradients[1].to(dtype), gradients[0]) and torch.equal(gradients[2].float(), gradients[1])


@pytest.mark.parametrize("layout", ["contiguous", "rows first", "one tensor"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_output_lies_in_memory_as_the_query_does(layout, grad, isa):
    query = laid_out(layout, (2, 3, 9, 8), torch.float32, 1).requires_grad_(grad)
    out = fastlm.attention(query, query.detach(), query.detach(), backend="cpu")
    assert (out if layout == "contiguous" else out.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("length", [4096, 20_000])
def test_a_long_sum_of_float32_is_right(length, isa):
    call = {name: seeded_normal(i, (1, 1, 64, 32), torch.float32) for i, name in enumerate(("query", "key", "value"))}
    call |= {name: seeded_normal(i, (1, 1, length, 32), torch.float32) for i, name in enumerate(("key", "value"))}
    Oracle(fastlm.attention, call, ("query", "key", "value"), set()).check(backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_far_apart_neither_overflow_nor_vanish(dtype, isa):
    """Scores reach +-60,000, but the softmax depends only on their differences."""
    query = seeded_normal(1, (1, 2, 50, 16), dtype) * 100
    call = {
        "query": query,
        "key": seeded_normal(2, (1, 2, 90, 16), dtype) * 100,
        "value": seeded_normal(3, (1, 2, 90, 16), dtype),
    }
    out, lse = fastlm.attention(**call, return_lse=True, backend="cpu")
    assert out.isfinite().all() and lse.isfinite().all()
    Oracle(fastlm.attention, {**call, "return_lse": True}, (), set()).check(backend="cpu")
