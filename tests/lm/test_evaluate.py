"""The figures of an evaluation agree with known densities, closed forms and limits."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.processes import printed
from torch.distributions import Normal

from fastlm.lm.data.batches import Texts, encode_text
from fastlm.lm.data.prepare import read_split
from fastlm.lm.model.evaluate import (
    ACTIVE,
    evaluate,
    importance_nll,
    log_density,
    mutual_information,
    reconstruction_scores,
)
from fastlm.lm.model.generate import TextGenerator
from fastlm.lm.model.presets import build
from fastlm.ops.latent import reparameterize_with_kl


def seeds(count):
    return torch.arange(count)


def test_log_density():
    generator = torch.Generator().manual_seed(0)
    z, mu, logvar = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(log_density(z, mu, logvar), expected)


def test_importance_sampling_finds_the_likelihood_that_is_known():
    """With x | z ~ N(z, 1) and z ~ N(0, 1), x ~ N(0, 2). The posterior, N(x / 2, 1 / 2), is given with a small error."""
    x = torch.tensor([[-1.5], [0.0], [0.7], [2.0]])

    def model(input_ids, latents, labels):
        return SimpleNamespace(reconstruction=-Normal(latents, 1.0).log_prob(x).sum(-1))

    batch = {"input_ids": None, "labels": None, "seeds": seeds(4)}
    mu, logvar = x / 2 + 0.1, torch.full_like(x, math.log(0.6))
    expected = -Normal(0.0, math.sqrt(2)).log_prob(x).sum(-1)
    nll, parts = importance_nll(model, batch, mu, logvar, 20000)
    torch.testing.assert_close(nll, expected, atol=0.02, rtol=0)
    negative_elbo = parts["reconstruction"] + parts["kl"]
    gap = torch.distributions.kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(x / 2, math.sqrt(0.5))).sum(-1)
    torch.testing.assert_close(negative_elbo, expected + gap, atol=0.03, rtol=0)
    one, _ = importance_nll(model, batch, mu, logvar, 1)
    assert torch.isfinite(one).all()


def test_mutual_information_at_its_limits():
    far = 100.0 * torch.eye(20)
    assert mutual_information(far, torch.zeros(20, 20), seeds(20)) == pytest.approx(math.log(20), abs=1e-4)
    same = torch.full((20, 4), 0.3)
    assert mutual_information(same, torch.zeros(20, 4), seeds(20)) == pytest.approx(0.0, abs=1e-5)
    pairs = 100.0 * torch.eye(2).repeat(10, 1)  # two clusters of ten have one bit
    assert mutual_information(pairs, torch.zeros(20, 2), seeds(20)) == pytest.approx(math.log(2), abs=1e-4)
    assert mutual_information(pairs, torch.zeros(20, 2), seeds(20), pairs=60) == pytest.approx(math.log(2), abs=1e-4)


def test_mutual_information_agrees_with_the_densities_and_takes_bounded_memory():
    """Its memory for 8,000 texts is far below that of all their densities and of 256 texts' differences, 0.5 GB each."""
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(300, 5, generator=generator), torch.randn(300, 5, generator=generator) - 3
    z, _ = reparameterize_with_kl(mu, logvar, seed=seeds(300))
    each = log_density(z[:, None].double(), mu.double(), logvar.double())  # (300, 300)
    expected = float((each.diagonal() - each.logsumexp(1) + math.log(300)).mean())
    assert mutual_information(mu, logvar, seeds(300)) == pytest.approx(expected, rel=1e-9)
    grown = printed("""
import resource, torch
from fastlm.lm.model.evaluate import mutual_information
mu = torch.randn(8_000, 64)
mutual_information(mu[:300], mu[:300], torch.arange(300))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mutual_information(mu, torch.zeros_like(mu), torch.arange(8_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
""")
    assert int(grown) * 1024 < 250e6


def test_mutual_information_of_a_gaussian():
    """With mu ~ N(0, 3) and z | mu ~ N(mu, 1), the mutual information is ln(4) / 2."""
    mu = math.sqrt(3) * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    assert mutual_information(mu, torch.zeros_like(mu), seeds(4000)) == pytest.approx(0.5 * math.log(4), abs=0.05)


def test_a_decoder_s_likelihood_text_by_text(corpus, tokenizer):
    model = build("decoder", "tiny", tokenizer).eval()
    texts = Texts(corpus, "test", tokenizer, 128)
    found = evaluate(model, tokenizer, texts)
    records = [record["text"] for record in read_split(corpus, "test")]
    total = 0.0
    with torch.no_grad():
        for text in records:
            ids = torch.tensor([encode_text(text, tokenizer, 128)])
            logs = model(ids).logits.double().log_softmax(-1)
            total -= float(logs[0, :-1].gather(1, ids[0, 1:, None]).sum())
    words = sum(len(text.split()) for text in records)
    tokens = sum(len(encode_text(text, tokenizer, 128)) - 1 for text in records)
    assert (found.texts, found.tokens, found.words) == (len(records), tokens, words)
    assert found.nll_per_token == pytest.approx(total / tokens, rel=1e-5)
    assert found.nll_per_word == pytest.approx(total / words, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / words), rel=1e-3)
    assert found.kl is found.active_units is found.mutual_information is found.bleu is None
    assert "KL" not in str(found) and "BLEU" not in str(found)


def test_a_text_vae(corpus, tokenizer):
    model = build("vae", "tiny", tokenizer).eval()
    texts = Texts(corpus, "test", tokenizer, 128)
    with torch.no_grad():
        model.latent.linear.weight[:16].normal_(0, 0.5)  # a latent that is used
        model.latent.linear.weight[:8] = 0.0  # except half of its means
    few, many = (evaluate(model, tokenizer, texts, samples=count) for count in (1, 16))
    assert many == evaluate(model, tokenizer, texts, samples=16)  # seeds reproduce
    negative_elbo = (many.reconstruction + many.kl) * many.texts / many.tokens
    assert many.nll_per_token < few.nll_per_token and many.nll_per_token < negative_elbo
    means = []
    with torch.no_grad():
        for index in range(len(texts)):
            means.append(model.posterior(texts[index][0][None])[0][0])
    variance = torch.stack(means).var(0)
    units = int((variance > ACTIVE).sum())
    assert many.active_units == units and 0 < units <= 8
    assert 0 < many.mutual_information <= math.log(len(texts)) + 1e-6
    assert 0 <= many.bleu < 100 and "chrF" in str(many)


def test_reconstructions_are_scored(corpus, tokenizer, monkeypatch):
    """Texts that come back whole have BLEU and chrF of 100; one text for all is far below, and not distinct."""
    model, texts = build("vae", "tiny", tokenizer), Texts(corpus, "test", tokenizer, 128)
    short = [text for text in (record["text"] for record in read_split(corpus, "test")) if len(text) <= 60][:100]
    monkeypatch.setattr(TextGenerator, "reconstruct", lambda self, wanted: list(wanted))
    found = reconstruction_scores(model, tokenizer, texts)
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100)
    assert found["distinct"] == len(set(short)) / len(short)
    monkeypatch.setattr(TextGenerator, "reconstruct", lambda self, wanted: [wanted[0]] * len(wanted))
    found = reconstruction_scores(model, tokenizer, texts)
    assert found["bleu"] < 50 and found["distinct"] == 1 / len(short)


def test_a_collapsed_latent_is_called_so(corpus, tokenizer):
    model = build("vae", "tiny", tokenizer)
    with torch.no_grad():
        model.latent.linear.weight.zero_()
        model.latent.linear.bias.zero_()
    found = evaluate(model, tokenizer, Texts(corpus, "test", tokenizer, 128), samples=2)
    assert found.active_units == 0 and found.kl == 0 and found.mutual_information == pytest.approx(0, abs=1e-5)


def test_errors(corpus, tokenizer):
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        evaluate(build("vae", "tiny", tokenizer), tokenizer, Texts(corpus, "test", tokenizer, 128), samples=0)
