"""Compute attention over a sequence that is spread over ranks, by keys and values that go round ("ring attention").

Each rank attends with its queries to the keys of one rank after the other, and joins the results by their log-sum-exps
(ops/attention/parts.py). At step s it gets the keys and values of rank r - s from there, while it computes step s - 1, and
their gradients go back there. Steps whose keys no query of a rank sees are left out.

A causal limit would give the last ranks most of the work. There the queries are exchanged: of 2n pieces, rank r computes those
of numbers r and 2n - 1 - r ("zigzag"), and out moves back. Keys and values stay where they are.
Sources: Liu et al., "Ring Attention with Blockwise Transformers" (2023); Brandon et al., "Striped Attention" (2023).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..backend import select
from ..ops.attention.call import AttentionCall
from ..ops.attention.parts import PASSES, PartPasses, first, join
from ..ops.torch_op import differentiable_once, reference_only
from .exchange import Range, move_rows
from .ranks import Ranks
from .sequences import Sequences, Shards, align_to_counters, part_of, split, visible

# ---- who computes what ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Hold which queries each rank computes, and whose keys it needs."""

    shards: Shards
    sequences: Sequences
    passes: PartPasses
    queries: list[list[Range]]  # of each rank: the pieces that it computes
    keys: list[Range]  # of each rank
    sees: list[list[bool]]  # [piece][rank]: whether this rank's piece of queries sees that rank's keys
    seen_by: list[bool]  # [rank]: whether that rank sees this rank's keys

    def moves_queries(self) -> bool:
        """Tell whether a rank computes other rows than its own."""
        return [[rows] for rows in self.shards.query_ranges()] != self.queries

    def moves_keys(self) -> bool:
        """Tell whether the bounds between the ranks' keys move."""
        return self.shards.key_ranges() != self.keys


def make_plan(shards: Shards, call: AttentionCall, passes: PartPasses) -> Plan:
    """Divide the work of a call among the ranks."""
    ranks, sequences = shards.ranks, Sequences.of(call, shards)
    queries, keys = [[rows] for rows in shards.query_ranges()], shards.key_ranges()
    left, right = call.left, call.right
    # Under a window of a share w of the keys, the mean rank has 1 - w / 2 of the work of the last.
    if right is not None and (left is None or left + right > sum(shards.keys) // 4):
        pieces = split(sum(shards.queries), 2 * ranks.size)
        queries = [[pieces[r], pieces[-1 - r]] for r in range(ranks.size)]
    if call.dropout_p:
        keys = align_to_counters(sequences, keys)
    sees = visible(sequences, queries[ranks.rank], keys, left, right)
    flat = [rows for of_rank in queries for rows in of_rank]
    seen = iter(visible(sequences, flat, [keys[ranks.rank]], left, right))
    seen_by = [any([next(seen)[0] for _ in of_rank]) for of_rank in queries]
    return Plan(shards, sequences, passes, queries, keys, sees, seen_by)


def attend(shards: Shards, call: AttentionCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return out and lse of this rank's rows, from the call of its rows."""
    barred = reference_only(*call[:5])
    passes = select("attention", PASSES, (call.query, call.value), backend, barred)
    plan = make_plan(shards, call, passes)
    query, key, value, mask, sinks, *rest = call
    if plan.moves_keys():
        have, want = ([[rows] for rows in ranges] for ranges in (shards.key_ranges(), plan.keys))
        key, value = (move_rows(shards.ranks, tensor, have, want) for tensor in (key, value))
    if plan.moves_queries():
        have = [[rows] for rows in shards.query_ranges()]
        query = move_rows(shards.ranks, query, have, plan.queries)
        if shards.mask_has_rows:
            mask = _move_mask(shards.ranks, mask, have, plan.queries)
        out, lse = _Ring.apply(plan, rest, query, key, value, mask, sinks)
        out = move_rows(shards.ranks, out, plan.queries, have)
        return out, move_rows(shards.ranks, lse[..., None], plan.queries, have).squeeze(3)
    return _Ring.apply(plan, rest, query, key, value, mask, sinks)


def _move_mask(ranks: Ranks, mask: Tensor, have: list[list[Range]], want: list[list[Range]]) -> Tensor:
    if mask.dtype == torch.bool:
        return move_rows(ranks, mask.view(torch.uint8), have, want).view(torch.bool)
    return move_rows(ranks, mask, have, want)


# ---- one part: a piece of this rank's queries with one rank's keys ----------------------------------------------------------


def _pieces(plan: Plan) -> list[slice]:
    """Return where the pieces of queries lie in this rank's tensors."""
    found, at = [], 0
    for begin, end in plan.queries[plan.shards.ranks.rank]:
        found.append(slice(at, at + end - begin))
        at += end - begin
    return found


def _mask_of(plan: Plan, mask: Tensor | None, rows: slice, source: int) -> Tensor | None:
    """Return the view of a mask (or of its gradient) of some of the rows, and of the keys of a rank."""
    if mask is None:
        return None
    columns = slice(*plan.keys[source]) if mask.shape[3] > 1 else slice(None)
    return mask[:, :, rows if plan.shards.mask_has_rows else slice(None), columns]


def _part_call(plan: Plan, rest: list, tensors: tuple, piece: int, rows: slice, source: int) -> AttentionCall:
    """Return the call of a piece of queries with the keys of a rank. A sink counts with the rank's own keys."""
    query, key, value, mask, sinks = tensors
    rank = plan.shards.ranks.rank
    part = part_of(plan.sequences, plan.queries[rank][piece], plan.keys[source])
    call = AttentionCall(query[:, :, rows], key, value, _mask_of(plan, mask, rows, source), sinks, *rest)
    device = query.device
    return call._replace(
        sinks=sinks if source == rank else None,
        cu_seqlens_q=None if part.cu_seqlens_q is None else part.cu_seqlens_q.to(device),
        cu_seqlens_k=None if part.cu_seqlens_k is None else part.cu_seqlens_k.to(device),
        places=part.places.to(device),
    )


# ---- keys and values on their way -------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]  # of keys and of values


def _transfer(ranks: Ranks, target: int, sent: Sequence[Tensor], source: int, received: Sequence[Tensor]) -> list[dist.Work]:
    """Begin to send tensors to one rank, and to receive some from another."""

    def operations(kind: Callable, tensors: Sequence[Tensor], peer: int) -> list[dist.P2POp]:
        return [dist.P2POp(kind, tensor, group=ranks.group, group_peer=peer) for tensor in tensors if tensor.numel()]

    both = operations(dist.isend, sent, target) + operations(dist.irecv, received, source)
    return dist.batch_isend_irecv(both) if both else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _circulate(plan: Plan, key: Tensor, value: Tensor) -> Iterator[tuple[int, Pair | None]]:
    """Yield (rank, (key, value)) of this rank, and then of the others; None for those whose keys this rank does not see.

    While the caller computes with one, the next are on their way.
    """
    ranks = plan.shards.ranks
    own = key.contiguous(), value.contiguous()

    def start(step: int) -> tuple[list[dist.Work], Pair | None]:
        source, target = (ranks.rank - step) % ranks.size, (ranks.rank + step) % ranks.size
        received = None
        if any(of_piece[source] for of_piece in plan.sees):
            begin, end = plan.keys[source]
            received = tuple(t.new_empty(*t.shape[:2], end - begin, t.shape[3]) for t in own)
        return _transfer(ranks, target, own if plan.seen_by[target] else (), source, received or ()), received

    coming = start(1)
    yield ranks.rank, own
    for step in range(1, ranks.size):
        works, received = coming
        if step + 1 < ranks.size:
            coming = start(step + 1)
        _wait(works)
        yield (ranks.rank - step) % ranks.size, received


class _Homecoming:
    """Send the gradients of other ranks' keys and values home, and add up those of this rank's own, in the order of steps."""

    def __init__(self, plan: Plan, own: Pair):
        self.plan, self.sums = plan, own
        self.under_way: list[tuple[list[dist.Work], Sequence[Tensor], Sequence[Tensor]]] = []

    def exchange(self, source: int, grads: Pair | None, like: Pair) -> None:
        """Send home the gradients of the keys and values of a rank, and receive what the rank as far on the other side saw."""
        ranks = self.plan.shards.ranks
        seer = (2 * ranks.rank - source) % ranks.size
        sent = () if grads is None else tuple(grad.to(tensor.dtype).contiguous() for grad, tensor in zip(grads, like))
        received = ()
        if self.plan.seen_by[seer]:
            received = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)
        self.under_way.append((_transfer(ranks, source, sent, seer, received), sent, received))
        if len(self.under_way) > 1:
            self._add()

    def _add(self) -> None:
        works, _, received = self.under_way.pop(0)  # What is sent must live until now.
        _wait(works)
        for total, part in zip(self.sums, received):
            total.add_(part)

    def finish(self) -> Pair:
        """Return the sums."""
        while self.under_way:
            self._add()
        return self.sums


# ---- all steps --------------------------------------------------------------------------------------------------------------


class _Ring(Function):
    """Attend to the keys of all ranks. The tensors are this rank's, its queries in the pieces that it computes."""

    @staticmethod
    def forward(ctx, plan: Plan, rest: list, *tensors: Tensor | None):
        query, key, value, mask, sinks = tensors
        rank, joined = plan.shards.ranks.rank, {}
        for source, pair in _circulate(plan, key, value):
            for i, rows in enumerate(_pieces(plan)):
                if source == rank or plan.sees[i][source]:
                    call = _part_call(plan, rest, (query, *pair, mask, sinks), i, rows, source)
                    result = plan.passes.forward(call)
                    joined[i] = join(joined[i], *result, plan.passes.unit(call)) if i in joined else first(*result)
        out, lse, statistics = (torch.cat(parts, dim=2) for parts in zip(*joined.values()))
        out = out.to(query.dtype)
        ctx.save_for_backward(*tensors, out, lse, statistics)
        ctx.plan, ctx.rest = plan, rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
        *tensors, out, lse, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        grads = _gradients(ctx.plan, ctx.rest, tuple(tensors), (grad_out, grad_lse, out, lse, statistics), needed[3:])
        return None, None, *(grad.to(tensor.dtype) if need else None for need, grad, tensor in zip(needed, grads, tensors))


def _gradients(plan: Plan, rest: list, tensors: tuple, of_rows: tuple, needed: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, mask and sinks, in float32 or better.

    ``of_rows`` are grad_out, grad_lse, out, lse and statistics; ``needed`` says whether mask and sinks have gradients.
    """
    query, key, value, mask, sinks = tensors
    rank = plan.shards.ranks.rank
    grad_query, grad_mask, grad_sinks = _zeros(query), *(_zeros(t) if need else None for t, need in zip((mask, sinks), needed))
    home = None
    for source, pair in _circulate(plan, key, value):
        of_pair = None
        for i, rows in enumerate(_pieces(plan)):
            if source != rank and not plan.sees[i][source]:
                continue
            call = _part_call(plan, rest, (query, *pair, mask, sinks), i, rows, source)
            of_piece = (None if tensor is None else tensor[:, :, rows] for tensor in of_rows)
            need_sinks = needed[1] and source == rank
            grads = plan.passes.backward(*of_piece, needed[0], need_sinks, call)
            grad_query[:, :, rows] += grads[0]
            of_pair = _wide(grads[1:3]) if of_pair is None else tuple(a.add_(b) for a, b in zip(of_pair, grads[1:3]))
            if needed[0]:
                _mask_of(plan, grad_mask, rows, source).add_(grads[3])
            if need_sinks:
                grad_sinks += grads[4]
        if source == rank:
            home = _Homecoming(plan, of_pair)
        else:
            home.exchange(source, of_pair, (key, value))
    return grad_query, *home.finish(), grad_mask, grad_sinks


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _wide(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors in which sums lose nothing."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
