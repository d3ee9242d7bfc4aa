"""Decorrelated batch normalization of the posterior's means is its formula, on several processes too, and bounds the KL."""

import pytest
import torch
from support.ranks import run
from torch.nn.functional import batch_norm

import fastlm
from fastlm.lm.model.batch_norm import MOMENTUM, DecorrelatedBatchNorm
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.presets import build
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain, seeded_normal

STD = 0.8
X = 3 + seeded_normal(0, (12, 5), torch.float64) * torch.tensor([0.8, 0.9, 1.0, 1.5, 2.0])
WEIGHTS = seeded_normal(1, (12, 5), torch.float64)


def inverse_root(cov):
    """Return the inverse square root of a covariance (D, D), by another way than the norm's."""
    left, values, right = torch.linalg.svd(cov)
    return left @ torch.diag(values.rsqrt()) @ right


def written_out(x):
    """Decorrelate x (B, D), without a gradient of the covariance, and normalize it as torch does."""
    centered = x - x.mean(0)
    root = inverse_root(torch.cov(x.detach().T, correction=0))
    return STD * batch_norm(centered @ root, None, None, training=True)


def values_and_gradient(norm, x, weights):
    x = x.clone().requires_grad_()
    out = norm(x)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    return out.detach(), gradient


def assert_good(found):
    """Compare the values and the gradient of X in float32 with the formula's."""
    dtypes = torch.float32, torch.float64
    plain, golden = (values_and_gradient(written_out, X.to(dtype), WEIGHTS.to(dtype)) for dtype in dtypes)
    for part, factor in enumerate((VALUE_FACTOR, GRADIENT_FACTOR)):
        assert_as_good_as_plain(found[part], plain[part], golden[part], factor)


def of_a_rank(rank, world):
    """Return what a rank makes of its share of X, and the running moments."""
    norm = DecorrelatedBatchNorm(5, STD)
    share = slice(0, 4) if rank == 0 else slice(4, None)
    return values_and_gradient(norm, X[share].float(), WEIGHTS[share].float()), norm.running_mean, norm.running_cov


def test_it_is_the_formula():
    assert_good(values_and_gradient(DecorrelatedBatchNorm(5, STD), X.float(), WEIGHTS.float()))
    norm = DecorrelatedBatchNorm(5, STD).double()
    torch.testing.assert_close(norm(X), written_out(X), rtol=1e-12, atol=1e-12)
    assert norm(X.bfloat16()).dtype == torch.bfloat16
    expected = DecorrelatedBatchNorm(5, STD)(X.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DecorrelatedBatchNorm(5, STD)(X.float()), expected)


def test_two_processes_are_one():
    """They have shares of unequal size; the gradient is that of the sum of their losses."""
    first, second = run(of_a_rank, 2)
    assert_good([torch.cat(parts) for parts in zip(first[0], second[0])])
    norm = DecorrelatedBatchNorm(5, STD)
    norm(X.float())
    for ours in (first, second):
        torch.testing.assert_close(ours[1:], (norm.running_mean, norm.running_cov))


def test_evaluation_takes_the_running_moments():
    norm, batches = DecorrelatedBatchNorm(5, STD).double(), seeded_normal(2, (34, 12, 5), torch.float64)
    for batch in batches[:33]:
        norm(batch)
    mean, cov = batches[:33].mean((0, 1)), torch.stack([torch.cov(batch.T, correction=0) for batch in batches[:33]]).mean(0)
    torch.testing.assert_close((norm.running_mean, norm.running_cov), (mean, cov))
    norm(batches[33])
    mean = mean + MOMENTUM * (batches[33].mean(0) - mean)
    cov = cov + MOMENTUM * (torch.cov(batches[33].T, correction=0) - cov)
    # It is about 1 where all batches are of one kind.
    torch.testing.assert_close(norm.running_var, torch.ones(5, dtype=torch.float64), rtol=0.1, atol=0)
    norm.running_var.fill_(4.0)
    torch.testing.assert_close(norm.eval()(X[:1]), STD * (X[:1] - mean) @ inverse_root(cov) / 2, rtol=1e-5, atol=1e-5)


def test_features_that_are_all_alike_are_told_apart():
    """Take one number in five places, and others of a third of its deviation: each gets its share."""
    alike = seeded_normal(4, (400, 1), torch.float64) + 0.33 * seeded_normal(5, (400, 5), torch.float64)
    norm = DecorrelatedBatchNorm(5, STD).double()
    for _ in range(2):
        torch.testing.assert_close(torch.cov(norm(alike).T), STD**2 * torch.eye(5, dtype=torch.float64), rtol=0.2, atol=0.1)
        norm.eval()


@pytest.mark.parametrize("x", [torch.ones(4, 5), torch.arange(4.0)[:, None].expand(4, 5)], ids=["one text", "one direction"])
def test_what_does_not_vary_is_not_blown_up(x):
    """Rounding is not taken for differences of texts."""
    x = x.clone().requires_grad_()
    norm = DecorrelatedBatchNorm(5, STD)
    out = norm(x)
    out.square().sum().backward()
    assert out.isfinite().all() and out.abs().max() < 3 and x.grad.isfinite().all() and x.grad.abs().max() < 1e3
    assert norm.eval()(x).isfinite().all()


def test_no_encoder_has_a_smaller_kl():
    """Hold the KL of each dimension to more than std^2 / 2, what the means alone take where the variance is 1."""
    norm = DecorrelatedBatchNorm(5, STD).double()
    logvar = seeded_normal(3, (12, 5), torch.float64)
    for scale in (1.0, 1e3, 1e6):
        mu = norm(scale * X)
        least = 0.5 * mu.square().mean(0)
        torch.testing.assert_close(least, torch.full((5,), STD**2 / 2, dtype=torch.float64), rtol=1e-2, atol=0)
        assert (fastlm.gaussian_kl(mu, logvar, event_dims=0).mean(0) > least).all()


def test_a_single_text_is_refused():
    with pytest.raises(ValueError, match="a batch must have at least 2 texts in training with mean_std; got 1"):
        DecorrelatedBatchNorm(5, STD)(X[:1])


@torch.no_grad()
def test_a_model_keeps_its_running_moments(tokenizer, tmp_path):
    model = build("vae", "tiny", tokenizer, mean_std=STD)
    ids = torch.randint(5, len(tokenizer), (8, 12), generator=torch.Generator().manual_seed(0))
    mu, _ = model.train().posterior(ids)
    torch.testing.assert_close(mu.square().mean(0), torch.full((16,), STD**2), rtol=0.1, atol=0)
    save(model, tokenizer, tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.config.mean_std == STD
    torch.testing.assert_close(loaded.posterior(ids)[0], model.eval().posterior(ids)[0])
    torch.testing.assert_close(loaded.posterior(ids)[0], mu, rtol=1e-3, atol=1e-3)
    loaded.latent.linear.bias[:16] += 1.0  # which rounding moves in training
    torch.testing.assert_close(loaded.posterior(ids)[0], mu, rtol=1e-3, atol=1e-3)
