"""xformers' masks, which say which keys a query sees without holding a tensor of scores.

A mask is a band around a diagonal: of all queries and keys, or, for the block-diagonal ones, of each of the sequences that lie
one after the other in a batch of one. `Band` says where the diagonal is; nearly all of xformers' names differ in it alone.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Which keys query i sees: those from p - left to p + right, None sets no limit, where p is its own position."""

    left: int | None
    right: int | None
    top_left: bool = False  # p is i, else i + keys - queries

    def mask(self, queries: int, keys: int, device: torch.device | str) -> Tensor:
        """Return the bool mask (queries, keys), True: seen."""
        position = torch.arange(queries, device=device)[:, None] + (0 if self.top_left else keys - queries)
        distance = torch.arange(keys, device=device) - position
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            seen &= distance >= -self.left
        return seen if self.right is None else seen & (distance <= self.right)


ALL = Band(None, None)
CAUSAL_TOP_LEFT = Band(None, 0, top_left=True)
CAUSAL = Band(None, 0)


def _check_window(name: str, size: int, least: int) -> None:
    if size < least:
        raise ValueError(f"{name} must be at least {least}; got {size}")


class AttentionBias:
    """What is added to the scores: 0 where a query sees a key, -inf where it does not."""

    band: Band = ALL
    _bias: Tensor | None = None  # (B, H, Mq, Mk), added to the scores beside

    def to(self, device: torch.device) -> "AttentionBias":
        """Return the same mask on a device."""
        return self

    def seen(self, queries: int, keys: int, device: torch.device | str) -> Tensor:
        """Return the bool mask (queries, keys), True: seen."""
        return self.band.mask(queries, keys, device)

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the bias as a tensor of a shape (..., queries, keys), to look at. Attention does not need it."""
        seen = self.seen(*shape[-2:], device)
        return torch.where(seen, 0.0, -math.inf).to(dtype).expand(tuple(shape))


# ---- of all queries and keys ------------------------------------------------------------------------------------------------


class LowerTriangularMask(AttentionBias):
    """Causal, aligned at the first query and key: query i sees the keys up to i."""

    band = CAUSAL_TOP_LEFT

    def __init__(self, device: torch.device | None = None):
        pass

    def add_bias(self, bias: Tensor) -> "LowerTriangularMaskWithTensorBias":
        """Return this mask with a floating tensor (B, H, Mq, Mk) added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """LowerTriangularMask with a floating tensor (B, H, Mq, Mk), which is added to the scores and gets a gradient."""

    def __init__(self, bias: Tensor):
        self._bias = bias

    def to(self, device: torch.device) -> "LowerTriangularMaskWithTensorBias":
        return type(self)(self._bias.to(device))

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, aligned at the last query and key."""

    band = CAUSAL

    def make_local_attention(self, window_size: int) -> "LowerTriangularFromBottomRightLocalAttentionMask":
        """Return this mask for the last ``window_size`` of the keys that a query sees."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The last ``_window_size`` of the keys that a query sees in LowerTriangularFromBottomRightMask."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window("window_size", self._window_size, 1)

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """So many keys on each side of a query, aligned at the last query and key."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        _check_window("window_left", self.window_left, 0)
        _check_window("window_right", self.window_right, 0)

    @property
    def band(self) -> Band:
        return Band(self.window_left, self.window_right)


# ---- where sequences lie ----------------------------------------------------------------------------------------------------


def _device(device: torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@dataclass
class _SeqLenInfo:
    """Where sequences begin that lie one after the other: seqstart int32 (sequences + 1,), and the same as a list."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: torch.device | None = None) -> "_SeqLenInfo":
        seqlens, begins = list(seqlens), [0]
        for length in seqlens:
            begins.append(begins[-1] + length)
        start = torch.tensor(begins, dtype=torch.int32, device=_device(device))
        return cls(start, max(seqlens, default=-1), min(seqlens, default=-1), begins)

    def to(self, device: torch.device) -> "_SeqLenInfo":
        return replace(self, seqstart=self.seqstart.to(device))

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield where each sequence begins and ends."""
        yield from zip(self.seqstart_py, self.seqstart_py[1:])

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Split (1, rows, ...) into tensors (B, M, ...) of sequences of one length each; B is 1 by default."""
        if x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            raise ValueError(f"the tensor must have shape (1, {self.seqstart_py[-1]}, ...); got {tuple(x.shape)}")
        begins, begin = [], 0
        for size in batch_sizes or [1] * (len(self.seqstart_py) - 1):
            begins.append((self.seqstart_py[begin], self.seqstart_py[begin + size], size))
            begin += size
        return [x[:, start:end].reshape(size, -1, *x.shape[2:]) for start, end, size in begins]


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Sequences that each have room for ``padding`` rows, of which the first seqlen int32 (sequences,) are used."""

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: torch.device | None = None
    ) -> "_PaddedSeqLenInfo":
        lengths = list(seqlens)
        if max(lengths, default=0) > padding:
            raise ValueError(f"kv_seqlen must not be longer than kv_padding, {padding}; got {lengths}")
        room = _SeqLenInfo.from_seqlens([padding] * len(lengths), device=device)
        used = torch.tensor(lengths, dtype=torch.int32, device=room.seqstart.device)
        longest, shortest = max(lengths, default=-1), min(lengths, default=-1)
        return cls(room.seqstart, longest, shortest, room.seqstart_py, used, lengths, padding)

    def to(self, device: torch.device) -> "_PaddedSeqLenInfo":
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))

    def intervals(self) -> Iterator[tuple[int, int]]:
        for begin, length in zip(self.seqstart_py, self.seqlen_py):
            yield begin, begin + length


# ---- of each sequence -------------------------------------------------------------------------------------------------------


@dataclass
class _Blocks(AttentionBias):
    """Queries (1, total_q, H, K) of sequences that see the keys (1, total_k, H, K) of their own sequence, in its band."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    def to(self, device: torch.device) -> "_Blocks":
        return replace(self, q_seqinfo=self.q_seqinfo.to(device), k_seqinfo=self.k_seqinfo.to(device))

    def seen(self, queries: int, keys: int, device: torch.device | str) -> Tensor:
        mask = torch.zeros(queries, keys, dtype=torch.bool, device=device)
        for (first, end), (first_key, end_key) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals()):
            mask[first:end, first_key:end_key] = self.band.mask(end - first, end_key - first_key, device)
        return mask

    def offsets(self) -> tuple[Tensor, Tensor]:
        """Return cu_seqlens_q and cu_seqlens_k for `fastlm.varlen_attention`."""
        return self.q_seqinfo.seqstart, self.k_seqinfo.seqstart


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors (B, M, ...) as one (1, total, ...)."""
    return torch.cat([tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in tensors], dim=1)


def _lengths(info: _SeqLenInfo) -> list[int]:
    return [end - begin for begin, end in info.intervals()]


@dataclass
class BlockDiagonalMask(_Blocks):
    """A query sees all keys of its own sequence."""

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: torch.device | None = None
    ) -> "BlockDiagonalMask":
        """Make the mask of sequences of these lengths; kv_seqlen is q_seqlen by default."""
        queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(queries, queries)
        if len(kv_seqlen) != len(q_seqlen):
            raise ValueError(f"kv_seqlen must have {len(q_seqlen)} lengths, as q_seqlen; got {len(kv_seqlen)}")
        return cls(queries, _SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple["BlockDiagonalMask", Tensor]:
        """Return the mask of tensors (B, M, ...), one sequence for each of B, and the tensors as one (1, total, ...)."""
        return cls._of_tensors(tensors, tensors), _packed(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple["BlockDiagonalMask", Tensor, Tensor, Tensor | None]:
        """Return the mask of queries (B, Mq, ...) and keys (B, Mk, ...), and queries, keys and values as one tensor each."""
        mask = cls._of_tensors(tensors_q, tensors_k)
        return mask, _packed(tensors_q), _packed(tensors_k), None if tensors_v is None else _packed(tensors_v)

    @classmethod
    def _of_tensors(cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor]) -> "BlockDiagonalMask":
        if [len(t) for t in tensors_q] != [len(t) for t in tensors_k]:
            raise ValueError("tensors_k must have as many tensors as tensors_q, of the same batch sizes")
        lengths = ([t.shape[1] for t in tensors for _ in range(len(t))] for tensors in (tensors_q, tensors_k))
        mask = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        mask._batch_sizes = [len(t) for t in tensors_q]
        return mask

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """Return (1, total_q, ...) as tensors (B, Mq, ...), the other way round from `from_tensor_lists_qkv`."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """Return (1, total_k, ...) as tensors (B, Mk, ...)."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return (1, total, ...) as tensors (B, M, ...), the other way round from `from_tensor_list`."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise ValueError("split is for as many keys as queries: use split_queries or split_kv")
        return self.split_queries(tensor)

    def make_causal(self) -> "BlockDiagonalCausalMask":
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> "BlockDiagonalCausalFromBottomRightMask":
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> "BlockDiagonalCausalLocalAttentionMask":
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(self, window_size: int) -> "BlockDiagonalCausalLocalAttentionFromBottomRightMask":
        sequences = self.q_seqinfo, self.k_seqinfo, self._batch_sizes
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(*sequences, window_size)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each sequence as in LowerTriangularMask: aligned at its first query and key."""

    band = CAUSAL_TOP_LEFT


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each sequence as in LowerTriangularFromBottomRightMask. It has as many keys as queries, or more."""

    band = CAUSAL

    def __post_init__(self) -> None:
        for i, (queries, keys) in enumerate(zip(_lengths(self.q_seqinfo), _lengths(self.k_seqinfo))):
            if keys < queries:
                raise ValueError(
                    f"kv_seqlen must not be shorter than q_seqlen; sequence {i} has {keys} keys, {queries} queries"
                )


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """The last ``_window_size`` of the keys that a query sees in BlockDiagonalCausalMask."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window("window_size", self._window_size, 1)

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0, top_left=True)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """The last ``_window_size`` of the keys that a query sees in BlockDiagonalCausalFromBottomRightMask."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_window("window_size", self._window_size, 1)

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0)


# ---- of each sequence, whose keys have room for more ------------------------------------------------------------------------


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """A query sees the used keys of its own sequence; each has room for ``kv_padding`` keys."""

    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: object = None,
        *,
        device: torch.device | None = None,
    ) -> "BlockDiagonalPaddedKeysMask":
        """Make the mask of sequences with so many queries and used keys. ``causal_diagonal`` is unused, as in xformers."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_local_attention(self, window_left: int, window_right: int) -> "BlockDiagonalLocalAttentionPaddedKeysMask":
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)

    def offsets(self) -> tuple[Tensor, Tensor]:
        """Return cu_seqlens, in which the unused keys behind a sequence are one that has no queries."""
        begins = self.k_seqinfo.seqstart
        used = torch.stack([begins[:-1], begins[:-1] + self.k_seqinfo.seqlen], dim=1).flatten()
        return self.q_seqinfo.seqstart.repeat_interleave(2)[1:], torch.cat([used, begins[-1:]])


def _padded(q_seqlen, kv_padding, kv_seqlen, device) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    if len(kv_seqlen) != len(q_seqlen):
        raise ValueError(f"kv_seqlen must have {len(q_seqlen)} lengths, as q_seqlen; got {len(kv_seqlen)}")
    keys = _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device)
    return _SeqLenInfo.from_seqlens(q_seqlen, device=device), keys


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each sequence causal, aligned at its last query and its last used key."""

    causal_diagonal: object = None
    band = CAUSAL


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """So many keys on each side of a query, aligned at its sequence's last query and last used key."""

    window_left: int
    window_right: int

    @property
    def band(self) -> Band:
        return Band(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding: int, kv_seqlen, window_left: int, window_right: int):
        """Make the mask of sequences with so many queries and used keys."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The last ``_window_size`` of the keys that a query sees in BlockDiagonalCausalWithOffsetPaddedKeysMask."""

    _window_size: int

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0)

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding: int, kv_seqlen, window_size: int):
        """Make the mask of sequences with so many queries and used keys."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_size)
