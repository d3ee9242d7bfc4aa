"""Attention over rows that are spread over ranks, in its simplest form: every rank gathers all keys and values."""

import torch
from torch import Tensor, distributed

import fastlm


class _Gather(torch.autograd.Function):
    """Concatenate the ranks' rows (B, H, L, D) along dim 2. All ranks have as many."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size(), dim=2)[distributed.get_rank()]


def gathered_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, method: str) -> Tensor:
    """Return this rank's rows of attention. ``method`` changes nothing."""
    stop = (distributed.get_rank() + 1) * query.shape[2] if causal else None
    key, value = (_Gather.apply(tensor)[:, :, :stop] for tensor in (key, value))
    return fastlm.attention(query, key, value, causal=causal)


def wrong_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, method: str) -> Tensor:
    """Return attention in which no rank sees another's keys."""
    return fastlm.attention(query, key, value, causal=causal)
