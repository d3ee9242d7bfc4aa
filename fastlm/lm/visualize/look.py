"""Look into the attention of a model of transformers while it runs, in memory linear in the length of the text.

The weights of all layers and heads would take layers * heads * Lq * Lk numbers. The look keeps what fastlm computes without
them, from the same pass as the output: statistics, and the largest weights of each query.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ...integrations.transformers.mask import make_mask, read_stand_in
from ...ops.attention import attention, attention_weights, top_keys

NAME = "fastlm-look"
TOP = 8  # keys of each query
MAPPED = 64  # The weights of at most this many queries are kept whole.


@dataclass(frozen=True)
class Look:
    """What is kept of the attention of one layer, or stacked of several: then a dimension of layers comes first.

    Attributes:
        entropy: (heads, Lq), in nats.
        max_logit: (heads, Lq), the largest score of each query.
        key_mass: (heads, Lk), the sum over all queries of the weights that a key receives.
        top_keys: (heads, Lq, k) int32, the keys with the largest weights, the largest first; -1 where there are fewer keys.
        top_weights: (heads, Lq, k).
        weights: (heads, Lq, Lk), or None for more than 64 queries.
    """

    entropy: Tensor
    max_logit: Tensor
    key_mass: Tensor
    top_keys: Tensor
    top_weights: Tensor
    weights: Tensor | None


_looks: ContextVar[list[Look]] = ContextVar("_looks")


@contextmanager
def looking(model: PreTrainedModel) -> Iterator[list[Look]]:
    """Collect a `Look` of each attention that the model computes in the block, one text at a time, in a list."""
    before, token = model.config._attn_implementation, _looks.set([])
    model.set_attn_implementation(NAME)
    try:
        yield _looks.get()
    finally:
        model.set_attn_implementation(before)
        _looks.reset(token)


def look(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend as fastlm's function of transformers' AttentionInterface does, and add a `Look` to the list of the block.

    The models of fastlm.lm give no other options. A text that is looked at has no padding, so that each mask is a pattern.
    """
    causal, window = (False, None) if attention_mask is None else read_stand_in(attention_mask)
    options = {"causal": causal, "window": window, "scale": scaling}
    names = "entropy", "max_logit", "key_mass"
    out, lse, stats = attention(query, key, value, return_lse=True, return_stats=names, **options)
    indices, largest = top_keys(query, key, lse, TOP, **options)
    weights = None
    if query.shape[2] <= MAPPED:
        weights = attention_weights(query, key, lse, rows=torch.arange(query.shape[2]), **options)[0]
    _looks.get().append(Look(*(found[0] for found in (*stats, indices.int(), largest)), weights))
    return out.transpose(1, 2).contiguous(), None


def stacked(looks: list[Look]) -> Look:
    """Return the looks of the layers of a stack as one."""
    of_layers = ([getattr(layer, field.name) for layer in looks] for field in fields(Look))
    return Look(*(None if layers[0] is None else torch.stack(layers) for layers in of_layers))


AttentionInterface.register(NAME, look)
AttentionMaskInterface.register(NAME, make_mask)
