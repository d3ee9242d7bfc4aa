"""Evaluation of a model on texts it has not seen: its likelihood, and whether its latent is used or has collapsed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...distributed import context
from ...ops.latent import reparameterize_with_kl
from ..data.batches import Collator, Texts
from .generate import TextGenerator
from .overlap import scores
from .text_vae import IGNORED, TextVAE, nll_of, targets_of

ACTIVE = 0.01  # a unit is active if the variance of its mu over texts is larger (Burda et al. 2016, arXiv:1509.00519)
BATCH = 32
RECONSTRUCTED, SHORT = 100, 60  # so many texts of at most so many characters are reconstructed


@dataclass
class Evaluation:
    """The results of a model on held-out texts, in nats. The last eight are None without a latent.

    Attributes:
        texts, tokens, words: their numbers. The tokens include each text's end; white space separates the words.
        nll_per_token, nll_per_word: the negative log-likelihood. Of a `TextVAE` it is an upper bound, by importance sampling
            (Burda et al. 2016).
        perplexity: exp(``nll_per_word``).
        reconstruction, kl: the two parts of the negative ELBO, averaged over the texts.
        active_units: the number of dimensions of the latent whose mean varies from text to text.
        mutual_information: of text and latent, estimated over the texts (He et al. 2019, arXiv:1901.05534); at most ln(texts).
        samples: the number of importance samples, which are latents, drawn for each text.
        bleu, chrf: sacrebleu's, 0 to 100, of greedy reconstructions of the first 100 texts of at most 60 characters; None if
            there are none.
        distinct: how many of these reconstructions differ, as a share.
    """

    texts: int
    tokens: int
    words: int
    nll_per_token: float
    nll_per_word: float
    perplexity: float
    reconstruction: float | None = None
    kl: float | None = None
    active_units: int | None = None
    mutual_information: float | None = None
    samples: int | None = None
    bleu: float | None = None
    chrf: float | None = None
    distinct: float | None = None

    def __str__(self) -> str:
        lines = [
            f"texts               {self.texts}, of {self.tokens} tokens and {self.words} words",
            f"NLL                 {self.nll_per_token:.4f} nats per token, {self.nll_per_word:.4f} per word"
            + (f" (at most: {self.samples} importance samples)" if self.samples else ""),
            f"perplexity          {self.perplexity:.1f} per word",
        ]
        if self.kl is not None:
            lines += [
                f"reconstruction      {self.reconstruction:.2f} nats per text",
                f"KL                  {self.kl:.2f} nats per text",
                f"active units        {self.active_units}",
                f"mutual information  {self.mutual_information:.2f} nats (at most {math.log(self.texts):.2f})",
            ]
        if self.bleu is not None:
            lines.append(
                f"reconstructions     BLEU {self.bleu:.1f}, chrF {self.chrf:.1f}, {self.distinct:.0%} distinct, of short texts"
            )
        return "\n".join(lines)


@torch.inference_mode()
def elbo(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Return the ``loss`` per token, and for a `TextVAE` its parts ``reconstruction`` and ``kl``, by one latent per text.

    In `fastlm.distributed.context_parallel` the batches are this rank's parts, and the results those of the whole texts.
    """
    was_training = model.training
    model.eval()
    labels, sums = 0, {}
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        outputs, targets = model(**batch), targets_of(batch["labels"], batch.get("shift_labels"))
        if isinstance(model, TextVAE):
            parts = {"reconstruction": outputs.reconstruction.sum(), "kl": outputs.kl.sum()}
        else:
            parts = {"loss": nll_of(outputs.logits, targets).sum()}
        labels += int((targets != IGNORED).sum())
        sums = {name: sums.get(name, 0.0) + float(part) for name, part in parts.items()}
    model.train(was_training)
    if context.is_open():
        own = torch.tensor([labels, *sums.values()], dtype=torch.float64, device=model.device)
        labels, *values = context.total(own).tolist()
        sums = dict(zip(sums, values))
    found = {name: value / labels for name, value in sums.items()}
    return {"loss": sum(found.values())} | found


@torch.inference_mode()
def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, samples: int = 32) -> Evaluation:
    """Evaluate a `TextVAE`, or a decoder without a latent, on ``texts``; each text's seed determines its noise.

    Raises:
        ValueError: ``samples`` is not positive.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    model.eval()
    batches = texts.batches(BATCH, Collator(tokenizer, encoder=isinstance(model, TextVAE)))
    tokens, words = sum(texts.lengths) - len(texts), max(texts.words, 1)
    found, nll = {}, 0.0
    posteriors = []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if isinstance(model, TextVAE):
            mu, logvar = model.posterior(batch["encoder_input_ids"], batch["encoder_attention_mask"])
            posteriors.append((mu, logvar, batch["seeds"]))
            bound, parts = importance_nll(model, batch, mu, logvar, samples)
            nll += float(bound.sum())
            found = {name: found.get(name, 0.0) + float(part.sum()) / len(texts) for name, part in parts.items()}
        else:
            nll += float(nll_of(model(**batch).logits, targets_of(batch["labels"])).sum())
    if posteriors:
        mu, logvar, seeds = map(torch.cat, zip(*posteriors))
        units = int((mu.var(0) > ACTIVE).sum())
        information = mutual_information(mu, logvar, seeds)
        found |= {"active_units": units, "mutual_information": information, "samples": samples}
        found |= reconstruction_scores(model, tokenizer, texts)
    return Evaluation(len(texts), tokens, words, nll / tokens, nll / words, math.exp(min(nll / words, 700)), **found)


def reconstruction_scores(model: TextVAE, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> dict[str, float]:
    """Return ``bleu``, ``chrf`` and ``distinct`` of reconstructions of short texts, or nothing if none is short."""
    rows = (ids for ids, _ in map(texts.__getitem__, range(len(texts))) if ids[-1] == tokenizer.eos_token_id)  # not cut
    wanted = list(
        islice((text for text in (tokenizer.decode(ids[1:-1]) for ids in rows) if 0 < len(text) <= SHORT), RECONSTRUCTED)
    )
    if not wanted:
        return {}
    found = TextGenerator(model, tokenizer).reconstruct(wanted)
    both = scores(wanted, found)
    return {"bleu": both["bleu"], "chrf": both["chrf"], "distinct": len(set(found)) / len(found)}


def importance_nll(
    model: TextVAE, batch: dict[str, Tensor], mu: Tensor, logvar: Tensor, samples: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an upper bound (B,) of -log p(text), from ``samples`` latents of the posterior, and the parts of the ELBO."""
    latents, kl = reparameterize_with_kl(mu, logvar, num_samples=samples, seed=batch["seeds"])  # (K, B, D)
    ids, labels = batch["input_ids"], batch["labels"]
    terms, reconstructions = [], []
    for z in latents:
        reconstruction = model(input_ids=ids, latents=z, labels=labels).reconstruction
        weight = log_density(z, torch.zeros_like(mu), torch.zeros_like(mu)) - log_density(z, mu, logvar)
        terms.append(weight - reconstruction)
        reconstructions.append(reconstruction)
    nll = math.log(samples) - torch.stack(terms).logsumexp(0)
    return nll, {"reconstruction": torch.stack(reconstructions).mean(0), "kl": kl}


def log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Return the log density (*) of z (*, D) under N(mu, e^logvar)."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu).square() * torch.exp(-logvar)).sum(-1)


def mutual_information(mu: Tensor, logvar: Tensor, seeds: Tensor, pairs: int = 1 << 21) -> float:
    """Estimate the mutual information of texts and latents from the posteriors (N, D) of N texts.

    It is the mean of log q(z|x) - log q(z) with one z per text, where q(z) is the mean of all posteriors.

    Args:
        pairs: how many densities, of a latent under a posterior, are in memory at a time.
    """
    z, _ = reparameterize_with_kl(mu, logvar, seed=seeds)
    z, mu, logvar = z.double(), mu.double(), logvar.double()  # the products below cancel
    total = log_density(z, mu, logvar).sum()
    precision = torch.exp(-logvar)  # (N, D)
    scaled, constant = mu * precision, (math.log(2 * math.pi) + logvar + mu.square() * precision).sum(-1)  # (N, D), (N,)
    for part in z.split(max(pairs // len(mu), 1)):
        densities = torch.addmm(constant, part.square(), precision.T, beta=-0.5, alpha=-0.5)  # (part, N)
        densities.addmm_(part, scaled.T)  # log q(z|x)
        total = total - (densities.logsumexp(1) - math.log(len(mu))).sum()
    return float(total) / len(mu)
