"""Test that the KL divergence is right to a few ulps of float32 however small, never negative, and infinite only if due."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import fastlm
from fastlm.testing import FLOATS, seeded_normal

ULPS = 4
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def exact_kl(mu, logvar, prior_mu=0.0, prior_logvar=0.0) -> float:
    """Compute one dimension's KL in 50 digits, from the formula of the textbooks."""
    with mpmath.workdps(50):
        x, d = mpmath.mpf(logvar) - mpmath.mpf(prior_logvar), mpmath.mpf(mu) - mpmath.mpf(prior_mu)
        return float((d**2 * mpmath.exp(-mpmath.mpf(prior_logvar)) + mpmath.exp(x) - 1 - x) / 2)


def exact_kls(*tensors) -> torch.Tensor:
    rows = zip(*(t.double().flatten().tolist() for t in tensors))
    return torch.tensor([exact_kl(*row) for row in rows], dtype=torch.float64).reshape(tensors[0].shape)


def logvars(dtype) -> torch.Tensor:
    """Return numbers of both signs from 1e-6 to 20, denser around the end of the series, rounded to the dtype."""
    wide, near = torch.logspace(-6, math.log10(20), 300, dtype=torch.float64), torch.linspace(0.2, 1.2, 101)
    return torch.cat([wide, -wide, near, -near, torch.zeros(1)]).to(dtype)


def elementwise_kl(mu, logvar, **options):
    return fastlm.gaussian_kl(mu, logvar, event_dims=0, **options)


# ---- accuracy ---------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("mean", [0.0, 1e-3, -0.25, 3.0])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_is_right_to_a_few_ulps(dtype, mean, backend, isa):
    logvar = logvars(dtype)
    mu = torch.full_like(logvar, mean)
    kl = elementwise_kl(mu, logvar, backend=backend)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (kl.double() - exact_kls(mu, logvar)).abs()
    assert (error <= ULPS * torch.finfo(kl.dtype).eps * exact_kls(mu, logvar)).all()


@DTYPES
def test_with_a_prior_it_is_right_to_what_rounding_the_difference_of_logvars_costs(dtype, isa):
    logvar = logvars(dtype)
    mu, prior_mu = (seeded_normal(seed, logvar.shape, dtype) for seed in (1, 2))
    prior_logvar = seeded_normal(3, logvar.shape, dtype)
    kl = elementwise_kl(mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, backend="cpu")
    golden = exact_kls(mu, logvar, prior_mu, prior_logvar)
    x = (logvar.double() - prior_logvar.double()).abs()
    error = (kl.double() - golden).abs()
    assert (error <= (ULPS + x) * torch.finfo(kl.dtype).eps * golden).all()


@pytest.mark.parametrize("logvar", [0.01, -0.01, 0.003])
def test_it_keeps_the_sign_that_the_naive_bfloat16_formula_loses(logvar, isa):
    mu, logvar = torch.zeros((), dtype=torch.bfloat16), torch.tensor(logvar, dtype=torch.bfloat16)
    kl = elementwise_kl(mu, logvar, backend="cpu").item()
    assert kl == pytest.approx(exact_kl(0.0, logvar.item()), rel=ULPS * 2**-23)


def test_the_naive_bfloat16_formula_does_lose_the_sign():
    mu, logvar = torch.zeros((), dtype=torch.bfloat16), torch.tensor(0.01, dtype=torch.bfloat16)
    assert 0.5 * (mu**2 + logvar.exp() - 1 - logvar) < 0


@DTYPES
def test_a_sum_over_many_dimensions_is_as_right_as_its_terms(dtype, isa):
    mu, logvar = seeded_normal(1, (3, 50_001), dtype), seeded_normal(2, (3, 50_001), dtype)
    golden = elementwise_kl(mu.double(), logvar.double(), backend="reference").sum(-1)
    kl = fastlm.gaussian_kl(mu, logvar, backend="cpu")
    assert ((kl.double() - golden).abs() <= ULPS * torch.finfo(kl.dtype).eps * golden).all()


def test_it_agrees_with_torch_distributions(isa):
    mu, logvar, prior_mu, prior_logvar = (seeded_normal(seed, (40, 7), torch.float64) for seed in range(4))
    posterior, prior = Normal(mu, (logvar / 2).exp()), Normal(prior_mu, (prior_logvar / 2).exp())
    kl = fastlm.gaussian_kl(mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, backend="cpu")
    torch.testing.assert_close(kl, kl_divergence(posterior, prior).sum(-1), rtol=1e-12, atol=0)


# ---- never negative ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_not_negative_for_any_16_bit_logvar(dtype, isa):
    logvar = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    kl = elementwise_kl(torch.zeros_like(logvar), logvar, backend="cpu")
    assert torch.equal(kl.isnan(), logvar.isnan())
    assert (kl[~kl.isnan()] >= 0).all()
    assert not kl[~kl.isnan()].signbit().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_not_negative_for_random_bits(dtype, isa):
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    info, generator = torch.iinfo(bits), torch.Generator().manual_seed(1)
    mu, logvar = (torch.randint(info.min, info.max, (100_000,), dtype=bits, generator=generator).view(dtype) for _ in range(2))
    kl = elementwise_kl(mu, logvar, backend="cpu")
    assert torch.equal(kl.isnan(), mu.isnan() | logvar.isnan())
    assert (kl[~kl.isnan()] >= 0).all()


@given(st.floats(-(2.0**60), 2.0**60, width=32), st.floats(-1, 1, width=32), st.floats(-20, 20, width=32))
def test_it_is_not_negative_next_to_the_prior(mean, difference, prior_logvar):
    mu, prior_logvar = torch.tensor(mean), torch.tensor(prior_logvar)
    kl = elementwise_kl(mu, prior_logvar + difference, prior_mu=mu, prior_logvar=prior_logvar, backend="cpu")
    assert kl >= 0


@DTYPES
def test_it_is_zero_where_posterior_and_prior_are_one(dtype, isa):
    mu, logvar = seeded_normal(1, (57,), dtype), seeded_normal(2, (57,), dtype)
    assert not elementwise_kl(mu, logvar, prior_mu=mu, prior_logvar=logvar, backend="cpu").any()
    assert not elementwise_kl(torch.zeros_like(mu), torch.zeros_like(mu), backend="cpu").any()


# ---- free bits --------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("mean", "value", "gradient"),
    [(0.5, 0.5, 0.0), (1.0, 0.5, 1.0), (2.0, 2.0, 2.0), (-1.0, 0.5, -1.0), (0.0, 0.5, 0.0)],
    ids=["below", "at", "above", "at, negative", "far below"],
)
def test_free_bits_lift_a_dimension_and_stop_its_gradient_below(dtype, mean, value, gradient, isa):
    """The KL of N(mean, 1) is mean^2 / 2, which is exactly 0.5 for a mean of 1."""
    mu = torch.tensor([mean, 3.0], dtype=dtype, requires_grad=True)
    logvar = torch.zeros(2, dtype=dtype)
    kl = fastlm.gaussian_kl(mu, logvar, free_bits=0.5, backend="cpu")
    kl.backward()
    assert kl.item() == value + 4.5
    assert mu.grad.tolist() == [gradient, 3.0]


def test_free_bits_count_per_dimension_not_per_latent(isa):
    zeros = torch.zeros(5, 8)
    assert fastlm.gaussian_kl(zeros, zeros, free_bits=0.25, backend="cpu").tolist() == [2.0] * 5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_free_bits_hide_no_nan(backend, isa):
    mu = torch.tensor([0.0, float("nan"), 0.0])
    kl = elementwise_kl(mu, torch.zeros(3), free_bits=1.0, backend=backend)
    assert kl.isnan().tolist() == [False, True, False]
