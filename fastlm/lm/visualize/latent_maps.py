"""Maps of a `TextVAE`'s latent: how a text changes along its units, and where the texts of a corpus lie."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.batches import encode_text, padded_ids
from ..data.prepare import read_split
from ..model.text_vae import TextVAE

BATCH = 8  # texts
VALUES = (-2.0, -1.0, 0.0, 1.0, 2.0)
TRAVERSED = 64  # tokens of a decoded text, at most
SHOWN_LABELS = 8


@dataclass(frozen=True)
class Traversal:
    """The texts that the decoder writes as one unit of a latent changes and the others stay.

    Attributes:
        unit: the unit's number, from 0.
        own: the unit's own value.
        texts: the text for each of the values that the unit was given.
    """

    unit: int
    own: float
    texts: list[str]


@dataclass(frozen=True)
class Map:
    """A map of texts on the plane in which their posterior means vary most.

    Attributes:
        points: (N, 2), the texts of the corpus.
        sentence: (2,), the sentence.
        explained: (2,), each axis' share of the variance.
        records: the N records, as `fastlm.lm.data.prepare.read_split` gives them.
    """

    points: np.ndarray
    sentence: np.ndarray
    explained: np.ndarray
    records: list[dict]

    @property
    def labels(self) -> list[tuple[str, int]]:
        """Return the most frequent labels, each with its number of texts."""
        return Counter(record["label"] for record in self.records if record["label"] is not None).most_common(SHOWN_LABELS)


@torch.inference_mode()
def means_of(model: TextVAE, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None = None) -> Tensor:
    """Return the posterior means (N, D) of N texts, which are cut at ``max_tokens``, or at the encoder's length."""
    max_tokens = max_tokens or model.config.encoder.max_position_embeddings
    rows = [torch.tensor(encode_text(text, tokenizer, max_tokens)) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    means = torch.empty(len(rows), model.config.latent_dim)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        means[part] = model.posterior(*padded_ids([rows[i] for i in part], tokenizer.pad_token_id))[0]
    return means


def held_out(corpus: str | os.PathLike, most: int) -> list[dict]:
    """Return up to ``most`` records of a prepared corpus, first of its test texts, then of its validation texts.

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.prepare.read_split`, or there are fewer than two.
    """
    records = list(islice(chain(read_split(corpus, "test"), read_split(corpus, "validation")), most))
    if len(records) < 2:
        raise ValueError(f"{corpus} must have at least two test and validation texts for a map; it has {len(records)}")
    return records


def map_of(means: Tensor, sentence: Tensor, records: list[dict]) -> Map:
    """Project ``means`` (N, D), D at least 2, and ``sentence`` (D,) on the first two principal components of ``means``."""
    pca = PCA(2, svd_solver="full").fit(means.numpy())
    points = pca.transform(means.numpy())
    return Map(points, pca.transform(sentence[None].numpy())[0], pca.explained_variance_ratio_, records)


def active_units(sentence: Tensor, means: Tensor | None, most: int) -> list[int]:
    """Return the ``most`` units whose ``means`` (N, D) vary most over texts; without them, the largest of ``sentence`` (D,)."""
    activity = sentence.abs() if means is None else means.var(0)
    return activity.argsort(descending=True, stable=True)[:most].tolist()


def traverse(
    model: TextVAE,
    tokenizer: PreTrainedTokenizerBase,
    z: Tensor,
    units: Sequence[int],
    values: Sequence[float] = VALUES,
    max_tokens: int = TRAVERSED,
) -> list[Traversal]:
    """Set each of ``units`` of ``z`` (D,) to each of ``values`` in turn, and decode greedily up to ``max_tokens`` tokens."""
    latents = z.repeat(len(units), len(values), 1)
    for row, unit in enumerate(units):
        latents[row, :, unit] = torch.tensor(values)
    texts = decoded(model, tokenizer, latents.flatten(0, 1), max_tokens)
    rows = [texts[start : start + len(values)] for start in range(0, len(texts), len(values))]
    return [Traversal(unit, float(z[unit]), row) for unit, row in zip(units, rows)]


@torch.inference_mode()
def decoded(model: TextVAE, tokenizer: PreTrainedTokenizerBase, latents: Tensor, max_tokens: int) -> list[str]:
    """Return the greedily decoded text of each latent of (N, D)."""
    ids = torch.full((len(latents), 1), tokenizer.bos_token_id)
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), latents=latents, do_sample=False, max_new_tokens=max_tokens
    )
    return tokenizer.batch_decode(written, skip_special_tokens=True)
