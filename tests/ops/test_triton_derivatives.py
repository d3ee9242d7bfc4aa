"""Test forward mode and second derivatives of the Triton kernels, as test_triton_attention.py does the first ones.

A call's results are out, lse and their tangents; the gradients of these four are those of the forward, and the second
derivatives. Golden is the reference in float64.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.derivatives import add_tangents, and_tangents, with_tangents
from support.guarded import Guarded
from support.oracle import Oracle, run
from support.sweep import EVERY_DTYPE, scaled
from support.triton_interpreter import DEVICE
from test_attention_sweep import attention_calls, varlen_calls
from test_edge_numbers import huge_logits, masked_row, qkv
from test_triton_attention import DIMS, LENGTHS
from torch.func import grad, jvp, vmap

import fastlm
from fastlm.testing import assert_as_good_as_plain, seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

TRITON = {"backend": "triton", "device": DEVICE}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEARNED = ("query", "key", "value", "mask", "sinks")
ATTENTION, VARLEN = with_tangents(fastlm.attention), with_tangents(fastlm.varlen_attention)


def check(function, call: dict, names=LEARNED):
    """Hold a call's results, tangents and gradients to the rule of errors."""
    call = add_tangents(call | {"return_lse": True}, tuple(sorted(names)))
    Oracle(function, call, and_tangents(LEARNED), set()).check(**TRITON)


# ---- every feature ----------------------------------------------------------------------------------------------------------


def grouped(q_len=33, k_len=40, batch=1, dim=24, **options):
    """Return a maker of a call of two query heads for a key head, whose tensors are normals of a dtype."""

    def make(dtype):
        shapes = {"query": (2, q_len, dim), "key": (1, k_len, dim), "value": (1, k_len, 17)}
        call = {name: seeded_normal(i, (batch, *shape), dtype) for i, (name, shape) in enumerate(shapes.items())}
        return call | {name: value(dtype) if callable(value) else value for name, value in options.items()}

    return make


def normals(*shape):
    return lambda dtype: seeded_normal(9, shape, dtype)


def with_hidden(dtype):
    """Return a float mask that hides some keys, a row and a block."""
    mask = seeded_normal(9, (33, 40), dtype)
    hidden = seeded_normal(8, (33, 40), dtype) > 1
    hidden[3], hidden[:, :16] = True, True
    return mask.masked_fill(hidden, -math.inf)


SEEN = seeded_normal(8, (1, 1, 33, 40), torch.float32) < 0.5
SEEN[:, :, 5] = False
FEATURES = {
    "plain": grouped(),
    "causal": grouped(causal=True),
    "more queries than keys": grouped(40, 33, causal=True),
    "window": grouped(window=(9, 3)),
    "a negative scale": grouped(scale=-0.4),
    "bool mask": grouped(mask=SEEN),
    "mask": grouped(mask=with_hidden),
    "mask for each query": grouped(mask=normals(2, 33, 1)),
    "mask for each key": grouped(batch=2, mask=normals(2, 1, 1, 40), causal=True),
    "mask of one number": grouped(mask=normals()),
    "softcap": grouped(softcap=0.7, scale=0.3),
    "slopes": grouped(alibi_slopes=torch.tensor([0.5, 0.1])),
    "sinks": grouped(40, 33, sinks=normals(2), causal=True),
    "dropout": grouped(batch=2, dropout_p=0.3, seed=torch.tensor([3, 2**62])),
    "all dropped": grouped(dropout_p=1.0, seed=3),
    "no keys": grouped(k_len=0, sinks=normals(2)),
    "everything": grouped(
        mask=with_hidden, softcap=2.0, sinks=normals(2), causal=True, window=(20, 0), dropout_p=0.2, seed=1,
        alibi_slopes=torch.tensor([0.5, 0.1]),
    ),
}  # fmt: skip
CALLS = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for i, name in enumerate(FEATURES)
    for dtype in (DTYPES if EVERY_DTYPE or name == "everything" else DTYPES[i % 3 :][:1])
]


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_tangents_and_second_derivatives_are_as_good_as_plain_pytorch(name, dtype):
    check(ATTENTION, FEATURES[name](dtype))


# One of the first two at least, without which lse_tangent has no gradient.
NAMES = st.tuples(st.sets(st.sampled_from(LEARNED)), st.sampled_from(LEARNED[:2])).map(lambda drawn: drawn[0] | {drawn[1]})


def test_keys_that_are_loaded_again_for_every_block():
    """Run the pass for the keys where it has no room to keep tiles of float32 with so many columns."""
    check(ATTENTION, grouped(dim=130, causal=True)(torch.float32))


@settings(max_examples=scaled(10))
@given(attention_calls(LENGTHS, DIMS, most=2, groups=(1, 2)), NAMES)
def test_any_tangents_anywhere(call, names):
    check(ATTENTION, call, names)


@settings(max_examples=scaled(4))
@given(varlen_calls(LENGTHS, DIMS, groups=(1, 2)), NAMES)
def test_any_tangents_of_packed_sequences(call, names):
    check(VARLEN, call, names)


# ---- numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_a_row_of_large_negative_numbers(fill):
    check(ATTENTION, masked_row(fill)(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tangents_of_steep_rows(dtype):
    """Make the tangents of a row's scores all large, and nearly the same where the weights are."""
    call = add_tangents({**grouped()(dtype), "scale": 1.0, "return_lse": True}, LEARNED)
    call |= {f"{name}_tangent": 4 * call[name] for name in ("query", "key")}
    Oracle(ATTENTION, call, LEARNED, set()).check(**TRITON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits(dtype):
    """float16 would overflow: it has no room for differences of score tangents above 65504."""
    check(ATTENTION, huge_logits()(dtype))


@pytest.mark.parametrize("tangent", [math.inf, math.nan])
def test_the_tangent_of_a_hidden_key_counts_for_nothing(tangent):
    """It comes from masks like log(weights)."""
    call = {**qkv(torch.float32, 40, 40), "mask": torch.zeros(40, 40)}
    call["mask"][:, 7] = call["mask"][3] = -math.inf
    call = add_tangents(call | {"return_lse": True}, LEARNED)
    expected = run(ATTENTION, call, LEARNED, **TRITON)
    call["mask_tangent"] = call["mask_tangent"].masked_fill(call["mask"] == -math.inf, tangent)
    for what, result in run(ATTENTION, call, LEARNED, **TRITON).items():
        assert torch.equal(result, expected[what]), what


@pytest.mark.parametrize("name", ["mask", "sinks"])
def test_a_row_does_not_depend_on_its_batch_and_every_run_gives_the_same_bits(name):
    call = {tensor: seeded_normal(i, (3, 2, 40, 16), torch.float32) for i, tensor in enumerate(("query", "key", "value"))}
    call[name] = seeded_normal(5, (3, 1, 40, 40) if name == "mask" else (2,), torch.float32)
    call = add_tangents(call | {"causal": True, "return_lse": True}, LEARNED)
    leaves = ("query", "key", "value", "mask") if name == "mask" else ("query", "key", "value")
    whole, again = (run(ATTENTION, call, leaves, **TRITON) for _ in range(2))
    alone = {k: v[1:2] if isinstance(v, torch.Tensor) and v.dim() == 4 else v for k, v in call.items()}
    sizes = [(3, 2, 40, 16), (3, 2, 40)] * 2
    gradients = [seeded_normal(100 + i, size, torch.float32)[1:2] for i, size in enumerate(sizes)]
    for what, result in run(ATTENTION, alone, leaves, lambda *_: gradients, **TRITON).items():
        assert torch.equal(whole[what], again[what]), what
        assert torch.equal(result, whole[what][1:2]), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_outside_the_tensors(dtype):
    """NaN surrounds every dimension of the inputs and of their tangents."""
    shapes = {"query": (2, 33, 24), "key": (1, 40, 24), "value": (1, 40, 17), "mask": (2, 33, 40)}
    call = {name: seeded_normal(i, (1, *shape), dtype) for i, (name, shape) in enumerate(shapes.items())}
    guarded = Guarded(DEVICE)
    inside = {name: guarded.put(tensor) for name, tensor in add_tangents(call, tuple(shapes)).items()}
    leaves = {name: inside[name].requires_grad_() for name in shapes}
    outputs = ATTENTION(**inside, causal=True, return_lse=True, backend="triton")
    of_outputs = [guarded.put(torch.ones_like(out)) if out.dim() == 4 else torch.ones_like(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), of_outputs)
    assert all(result.isfinite().all() for result in (*outputs, *gradients))
    guarded.check(math.nan)


# ---- by torch ---------------------------------------------------------------------------------------------------------------


def double_backward(loss, x, v):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, v)[0]


HESSIAN_PRODUCTS = {
    "double backward": double_backward,
    "hvp": lambda loss, x, v: torch.autograd.functional.hvp(loss, x, v)[1],
    "jvp of grad": lambda loss, x, v: jvp(grad(loss), (x,), (v,))[1],
    "grad of jvp": lambda loss, x, v: grad(lambda x: jvp(loss, (x,), (v,))[1])(x),
    "vmap of jvp": lambda loss, x, v: vmap(lambda v: jvp(grad(loss), (x,), (v,))[1])(torch.stack([-v, v]))[1],
}


@pytest.mark.parametrize("product", HESSIAN_PRODUCTS.values(), ids=HESSIAN_PRODUCTS)
def test_products_with_a_hessian(product):
    x, v = seeded_normal(1, (1, 2, 33, 16), torch.float32), seeded_normal(2, (1, 2, 33, 16), torch.float32)

    def run_on(backend, dtype, device):
        def loss(x):
            return fastlm.attention(x, 0.5 * x, x.sin(), causal=True, softcap=3.0, backend=backend).square().sum()

        return product(loss, x.to(device, dtype), v.to(device, dtype)).cpu()

    golden, plain = (run_on("reference", dtype, "cpu") for dtype in (torch.float64, torch.float32))
    assert_as_good_as_plain(run_on("triton", torch.float32, DEVICE), plain, golden, 3.0)


def test_opcheck():
    tensors = [seeded_normal(i, (1, 2, 9, 16), torch.float32).to(DEVICE) for i in range(3)]
    call, tangents = (*tensors, *[None] * 7, 2, 0, 0.3, 0.0, 0.0), (tensors[0], None, tensors[2], None, None)
    ops = torch.ops.fastlm
    torch.library.opcheck(ops.triton_attention_jvp.default, (*call, *tangents), raise_exception=True)
    out, lse, *rest = ops.triton_attention_jvp(*call, *tangents)
    saved = out, lse, out, lse, *rest, False, False
    torch.library.opcheck(ops.triton_attention_jvp_backward.default, (*saved, *call, *tangents), raise_exception=True)
