"""The launchers of attention's Triton kernels: which kernels a call takes, with which arguments and settings.

A call is planned before it is run: `plan_forward`, `plan_backward` and `plan_decoding` return launches, which `run` starts one
after the other without waiting for the GPU. Ahead-of-time compilation and its tests read the same plans.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .backward import attention_delta, attention_grad_key_value, attention_grad_query
from .device import LOG2E, Dropout, Mask, Rows, Scoring, Sizes, Visits
from .forward import attention_forward
from .kvcache import Cache, attention_decode, attention_join, cache_append
from .mask import attention_grad_mask, attention_visits
from .tiles import (
    BUSY,
    BY_DESCRIPTORS,
    CACHE_SHARE,
    DECODE,
    FORWARD,
    GRAD_KEY_VALUE,
    GRAD_QUERY,
    ROWS,
    Tile,
    architecture,
    has_descriptors,
    has_tf32,
    tile,
)

_FAR = 1 << 30  # farther than any key: what a wider window is cut to, so that places stay in 32 bits


class Launch(NamedTuple):
    """A kernel with all it takes."""

    kernel: Any
    grid: int
    arguments: dict
    options: dict


class Call(NamedTuple):
    """A call of attention. Tensors are (batch, head, row, column), columns contiguous, but for the mask's; with cu_seqlens,
    sequences lie along the rows of a batch of one."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float
    drop_below: int  # the generator's words that drop a weight are below this; 0: no dropout
    keep_scale: float
    allow_tf32: bool
    arch: str | None = None  # the GPU to plan for; None is the query's


def _launch(kernel, grid: int, arguments: dict, warps: int = 4, stages: int = 1) -> Launch:
    # Kernels say themselves what is fused: a maximum minus itself, fused with the product that it came from, would not be 0.
    return Launch(kernel, grid, arguments, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False})


def run(launches: Iterable[Launch]) -> None:
    """Start the kernels in their order."""
    for kernel, grid, arguments, options in launches:
        if grid:
            kernel[(grid,)](**arguments, **options)


# ---- what kernels are told --------------------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Rows:
    # Rows so far apart that those of a tile, 256 at most, do not fit into offsets of 32 bits.
    return Rows(tensor, *tensor.stride()[:3], True if tensor.stride(2) >= 1 << 22 else None)


def _inputs(call: Call) -> dict:
    return {name: _rows(getattr(call, name)) for name in ("query", "key", "value")}


def _mask(mask: Tensor | None, call: Call) -> tuple[Mask | None, Tensor | None]:
    """The mask as kernels read it, and as a tensor of 4 dimensions."""
    if mask is None:
        return None, None
    mask = mask.float() if mask.dtype == torch.float64 else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask[(None,) * (4 - mask.dim())]
    shape = *call.query.shape[:3], call.key.shape[2]
    return Mask(mask, *mask.expand(shape).stride()), mask


def _sizes(call: Call) -> Sizes:
    batch, heads, q_len, _ = call.query.shape
    if call.cu_seqlens_q is not None:
        batch = call.cu_seqlens_q.shape[0] - 1
    group = heads // max(1, call.key.shape[1])
    return Sizes(batch, heads, group, q_len, call.key.shape[2], call.cu_seqlens_q, call.cu_seqlens_k)


def _scoring(left, right, scale: float, softcap: float, slopes: Tensor | None, sinks: Tensor | None, plain: bool) -> Scoring:
    """Say how products become scores, which are products themselves if `plain`."""
    left, right = (None if side is None else max(-_FAR, min(side, _FAR)) for side in (left, right))
    factor = scale * LOG2E.value if plain else LOG2E.value
    cap, per_cap = (softcap, 1.0 / softcap) if softcap else (None, None)
    slopes = None if slopes is None else slopes.float().contiguous()
    slope_batch = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    sinks = None if sinks is None else sinks.float().contiguous()
    power = 2.0 ** math.ceil(math.log2(factor))
    return Scoring(left, right, scale, factor, power, cap, per_cap, slopes, slope_batch, sinks)


def _scoring_of(call: Call) -> Scoring:
    return _scoring(call.left, call.right, call.scale, call.softcap, call.alibi_slopes, call.sinks, is_plain(call))


def _dropout(call: Call) -> Dropout:
    if call.seed is None or not call.drop_below:
        return Dropout(None, None, None, None)
    return Dropout(call.seed.contiguous(), True if call.seed.dim() else None, call.drop_below - 1, call.keep_scale)


def _columns(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _precision(allow_tf32: bool, dtype: torch.dtype, arch: str) -> str:
    """Of float32's products; those of narrower numbers are exact."""
    return "tf32" if allow_tf32 and dtype == torch.float32 and has_tf32(arch) else "ieee"


def _arch(call: Call) -> str:
    return call.arch or architecture(call.query.device)


def _shared(call: Call) -> dict:
    """The constants that all passes over tiles take."""
    head_dim, value_dim = call.query.shape[3], call.value.shape[3]
    return {
        "D": head_dim,
        "DV": value_dim,
        "COLUMNS": _columns(head_dim),
        "VALUE_COLUMNS": _columns(value_dim),
        "PRECISION": _precision(call.allow_tf32, call.query.dtype, _arch(call)),
    }


_SCALES = 2.0**-60, 2.0**60  # times these, products that fit into float32 give exponents of 2 that mean something


def is_plain(call: Call) -> bool:
    """Tell whether scores are products times a positive number, so that kernels can do without the multiplication."""
    has_bias = call.mask is not None and call.mask.is_floating_point()
    return _SCALES[0] <= call.scale <= _SCALES[1] and not call.softcap and call.alibi_slopes is None and not has_bias


def _is_fused(call: Call) -> bool:
    """Tell whether the forward computes a weight in one multiply-add. Beside float32's products a subtraction costs nothing."""
    return is_plain(call) and call.query.dtype != torch.float32


def _is_specialized(call: Call, shape: Tile, tiles: dict) -> bool:
    """Whether some warps copy, some multiply and some weigh: where the settings say so and the loop holds nothing else."""
    return shape.specialized and is_plain(call) and None not in tiles.values()


def _together(call: Call) -> int:
    """Heads whose programs run side by side: as many as share the cache where blocks differ, one where they do not."""
    if call.right is None:
        return 1
    bytes_of_head = call.key.shape[2] * (call.key.shape[3] + call.value.shape[3]) * call.key.element_size()
    return max(1, CACHE_SHARE // max(1, bytes_of_head))


def _is_describable(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can copy from where it lies."""
    steps = [stride * tensor.element_size() for length, stride in zip(tensor.shape[:3], tensor.stride()) if length != 1]
    return tensor.data_ptr() % 16 == 0 and all(0 < step < 1 << 40 and step % 16 == 0 for step in steps)


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor | None:
    """Of blocks of so many rows; None where the tensor does not lie in memory as the accelerator wants it."""
    if not tensor.numel() or not _is_describable(tensor):
        return None
    columns = _columns(tensor.shape[3])
    strides = [columns if length == 1 else stride for length, stride in zip(tensor.shape[:3], tensor.stride())]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def _cut(kernel: str, call: Call, **walked: Tensor) -> tuple[Tile, dict]:
    """The tile of a pass, and the arguments by which it copies tiles of what its loop walks over: descriptors or None.

    Packed sequences have none, as a tile may not end where a sequence does. The tile does not depend on where a tensor lies, so
    that a row's sums have one order whatever the batch around it.
    """
    arch, dtype, head_dim = _arch(call), call.query.dtype, max(call.query.shape[3], call.value.shape[3])
    if call.mask is not None or call.drop_below:
        return tile(kernel, arch, dtype, head_dim, BUSY), {f"{name}_tiles": None for name in walked}
    shape = tile(kernel, arch, dtype, head_dim, BY_DESCRIPTORS)
    rows = shape.q if kernel == GRAD_KEY_VALUE else shape.k
    length = min(tensor.shape[2] for tensor in walked.values())
    if not has_descriptors(arch, dtype) or call.cu_seqlens_q is not None or length < rows:
        return tile(kernel, arch, dtype, head_dim), {f"{name}_tiles": None for name in walked}
    return shape, {f"{name}_tiles": _descriptor(tensor, rows) for name, tensor in walked.items()}


def _blocks(length: int, cu_seqlens: Tensor | None, block: int, sizes: Sizes) -> int:
    """Blocks of all sequences together; with cu_seqlens, the slots that they are looked for in."""
    if cu_seqlens is None:
        return sizes.batch * triton.cdiv(length, block)
    return length // block + sizes.batch if sizes.batch else 0


# ---- the passes -------------------------------------------------------------------------------------------------------------


def _visits(
    mask: Tensor | None, call: Call, shape: Tile, by_keys: bool, scoring: Scoring
) -> tuple[list[Launch], Visits | None]:
    """The launch that lists which blocks to visit, and the lists."""
    if mask is None:
        return [], None
    q_len, k_len = call.query.shape[2], call.key.shape[2]
    own, other = triton.cdiv(q_len, shape.q), triton.cdiv(k_len, shape.k)
    own, other = (other, own) if by_keys else (own, other)
    batch, heads = mask.shape[:2]
    counts = torch.empty(batch, heads, own, dtype=torch.int32, device=mask.device)
    blocks = torch.empty(batch, heads, own, max(1, other), dtype=torch.int32, device=mask.device)
    one_unit = Mask(mask, *mask.expand(batch, heads, q_len, k_len).stride())
    arguments = {
        "mask": one_unit, "blocks": blocks, "counts": counts, "mask_heads": heads, "q_len": q_len, "k_len": k_len,
        "left": scoring.left, "right": scoring.right, "BLOCK_Q": shape.q, "BLOCK_K": shape.k, "BY_KEYS": by_keys,
    }  # fmt: skip
    of_batch, of_head = heads * own if batch > 1 else 0, own if heads > 1 else 0
    return [_launch(attention_visits, batch * heads * own, arguments)], Visits(blocks, counts, of_batch, of_head, max(1, other))


def plan_forward(call: Call, out: Tensor, lse: Tensor, statistics: Tensor) -> list[Launch]:
    """Plan launches that write out (batch, heads, rows, Dv), lse (batch, heads, rows) and statistics (the same, 2)."""
    (shape, tiles), sizes = _cut(FORWARD, call, key=call.key, value=call.value), _sizes(call)
    scoring = _scoring_of(call)
    mask_rows, mask = _mask(call.mask, call)
    launches, visits = _visits(mask, call, shape, False, scoring)
    arguments = {
        **_inputs(call), **tiles, "out": _rows(out), "lse": lse, "statistics": statistics, "mask": mask_rows,
        "visits": visits, "sizes": sizes, "scoring": scoring, "dropout": _dropout(call), "together": _together(call),
        "BLOCK_Q": shape.q, "BLOCK_K": shape.k, "PLAIN": is_plain(call), "FUSED": _is_fused(call),
        "SPECIALIZED": _is_specialized(call, shape, tiles), **_shared(call),
    }  # fmt: skip
    grid = sizes.heads * _blocks(sizes.q_len, sizes.cu_q, shape.q, sizes)
    return [*launches, _launch(attention_forward, grid, arguments, shape.warps, shape.stages)]


def plan_backward(
    call: Call, out: Tensor, statistics: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: tuple, delta: Tensor
) -> list[Launch]:
    """Plan launches that write delta (batch, heads, rows) and the gradients of query, key, value and, unless None, mask.

    grad_mask is contiguous, of the mask's shape.
    """
    sizes, shared = _sizes(call), _shared(call)
    grad_query, grad_key, grad_value, grad_mask = grads
    scoring = _scoring_of(call._replace(sinks=None))  # the sinks are in the statistics
    mask_rows, mask = _mask(call.mask, call)
    tensors = {**_inputs(call), "grad_out": _rows(grad_out), "statistics": statistics, "delta": delta, "mask": mask_rows}
    tensors |= {"sizes": sizes, "scoring": scoring, "dropout": _dropout(call), **shared}
    walk = {"together": _together(call), "PLAIN": is_plain(call)}

    batch, heads, q_len, _ = call.query.shape
    of_delta = {
        "out": _rows(out), "grad_out": _rows(grad_out), "grad_lse": grad_lse, "delta": delta, "heads": heads, "rows": q_len,
        "DV": shared["DV"], "VALUE_COLUMNS": shared["VALUE_COLUMNS"], "BLOCK_Q": ROWS,
    }  # fmt: skip
    launches = [_launch(attention_delta, batch * heads * triton.cdiv(q_len, ROWS), of_delta)]

    shape, tiles = _cut(GRAD_KEY_VALUE, call, query=call.query, grad_out=grad_out)
    listing, visits = _visits(mask, call, shape, True, scoring)
    blocks = {"visits": visits, "BLOCK_Q": shape.q, "BLOCK_K": shape.k}
    arguments = {**tensors, **tiles, **walk, **blocks, "grad_key": _rows(grad_key), "grad_value": _rows(grad_value)}
    grid = call.key.shape[1] * _blocks(sizes.k_len, sizes.cu_k, shape.k, sizes)
    launches += [*listing, _launch(attention_grad_key_value, grid, arguments, shape.warps, shape.stages)]

    shape, tiles = _cut(GRAD_QUERY, call, key=call.key, value=call.value)
    listing, visits = _visits(mask, call, shape, False, scoring)
    blocks = {"visits": visits, "BLOCK_Q": shape.q, "BLOCK_K": shape.k}
    arguments = {**tensors, **tiles, **walk, **blocks, "grad_query": _rows(grad_query)}
    grid = heads * _blocks(q_len, sizes.cu_q, shape.q, sizes)
    launches += [*listing, _launch(attention_grad_query, grid, arguments, shape.warps, shape.stages)]
    if grad_mask is not None:
        launches.append(_plan_grad_mask(mask, grad_mask, tensors, sizes, shape))
    return launches


def _plan_grad_mask(mask: Tensor, grad_mask: Tensor, tensors: dict, sizes: Sizes, shape: Tile) -> Launch:
    batch, heads, rows, columns = mask.shape
    per_query, per_key = rows == sizes.q_len, columns == sizes.k_len
    arguments = {
        **tensors, "grad_mask": grad_mask, "mask_batch": batch, "mask_heads": heads, "PER_QUERY": per_query, "PER_KEY": per_key,
        "BLOCK_Q": shape.q, "BLOCK_K": shape.k,
    }  # fmt: skip
    tiles = (triton.cdiv(rows, shape.q) if per_query else 1) * (triton.cdiv(columns, shape.k) if per_key else 1)
    return _launch(attention_grad_mask, batch * heads * tiles, arguments, shape.warps, shape.stages)


# ---- decoding ---------------------------------------------------------------------------------------------------------------

_FEWEST_OF_CHUNK, _MOST_CHUNKS = 256, 64


def plan_decoding(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    allow_tf32: bool,
    out: Tensor,
    lse: Tensor,
    arch: str | None = None,
) -> list[Launch]:
    """Launches that append key and value to the caches, then write out and lse, as in `plan_forward`.

    All have contiguous columns.
    """
    (batch, heads, q_len, head_dim), value_dim, device = query.shape, value_cache.shape[3], query.device
    keys, values = _cache(key_cache, block_table), _cache(value_cache, block_table)
    capacity = keys.rows * (1 if block_table is None else keys.most)
    kv_heads = key_cache.shape[1 if block_table is None else 2]
    added = 0 if key is None else key.shape[2]
    arch = arch or architecture(device)
    shape = tile(DECODE, arch, query.dtype, max(head_dim, value_dim))
    cache_seqlens = cache_seqlens.contiguous()
    launches = []
    for new, cache in ((key, keys), (value, values)) if added else ():
        arguments = {
            "rows": _rows(new), "cache": cache, "cache_seqlens": cache_seqlens, "kv_heads": kv_heads, "added": added,
            "DIM": new.shape[3], "COLUMNS": _columns(new.shape[3]), "BLOCK": shape.q,
        }  # fmt: skip
        launches.append(_launch(cache_append, batch * kv_heads * triton.cdiv(added, shape.q), arguments))

    chunk = max(_FEWEST_OF_CHUNK, shape.k, triton.next_power_of_2(triton.cdiv(capacity, _MOST_CHUNKS)))
    chunks = max(1, triton.cdiv(capacity, chunk))
    partial = torch.empty(batch, heads, q_len, chunks, value_dim, dtype=torch.float32, device=device)
    statistics = torch.empty(batch, heads, q_len, chunks, 2, dtype=torch.float32, device=device)
    group = heads // max(1, kv_heads)
    both = {
        "partial": partial, "statistics": statistics, "cache_seqlens": cache_seqlens,
        "sizes": Sizes(batch, heads, group, q_len, capacity, None, None),
        "scoring": _scoring(left, right, scale, softcap, alibi_slopes, sinks, False), "added": added, "capacity": capacity,
        "chunks": chunks, "DV": value_dim, "VALUE_COLUMNS": _columns(value_dim), "CHUNK": chunk,
    }  # fmt: skip
    of_tiles = {
        "query": _rows(query), "keys": keys, "values": values, "D": head_dim, "COLUMNS": _columns(head_dim),
        "BLOCK_Q": shape.q, "BLOCK_K": shape.k, "PRECISION": _precision(allow_tf32, query.dtype, arch),
    }  # fmt: skip
    grid = chunks * batch * kv_heads * triton.cdiv(group * q_len, shape.q)
    launches.append(_launch(attention_decode, grid, both | of_tiles, shape.warps, shape.stages))
    launches.append(_launch(attention_join, batch * heads * q_len, both | {"out": _rows(out), "lse": lse}))
    return launches


def _cache(cache: Tensor, block_table: Tensor | None) -> Cache:
    if block_table is None:
        return Cache(cache, *cache.stride()[:3], cache.shape[2], None, 1, 1)
    page, row, head, _ = cache.stride()
    return Cache(cache, page, head, row, cache.shape[1], block_table.contiguous(), cache.shape[0], block_table.shape[1])
