"""Hold the modules of flash_attn.modules.mha: attention of packed projections, and the layer around it.

Parameters have flash_attn's names, so that checkpoints load. ParallelMHA is not here: its linear layers are flash_attn's own
kernels.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kvcache import flash_attn_with_kvcache
from ..layers.rotary import RotaryEmbedding
from .attention import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention

__all__ = ["MHA", "CrossAttention", "FlashCrossAttention", "FlashSelfAttention", "SelfAttention", "get_alibi_slopes"]


def get_alibi_slopes(nheads: int) -> list[float]:
    """Return ALiBi's slopes: a geometric series for a power of two, and else that of the one below and every other of the next.

    Source: Press et al., "Train Short, Test Long" (2021).
    """
    whole = 2 ** math.floor(math.log2(nheads))
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    return slopes if whole == nheads else slopes + get_alibi_slopes(2 * whole)[::2][: nheads - whole]


class MHA(nn.Module):
    """Project to queries, keys and values, attend, and project back.

    Args:
        num_heads_kv: heads of keys and values, which divide ``num_heads``; None: as many.
        cross_attn: queries from x, keys and values from x_kv.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        dropout: the share of weights that are dropped in training.
        softmax_scale, causal, window_size: as in `flash_attn_func`.
        layer_idx: the layer's key among the caches of generation.
        dwconv: a depthwise convolution of width 3 over the projections, which looks back.
        rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: as `RotaryEmbedding`'s; 0: no rotation.
        use_alibi: subtract ALiBi's slopes times the distance.
        fused_bias_fc: changes nothing, because fastlm has no such linear layer.
        use_flash_attn: attend by flash_attn's functions, which take packed sequences, and no padding mask.
        return_residual: also return x.
        checkpointing: compute attention again in the backward.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert use_flash_attn or not use_alibi, "ALiBi code path requires flash_attn"
        assert use_flash_attn or window_size == (-1, -1), "Local (sliding window) attention code path requires flash_attn"
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads_kv or num_heads
        assert num_heads % self.num_heads_kv == 0, "num_heads must be divisible by num_heads_kv"
        assert embed_dim % num_heads == 0, "embed_dim must be divisible by num_heads"
        self.head_dim, self.cross_attn, self.causal, self.layer_idx = embed_dim // num_heads, cross_attn, causal, layer_idx
        self.dwconv, self.use_flash_attn, self.rotary_emb_dim = dwconv, use_flash_attn, rotary_emb_dim
        self.return_residual, self.checkpointing = return_residual, checkpointing
        self._packed = not cross_attn and self.num_heads_kv == num_heads  # queries, keys and values are one tensor

        kv_dim, linear = 2 * self.head_dim * self.num_heads_kv, partial(nn.Linear, device=device, dtype=dtype)
        if cross_attn:
            self.Wq = linear(embed_dim, embed_dim, bias=qkv_proj_bias)
            self.Wkv = linear(embed_dim, kv_dim, bias=qkv_proj_bias)
        else:
            self.Wqkv = linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias)
        if dwconv and self._packed:
            self.dwconv_qkv = _depthwise(embed_dim + kv_dim)
        elif dwconv:
            self.dwconv_q, self.dwconv_kv = _depthwise(embed_dim), _depthwise(kv_dim)
        if rotary_emb_dim > 0:
            assert not cross_attn, "MHA with rotary embedding does not support cross-attention yet"
            options = {"base": rotary_emb_base, "interleaved": rotary_emb_interleaved, "scale_base": rotary_emb_scale_base}
            self.rotary_emb = RotaryEmbedding(rotary_emb_dim, **options, device=device)
        options = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        if use_flash_attn:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
            options |= {"alibi_slopes": slopes, "window_size": window_size}
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**options)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**options)
        self.out_proj = linear(embed_dim, embed_dim, bias=out_proj_bias)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory for keys and values, (batch_size, max_seqlen, 2, Hk, D), with whatever it holds."""
        weight = self.out_proj.weight
        return weight.new_empty(batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim, dtype=dtype or weight.dtype)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: slice | Tensor | None = None,
        inference_params=None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return (B, S, embed_dim), or (total, embed_dim) of packed sequences; with return_residual also x.

        Args:
            x: (B, S, embed_dim); with ``cu_seqlens``, (total, embed_dim).
            x_kv: (B, Sk, embed_dim), of cross-attention.
            key_padding_mask: bool (B, S), True at a key that counts; not with use_flash_attn.
            cu_seqlens, max_seqlen: as in `flash_attn_varlen_func`; only with use_flash_attn.
            mixer_subset: which rows of x make queries, in cross-attention.
            inference_params: an object with max_batch_size, max_seqlen, batch_size_offset, seqlen_offset (the rows that are
                cached), lengths_per_sample (int32 (B,), their number of each sequence, or None) and key_value_memory_dict,
                the caches by layer_idx.
        """
        if cu_seqlens is not None:
            assert self.use_flash_attn and max_seqlen is not None and not self.dwconv and self.rotary_emb_dim == 0
        if key_padding_mask is not None:
            assert cu_seqlens is None and max_seqlen is None and not self.use_flash_attn
        if inference_params is not None:
            assert key_padding_mask is None and cu_seqlens is None and max_seqlen is None and not self.dwconv
        projected = self._project(x, x_kv, mixer_subset)
        if self.rotary_emb_dim > 0:
            projected = self._rotate(projected, inference_params)
        if inference_params is not None:
            q, kv = (projected[0][:, :, 0], projected[0][:, :, 1:]) if self._packed else projected
            context = self._update_kvcache_attention(q, kv, inference_params)
        else:
            lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            kwargs |= lengths if self.use_flash_attn else {"key_padding_mask": key_padding_mask}
            attend = self.inner_attn if self._packed else self.inner_cross_attn
            run = partial(checkpoint, attend, use_reentrant=False) if self.checkpointing else attend
            context = run(*projected, **kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _project(self, x: Tensor, x_kv: Tensor | None, mixer_subset: slice | Tensor | None) -> tuple[Tensor, ...]:
        """Return (qkv,), (..., 3, H, D), or (q, kv), (..., H, D) and (..., 2, Hk, D)."""
        if self._packed:
            assert x_kv is None and mixer_subset is None
            qkv = self.Wqkv(x)
            return ((_convolved(self.dwconv_qkv, qkv) if self.dwconv else qkv).unflatten(-1, (3, -1, self.head_dim)),)
        if self.cross_attn:
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            q, kv = self.Wqkv(x).tensor_split((self.embed_dim,), dim=-1)
        if self.dwconv:
            q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
        return q.unflatten(-1, (-1, self.head_dim)), kv.unflatten(-1, (2, -1, self.head_dim))

    def _rotate(self, projected: tuple[Tensor, ...], inference_params) -> tuple[Tensor, ...]:
        """Rotate queries and keys by their positions."""
        if inference_params is None:
            rotated = self.rotary_emb(*projected)
        else:
            options = {"seqlen_offset": _rows_cached(inference_params), "max_seqlen": inference_params.max_seqlen}
            rotated = self.rotary_emb(*projected, **options)
        return rotated if isinstance(rotated, tuple) else (rotated,)

    def _update_kvcache_attention(self, q: Tensor, kv: Tensor, inference_params) -> Tensor:
        """Write kv (B, S, 2, Hk, D) into this layer's cache, and attend to all that is cached."""
        assert self.layer_idx is not None, "Generation requires layer_idx in the constructor"
        if inference_params.seqlen_offset == 0 or not self.use_flash_attn:
            return self.inner_cross_attn(q, _update_kv_cache(kv, inference_params, self.layer_idx))
        inner = self.inner_cross_attn
        caches = inference_params.key_value_memory_dict[self.layer_idx][: len(q)].unbind(2)
        return flash_attn_with_kvcache(
            q,
            *caches,
            *kv.unbind(2),
            cache_seqlens=_rows_cached(inference_params, len(q)),
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=inner.alibi_slopes,
        )


def _depthwise(channels: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels)


def _convolved(convolution: nn.Conv1d, rows: Tensor) -> Tensor:
    """Return rows (B, S, C), each mixed with the two before it."""
    return convolution(rows.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()


def _rows_cached(inference_params, batch: int | None = None) -> int | Tensor:
    """Return how many rows are cached, of each of ``batch`` sequences, int32 (B,), or of all alike."""
    lengths = inference_params.lengths_per_sample
    return inference_params.seqlen_offset if lengths is None else lengths[:batch]


def _update_kv_cache(kv: Tensor, inference_params, layer_idx: int) -> Tensor:
    """Write kv (B, S, 2, Hk, D) into a layer's cache, and return all that is cached (B, rows, 2, Hk, D)."""
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        caches[layer_idx] = kv.new_empty(inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
    first, before = inference_params.batch_size_offset, inference_params.seqlen_offset
    cached = caches[layer_idx][first : first + kv.shape[0], : before + kv.shape[1]]
    assert cached.shape[:2] == (kv.shape[0], before + kv.shape[1]), "the cache has too few rows or sequences"
    cached[:, before:] = kv
    return cached
