"""Run attention on DTensors that are sharded along the batch, the heads or the sequence, with the whole call's dropout."""

import math

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...ops.attention.call import KVCACHE_TENSORS, TENSORS, AttentionCall, KVCacheCall, Place
from ...ops.attention.stats import AttentionStats
from ..attention import attention as spread_attention
from .plan import Axes, Plan, agreed_seed, mesh_of, sharded_dim

BATCH, HEADS, SEQUENCE = "batch", "heads", "sequence"
_ROWS = 2  # the dimension of queries and keys that the sequence lies along


class Layout:
    """Hold how a call of attention is spread, and the axes of its tensors.

    Heads of keys and values are sharded with those of the queries if every rank then has the ones that its queries need. If
    not, every rank gets all of them, and cuts out those that it needs.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        query: Tensor,
        keys: tuple[Tensor, ...],
        batch: str | None = BATCH,
        head_dim_of_keys: int = 1,
        may_ring: bool = False,
    ) -> None:
        self.query_heads, self.key_heads = query.shape[1], keys[0].shape[head_dim_of_keys]
        self.of_query = (batch, HEADS, SEQUENCE, None)
        of_keys = (batch, HEADS, SEQUENCE, None) if head_dim_of_keys == 1 else (None, None, HEADS, None)
        self.plan = Plan.choose(mesh, [(query, self.of_query), *((key, of_keys) for key in keys)])
        may_ring = may_ring and self.plan.axes.count(SEQUENCE) == 1
        instead = tuple(_instead(axis, i, query, keys, may_ring) for i, axis in enumerate(self.plan.axes))
        self.plan = self.plan._replace(axes=instead)
        self.heads = self.plan.mine(HEADS, self.query_heads)
        self.head_dim_of_keys = head_dim_of_keys
        # Equal heads are cut alike, and so are those that both can be shared out evenly.
        parts = math.prod(self.plan.counts(HEADS))
        self.keys_follow = self.key_heads == self.query_heads or self.key_heads % parts == 0
        self.of_keys = tuple(axis if axis != HEADS or self.keys_follow else None for axis in of_keys)
        self.sizes = {BATCH: query.shape[0], HEADS: self.query_heads, SEQUENCE: query.shape[_ROWS]}

    def cut(self, key: Tensor | None) -> Tensor | None:
        """Return the heads of this rank's keys or values that its queries need, in equal groups."""
        if key is None or self.keys_follow:
            return key
        dim, heads, group = self.head_dim_of_keys, self.heads, self.query_heads // self.key_heads
        first, last = heads.start // group, -(-heads.stop // group)
        if not len(heads):
            return key.narrow(dim, 0, 0)
        if last - first == 1 or (heads.start % group == 0 and heads.stop % group == 0):
            return key.narrow(dim, first, last - first)
        return key.index_select(dim, torch.tensor([head // group for head in heads], device=key.device))

    def local_keys(self, key: Tensor | None) -> Tensor | None:
        """Return the keys or values that this rank's queries need."""
        return self.cut(self.plan.local(key, self.of_keys))

    def of_mask(self, mask: Tensor | None) -> Axes:
        """Return the axes of a mask that broadcasts to (B, Hq, Lq, Lk)."""
        if mask is None or mask.dim() == 0:
            return ()
        return tuple(None if n == 1 else axis for n, axis in zip(mask.shape, self.of_query[-mask.dim() :]))

    def of_slopes(self, slopes: Tensor | None) -> Axes:
        """Return the axes of slopes (Hq,) or (B, Hq)."""
        return (HEADS,) if slopes is None or slopes.dim() == 1 else (self.of_query[0], HEADS)


def _instead(axis: str | None, mesh_dim: int, query: Tensor, keys: tuple[Tensor, ...], may_ring: bool) -> str | None:
    """Return the axis that a dimension of the mesh shards in the call, where it shards the sequence of what is given.

    Queries exchange it for heads, as the method "all-to-all" of `fastlm.distributed.attention` does. Where the heads do not
    divide by the ranks, they keep it, if the keys have it, too, and the method "ring" may run. If not, each rank gets it all.
    """
    if axis != SEQUENCE or sharded_dim(query, mesh_dim) != _ROWS:
        return None if axis == SEQUENCE else axis
    if query.shape[1] % query.device_mesh.size(mesh_dim) == 0:
        return HEADS
    return SEQUENCE if may_ring and all(sharded_dim(key, mesh_dim) == _ROWS for key in keys) else None


def run_attention(
    run, op: str, call: AttentionCall, seed: int | Tensor | None, backend: str | None, wanted: frozenset[str]
) -> tuple[DTensor, DTensor, AttentionStats | None]:
    """Run a call of DTensors, without its seed; ``run(op, call, seed, backend, wanted)`` runs one of local tensors.

    Return out, lse and statistics. Where the queries' sequence is sharded, so are out and what has a number for each query.
    """
    query, key, value, mask, sinks, slopes, _, cu_seqlens_q, cu_seqlens_k, _ = call[:TENSORS]
    packed = cu_seqlens_q is not None
    mesh, batch = mesh_of(call[:TENSORS]), None if packed else BATCH
    layout = Layout(mesh, query, (key, value), batch, may_ring=_may_ring(call, wanted, mesh))
    plan = layout.plan
    local = call._replace(
        query=plan.local(query, layout.of_query),
        key=layout.local_keys(key),
        value=layout.local_keys(value),
        mask=plan.local(mask, layout.of_mask(mask)),
        sinks=plan.local(sinks, (HEADS,)),
        alibi_slopes=plan.local(slopes, layout.of_slopes(slopes)),
        cu_seqlens_q=plan.local(cu_seqlens_q, (None,)),
        cu_seqlens_k=plan.local(cu_seqlens_k, (None,)),
    )
    if call.dropout_p:
        seed = agreed_seed(plan.mesh, local.query) if seed is None else seed
        if isinstance(seed, Tensor):
            seed = plan.local(seed, layout.of_query[: seed.dim()])
        local = _placed(local, layout, seed)
    if SEQUENCE in plan.axes:
        out, lse, stats = *_ring(local, plan, seed, backend), None
    else:
        out, lse, stats = run(op, local, seed, backend, wanted)
    return (
        _as_query(query, plan.whole(out, layout.of_query, layout.sizes)),
        _as_query(query, plan.whole(lse, layout.of_query[:3], layout.sizes)),
        None if stats is None else _whole_stats(query, layout, stats),
    )


def _may_ring(call: AttentionCall, wanted: frozenset[str], mesh: DeviceMesh) -> bool:
    """Tell whether `_ring` has all that a call asks for. It counts the noise of dropout as if it had the whole batch."""
    has_noise = call.dropout_p and mesh.ndim > 1
    is_ahead = call.right is not None and call.right < 0  # as in torch's attention of fewer queries than keys
    packed = call.cu_seqlens_q is not None
    return not (has_noise or is_ahead or wanted or packed or torch.compiler.is_compiling())


def _ring(local: AttentionCall, plan: Plan, seed: int | Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return this rank's (out, lse) of a sequence that is spread over the ranks of a dimension of the mesh."""
    return spread_attention(
        *local[:3],
        group=plan.mesh.get_group(plan.axes.index(SEQUENCE)),
        method="ring",
        mask=local.mask,
        window=(local.left, local.right),
        scale=local.scale,
        softcap=local.softcap or None,
        alibi_slopes=local.alibi_slopes,
        sinks=local.sinks,
        dropout_p=local.dropout_p,
        seed=seed if local.dropout_p else None,
        return_lse=True,
        backend=backend,
    )


def _whole_stats(query: Tensor, layout: Layout, stats: AttentionStats) -> AttentionStats:
    """Return the statistics as DTensors; those of keys (B, Hq, Lk) are whole along the sequence."""
    *of_queries, key_mass = (
        None if tensor is None else layout.plan.whole(tensor, layout.of_query[:3], layout.sizes) for tensor in stats
    )
    return AttentionStats(*(None if tensor is None else _as_query(query, tensor) for tensor in of_queries), key_mass)


def _as_query(query: Tensor, result: DTensor) -> DTensor:
    """Shard a result along the sequence where the query is."""
    placements = [
        Shard(_ROWS) if sharded_dim(query, mesh_dim) == _ROWS else placement
        for mesh_dim, placement in enumerate(result.placements)
    ]
    return result.redistribute(result.device_mesh, placements) if placements != list(result.placements) else result


def _placed(local: AttentionCall, layout: Layout, seed: int | Tensor) -> AttentionCall:
    """Give a local call with dropout its place in the whole call, which the counters of its noise count from."""
    one_stream, axes = not isinstance(seed, Tensor) or seed.dim() == 0, layout.plan.axes
    if HEADS not in axes and (BATCH not in axes or not one_stream):
        return local  # Its noise is the whole call's as it is.
    device = local.query.device
    if local.cu_seqlens_q is None:
        batch = layout.plan.mine(BATCH, layout.sizes[BATCH])
        position = torch.full((len(batch),), local.key.shape[2] - local.query.shape[2], device=device)
    else:
        batch = range(local.cu_seqlens_q.shape[0] - 1)
        position = local.cu_seqlens_k.diff() - local.cu_seqlens_q.diff()
    example = torch.arange(batch.start, batch.stop, device=device) * one_stream
    zero = torch.zeros_like(example)
    stream = example * layout.query_heads + layout.heads.start
    return local._replace(places=torch.stack(Place(position.long(), zero, zero, stream), dim=1))


def run_kvcache(run, call: KVCacheCall) -> tuple[DTensor, DTensor]:
    """Run a call of DTensors; ``run(call)`` runs one of local tensors, and appends to this rank's part of the caches."""
    paged = call.block_table is not None
    mesh = mesh_of(call[:KVCACHE_TENSORS])
    layout = Layout(mesh, call.query, (call.key_cache, call.value_cache), head_dim_of_keys=2 if paged else 1)
    plan = layout.plan
    if call.key is not None:
        _check_in_place(layout, call)
    of_rows = (BATCH, *layout.of_keys[1:]) if not paged else (BATCH, layout.of_keys[2], None, None)
    local = call._replace(
        query=plan.local(call.query, layout.of_query),
        key_cache=layout.local_keys(call.key_cache),
        value_cache=layout.local_keys(call.value_cache),
        cache_seqlens=plan.local(call.cache_seqlens, (BATCH,)),
        key=plan.local(call.key, of_rows),
        value=plan.local(call.value, of_rows),
        block_table=plan.local(call.block_table, (BATCH, None)),
        sinks=plan.local(call.sinks, (HEADS,)),
        alibi_slopes=plan.local(call.alibi_slopes, layout.of_slopes(call.alibi_slopes)),
    )
    out, lse = run(local)
    return plan.whole(out, layout.of_query, layout.sizes), plan.whole(lse, layout.of_query[:3], layout.sizes)


def _check_in_place(layout: Layout, call: KVCacheCall) -> None:
    """Refuse to append to caches that are not sharded as the call is: rows would go to a copy, or be missing on other ranks."""
    expected = layout.plan.placements(layout.of_keys)
    for name, cache in (("key_cache", call.key_cache), ("value_cache", call.value_cache)):
        fits = isinstance(cache, DTensor) and cache.placements == expected and layout.keys_follow
        if not fits or (call.block_table is not None and BATCH in layout.plan.axes):
            given = cache.placements if isinstance(cache, DTensor) else "a plain tensor"
            raise ValueError(f"{name} is written in place: it must be sharded as the queries are, {expected}; got {given}")


def run_weights(
    run,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    rows: Tensor | None,
) -> tuple[DTensor, ...]:
    """Run `fastlm.attention_weights` or `fastlm.top_keys` on DTensors.

    ``run`` takes the same tensors, local ones, and returns results (B, Hq, queries, columns).
    """
    layout = Layout(mesh_of((query, key, lse, mask, sinks, slopes, rows)), query, (key,))
    plan = layout.plan
    results = run(
        plan.local(query, layout.of_query),
        layout.local_keys(key),
        plan.local(lse, layout.of_query[:3]),
        plan.local(mask, layout.of_mask(mask)),
        plan.local(sinks, (HEADS,)),
        plan.local(slopes, layout.of_slopes(slopes)),
        plan.local(rows, (None,)),
    )
    return tuple(plan.whole(result, layout.of_query, layout.sizes) for result in results)
