"""Batch normalization of the posterior's means agrees with torch's, on several processes too, and bounds the KL from below."""

import pytest
import torch
from support.ranks import run
from torch.nn.functional import batch_norm

import fastlm
from fastlm.lm.model.batch_norm import BatchNorm
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.presets import build
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain, seeded_normal

STD = 0.8
# Means of which some are far from 0 and some vary little, as those of an untrained encoder.
X = 3 + seeded_normal(0, (12, 5), torch.float64) * torch.tensor([0.05, 0.3, 1.0, 2.0, 4.0])
WEIGHTS = seeded_normal(1, (12, 5), torch.float64)


def torch_s(x):
    """Normalize x (B, D) as torch does."""
    return STD * batch_norm(x, None, None, training=True)


def values_and_gradient(norm, x, weights):
    x = x.clone().requires_grad_()
    out = norm(x)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    return out.detach(), gradient


def assert_good(found):
    """Compare the values and the gradient of X in float32 with torch's."""
    plain, golden = (values_and_gradient(torch_s, X.to(dtype), WEIGHTS.to(dtype)) for dtype in (torch.float32, torch.float64))
    for part, factor in enumerate((VALUE_FACTOR, GRADIENT_FACTOR)):
        assert_as_good_as_plain(found[part], plain[part], golden[part], factor)


def of_a_rank(rank, world):
    """Return what a rank makes of its share of X, and the running moments."""
    norm = BatchNorm(5, STD)
    share = slice(0, 4) if rank == 0 else slice(4, None)
    return values_and_gradient(norm, X[share].float(), WEIGHTS[share].float()), norm.running_mean, norm.running_var


def test_it_is_torch_s():
    assert_good(values_and_gradient(BatchNorm(5, STD), X.float(), WEIGHTS.float()))
    norm = BatchNorm(5, STD).double()
    torch.testing.assert_close(norm(X), torch_s(X), rtol=1e-12, atol=1e-12)
    assert norm(X.bfloat16()).dtype == torch.bfloat16


def test_two_processes_are_one():
    """They have shares of unequal size; the gradient is that of the sum of their losses."""
    first, second = run(of_a_rank, 2)
    assert_good([torch.cat(parts) for parts in zip(first[0], second[0])])
    norm = BatchNorm(5, STD)
    norm(X.float())
    for ours in (first, second):
        torch.testing.assert_close(ours[1:], (norm.running_mean, norm.running_var))


def test_evaluation_takes_the_running_moments():
    norm, batches = BatchNorm(5, STD).double(), seeded_normal(2, (11, 12, 5), torch.float64)
    for batch in batches[:10]:
        norm(batch)
    torch.testing.assert_close(norm.running_mean, batches[:10].mean((0, 1)))
    mean, var = batches[:10].mean((0, 1)), batches[:10].var(1, correction=0).mean(0)
    torch.testing.assert_close(norm.running_var, var)
    norm(batches[10])
    mean = 0.9 * mean + 0.1 * batches[10].mean(0)
    var = 0.9 * var + 0.1 * batches[10].var(0, correction=0)
    torch.testing.assert_close(norm.eval()(X[:1]), STD * (X[:1] - mean) / (var + norm.eps).sqrt())


def test_no_encoder_has_a_smaller_kl():
    """Hold the KL of each dimension to more than std^2 / 2, what the means alone take where the variance is 1."""
    norm = BatchNorm(5, STD).double()
    logvar = seeded_normal(3, (12, 5), torch.float64)
    for scale in (1.0, 1e3, 1e6):
        mu = norm(scale * X)
        least = 0.5 * mu.square().mean(0)
        torch.testing.assert_close(least, torch.full((5,), STD**2 / 2, dtype=torch.float64), rtol=1e-2, atol=0)
        assert (fastlm.gaussian_kl(mu, logvar, event_dims=0).mean(0) > least).all()


def test_a_single_text_is_refused():
    with pytest.raises(ValueError, match="a batch must have at least 2 texts in training with mean_std; got 1"):
        BatchNorm(5, STD)(X[:1])


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
