"""The launchers of attention's Triton kernels: they choose a call's kernels, arguments and tiles.

A call is planned before it runs. `plan_forward`, `plan_backward`, `plan_key_mass`, `plan_mass_mean`, `plan_jvp`,
`plan_jvp_backward` and `plan_kvcache` return launches, which are chosen once for calls that are alike. `run` starts these one
after the other, without waiting for the GPU. Ahead-of-time compilation and its tests read the same plans.
"""

import torch
import triton
from torch import Tensor

from ..common.launch import Launch, make_launch
from ..common.launch import run as run
from ..common.plans import Scratch, converted, planned_once
from ..common.plans import forget_plans as forget_plans
from .arguments import (
    Call,
    JvpResults,
    KVCacheCall,
    TangentTensors,
    choose_tile,
    columns_of,
    constants_of,
    describable,
    dropout_of,
    heads_per_group,
    inputs_of,
    is_fused,
    is_scale_only,
    is_specialized,
    make_scoring,
    mask_of,
    needs_reload,
    num_blocks,
    pointer_tile,
    precision_of,
    rows_of,
    scoring_of,
    sizes_of,
    tangents_of,
)
from .backward import attention_delta, attention_grad_key_value, attention_grad_query
from .device import BlockList, Mask, Scoring, Sizes
from .forward import attention_forward
from .jvp import attention_jvp
from .jvp_backward import attention_jvp_grad_key_value, attention_jvp_grad_query
from .key_mass import attention_key_mass, attention_mass_mean
from .kvcache import KVCache, attention_combine, attention_kvcache, kvcache_append
from .mask import attention_block_lists, attention_grad_mask
from .stats import RowStats, StatsGrads
from .tiles import (
    DELTA_ROWS,
    FORWARD,
    FORWARD_STATS,
    GRAD_KEY_VALUE,
    GRAD_KEY_VALUE_STATS,
    GRAD_MASK,
    GRAD_QUERY,
    GRAD_QUERY_STATS,
    JVP,
    JVP_GRAD_KEY_VALUE,
    JVP_GRAD_MASK,
    JVP_GRAD_QUERY,
    KEY_MASS,
    KVCACHE,
    MASS_MEAN,
    Tile,
    tile_for,
)
from .tiles import architecture as architecture

# ---- the passes -------------------------------------------------------------------------------------------------------------


def _plan_block_lists(
    mask: Tensor | None, call: Call, tile: Tile, by_keys: bool, scoring: Scoring
) -> tuple[list[Launch], BlockList | None]:
    """Plan the launch that lists which blocks a pass visits; return it and the lists.

    With places, a window lies elsewhere in each example, and each has lists of its own.
    """
    if mask is None:
        return [], None
    q_len, k_len = call.query.shape[2], call.key.shape[2]
    own, other = triton.cdiv(q_len, tile.q), triton.cdiv(k_len, tile.k)
    own, other = (other, own) if by_keys else (own, other)
    batch, heads = mask.shape[0] if call.places is None else call.query.shape[0], mask.shape[1]
    counts = Scratch(batch, heads, own, dtype=torch.int32)
    blocks = Scratch(batch, heads, own, max(1, other), dtype=torch.int32)
    own_mask = Mask(mask, *mask.expand(batch, heads, q_len, k_len).stride())
    arguments = {
        "mask": own_mask, "blocks": blocks, "counts": counts, "mask_heads": heads, "q_len": q_len, "k_len": k_len,
        "places": sizes_of(call).places, "left": scoring.left, "right": scoring.right,
        "BLOCK_Q": tile.q, "BLOCK_K": tile.k, "BY_KEYS": by_keys,
    }  # fmt: skip
    batch_stride, head_stride = heads * own if batch > 1 else 0, own if heads > 1 else 0
    lists = BlockList(blocks, counts, batch_stride, head_stride, max(1, other))
    return [make_launch(attention_block_lists, batch * heads * own, arguments)], lists


@planned_once
def plan_forward(call: Call, out: Tensor, lse: Tensor, statistics: Tensor, row_stats: RowStats | None = None) -> list[Launch]:
    """Plan launches that write out (batch, heads, rows, Dv), lse (batch, heads, rows), statistics (batch, heads, rows, 2).

    They write row_stats, too, unless None.
    """
    name, sizes, scoring = FORWARD if row_stats is None else FORWARD_STATS, sizes_of(call), scoring_of(call)
    query, key, value = describable(call, *call[:3])
    call = call._replace(query=query, key=key, value=value)
    tile, descriptors = choose_tile(name, call, key=call.key, value=call.value)
    mask_rows, mask = mask_of(call.mask, call)
    launches, block_lists = _plan_block_lists(mask, call, tile, False, scoring)
    arguments = {
        **inputs_of(call), **descriptors, "out": rows_of(out), "lse": lse, "statistics": statistics, "row_stats": row_stats,
        "mask": mask_rows, "block_lists": block_lists, "sizes": sizes, "scoring": scoring, "dropout": dropout_of(call),
        "heads_per_group": heads_per_group(call), "BLOCK_Q": tile.q, "BLOCK_K": tile.k,
        "SCALE_ONLY": is_scale_only(call), "FUSED": is_fused(call),
        "SPECIALIZED": is_specialized(call, tile, descriptors), **constants_of(call),
    }  # fmt: skip
    grid = sizes.heads * num_blocks(sizes.q_len, sizes.cu_q, tile.q, sizes)
    return [*launches, make_launch(attention_forward, grid, arguments, tile.warps, tile.stages)]


def _plan_delta(call: Call, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, delta: Tensor) -> Launch:
    """Plan the launch that writes delta = sum_d out grad_out - grad_lse."""
    batch, heads, q_len, value_dim = out.shape
    arguments = {
        "out": rows_of(out), "grad_out": rows_of(grad_out), "grad_lse": grad_lse, "delta": delta, "heads": heads, "rows": q_len,
        "DV": value_dim, "VALUE_COLUMNS": columns_of(value_dim), "BLOCK_Q": DELTA_ROWS,
    }  # fmt: skip
    return make_launch(attention_delta, batch * heads * triton.cdiv(q_len, DELTA_ROWS), arguments)


@planned_once
def plan_backward(
    call: Call,
    out: Tensor,
    statistics: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: tuple,
    delta: Tensor,
    stats: StatsGrads | None = None,
) -> list[Launch]:
    """Plan launches that write delta (batch, heads, rows) and the gradients of query, key, value and, unless None, mask.

    grad_mask is contiguous, of the mask's shape. With stats, grad_lse holds their part of delta, negated (stats.py).
    """
    for_key_value, for_query = (GRAD_KEY_VALUE, GRAD_QUERY) if stats is None else (GRAD_KEY_VALUE_STATS, GRAD_QUERY_STATS)
    query, key, value, grad_out = describable(call, *call[:3], grad_out)
    call = call._replace(query=query, key=key, value=value)
    sizes, constants = sizes_of(call), constants_of(call)
    grad_query, grad_key, grad_value, grad_mask = grads
    scoring = scoring_of(call._replace(sinks=None))  # The statistics include the sinks.
    mask_rows, mask = mask_of(call.mask, call)
    shared = {**inputs_of(call), "grad_out": rows_of(grad_out), "statistics": statistics, "delta": delta, "stats": stats}
    shared |= {"mask": mask_rows, "sizes": sizes, "scoring": scoring, "dropout": dropout_of(call), **constants}
    loop = {"heads_per_group": heads_per_group(call), "SCALE_ONLY": is_scale_only(call)}

    launches = [_plan_delta(call, out, grad_out, grad_lse, delta)]
    tile, descriptors = choose_tile(for_key_value, call, query=call.query, grad_out=grad_out)
    listing, block_lists = _plan_block_lists(mask, call, tile, True, scoring)
    blocks = {"block_lists": block_lists, "BLOCK_Q": tile.q, "BLOCK_K": tile.k}
    arguments = {**shared, **descriptors, **loop, **blocks, "grad_key": rows_of(grad_key), "grad_value": rows_of(grad_value)}
    grid = call.key.shape[1] * num_blocks(sizes.k_len, sizes.cu_k, tile.k, sizes)
    launches += [*listing, make_launch(attention_grad_key_value, grid, arguments, tile.warps, tile.stages)]

    tile, descriptors = choose_tile(for_query, call, key=call.key, value=call.value)
    listing, block_lists = _plan_block_lists(mask, call, tile, False, scoring)
    blocks = {"block_lists": block_lists, "BLOCK_Q": tile.q, "BLOCK_K": tile.k}
    arguments = {**shared, **descriptors, **loop, **blocks, "grad_query": rows_of(grad_query)}
    grid = sizes.heads * num_blocks(sizes.q_len, sizes.cu_q, tile.q, sizes)
    launches += [*listing, make_launch(attention_grad_query, grid, arguments, tile.warps, tile.stages)]
    if grad_mask is not None:
        shared |= dict.fromkeys(("tangents", "lse_tangent", "tangent_delta"))
        launches.append(_plan_grad_mask(mask, grad_mask, shared, sizes, pointer_tile(GRAD_MASK, call)))
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
    return make_launch(attention_grad_mask, batch * heads * tiles, arguments, tile.warps, tile.stages)


# ---- the passes for the mass of the keys ------------------------------------------------------------------------------------


@planned_once
def plan_key_mass(call: Call, statistics: Tensor, key_mass: Tensor) -> list[Launch]:
    """Plan launches that write key_mass (batch, heads, keys) from the statistics that `plan_forward` writes."""
    return _plan_weights(KEY_MASS, attention_key_mass, call, statistics, key_mass=key_mass)


@planned_once
def plan_mass_mean(call: Call, statistics: Tensor, grad_key_mass: Tensor, mass_mean: Tensor) -> list[Launch]:
    """Plan launches that write mass_mean (batch, heads, rows), the means of grad_key_mass weighted with the rows' weights."""
    return _plan_weights(MASS_MEAN, attention_mass_mean, call, statistics, grad_key_mass=grad_key_mass, mass_mean=mass_mean)


def _plan_weights(name: str, kernel, call: Call, statistics: Tensor, **own: Tensor) -> list[Launch]:
    """Plan the launches of a pass that computes the weights again and reads no values."""
    tile, sizes, constants = pointer_tile(name, call), sizes_of(call), constants_of(call)
    scoring = scoring_of(call._replace(sinks=None))  # The statistics include the sinks.
    mask_rows, mask = mask_of(call.mask, call)
    by_keys = name == KEY_MASS
    launches, block_lists = _plan_block_lists(mask, call, tile, by_keys, scoring)
    arguments = {
        "query": rows_of(call.query), "key": rows_of(call.key), "statistics": statistics, **own, "mask": mask_rows,
        "block_lists": block_lists, "sizes": sizes, "scoring": scoring, "heads_per_group": heads_per_group(call),
        "BLOCK_Q": tile.q, "BLOCK_K": tile.k, "SCALE_ONLY": is_scale_only(call),
        **{constant: constants[constant] for constant in ("D", "COLUMNS", "PRECISION")},
    }  # fmt: skip
    length, cu_seqlens, block = (sizes.k_len, sizes.cu_k, tile.k) if by_keys else (sizes.q_len, sizes.cu_q, tile.q)
    grid = sizes.heads * num_blocks(length, cu_seqlens, block, sizes)
    return [*launches, make_launch(kernel, grid, arguments, tile.warps, tile.stages)]


# ---- the passes with tangents -----------------------------------------------------------------------------------------------


@planned_once
def plan_jvp(call: Call, tangents: TangentTensors, results: JvpResults) -> list[Launch]:
    """Plan launches that write what those of `plan_forward` do, and the tangents of out and lse."""
    tile, sizes, scoring = pointer_tile(JVP, call), sizes_of(call), scoring_of(call)
    mask_rows, mask = mask_of(call.mask, call)
    launches, block_lists = _plan_block_lists(mask, call, tile, False, scoring)
    arguments = {
        **inputs_of(call), "tangents": tangents_of(tangents, call), "out": rows_of(results.out), "lse": results.lse,
        "statistics": results.statistics, "out_tangent": rows_of(results.out_tangent), "lse_tangent": results.lse_tangent,
        "mask": mask_rows, "block_lists": block_lists, "sizes": sizes, "scoring": scoring, "dropout": dropout_of(call),
        "heads_per_group": heads_per_group(call),
        "BLOCK_Q": tile.q, "BLOCK_K": tile.k, "SCALE_ONLY": is_scale_only(call), **constants_of(call),
    }  # fmt: skip
    grid = sizes.heads * num_blocks(sizes.q_len, sizes.cu_q, tile.q, sizes)
    return [*launches, make_launch(attention_jvp, grid, arguments, tile.warps, tile.stages)]


@planned_once
def plan_jvp_backward(
    call: Call,
    tangents: TangentTensors,
    results: JvpResults,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: tuple,
    deltas: tuple[Tensor, Tensor],
) -> list[Launch]:
    """Plan launches that write the gradients that <grad_out, out_tangent> + <grad_lse, lse_tangent> has for the inputs.

    They are those of query, key, value and, unless None, mask, laid out as by `plan_backward`. Its delta, and the same of
    out_tangent, are written to `deltas`.
    """
    sizes, (delta, tangent_delta), (grad_query, grad_key, grad_value, grad_mask) = sizes_of(call), deltas, grads
    scoring = scoring_of(call._replace(sinks=None))  # The statistics include the sinks.
    mask_rows, mask = mask_of(call.mask, call)
    shared = {
        **inputs_of(call), "tangents": tangents_of(tangents, call), "grad_out": rows_of(grad_out),
        "statistics": results.statistics, "delta": delta, "lse_tangent": results.lse_tangent, "tangent_delta": tangent_delta,
        "mask": mask_rows, "sizes": sizes, "scoring": scoring, "dropout": dropout_of(call), **constants_of(call),
    }  # fmt: skip
    loop = {"heads_per_group": heads_per_group(call), "SCALE_ONLY": is_scale_only(call)}
    launches = [
        _plan_delta(call, results.out, grad_out, grad_lse, delta),
        _plan_delta(call, results.out_tangent, grad_out, None, tangent_delta),
    ]

    tile = pointer_tile(JVP_GRAD_KEY_VALUE, call)
    listing, block_lists = _plan_block_lists(mask, call, tile, True, scoring)
    blocks = {"block_lists": block_lists, "BLOCK_Q": tile.q, "BLOCK_K": tile.k}
    arguments = {**shared, **loop, **blocks, "grad_key": rows_of(grad_key), "grad_value": rows_of(grad_value)}
    arguments["RELOAD"] = needs_reload(call)
    grid = call.key.shape[1] * num_blocks(sizes.k_len, sizes.cu_k, tile.k, sizes)
    launches += [*listing, make_launch(attention_jvp_grad_key_value, grid, arguments, tile.warps, tile.stages)]

    tile = pointer_tile(JVP_GRAD_QUERY, call)
    listing, block_lists = _plan_block_lists(mask, call, tile, False, scoring)
    blocks = {"block_lists": block_lists, "BLOCK_Q": tile.q, "BLOCK_K": tile.k}
    arguments = {**shared, **loop, **blocks, "grad_query": rows_of(grad_query)}
    grid = sizes.heads * num_blocks(sizes.q_len, sizes.cu_q, tile.q, sizes)
    launches += [*listing, make_launch(attention_jvp_grad_query, grid, arguments, tile.warps, tile.stages)]
    if grad_mask is not None:
        launches.append(_plan_grad_mask(mask, grad_mask, shared | {"stats": None}, sizes, pointer_tile(JVP_GRAD_MASK, call)))
    return launches


# ---- attention with a KV cache ----------------------------------------------------------------------------------------------

_MIN_SPLIT, _MAX_SPLITS = 256, 64  # The fewest keys of a split, and the most splits.


@planned_once
def plan_kvcache(call: KVCacheCall, out: Tensor, lse: Tensor) -> list[Launch]:
    """Plan launches that append key and value to the caches, then write out and lse as `plan_forward` does."""
    (
        query, key_cache, value_cache, cache_seqlens, key, value, block_table, sinks, alibi_slopes,
        left, right, scale, softcap, allow_tf32, arch,
    ) = call  # fmt: skip
    cache_seqlens, block_table = (converted(tensor, Tensor.contiguous) for tensor in (cache_seqlens, block_table))
    (batch, heads, q_len, head_dim), value_dim = query.shape, value_cache.shape[3]
    keys, values = _kvcache(key_cache, block_table), _kvcache(value_cache, block_table)
    capacity = keys.rows * (1 if block_table is None else keys.max_pages)
    kv_heads = key_cache.shape[1 if block_table is None else 2]
    added = 0 if key is None else key.shape[2]
    tile = tile_for(KVCACHE, arch, query.dtype, max(head_dim, value_dim))
    columns = {"D": head_dim, "DV": value_dim, "COLUMNS": columns_of(head_dim), "VALUE_COLUMNS": columns_of(value_dim)}
    launches = []
    if added:
        arguments = {
            "key": rows_of(key), "value": rows_of(value), "keys": keys, "values": values, "cache_seqlens": cache_seqlens,
            "kv_heads": kv_heads, "added": added, **columns, "BLOCK": tile.q,
        }  # fmt: skip
        launches.append(make_launch(kvcache_append, batch * kv_heads * triton.cdiv(added, tile.q), arguments))

    split = max(_MIN_SPLIT, tile.k, triton.next_power_of_2(triton.cdiv(capacity, _MAX_SPLITS)))
    num_splits = max(1, triton.cdiv(capacity, split))
    partial = Scratch(batch, heads, q_len, num_splits, value_dim, dtype=torch.float32)
    statistics = Scratch(batch, heads, q_len, num_splits, 2, dtype=torch.float32)
    group = heads // max(1, kv_heads)
    shared = {
        "partial": partial, "statistics": statistics, "cache_seqlens": cache_seqlens,
        "sizes": Sizes(batch, heads, group, q_len, capacity, None, None, None),
        "scoring": make_scoring(left, right, scale, softcap, alibi_slopes, sinks, False), "added": added, "capacity": capacity,
        "num_splits": num_splits, "SPLIT": split,
    }  # fmt: skip
    arguments = {
        **shared, **columns, "query": rows_of(query), "keys": keys, "values": values, "BLOCK_Q": tile.q, "BLOCK_K": tile.k,
        "PAGE": None if block_table is None else max(1, keys.rows), "PRECISION": precision_of(allow_tf32, query.dtype, arch),
    }  # fmt: skip
    grid = num_splits * batch * kv_heads * triton.cdiv(group * q_len, tile.q)
    launches.append(make_launch(attention_kvcache, grid, arguments, tile.warps, tile.stages))
    arguments = {**shared, "out": rows_of(out), "lse": lse, "DV": value_dim, "VALUE_COLUMNS": columns["VALUE_COLUMNS"]}
    launches.append(make_launch(attention_combine, batch * heads * q_len, arguments))
    return launches


def _kvcache(cache: Tensor, block_table: Tensor | None) -> KVCache:
    """Return a cache, contiguous or paged, with its strides."""
    if block_table is None:
        return KVCache(*rows_of(cache), cache.shape[2], None, 1, 1)
    span = sum((length - 1) * stride for length, stride in zip(cache.shape, cache.stride()))
    rows = rows_of(cache.transpose(1, 2))._replace(data=cache, wide=True if span >= 1 << 31 else None)
    return KVCache(*rows, cache.shape[1], block_table, cache.shape[0], block_table.shape[1])
