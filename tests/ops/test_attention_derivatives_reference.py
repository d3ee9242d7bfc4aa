"""Test the derivatives of the reference of attention: by finite differences and by each other."""

import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hvp, vhp
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import fastlm
from fastlm.testing import seeded_normal


def normals_like(seed: int, tensors) -> list[torch.Tensor]:
    return [seeded_normal(seed + i, tuple(t.shape), t.dtype) for i, t in enumerate(tensors)]


# ---- finite differences, and mixtures of modes, of small calls --------------------------------------------------------------

B, H, HKV, LQ, LK, D, DV = 1, 2, 1, 3, 4, 2, 3
SEEN = torch.ones(LQ, LK, dtype=torch.bool)
SEEN[1] = SEEN[0, 2] = False  # A row sees no key.


def n(seed: int, *shape: int) -> torch.Tensor:
    return seeded_normal(seed, shape, torch.float64)


def batched(q_len=LQ, k_len=LK, learned=None, **options):
    """Return (function, inputs) of a call; the function gives (out, lse), and takes the ``learned`` arguments last."""
    learned = learned or {}

    def call(query, key, value, *more):
        named = dict(zip(learned, more))
        return fastlm.attention(query, key, value, return_lse=True, backend="reference", **options, **named)

    return call, (n(1, B, H, q_len, D), n(2, B, HKV, k_len, D), n(3, B, HKV, k_len, DV), *learned.values())


def packed():
    """Return (function, inputs) of packed sequences with everything; one has no query and one no key."""
    cu_seqlens = torch.tensor([0, 2, 2, 5]).int(), torch.tensor([0, 0, 2, 5]).int()
    slopes, seed = n(4, 3, H).abs(), torch.tensor([5, 6, 7])

    def call(query, key, value, sinks):
        return fastlm.varlen_attention(
            query, key, value, *cu_seqlens, causal=True, window=(3, 0), softcap=2.0, alibi_slopes=slopes, sinks=sinks,
            dropout_p=0.2, seed=seed, return_lse=True, backend="reference",
        )  # fmt: skip

    return call, (n(1, 5, H, D), n(2, 5, HKV, D), n(3, 5, HKV, DV), n(5, H))


SMALL = {
    "plain": batched(),
    "causal, rows without keys": batched(k_len=2, causal=True),
    "window": batched(window=(1, 0)),
    "softcap": batched(softcap=0.8),
    "slopes": batched(alibi_slopes=torch.tensor([0.5, 0.25])),
    "sinks": batched(k_len=2, causal=True, learned={"sinks": n(8, H)}),
    "bool mask": batched(mask=SEEN),
    "mask": batched(learned={"mask": n(9, H, 1, LK)}),
    "mask of -inf": batched(mask=n(9, LQ, LK).masked_fill(~SEEN, -math.inf)),
    "mask of the lowest number": batched(mask=n(9, LQ, LK).masked_fill(~SEEN & SEEN.any(1, keepdim=True), -1.7e308)),
    "dropout": batched(dropout_p=0.4, seed=3),
    "all dropped": batched(dropout_p=1.0, seed=3),
    "no keys": batched(k_len=0, learned={"sinks": n(8, H)}),
    "nothing at all": batched(k_len=0),
    "everything": batched(
        learned={"mask": n(9, LQ, LK), "sinks": n(8, H)}, softcap=1.3, window=(3, 1), dropout_p=0.2, seed=1, scale=0.6,
        alibi_slopes=n(7, H).abs(),
    ),
    "packed": packed(),
}  # fmt: skip
over_small_calls = pytest.mark.parametrize(("call", "inputs"), SMALL.values(), ids=SMALL)


def finite(call):
    """Return ``call`` with a 0 for the LSE of a row without keys, which has no finite differences."""

    def function(*tensors):
        out, lse = call(*tensors)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    return function


@over_small_calls
def test_first_and_second_derivatives_are_those_of_finite_differences(call, inputs):
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    call = finite(call)
    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, check_batched_grad=True)


def test_a_learned_mask_of_minus_infinity_has_derivatives_of_zero():
    """Finite differences cannot tell: the mask stays -inf."""
    mask = n(9, LQ, LK).masked_fill(~SEEN, -math.inf)
    call, inputs = batched(learned={"mask": mask})
    gradient, second = linearize(grad(lambda *t: scalar(call)(*t), 3), *inputs)
    second = second(*normals_like(20, inputs))
    assert not gradient[~SEEN].any() and gradient[SEEN].all()
    assert not second[~SEEN].any() and second[SEEN].all()


def scalar(call):
    """Return a function of ``call``'s inputs to one number that has no vanishing second derivatives."""

    def loss(*tensors):
        out, lse = finite(call)(*tensors)
        ramp = torch.arange(1.0, 1.0 + out.numel(), dtype=out.dtype).view(out.shape)
        return (out.sin() * ramp).sum() + (lse / 2).tanh().square().sum()

    return loss


def dual_tangent(function, x, tangent):
    """Return the tangent of ``function(x)``, by dual tensors."""
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    return torch.zeros_like(function(x)) if dual is None else dual


def double_backward(loss, x, v):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, v)[0]


def backward_of_a_tangent(loss, x, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(dual_tangent(loss, x, v), x)[0]


def tangent_of_a_backward(loss, x, v):
    def gradient(dual):
        return torch.autograd.grad(loss(dual), dual, create_graph=True)[0]

    return dual_tangent(gradient, x.clone().requires_grad_(), v)


# All of these are the Hessian of ``loss`` at x times v.
HESSIAN_PRODUCTS = {
    "hessian": lambda loss, x, v: hessian(loss)(x) @ v,
    "forward over forward": lambda loss, x, v: jacfwd(jacfwd(loss))(x) @ v,
    "reverse over reverse": lambda loss, x, v: jacrev(jacrev(loss))(x) @ v,
    "reverse over forward": lambda loss, x, v: jacrev(jacfwd(loss))(x) @ v,
    "jvp of grad": lambda loss, x, v: jvp(grad(loss), (x,), (v,))[1],
    "grad of jvp": lambda loss, x, v: grad(lambda x: jvp(loss, (x,), (v,))[1])(x),
    "vjp of grad": lambda loss, x, v: vjp(grad(loss), x)[1](v)[0],
    "linearize": lambda loss, x, v: linearize(grad(loss), x)[1](v),
    "vmap of jvp": lambda loss, x, v: vmap(lambda v: jvp(grad(loss), (x,), (v,))[1])(torch.stack([-v, v]))[1],
    "vmap of grad of jvp": lambda loss, x, v: vmap(lambda x: grad(lambda x: jvp(loss, (x,), (v,))[1])(x))(x[None])[0],
    "hvp": lambda loss, x, v: hvp(loss, x, v)[1],
    "vhp": lambda loss, x, v: vhp(loss, x, v)[1],
    "double backward": double_backward,
    "backward of a tangent": backward_of_a_tangent,
    "tangent of a backward": tangent_of_a_backward,
}


@over_small_calls
def test_mixtures_of_forward_and_reverse_mode_agree(call, inputs):
    def loss(x):
        parts = x.split([t.numel() for t in inputs])
        return scalar(call)(*(part.view(t.shape) for part, t in zip(parts, inputs)))

    x = torch.cat([t.flatten() for t in inputs])
    v = n(30, *x.shape)
    # Central differences of the gradient, which the test above has checked.
    expected = (grad(loss)(x + 1e-5 * v) - grad(loss)(x - 1e-5 * v)) / 2e-5
    first = HESSIAN_PRODUCTS["hessian"](loss, x, v)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)
    for name, product in HESSIAN_PRODUCTS.items():
        torch.testing.assert_close(product(loss, x, v), first, rtol=1e-11, atol=1e-11, msg=f"{name} differs from hessian")
