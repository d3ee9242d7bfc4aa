"""Attend to packed projections, (B, S, 3, H, D) or (B, Sq, H, D) and (B, Sk, 2, Hk, D): the modules inside flash_attn's MHA."""

import torch
from torch import Tensor, nn

from ....ops.attention import attention
from ..functions import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


class _Attention(nn.Module):
    """Hold what the attention modules share: ``causal`` and ``softmax_scale`` of the call, and a dropout that training has."""

    def __init__(self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def _dropout_p(self) -> float:
        return self.drop.p if self.training else 0.0

    def _causal(self, given: bool | None) -> bool:
        return self.causal if given is None else given


class _FlashAttention(_Attention):
    """Add the options that only flash_attn's functions have."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size, self.deterministic = window_size, deterministic

    def _options(self, causal: bool | None) -> dict:
        slopes = self.alibi_slopes
        return {
            "dropout_p": self._dropout_p(),
            "softmax_scale": self.softmax_scale,
            "causal": self._causal(causal),
            "window_size": self.window_size,
            "alibi_slopes": None if slopes is None else slopes.float(),  # A model that was cast has cast them, too.
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_FlashAttention):
    """Compute `flash_attn_qkvpacked_func`, or with cu_seqlens `flash_attn_varlen_qkvpacked_func`.

    Args:
        causal, softmax_scale, window_size, alibi_slopes, deterministic: as in these functions.
        attention_dropout: the share of weights that are dropped in training.
    """

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Return (B, S, H, D) of qkv (B, S, 3, H, D); with ``cu_seqlens`` int32 (B + 1,), (total, H, D) of (total, 3, H, D).

        ``causal`` overrides the module's.
        """
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._options(causal))
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **self._options(causal))


class FlashCrossAttention(_FlashAttention):
    """Compute `flash_attn_kvpacked_func`, or with cu_seqlens `flash_attn_varlen_kvpacked_func`.

    Args:
        causal, softmax_scale, alibi_slopes, window_size, deterministic: as in these functions.
        attention_dropout: the share of weights that are dropped in training.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,  # before the window, unlike in FlashSelfAttention
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Return (B, Sq, H, D) of q (B, Sq, H, D) and kv (B, Sk, 2, Hk, D); with ``cu_seqlens``, of packed q and kv.

        ``causal`` overrides the module's.
        """
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._options(causal))
        lengths = cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k
        return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **self._options(causal))


class _MaskedAttention(_Attention):
    """Add attention with a mask (B, 1, 1 or Sq, Sk), which flash_attn's functions have not."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
        options = {"scale": self.softmax_scale, "dropout_p": self._dropout_p()}
        return attention(*rows, mask=mask, causal=causal, **options).transpose(1, 2)


class SelfAttention(_MaskedAttention):
    """Compute attention of sequences to themselves, which may be padded."""

    def forward(self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return (B, S, H, D) of qkv (B, S, 3, H, D).

        ``key_padding_mask`` is bool (B, S), True at a key that counts. ``causal`` overrides the module's.
        """
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None]
        return self._attend(*qkv.unbind(2), self._causal(causal), mask)


class CrossAttention(_MaskedAttention):
    """Compute attention of sequences to others, which may be padded."""

    def forward(self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return (B, Sq, H, D) of q (B, Sq, H, D) and kv (B, Sk, 2, Hk, D).

        ``key_padding_mask`` is bool (B, Sk), True at a key that counts; with ``causal``, the last query of a sequence stands at
        the last of as many keys as count. ``causal`` overrides the module's.
        """
        causal, mask = self._causal(causal), None
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, None]  # (B, 1, 1, Sk)
            if causal:
                query, key = (torch.arange(tensor.shape[1], device=q.device) for tensor in (q, kv))
                shift = mask.sum(-1, keepdim=True) - q.shape[1]  # (B, 1, 1, 1)
                causal, mask = False, mask & (key <= query[:, None] + shift)
        return self._attend(q, *kv.unbind(2), causal, mask)
