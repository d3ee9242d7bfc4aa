"""Test the derivatives of the reference of attention: by finite differences, by each other, and by the closed forms."""

import math

import pytest
import torch
from cases.attention import SPECS
from support.second_order import HESSIAN_PRODUCTS
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, linearize, vjp

import fastlm
from fastlm.reference import attention as reference
from fastlm.reference import attention_derivatives as closed_forms
from fastlm.testing import GRADIENT_FACTOR, assert_as_good_as_plain, seeded_normal

INPUTS = 5  # The first 5 arguments of `attend` have derivatives, but not a bool mask.


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


@over_small_calls
def test_mixtures_of_forward_and_reverse_mode_agree(call, inputs):
    def loss(x):
        parts = x.split([t.numel() for t in inputs])
        return scalar(call)(*(part.view(t.shape) for part, t in zip(parts, inputs)))

    x = torch.cat([t.flatten() for t in inputs])
    v = n(30, *x.shape)
    # Central differences of the gradient, which the test above has checked.
    expected = (grad(loss)(x + 1e-5 * v) - grad(loss)(x - 1e-5 * v)) / 2e-5
    products = dict(HESSIAN_PRODUCTS)
    first = products.pop("hessian")(loss, x, v)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)
    for name, product in products.items():
        torch.testing.assert_close(product(loss, x, v), first, rtol=1e-11, atol=1e-11, msg=f"{name} differs from hessian")


# ---- the closed forms -------------------------------------------------------------------------------------------------------

CASES = [(spec.function, name, make) for spec in SPECS[:2] for name, make in spec.cases.items()]
over_cases = pytest.mark.parametrize(
    ("function", "make"), [(f, m) for f, _, m in CASES], ids=[f"{f.__name__}, {n}" for f, n, _ in CASES]
)


class Linearized:
    """A call of the reference with its directions, and its derivatives by autograd, in one dtype.

    ``call`` holds the arguments of `attend`, ``tangents`` the directions of the first five, and ``which`` the indices of those
    that have one.
    """

    def __init__(self, call: tuple, tangents: list, grads: list):
        self.call, self.tangents, self.grads = call, tangents, grads
        self.which = [i for i, tangent in enumerate(tangents) if tangent is not None]

    @classmethod
    def record(cls, function, arguments: dict, monkeypatch) -> "Linearized":
        """Record what the public function calls the reference with, and draw the directions."""
        calls, attend = [], reference.attend
        with monkeypatch.context() as patch:
            patch.setattr(reference, "attend", lambda *call: calls.append(call) or attend(*call))
            function(**arguments, backend="reference")
        (call,) = calls
        tangents = [None] * INPUTS
        for i, tensor in enumerate(call[:INPUTS]):
            if tensor is not None and tensor.is_floating_point():
                tangents[i] = seeded_normal(40 + i, tensor.shape, tensor.dtype)
        return cls(call, tangents, normals_like(50, attend(*call)))

    def to(self, dtype: torch.dtype) -> "Linearized":
        def convert(values):
            return [v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]

        return Linearized(tuple(convert(self.call)), convert(self.tangents), convert(self.grads))

    def inputs(self) -> list:
        return [self.call[i] for i in self.which]

    def directions(self) -> list:
        return [self.tangents[i] for i in self.which]

    def outputs(self, *inputs):
        """Return (out, lse) as a function of the inputs that have derivatives."""
        call = list(self.call)
        for i, tensor in zip(self.which, inputs):
            call[i] = tensor
        return reference.attend(*call)

    def jvp(self, inputs, directions) -> tuple:
        return jvp(self.outputs, tuple(inputs), tuple(directions))[1]

    def closed_jvp_backward(self) -> list:
        """Return the gradients of the inputs, then those of the directions."""
        grads, tangent_grads = closed_forms.jvp_backward(*self.grads, self.tangents, *self.call)
        absent = [i for i in range(INPUTS) if i not in self.which]
        assert all(grads[i] is None and tangent_grads[i] is None for i in absent)
        return [grads[i] for i in self.which] + [tangent_grads[i] for i in self.which]


def assert_equal_derivatives(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@over_cases
def test_closed_forms_are_the_derivatives_of_autograd(function, make, monkeypatch):
    it = Linearized.record(function, make(torch.float64), monkeypatch)
    inputs, directions = it.inputs(), it.directions()
    tangents = closed_forms.jvp(it.tangents, *it.call)
    assert_equal_derivatives(tangents, it.jvp(inputs, directions))

    grads = it.closed_jvp_backward()
    k = len(inputs)
    _, pullback = vjp(lambda *both: it.jvp(both[:k], both[k:]), *inputs, *directions)
    assert_equal_derivatives(grads, pullback(tuple(it.grads)))

    leaves = [t.clone().requires_grad_() for t in (*inputs, *it.grads)]
    first = torch.autograd.grad(it.outputs(*leaves[:k]), leaves[:k], leaves[k:], create_graph=True)
    assert_equal_derivatives([*grads[:k], *tangents], torch.autograd.grad(first, leaves, directions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@over_cases
def test_closed_forms_round_as_autograd_does(function, make, dtype, monkeypatch):
    if make is SPECS[0].cases["one of each"]:
        pytest.skip("the error of a single number is luck")
    it = Linearized.record(function, make(dtype), monkeypatch)
    double, inputs = it.to(torch.float64), it.inputs()
    k = len(inputs)

    def derivatives(of):
        tangents, pullback = vjp(lambda *both: of.jvp(both[:k], both[k:]), *of.inputs(), *of.directions())
        return *tangents, *pullback(tuple(of.grads))

    actual = *closed_forms.jvp(it.tangents, *it.call), *it.closed_jvp_backward()
    names = "dout", "dlse", *(f"gradient {i}" for i in range(2 * k))
    for name, a, plain, golden in zip(names, actual, derivatives(it), derivatives(double), strict=True):
        assert_as_good_as_plain(a, plain, golden, GRADIENT_FACTOR, name)


def test_what_is_missing_counts_as_zero(monkeypatch):
    it = Linearized.record(fastlm.attention, SPECS[0].cases["everything"](torch.float64), monkeypatch)
    zeros = [torch.zeros_like(t) for t in it.tangents]
    for i in it.which:
        alone = [t if j == i else None for j, t in enumerate(it.tangents)]
        filled = [t if j == i else zeros[j] for j, t in enumerate(it.tangents)]
        assert_equal_derivatives(closed_forms.jvp(alone, *it.call), closed_forms.jvp(filled, *it.call))
    u, w = it.grads
    for given, filled in (((u, None), (u, torch.zeros_like(w))), ((None, w), (torch.zeros_like(u), w))):
        results = (closed_forms.jvp_backward(*pair, it.tangents, *it.call) for pair in (given, filled))
        assert_equal_derivatives(*([t for part in result for t in part] for result in results))
