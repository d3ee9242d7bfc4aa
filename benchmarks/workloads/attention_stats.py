"""Ask attention for statistics of its weights, by fastlm and by its peers, for the sections of attention.py."""

import math
from collections.abc import Callable
from types import SimpleNamespace

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


def _of_matrix(attend: Callable[..., tuple[Tensor, Tensor]], names: tuple[str, ...]) -> Callable[..., Call]:
    """Return a peer whose ``attend(query, key, value)`` returns the output and the whole matrix of weights."""

    def ready(query: Tensor, key: Tensor, value: Tensor) -> Call:
        def call() -> tuple[Tensor, ...]:
            out, weights = attend(query, key, value)
            of = {
                "entropy": lambda: -torch.sum(weights * torch.log(weights), dim=-1),
                "max_logit": lambda: torch.amax(query @ key.mT, dim=-1) / math.sqrt(query.shape[3]),
                "key_mass": lambda: weights.sum(dim=-2),
            }
            return out, *(of[name]() for name in names)

        return call

    return ready


def _eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(query @ key.mT / math.sqrt(query.shape[3]), dim=-1)
    return weights @ value, weights


def _output_attentions(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Call what a model of transformers runs to return its weights."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module = SimpleNamespace(num_key_value_groups=1, training=False)
    out, weights = eager_attention_forward(module, query, key, value, None, scaling=query.shape[3] ** -0.5)
    return out.transpose(1, 2), weights


_OF = {"attention_with_row_stats": ROWS, "attention_with_key_mass": MASS, "attention_with_entropy": ENTROPY}
PEERS = {
    function: {"eager": _of_matrix(_eager, names), "output_attentions": _of_matrix(_output_attentions, names)}
    for function, names in _OF.items()
}
