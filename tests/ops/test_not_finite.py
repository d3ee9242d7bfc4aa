"""Test that NaN and infinity in the inputs come out where they went in, and nowhere else."""

import math

import pytest
import torch
from support.oracle import Oracle, noisy_results, run

import fastlm
from fastlm.testing import FLOATS, seeded_normal

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
DIFFERENTIABLE = ("mu", "logvar", "prior_mu", "prior_logvar")
ROW, COLUMN = 2, 3
OPTIONS = {"plain": {}, "samples": {"num_samples": 2}, "free bits": {"free_bits": 0.1}, "clamp": {"logvar_clamp": (-1.0, 1.0)}}


def arguments(dtype, **options) -> dict:
    tensors = {name: seeded_normal(seed, (5, 37), dtype) for seed, name in enumerate(DIFFERENTIABLE)}
    return {**tensors, "seed": 3, **options}


def spoiled(arguments: dict, name: str, value: float) -> dict:
    tensor = arguments[name].clone()
    tensor[..., ROW, COLUMN] = value
    return {**arguments, name: tensor}


def without_the_spot(what: str, result: torch.Tensor) -> torch.Tensor:
    """Set to 0 what the element at (ROW, COLUMN) may reach: its own row of kl, or its own element of another result."""
    result = result.clone()
    if what == "output 1":
        result[ROW] = 0
    else:
        result[..., ROW, COLUMN] = 0
    return result


@DTYPES
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_they_come_out_where_they_went_in(dtype, name, value, options, isa):
    call = arguments(dtype, **options)
    clean = run(fastlm.reparameterize_with_kl, call, DIFFERENTIABLE, backend="cpu")
    call = spoiled(call, name, value)
    oracle = Oracle(fastlm.reparameterize_with_kl, call, DIFFERENTIABLE, noisy_results("reparameterize_with_kl"))
    results = oracle.check(backend="cpu")
    for what, result in results.items():
        assert torch.equal(without_the_spot(what, result), without_the_spot(what, clean[what])), what


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_in_a_prior_for_each_dimension_they_reach_that_dimension_only(value, isa):
    call = arguments(torch.float32)
    call["prior_logvar"] = call["prior_logvar"][ROW].clone()
    call["prior_logvar"][COLUMN] = value
    results = run(fastlm.reparameterize_with_kl, call, DIFFERENTIABLE, backend="cpu")
    gradient = results["gradient of prior_logvar"]
    assert torch.arange(37)[~gradient.isfinite()].tolist() in ([], [COLUMN])
    assert not results["output 1"].isfinite().any()
    for what in ("gradient of mu", "gradient of logvar", "gradient of prior_mu"):
        others = torch.arange(37) != COLUMN
        assert results[what][:, others].isfinite().all(), what


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_reaches_its_own_element_only(value, isa):
    mu, logvar = (seeded_normal(seed, (5, 37), torch.float32).requires_grad_() for seed in (1, 2))
    z = fastlm.reparameterize(mu, logvar, seed=1, backend="cpu")
    gradient = torch.ones(5, 37)
    gradient[ROW, COLUMN] = value
    for result in torch.autograd.grad(z, (mu, logvar), gradient):
        assert (~result.isfinite()).nonzero().tolist() == [[ROW, COLUMN]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_infinite_kl_that_the_loss_does_not_use_spoils_no_gradient(backend, isa):
    mu, logvar = torch.tensor([math.inf, 1.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    z, _ = fastlm.reparameterize_with_kl(mu, logvar, seed=1, backend=backend)
    z.sum().backward()
    assert mu.grad.tolist() == [1.0, 1.0] and logvar.grad.isfinite().all()


@DTYPES
@pytest.mark.parametrize("logvar", [math.inf, -math.inf])
def test_an_infinite_logvar_gives_an_infinite_kl_and_no_nan(dtype, logvar, isa):
    mu, logvar = torch.zeros(3, dtype=dtype), torch.tensor([0.5, logvar, -0.5], dtype=dtype)
    assert fastlm.gaussian_kl(mu, logvar, backend="cpu").item() == math.inf
    assert fastlm.gaussian_kl(mu, logvar, event_dims=0, backend="cpu").isinf().tolist() == [False, True, False]


@DTYPES
def test_a_logvar_of_minus_infinity_samples_the_mean(dtype, isa):
    mu = seeded_normal(1, (33,), dtype)
    assert torch.equal(fastlm.reparameterize(mu, torch.full_like(mu, -math.inf), seed=1, backend="cpu"), mu)


@DTYPES
def test_a_clamp_tames_infinity_and_keeps_nan(dtype, isa):
    mu, logvar = torch.zeros(3, dtype=dtype), torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    kl = fastlm.gaussian_kl(mu, logvar, event_dims=0, logvar_clamp=(-1.0, 2.0), backend="cpu")
    expected = [(math.exp(2) - 3) / 2, (math.exp(-1) - 0) / 2, math.nan]
    torch.testing.assert_close(kl.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0, equal_nan=True)


def test_a_value_too_large_for_float16_comes_out_infinite(isa):
    mu, logvar = torch.tensor([6.5e4, -6.5e4, 1.0], dtype=torch.float16), torch.full((3,), 15.0, dtype=torch.float16)
    eps = fastlm.reparameterize(torch.zeros(3), torch.zeros(3), seed=2, backend="cpu")
    z = fastlm.reparameterize(mu, logvar, seed=2, backend="cpu")
    expected = (mu.float() + torch.exp(torch.tensor(7.5)) * eps).to(torch.float16)
    torch.testing.assert_close(z, expected)
