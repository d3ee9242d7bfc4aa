"""Ask attention for statistics of its weights, by fastlm and by its peers, for the sections of attention.py."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import attention

Call = Callable[[], Tensor | tuple[Tensor, ...]]

ROWS, MASS, ENTROPY = ("entropy", "max_logit"), ("key_mass",), ("entropy",)


def attention_with_row_stats(query: Tensor, key: Tensor, value: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    """Return attention's output, and the entropy and the largest logit of each query."""
    return _with_stats(ROWS, query, key, value, backend)


def attention_with_key_mass(query: Tensor, key: Tensor, value: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    """Return attention's output, and the mass that each key receives."""
    return _with_stats(MASS, query, key, value, backend)


def attention_with_entropy(query: Tensor, key: Tensor, value: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    """Return attention's output, and the entropy of each query."""
    return _with_stats(ENTROPY, query, key, value, backend)


def _with_stats(names: tuple[str, ...], query, key, value, backend) -> tuple[Tensor, ...]:
    out, stats = attention(query, key, value, return_stats=names, backend=backend)
    return out, *(getattr(stats, name) for name in names)


def _eager(names: tuple[str, ...]) -> Callable[..., Call]:
    """Return the peer that holds the whole matrix, as `output_attentions` of transformers does."""

    def ready(query: Tensor, key: Tensor, value: Tensor) -> Call:
        def call() -> tuple[Tensor, ...]:
            scores = query @ key.mT / math.sqrt(query.shape[3])
            weights = torch.softmax(scores, dim=-1)
            of = {
                "entropy": lambda: -torch.sum(weights * torch.log(weights), dim=-1),
                "max_logit": lambda: scores.amax(dim=-1),
                "key_mass": lambda: weights.sum(dim=-2),
            }
            return weights @ value, *(of[name]() for name in names)

        return call

    return ready


PEERS = {
    "attention_with_row_stats": {"eager": _eager(ROWS)},
    "attention_with_key_mass": {"eager": _eager(MASS)},
    "attention_with_entropy": {"eager": _eager(ENTROPY)},
}
