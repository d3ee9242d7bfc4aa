"""Test forward mode, second and third derivatives of the latent on the CPU, closed forms around the kernels."""

import pytest
import torch
from cases.latent import SPECS
from support.second_order import HESSIAN_PRODUCTS
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import fastlm
from fastlm.testing import GRADIENT_FACTOR, assert_as_good_as_plain, seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernels."""


def n(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return seeded_normal(seed, shape, dtype)


# ---- finite differences, and mixtures of modes, of small calls --------------------------------------------------------------

SHAPE = 3, 4
SEEDS = torch.tensor([1, -2, 3])
WITH_KL, SAMPLE, KL = fastlm.reparameterize_with_kl, fastlm.reparameterize, fastlm.gaussian_kl
# (function, shapes of the priors, options)
SMALL = {
    "plain": (WITH_KL, {}, {"seed": 5}),
    "sample": (SAMPLE, {}, {"seed": 5}),
    "temperature and seeds": (SAMPLE, {}, {"seed": SEEDS, "temperature": 0.3}),
    "kl": (KL, {}, {}),
    "kl of priors": (KL, {"prior_mu": SHAPE, "prior_logvar": SHAPE}, {"event_dims": 2}),
    "prior mean": (WITH_KL, {"prior_mu": (4,)}, {"seed": 5}),
    "prior variance": (WITH_KL, {"prior_logvar": (3, 1)}, {"seed": 5, "event_dims": 0}),
    "free bits": (WITH_KL, {}, {"seed": 5, "free_bits": 0.4}),
    "clamp": (WITH_KL, {}, {"seed": 5, "logvar_clamp": (-0.6, 0.8)}),
    "samples": (WITH_KL, {}, {"seed": 5, "num_samples": 3}),
    "everything": (
        WITH_KL,
        {"prior_mu": (3, 1), "prior_logvar": (4,)},
        {"seed": SEEDS, "free_bits": 0.2, "logvar_clamp": (-0.9, 1.1), "num_samples": 2, "event_dims": 2},
    ),
}
over_small_calls = pytest.mark.parametrize("name", SMALL)


def small(name: str, backend: str = "cpu", dtype=torch.float64):
    """Return (call, inputs) with ``call(*inputs)`` a tuple of outputs."""
    function, priors, options = SMALL[name]

    def call(mu, logvar, *more):
        outputs = function(mu, logvar, **dict(zip(priors, more)), **options, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    shapes = SHAPE, SHAPE, *priors.values()
    return call, tuple(n(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))


def loss_of(name: str, backend: str = "cpu"):
    """Return (loss, x), with ``loss`` a function of the inputs in one vector x, not linear in any output."""
    call, inputs = small(name, backend)

    def loss(x):
        parts = x.split([t.numel() for t in inputs])
        outputs = call(*(part.view(t.shape) for part, t in zip(parts, inputs)))
        return sum((out.sin() * torch.arange(1.0, 1.0 + out.numel()).view(out.shape)).sum() for out in outputs)

    return loss, torch.cat([t.flatten() for t in inputs])


@over_small_calls
def test_first_and_second_derivatives_are_those_of_finite_differences(name):
    call, inputs = small(name)
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@over_small_calls
def test_mixtures_of_forward_and_reverse_mode_agree(name):
    loss, x = loss_of(name)
    v = n(30, *x.shape)
    expected = jvp(grad(loss_of(name, "reference")[0]), (x,), (v,))[1]  # Its noise is rounded elsewhere.
    products = dict(HESSIAN_PRODUCTS)
    first = products.pop("hessian")(loss, x, v)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    for how, product in products.items():
        torch.testing.assert_close(product(loss, x, v), first, rtol=1e-11, atol=1e-11, msg=f"{how} differs from hessian")


@over_small_calls
def test_third_derivatives(name):
    def thirds(backend):
        loss, x = loss_of(name, backend)
        v, w = n(30, *x.shape), n(31, *x.shape)

        def forward(x):
            return jvp(grad(loss), (x,), (v,))[1]

        def reverse(x):
            leaf = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first, leaf, v, create_graph=True)
            return torch.autograd.grad(second, leaf, w)[0]

        return jvp(forward, (x,), (w,))[1], grad(lambda x: grad(lambda x: grad(loss)(x) @ v)(x) @ w)(x), reverse(x)

    for actual, expected in zip(thirds("cpu"), thirds("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


# ---- what only some callers do ----------------------------------------------------------------------------------------------


@over_small_calls
def test_incoming_gradients_alone_may_have_tangents(name):
    """Differentiate a forward that ran on the kernel, because nothing had a tangent yet."""

    def tangents_of_gradients(backend):
        call, inputs = small(name, backend)
        outputs, pullback = vjp(call, *inputs)
        directions = tuple(n(60 + i, *out.shape) for i, out in enumerate(outputs))
        by_func = jvp(lambda *grads: pullback(grads), outputs, directions)[1]
        leaves = tuple(t.clone().requires_grad_() for t in inputs)
        results = call(*leaves)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(out.detach(), d) for out, d in zip(results, directions)]
            by_duals = [
                forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(results, leaves, duals, materialize_grads=True)
            ]
        return *by_func, *(torch.zeros_like(t) if d is None else d for t, d in zip(inputs, by_duals))

    for actual, expected in zip(tangents_of_gradients("cpu"), tangents_of_gradients("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "samples", "everything"])
def test_each_example_has_its_own_hessian(name):
    """vmap makes one call of the batch, whose examples draw the noise of the one seed."""
    function, priors, options = SMALL[name]
    options = {**options, "seed": 5, "event_dims": 1}
    mu, logvar = n(1, 5, 4), n(2, 5, 4)

    def loss(mu, logvar):
        z, kl = function(mu, logvar, **options, backend="cpu")
        return z.sin().sum() + kl.square().sum()

    for product in (hessian(loss, (0, 1)), jacrev(jacrev(loss, (0, 1)), (0, 1))):
        batch = [t for row in vmap(product)(mu, logvar) for t in row]
        one_by_one = ([t for row in product(m, lv) for t in row] for m, lv in zip(mu, logvar))
        for actual, *expected in zip(batch, *one_by_one, strict=True):
            torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-11, atol=1e-11)


def test_beyond_a_kink_all_derivatives_are_zero():
    mu, logvar = torch.zeros(2, 3), torch.tensor([[1000.0, -1000.0, 0.1], [0.01, 0.0, 3.0]])

    def outputs(logvar):
        return fastlm.reparameterize_with_kl(
            mu, logvar, logvar_clamp=(-2.0, 2.0), free_bits=0.1, event_dims=0, seed=1, backend="cpu"
        )

    def clamped(logvar):
        z, kl = outputs(logvar)
        return z.square().sum() + kl.sum()

    def free(logvar):
        return outputs(logvar)[1].sum()

    outside = logvar.abs() > 2.0
    below = outside | (logvar.abs() < 0.2)
    for loss, zero in ((clamped, outside), (free, below)):
        first = grad(loss)(logvar)
        for second in (jvp(grad(loss), (logvar,), (mu + 1,))[1], vjp(grad(loss), logvar)[1](mu + 1)[0]):
            assert second.isfinite().all() and not second[zero].any() and not first[zero].any()
            assert (second[~zero] != 0).all() and (first[~zero] != 0).all()


def test_forward_mode_draws_the_kernel_s_noise():
    mu, logvar = n(1, 700, dtype=torch.float32), torch.zeros(700)
    assert fastlm.explain(fastlm.reparameterize, mu, logvar).backend == "cpu"
    noise = fastlm.reparameterize(logvar, logvar, seed=9)
    z, tangent = jvp(lambda mu, logvar: fastlm.reparameterize(mu, logvar, seed=9), (mu, logvar), (mu, 2 * mu))
    assert torch.equal(z, mu + noise) and torch.equal(tangent, mu + mu * noise)


# ---- the error, over all cases and dtypes -----------------------------------------------------------------------------------

CASES = [(spec, name, dtype) for spec in SPECS for name in spec.cases for dtype in spec.dtypes if dtype != torch.float64]


def second_order(spec, arguments: dict, backend: str) -> dict[str, torch.Tensor]:
    """Return the tangents of the outputs, the gradients of these, and what a double backward gives, in fixed directions."""
    inputs = {name: arguments[name] for name in spec.differentiable if name in arguments}

    def like(seed, tensors):  # Directions are numbers of half precision, so that they are the same in every dtype.
        return tuple(n(seed + i, *t.shape).bfloat16().to(t.dtype) for i, t in enumerate(tensors))

    def call(*tensors):
        outputs = spec.function(**{**arguments, **dict(zip(inputs, tensors))}, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    tensors = tuple(inputs.values())
    directions = like(40, tensors)
    cotangents = like(50, call(*tensors))
    tangents, pullback = vjp(lambda *t: jvp(call, t, directions)[1], *tensors)
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *cotangents)]
    first = torch.autograd.grad(
        call(*leaves[: len(tensors)]), leaves[: len(tensors)], leaves[len(tensors) :], create_graph=True
    )
    double = torch.autograd.grad(first, leaves, directions, allow_unused=True, materialize_grads=True)
    return {
        **{f"tangent {i}": t for i, t in enumerate(tangents)},
        **{f"gradient of the tangents for {name}": g for name, g in zip(inputs, pullback(cotangents))},
        **{f"double backward {i}": g for i, g in enumerate(double)},
    }


@pytest.mark.parametrize(("spec", "name", "dtype"), CASES, ids=[f"{s.name}, {n}, {d}" for s, n, d in CASES])
def test_second_derivatives_are_as_good_as_plain(spec, name, dtype):
    arguments = spec.cases[name](dtype)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    actual, plain = (second_order(spec, arguments, backend) for backend in ("cpu", "reference"))
    for what, golden in second_order(spec, wide, "reference").items():
        assert_as_good_as_plain(actual[what], plain[what], golden, GRADIENT_FACTOR, what)
