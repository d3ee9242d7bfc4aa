"""Test the oracle itself against other people's mathematics, and its gradients against finite differences."""

import mpmath
import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence

from fastlm.reference.latent import expm1_minus, reparameterize
from fastlm.reference.noise import normal_like
from fastlm.testing import seeded_normal

FEATURES = {
    "plain": {},
    "prior mean": {"prior_mu": (3, 4)},
    "prior variance": {"prior_logvar": (3, 4)},
    "prior per dimension": {"prior_mu": (4,), "prior_logvar": (1, 4)},
    "free bits": {"free_bits": 0.4},
    "clamp": {"logvar_clamp": (-0.6, 0.8)},
    "samples": {"num_samples": 3},
    "every element": {"event_dims": 0},
    "whole tensor": {"event_dims": 2},
    "seed per example": {"seed": torch.tensor([1, -2, 3])},
    "temperature": {"temperature": 0.3},
    "everything": {
        "prior_mu": (3, 1),
        "prior_logvar": (4,),
        "free_bits": 0.2,
        "logvar_clamp": (-0.9, 1.1),
        "num_samples": 2,
        "event_dims": 2,
        "seed": torch.tensor([1, -2, 3]),
        "temperature": 1.3,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_finite_differences(feature):
    options = {"seed": torch.tensor(5), **FEATURES[feature]}
    shapes = {"mu": (3, 4), "logvar": (3, 4), **{k: options.pop(k) for k in ("prior_mu", "prior_logvar") if k in options}}
    leaves = {k: seeded_normal(i, s, torch.float64).requires_grad_() for i, (k, s) in enumerate(shapes.items())}

    def outputs(*tensors):
        return reparameterize(**dict(zip(leaves, tensors)), **options)

    assert gradcheck(outputs, tuple(leaves.values()))


@pytest.mark.parametrize("x", [0.0, 1e-300, 1e-9, -1e-9, 0.1, 0.4999, -0.4999, 0.5, -0.5, 0.5001, 1.0, 20.0, -20.0, 700.0])
def test_expm1_minus_is_right_to_the_last_bits(x):
    with mpmath.workdps(700):
        exact = float(mpmath.exp(mpmath.mpf(x)) - 1 - mpmath.mpf(x))
    assert expm1_minus(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-15, abs=0)


@pytest.mark.parametrize("x", [0.0, 1e-6, 0.3, -0.3, 0.5, 3.0, -20.0])
def test_expm1_minus_has_the_derivative_expm1(x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expm1_minus(x).backward()
    torch.testing.assert_close(x.grad, torch.expm1(x.detach()), rtol=1e-14, atol=0)


def test_the_kl_is_that_of_torch_distributions():
    mu, logvar, prior_mu, prior_logvar = (seeded_normal(seed, (30, 5), torch.float64) for seed in range(4))
    kl = reparameterize(mu, logvar, prior_mu, prior_logvar)[1]
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(prior_mu, (prior_logvar / 2).exp())).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)


def test_z_is_the_textbook_s_formula_on_the_noise():
    mu, logvar, seed = seeded_normal(1, (6, 5), torch.float64), seeded_normal(2, (6, 5), torch.float64), torch.tensor(9)
    z = reparameterize(mu, logvar, seed=seed, num_samples=2, temperature=0.5)[0]
    torch.testing.assert_close(z, mu + 0.5 * torch.sqrt(torch.exp(logvar)) * normal_like(mu, seed, 2), rtol=1e-14, atol=1e-15)
