"""Make the arguments of attention's kernels: a call's tensors with their strides, its options, its tiles and its blocks."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.plans import converted
from .device import LOG2E, Dropout, Mask, Scoring, Sizes
from .rows import Rows
from .tangents import Tangents
from .tiles import (
    L2_BUDGET,
    LoopKind,
    Tile,
    has_descriptors,
    has_tf32,
    tile_for,
)

_FAR = 1 << 30  # Farther than any key. Wider windows are cut to it, so that positions fit into 32 bits.


class TangentTensors(NamedTuple):
    """The tangents of a call's tensors, of their shapes and dtypes, with contiguous columns. None counts as zeros."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None


class JvpResults(NamedTuple):
    """What the forward with tangents returns. Columns are contiguous."""

    out: Tensor  # (batch, heads, rows, Dv)
    lse: Tensor  # float32 (batch, heads, rows), contiguous
    statistics: Tensor  # float32 (batch, heads, rows, 2), contiguous
    out_tangent: Tensor  # like out
    lse_tangent: Tensor  # like lse


class Call(NamedTuple):
    """A call of attention.

    Tensors are (batch, head, row, column), and columns are contiguous, except those of the mask. With cu_seqlens, sequences lie
    along the rows of a batch of one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    places: Tensor | None = None
    left: int | None = None
    right: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    drop_below: int = 0  # A random word below this drops its weight; 0 means no dropout.
    keep_scale: float = 1.0
    allow_tf32: bool = False
    arch: str | None = None  # The GPU to plan for.


class KVCacheCall(NamedTuple):
    """A call of attention to caches of keys and values, to which new ones may be appended before. Columns are contiguous."""

    query: Tensor  # (batch, heads, rows, D)
    key_cache: Tensor  # (batch, heads, rows, D), or (pages, rows, heads, D) with a block_table
    value_cache: Tensor
    cache_seqlens: Tensor  # int32 (batch,): rows before appending
    key: Tensor | None = None  # (batch, heads, rows, D), to be appended
    value: Tensor | None = None
    block_table: Tensor | None = None  # int32 (batch, max_pages)
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    left: int | None = None
    right: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    allow_tf32: bool = False
    arch: str | None = None  # The GPU to plan for.


# ---- kernel arguments -------------------------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> Rows:
    """Return a tensor with its strides.

    Its rows are wide if those of one tile, 256 at most, lie too far apart for offsets of 32 bits.
    """
    batch, head, row, _ = tensor.stride()
    return Rows(tensor, batch, head, row, True if row >= 1 << 22 else None, True if row % 16 == 8 else None)


def inputs_of(call: Call) -> dict:
    """Return query, key and value with their strides."""
    return {name: rows_of(getattr(call, name)) for name in ("query", "key", "value")}


def _readable(mask: Tensor) -> Tensor:
    """Return a mask of 4 dimensions, of bytes or of floats of at most 32 bits."""
    mask = mask.float() if mask.dtype == torch.float64 else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask[(None,) * (4 - mask.dim())]


def _float32(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor of float32."""
    return tensor.float().contiguous()


def mask_of(mask: Tensor | None, call: Call) -> tuple[Mask | None, Tensor | None]:
    """Return the mask with the strides of its broadcast, and the mask as a tensor of 4 dimensions."""
    if mask is None:
        return None, None
    mask = converted(mask, _readable)
    shape = *call.query.shape[:3], call.key.shape[2]
    return Mask(mask, *mask.expand(shape).stride()), mask


def tangents_of(tangents: TangentTensors, call: Call) -> Tangents:
    """Return the tangents with their strides."""
    query, key, value = (None if tensor is None else rows_of(tensor) for tensor in tangents[:3])
    mask, _ = mask_of(tangents.mask, call)
    return Tangents(query, key, value, mask, converted(tangents.sinks, _float32))


def sizes_of(call: Call) -> Sizes:
    """Return the sizes of a call."""
    batch, heads, q_len, _ = call.query.shape
    if call.cu_seqlens_q is not None:
        batch = call.cu_seqlens_q.shape[0] - 1
    group = heads // max(1, call.key.shape[1])
    places = converted(call.places, Tensor.contiguous)
    return Sizes(batch, heads, group, q_len, call.key.shape[2], call.cu_seqlens_q, call.cu_seqlens_k, places)


def make_scoring(
    left, right, scale: float, softcap: float, slopes: Tensor | None, sinks: Tensor | None, scale_only: bool
) -> Scoring:
    """Return the steps from products to the softmax; if `scale_only`, scores are the products themselves."""
    left, right = (None if side is None else max(-_FAR, min(side, _FAR)) for side in (left, right))
    factor = scale * LOG2E.value if scale_only else LOG2E.value
    cap, per_cap = (softcap, 1.0 / softcap) if softcap else (None, None)
    slopes = converted(slopes, _float32)
    slope_batch = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    power = 2.0 ** math.ceil(math.log2(factor))
    return Scoring(left, right, scale, factor, power, cap, per_cap, slopes, slope_batch, converted(sinks, _float32))


def scoring_of(call: Call) -> Scoring:
    """Return the steps from products to the softmax of a call."""
    return make_scoring(call.left, call.right, call.scale, call.softcap, call.alibi_slopes, call.sinks, is_scale_only(call))


def dropout_of(call: Call) -> Dropout:
    """Return the dropout of a call; its fields are None without dropout."""
    if call.seed is None or not call.drop_below:
        return Dropout(None, None, None, None)
    seed = converted(call.seed, Tensor.contiguous)
    return Dropout(seed, True if seed.dim() else None, call.drop_below - 1, call.keep_scale)


def columns_of(dim: int) -> int:
    """Return the number of columns of a tile for a head_dim."""
    return max(16, triton.next_power_of_2(dim))


def precision_of(allow_tf32: bool, dtype: torch.dtype, arch: str) -> str:
    """Return the input precision of float32's products. Products of narrower dtypes are exact."""
    return "tf32" if allow_tf32 and dtype == torch.float32 and has_tf32(arch) else "ieee"


def constants_of(call: Call) -> dict:
    """Return the constants that all passes over tiles take."""
    head_dim, value_dim = call.query.shape[3], call.value.shape[3]
    return {
        "D": head_dim,
        "DV": value_dim,
        "COLUMNS": columns_of(head_dim),
        "VALUE_COLUMNS": columns_of(value_dim),
        "PRECISION": precision_of(call.allow_tf32, call.query.dtype, call.arch),
    }


_SCALES = 2.0**-60, 2.0**60  # Products that fit into float32, times a scale between these, are sensible exponents of 2.


def is_scale_only(call: Call) -> bool:
    """Tell whether scores are products times a positive scale and nothing else, so that kernels can skip the multiplication."""
    has_bias = call.mask is not None and call.mask.is_floating_point()
    return _SCALES[0] <= call.scale <= _SCALES[1] and not call.softcap and call.alibi_slopes is None and not has_bias


def is_fused(call: Call) -> bool:
    """Tell whether the forward computes a weight in one multiply-add.

    For float32 it does not: beside float32's products, a separate subtraction costs nothing.
    """
    return is_scale_only(call) and call.query.dtype != torch.float32


def is_specialized(call: Call, tile: Tile, descriptors: dict) -> bool:
    """Tell whether some warps copy, some multiply and some compute the softmax.

    They do where the tile says so and the loop does nothing else.
    """
    return tile.specialized and is_scale_only(call) and None not in descriptors.values()


def heads_per_group(call: Call) -> int:
    """Return the number of heads scheduled together, so that their K and V stay in the L2 cache; 1 without a causal limit.

    Without a causal limit all blocks take equally long, and their order does not matter.
    """
    if call.right is None:
        return 1
    bytes_of_head = call.key.shape[2] * (call.key.shape[3] + call.value.shape[3]) * call.key.element_size()
    return max(1, L2_BUDGET // max(1, bytes_of_head))


def _copies_by_descriptor(call: Call) -> bool:
    """Tell whether loops over long sequences of a call copy their blocks by descriptor.

    Descriptors want rows at multiples of 16 bytes. Packed sequences have none, because a tile may reach past a sequence's end.
    The answer does not depend on where a tensor lies, so that a row's sums have one order whatever the batch around it.
    """
    is_plain = call.mask is None and not call.drop_below and call.cu_seqlens_q is None
    is_aligned = call.query.shape[3] % 8 == 0 and call.value.shape[3] % 8 == 0
    return is_plain and is_aligned and has_descriptors(call.arch, call.query.dtype)


def _is_describable(tensor: Tensor) -> bool:
    """Tell whether the tensor memory accelerator can copy a tensor from where it lies."""
    steps = [stride * tensor.element_size() for length, stride in zip(tensor.shape[:3], tensor.stride()) if length != 1]
    return tensor.data_ptr() % 16 == 0 and all(0 < step < 1 << 40 and step % 16 == 0 for step in steps)


def _contiguous_copy(tensor: Tensor) -> Tensor:
    """Return a copy in memory of its own, which is aligned."""
    return tensor.clone(memory_format=torch.contiguous_format)


def describable(call: Call, *tensors: Tensor) -> list[Tensor]:
    """Return tensors of a call as its loops can copy them: the same, or, where they are expanded or misaligned, copies.

    A copy costs little beside attention. Without it a loop would compute pointers, for which its tile leaves no registers.
    """
    if not _copies_by_descriptor(call):
        return list(tensors)
    return [tensor if _is_describable(tensor) else converted(tensor, _contiguous_copy) for tensor in tensors]


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor | None:
    """Return the descriptor of a tensor's blocks of `rows` rows; None for an empty tensor, which has no blocks."""
    if not tensor.numel():
        return None
    columns = columns_of(tensor.shape[3])
    strides = [columns if length == 1 else stride for length, stride in zip(tensor.shape[:3], tensor.stride())]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def choose_tile(name: str, call: Call, **operands: Tensor) -> tuple[Tile, dict]:
    """Return the tile of the pass `name`, and the descriptors, or None, of the operands that its loop copies block by block.

    The operands are describable. Those that are shorter than a block have no descriptors.
    """
    arch, dtype, head_dim = call.arch, call.query.dtype, max(call.query.shape[3], call.value.shape[3])
    if _copies_by_descriptor(call):
        tile = tile_for(name, arch, dtype, head_dim, LoopKind.DESCRIPTORS)
        rows = tile.q if "query" in operands else tile.k
        if all(tensor.shape[2] >= rows for tensor in operands.values()):
            return tile, {f"{operand}_desc": _descriptor(tensor, rows) for operand, tensor in operands.items()}
    return pointer_tile(name, call), {f"{operand}_desc": None for operand in operands}


def pointer_tile(name: str, call: Call) -> Tile:
    """Return the tile of the pass `name`, which copies all blocks by pointers."""
    kind = LoopKind.MASKED if call.mask is not None or call.drop_below else LoopKind.PLAIN
    return tile_for(name, call.arch, call.query.dtype, max(call.query.shape[3], call.value.shape[3]), kind)


def needs_reload(call: Call) -> bool:
    """Tell whether a GPU has no room for all tiles of the pass that computes the keys' second derivatives.

    NVIDIA's would lack shared memory, AMD's registers.
    """
    return call.query.dtype == torch.float32 and max(call.query.shape[3], call.value.shape[3]) > 128


def num_blocks(length: int, cu_seqlens: Tensor | None, block: int, sizes: Sizes) -> int:
    """Return the number of blocks of all sequences; with cu_seqlens, the number of slots that hold them (find_sequence)."""
    if cu_seqlens is None:
        return sizes.batch * triton.cdiv(length, block)
    return length // block + sizes.batch if sizes.batch else 0
