"""The launchers of attention's Triton kernels: they choose a call's kernels, arguments and tiles.

A call is planned before it runs. `plan_forward`, `plan_backward` and `plan_kvcache` return launches. `run` starts these one
after the other, without waiting for the GPU. Ahead-of-time compilation and its tests read the same plans.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .backward import attention_delta, attention_grad_key_value, attention_grad_query
from .device import LOG2E, BlockList, Dropout, Mask, Rows, Scoring, Sizes
from .forward import attention_forward
from .kvcache import KVCache, attention_combine, attention_kvcache, kvcache_append
from .mask import attention_block_lists, attention_grad_mask
from .tiles import (
    DELTA_ROWS,
    FORWARD,
    GRAD_KEY_VALUE,
    GRAD_QUERY,
    KVCACHE,
    L2_BUDGET,
    LoopKind,
    Tile,
    architecture,
    has_descriptors,
    has_tf32,
    tile_for,
)

_FAR = 1 << 30  # Farther than any key. Wider windows are cut to it, so that positions fit into 32 bits.


class Launch(NamedTuple):
    """A kernel with its grid, arguments and compiler options."""

    kernel: Any
    grid: int
    arguments: dict
    options: dict


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
    left: int | None = None
    right: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    drop_below: int = 0  # A random word below this drops its weight; 0 means no dropout.
    keep_scale: float = 1.0
    allow_tf32: bool = False
    arch: str | None = None  # The GPU to plan for; None means the query's.


def _launch(kernel, grid: int, arguments: dict, warps: int = 4, stages: int = 1) -> Launch:
    # Kernels write `fma` themselves, and the compiler fuses nothing: a maximum minus itself, fused with the product that it
    # came from, would not be 0.
    return Launch(kernel, grid, arguments, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False})


def run(launches: Iterable[Launch]) -> None:
    """Start the kernels in their order."""
    for kernel, grid, arguments, options in launches:
        if grid:
            kernel[(grid,)](**arguments, **options)


# ---- kernel arguments -------------------------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Rows:
    """Return a tensor with its strides.

    Its rows are wide if those of one tile, 256 at most, lie too far apart for offsets of 32 bits.
    """
    return Rows(tensor, *tensor.stride()[:3], True if tensor.stride(2) >= 1 << 22 else None)


def _inputs(call: Call) -> dict:
    """Return query, key and value with their strides."""
    return {name: _rows(getattr(call, name)) for name in ("query", "key", "value")}


def _mask(mask: Tensor | None, call: Call) -> tuple[Mask | None, Tensor | None]:
    """Return the mask with the strides of its broadcast, and the mask as a tensor of 4 dimensions."""
    if mask is None:
        return None, None
    mask = mask.float() if mask.dtype == torch.float64 else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask[(None,) * (4 - mask.dim())]
    shape = *call.query.shape[:3], call.key.shape[2]
    return Mask(mask, *mask.expand(shape).stride()), mask


def _sizes(call: Call) -> Sizes:
    """Return the sizes of a call."""
    batch, heads, q_len, _ = call.query.shape
    if call.cu_seqlens_q is not None:
        batch = call.cu_seqlens_q.shape[0] - 1
    group = heads // max(1, call.key.shape[1])
    return Sizes(batch, heads, group, q_len, call.key.shape[2], call.cu_seqlens_q, call.cu_seqlens_k)


def _scoring(
    left, right, scale: float, softcap: float, slopes: Tensor | None, sinks: Tensor | None, scale_only: bool
) -> Scoring:
    """Return the steps from products to the softmax; if `scale_only`, scores are the products themselves."""
    left, right = (None if side is None else max(-_FAR, min(side, _FAR)) for side in (left, right))
    factor = scale * LOG2E.value if scale_only else LOG2E.value
    cap, per_cap = (softcap, 1.0 / softcap) if softcap else (None, None)
    slopes = None if slopes is None else slopes.float().contiguous()
    slope_batch = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    sinks = None if sinks is None else sinks.float().contiguous()
    power = 2.0 ** math.ceil(math.log2(factor))
    return Scoring(left, right, scale, factor, power, cap, per_cap, slopes, slope_batch, sinks)


def _scoring_of(call: Call) -> Scoring:
    """Return the steps from products to the softmax of a call."""
    return _scoring(call.left, call.right, call.scale, call.softcap, call.alibi_slopes, call.sinks, is_scale_only(call))


def _dropout(call: Call) -> Dropout:
    """Return the dropout of a call; its fields are None without dropout."""
    if call.seed is None or not call.drop_below:
        return Dropout(None, None, None, None)
    return Dropout(call.seed.contiguous(), True if call.seed.dim() else None, call.drop_below - 1, call.keep_scale)


def _columns(dim: int) -> int:
    """Return the number of columns of a tile for a head_dim."""
    return max(16, triton.next_power_of_2(dim))


def _precision(allow_tf32: bool, dtype: torch.dtype, arch: str) -> str:
    """Return the input precision of float32's products. Products of narrower dtypes are exact."""
    return "tf32" if allow_tf32 and dtype == torch.float32 and has_tf32(arch) else "ieee"


def _arch(call: Call) -> str:
    """Return the GPU to plan for."""
    return call.arch or architecture(call.query.device)


def _constants(call: Call) -> dict:
    """Return the constants that all passes over tiles take."""
    head_dim, value_dim = call.query.shape[3], call.value.shape[3]
    return {
        "D": head_dim,
        "DV": value_dim,
        "COLUMNS": _columns(head_dim),
        "VALUE_COLUMNS": _columns(value_dim),
        "PRECISION": _precision(call.allow_tf32, call.query.dtype, _arch(call)),
    }


_SCALES = 2.0**-60, 2.0**60  # Products that fit into float32, times a scale between these, are sensible exponents of 2.


def is_scale_only(call: Call) -> bool:
    """Tell whether scores are products times a positive scale and nothing else, so that kernels can skip the multiplication."""
    has_bias = call.mask is not None and call.mask.is_floating_point()
    return _SCALES[0] <= call.scale <= _SCALES[1] and not call.softcap and call.alibi_slopes is None and not has_bias


def _is_fused(call: Call) -> bool:
    """Tell whether the forward computes a weight in one multiply-add.

    For float32 it does not: beside float32's products, a separate subtraction costs nothing.
    """
    return is_scale_only(call) and call.query.dtype != torch.float32


def _is_specialized(call: Call, tile: Tile, descriptors: dict) -> bool:
    """Tell whether some warps copy, some multiply and some compute the softmax.

    They do where the tile says so and the loop does nothing else.
    """
    return tile.specialized and is_scale_only(call) and None not in descriptors.values()


def _heads_per_group(call: Call) -> int:
    """Return the number of heads scheduled together, so that their K and V stay in the L2 cache; 1 without a causal limit.

    Without a causal limit all blocks take equally long, and their order does not matter.
    """
    if call.right is None:
        return 1
    bytes_of_head = call.key.shape[2] * (call.key.shape[3] + call.value.shape[3]) * call.key.element_size()
    return max(1, L2_BUDGET // max(1, bytes_of_head))


def _is_describable(tensor: Tensor) -> bool:
    """Tell whether the tensor memory accelerator can copy a tensor from where it lies."""
    steps = [stride * tensor.element_size() for length, stride in zip(tensor.shape[:3], tensor.stride()) if length != 1]
    return tensor.data_ptr() % 16 == 0 and all(0 < step < 1 << 40 and step % 16 == 0 for step in steps)


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor | None:
    """Return the descriptor of a tensor's blocks of `rows` rows; None where the accelerator cannot copy the tensor."""
    if not tensor.numel() or not _is_describable(tensor):
        return None
    columns = _columns(tensor.shape[3])
    strides = [columns if length == 1 else stride for length, stride in zip(tensor.shape[:3], tensor.stride())]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def _choose_tile(name: str, call: Call, **operands: Tensor) -> tuple[Tile, dict]:
    """Return the tile of the pass `name`, and the descriptors, or None, of the operands that its loop copies block by block.

    Packed sequences have no descriptors, because a tile may reach past the end of a sequence. The tile does not depend on where
    a tensor lies, so that a row's sums have one order whatever the batch around it.
    """
    arch, dtype, head_dim = _arch(call), call.query.dtype, max(call.query.shape[3], call.value.shape[3])
    pointers = {f"{operand}_desc": None for operand in operands}
    if call.mask is not None or call.drop_below:
        return tile_for(name, arch, dtype, head_dim, LoopKind.MASKED), pointers
    tile = tile_for(name, arch, dtype, head_dim, LoopKind.DESCRIPTORS)
    rows = tile.q if name == GRAD_KEY_VALUE else tile.k
    length = min(tensor.shape[2] for tensor in operands.values())
    if not has_descriptors(arch, dtype) or call.cu_seqlens_q is not None or length < rows:
        return tile_for(name, arch, dtype, head_dim), pointers
    return tile, {f"{operand}_desc": _descriptor(tensor, rows) for operand, tensor in operands.items()}


def _num_blocks(length: int, cu_seqlens: Tensor | None, block: int, sizes: Sizes) -> int:
    """Return the number of blocks of all sequences; with cu_seqlens, the number of slots that hold them (find_sequence)."""
    if cu_seqlens is None:
        return sizes.batch * triton.cdiv(length, block)
    return length // block + sizes.batch if sizes.batch else 0


# ---- the passes -------------------------------------------------------------------------------------------------------------


def _plan_block_lists(
    mask: Tensor | None, call: Call, tile: Tile, by_keys: bool, scoring: Scoring
) -> tuple[list[Launch], BlockList | None]:
    """Plan the launch that lists which blocks a pass visits; return it and the lists."""
    if mask is None:
        return [], None
    q_len, k_len = call.query.shape[2], call.key.shape[2]
    own, other = triton.cdiv(q_len, tile.q), triton.cdiv(k_len, tile.k)
    own, other = (other, own) if by_keys else (own, other)
    batch, heads = mask.shape[:2]
    counts = torch.empty(batch, heads, own, dtype=torch.int32, device=mask.device)
    blocks = torch.empty(batch, heads, own, max(1, other), dtype=torch.int32, device=mask.device)
    own_mask = Mask(mask, *mask.expand(batch, heads, q_len, k_len).stride())
    arguments = {
        "mask": own_mask, "blocks": blocks, "counts": counts, "mask_heads": heads, "q_len": q_len, "k_len": k_len,
        "left": scoring.left, "right": scoring.right, "BLOCK_Q": tile.q, "BLOCK_K": tile.k, "BY_KEYS": by_keys,
    }  # fmt: skip
    batch_stride, head_stride = heads * own if batch > 1 else 0, own if heads > 1 else 0
    lists = BlockList(blocks, counts, batch_stride, head_stride, max(1, other))
    return [_launch(attention_block_lists, batch * heads * own, arguments)], lists


def plan_forward(call: Call, out: Tensor, lse: Tensor, statistics: Tensor) -> list[Launch]:
    """Plan launches that write out (batch, heads, rows, Dv), lse (batch, heads, rows), statistics (batch, heads, rows, 2)."""
    (tile, descriptors), sizes = _choose_tile(FORWARD, call, key=call.key, value=call.value), _sizes(call)
    scoring = _scoring_of(call)
    mask_rows, mask = _mask(call.mask, call)
    launches, block_lists = _plan_block_lists(mask, call, tile, False, scoring)
    arguments = {
        **_inputs(call), **descriptors, "out": _rows(out), "lse": lse, "statistics": statistics, "mask": mask_rows,
        "block_lists": block_lists, "sizes": sizes, "scoring": scoring, "dropout": _dropout(call),
        "heads_per_group": _heads_per_group(call), "BLOCK_Q": tile.q, "BLOCK_K": tile.k,
        "SCALE_ONLY": is_scale_only(call), "FUSED": _is_fused(call),
        "SPECIALIZED": _is_specialized(call, tile, descriptors), **_constants(call),
    }  # fmt: skip
    grid = sizes.heads * _num_blocks(sizes.q_len, sizes.cu_q, tile.q, sizes)
    return [*launches, _launch(attention_forward, grid, arguments, tile.warps, tile.stages)]


def plan_backward(
    call: Call, out: Tensor, statistics: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: tuple, delta: Tensor
) -> list[Launch]:
    """Plan launches that write delta (batch, heads, rows) and the gradients of query, key, value and, unless None, mask.

    grad_mask is contiguous, of the mask's shape.
    """
    sizes, constants = _sizes(call), _constants(call)
    grad_query, grad_key, grad_value, grad_mask = grads
    scoring = _scoring_of(call._replace(sinks=None))  # The statistics include the sinks.
    mask_rows, mask = _mask(call.mask, call)
    shared = {**_inputs(call), "grad_out": _rows(grad_out), "statistics": statistics, "delta": delta, "mask": mask_rows}
    shared |= {"sizes": sizes, "scoring": scoring, "dropout": _dropout(call), **constants}
    loop = {"heads_per_group": _heads_per_group(call), "SCALE_ONLY": is_scale_only(call)}

    batch, heads, q_len, _ = call.query.shape
    arguments = {
        "out": _rows(out), "grad_out": _rows(grad_out), "grad_lse": grad_lse, "delta": delta, "heads": heads, "rows": q_len,
        "DV": constants["DV"], "VALUE_COLUMNS": constants["VALUE_COLUMNS"], "BLOCK_Q": DELTA_ROWS,
    }  # fmt: skip
    launches = [_launch(attention_delta, batch * heads * triton.cdiv(q_len, DELTA_ROWS), arguments)]

    tile, descriptors = _choose_tile(GRAD_KEY_VALUE, call, query=call.query, grad_out=grad_out)
    listing, block_lists = _plan_block_lists(mask, call, tile, True, scoring)
    blocks = {"block_lists": block_lists, "BLOCK_Q": tile.q, "BLOCK_K": tile.k}
    arguments = {**shared, **descriptors, **loop, **blocks, "grad_key": _rows(grad_key), "grad_value": _rows(grad_value)}
    grid = call.key.shape[1] * _num_blocks(sizes.k_len, sizes.cu_k, tile.k, sizes)
    launches += [*listing, _launch(attention_grad_key_value, grid, arguments, tile.warps, tile.stages)]

    tile, descriptors = _choose_tile(GRAD_QUERY, call, key=call.key, value=call.value)
    listing, block_lists = _plan_block_lists(mask, call, tile, False, scoring)
    blocks = {"block_lists": block_lists, "BLOCK_Q": tile.q, "BLOCK_K": tile.k}
    arguments = {**shared, **descriptors, **loop, **blocks, "grad_query": _rows(grad_query)}
    grid = heads * _num_blocks(q_len, sizes.cu_q, tile.q, sizes)
    launches += [*listing, _launch(attention_grad_query, grid, arguments, tile.warps, tile.stages)]
    if grad_mask is not None:
        launches.append(_plan_grad_mask(mask, grad_mask, shared, sizes, tile))
    return launches


def _plan_grad_mask(mask: Tensor, grad_mask: Tensor, shared: dict, sizes: Sizes, tile: Tile) -> Launch:
    """Plan the launch that writes the mask's gradient."""
    batch, heads, rows, columns = mask.shape
    per_query, per_key = rows == sizes.q_len, columns == sizes.k_len
    arguments = {
        **shared, "grad_mask": grad_mask, "mask_batch": batch, "mask_heads": heads, "PER_QUERY": per_query, "PER_KEY": per_key,
        "BLOCK_Q": tile.q, "BLOCK_K": tile.k,
    }  # fmt: skip
    tiles = (triton.cdiv(rows, tile.q) if per_query else 1) * (triton.cdiv(columns, tile.k) if per_key else 1)
    return _launch(attention_grad_mask, batch * heads * tiles, arguments, tile.warps, tile.stages)


# ---- attention with a KV cache ----------------------------------------------------------------------------------------------

_MIN_SPLIT, _MAX_SPLITS = 256, 64  # The fewest keys of a split, and the most splits.


def plan_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    allow_tf32: bool,
    out: Tensor,
    lse: Tensor,
    arch: str | None = None,
) -> list[Launch]:
    """Plan launches that append key and value to the caches, then write out and lse as `plan_forward` does.

    The columns of all tensors are contiguous.
    """
    (batch, heads, q_len, head_dim), value_dim, device = query.shape, value_cache.shape[3], query.device
    keys, values = _kvcache(key_cache, block_table), _kvcache(value_cache, block_table)
    capacity = keys.rows * (1 if block_table is None else keys.max_pages)
    kv_heads = key_cache.shape[1 if block_table is None else 2]
    added = 0 if key is None else key.shape[2]
    arch = arch or architecture(device)
    tile = tile_for(KVCACHE, arch, query.dtype, max(head_dim, value_dim))
    cache_seqlens = cache_seqlens.contiguous()
    launches = []
    for new, cache in ((key, keys), (value, values)) if added else ():
        arguments = {
            "rows": _rows(new), "cache": cache, "cache_seqlens": cache_seqlens, "kv_heads": kv_heads, "added": added,
            "DIM": new.shape[3], "COLUMNS": _columns(new.shape[3]), "BLOCK": tile.q,
        }  # fmt: skip
        launches.append(_launch(kvcache_append, batch * kv_heads * triton.cdiv(added, tile.q), arguments))

    split = max(_MIN_SPLIT, tile.k, triton.next_power_of_2(triton.cdiv(capacity, _MAX_SPLITS)))
    num_splits = max(1, triton.cdiv(capacity, split))
    partial = torch.empty(batch, heads, q_len, num_splits, value_dim, dtype=torch.float32, device=device)
    statistics = torch.empty(batch, heads, q_len, num_splits, 2, dtype=torch.float32, device=device)
    group = heads // max(1, kv_heads)
    shared = {
        "partial": partial, "statistics": statistics, "cache_seqlens": cache_seqlens,
        "sizes": Sizes(batch, heads, group, q_len, capacity, None, None),
        "scoring": _scoring(left, right, scale, softcap, alibi_slopes, sinks, False), "added": added, "capacity": capacity,
        "num_splits": num_splits, "DV": value_dim, "VALUE_COLUMNS": _columns(value_dim), "SPLIT": split,
    }  # fmt: skip
    arguments = {
        "query": _rows(query), "keys": keys, "values": values, "D": head_dim, "COLUMNS": _columns(head_dim),
        "BLOCK_Q": tile.q, "BLOCK_K": tile.k, "PRECISION": _precision(allow_tf32, query.dtype, arch),
    }  # fmt: skip
    grid = num_splits * batch * kv_heads * triton.cdiv(group * q_len, tile.q)
    launches.append(_launch(attention_kvcache, grid, shared | arguments, tile.warps, tile.stages))
    launches.append(_launch(attention_combine, batch * heads * q_len, shared | {"out": _rows(out), "lse": lse}))
    return launches


def _kvcache(cache: Tensor, block_table: Tensor | None) -> KVCache:
    """Return a cache, contiguous or paged, with its strides."""
    if block_table is None:
        return KVCache(cache, *cache.stride()[:3], cache.shape[2], None, 1, 1)
    page, row, head, _ = cache.stride()
    return KVCache(cache, page, head, row, cache.shape[1], block_table.contiguous(), cache.shape[0], block_table.shape[1])
