"""Rotate queries and keys by their positions, by the functions of flash_attn.layers.rotary, in torch's own ops.

    x_1, x_2 -> x_1 cos - x_2 sin, x_1 sin + x_2 cos

for pairs of dimensions, in float32 or better. Pairs are (0, 1), (2, 3), … if ``interleaved``, and else
(0, rotary_dim / 2), …; dimensions past rotary_dim stay.
Source: Su et al., "RoFormer" (2021); xPos: Sun et al., "A Length-Extrapolatable Transformer" (2022).
"""

import torch
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Return x (..., S, H, D) rotated by the rows ``positions`` (..., S or 1) of cos and sin (positions, rotary_dim / 2)."""
    assert sin.shape == cos.shape, f"sin must have cos's shape {tuple(cos.shape)}; got {tuple(sin.shape)}"
    assert cos.dtype == sin.dtype == x.dtype, f"cos and sin must have x's dtype {x.dtype}; got {cos.dtype} and {sin.dtype}"
    rotary_dim = 2 * cos.shape[-1]
    assert rotary_dim <= x.shape[-1], f"rotary_dim must be <= headdim {x.shape[-1]}; got {rotary_dim}"
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions][..., None, :].to(wide) for table in (cos, sin))  # (..., S or 1, 1, rotary_dim / 2)
    rotated, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    pairs = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, dim=-1)
    pairs = pairs[0] * cos - pairs[1] * sin, pairs[0] * sin + pairs[1] * cos
    rotated = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first rotary_dim of x.

    Args:
        x: (B, S, H, D); or, with ``cu_seqlens``, packed sequences (total, H, D).
        cos, sin: (positions, rotary_dim / 2), in x's dtype.
        interleaved: see the top of the file.
        inplace: write into x, and return it.
        seqlen_offsets: the position of each sequence's first row: an int, or (B,).
        cu_seqlens: int32 (B + 1,): where the sequences begin, and the total.
        max_seqlen: not used.

    Returns:
        A tensor like x. It has a gradient for x.
    """
    rotated = rotate(x, cos, sin, _positions(x, seqlen_offsets, cu_seqlens), interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Return `apply_rotary_emb` of x (B, S, H, D) with cos and sin (S, rotary_dim / 2)."""
    return apply_rotary_emb(x, cos, sin, interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate queries and keys in place, and return qkv.

    Args:
        qkv: (B, S, 3, H, D), or (B, S, num_heads_q + 2 * num_heads_k, D).
        cos_k, sin_k: the keys' own tables (xPos); None: cos and sin.
        cos, sin, interleaved, seqlen_offsets: as in `apply_rotary_emb`.
        num_heads_q: needed if qkv has 4 dimensions.
    """
    if qkv.dim() == 5:
        assert qkv.shape[2] == 3
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        assert qkv.dim() == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (num_heads_q + qkv.shape[2]) // 2]
    options = {"interleaved": interleaved, "inplace": True, "seqlen_offsets": seqlen_offsets}
    apply_rotary_emb(q, cos, sin, **options)
    apply_rotary_emb(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, **options)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate the keys of kv (B, S, 2, H, D) in place, and return kv; the other arguments as in `apply_rotary_emb`."""
    assert kv.shape[2] == 2
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, inplace=True, seqlen_offsets=seqlen_offsets)
    return kv


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the positions of the rows of x: (S,), (B, S), or (total,) of packed sequences."""
    if cu_seqlens is None:
        row = torch.arange(x.shape[1], device=x.device)
        return row + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    row = torch.arange(x.shape[0], device=x.device)
    sequence = torch.bucketize(row, cu_seqlens[1:], right=True)
    offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return row - cu_seqlens[sequence] + offset


class RotaryEmbedding(nn.Module):
    """Rotate queries and keys in place by tables of cos and sin, which are made as long as they are needed.

    Args:
        dim: rotary_dim, even.
        base: pair i of position p is turned by p * base ** (-2 i / dim).
        interleaved: see the top of the file.
        scale_base: if given, queries grow and keys shrink with their positions (xPos); 512 is its authors' choice.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = self._sin_cached = self._cos_k_cached = self._sin_k_cached = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** (-even / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Make the tables (seqlen, dim / 2), if those that there are do not fit. They are computed in float32."""
        cached = self._cos_cached
        fits = cached is not None and seqlen <= self._seq_len_cached and cached.device == device and cached.dtype == dtype
        if fits and not (self.training and cached.is_inference()):
            return
        self._seq_len_cached = seqlen
        in_float32 = self.inv_freq.dtype == torch.float32  # A model that was cast to bfloat16 has lost the digits.
        frequencies = self.inv_freq if in_float32 else self._compute_inv_freq(device)
        place = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(place, frequencies.to(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self.scale.to(device, torch.float32) ** ((place - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate in place.

        Args:
            qkv: (B, S, 3, H, D) or (B, S, num_heads_q + 2 * num_heads_k, D); with ``kv``, the queries (B, S, H, D).
            kv: (B, S, 2, Hk, D).
            seqlen_offset: the position of the first rows: an int, or (B,), for which the tables must be long enough:
                ``max_seqlen``.
            max_seqlen: the length of the tables.

        Returns:
            qkv, or (q, kv).
        """
        length = max_seqlen
        if length is None and not isinstance(seqlen_offset, Tensor):
            length = qkv.shape[1] + seqlen_offset
        if length is not None:
            self._update_cos_sin_cache(length, qkv.device, qkv.dtype)
        tables = self._cos_cached, self._sin_cached
        of_keys = (self._cos_k_cached, self._sin_k_cached) if self.scale is not None else tables
        options = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, *tables, *of_keys, num_heads_q=num_heads_q, **options)
        return apply_rotary_emb(qkv, *tables, inplace=True, **options), apply_rotary_emb_kv_(kv, *of_keys, **options)
