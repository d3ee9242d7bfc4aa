"""Compute attention over a sequence that is spread over ranks, by keys and values that go round ("ring attention").

Each rank attends with its queries to the keys of one rank after the other, and joins the results by their log-sum-exps
(ops/attention/parts.py). At step s it gets the keys and values of rank r - s from there, while it computes step s - 1, and
their gradients go back there. Keys that no query of a rank sees are not sent to it.

A causal limit would give the last ranks most of the work. There the rows are exchanged first: of 2n pieces, rank r has those of
numbers r and 2n - 1 - r ("zigzag"), so that all ranks have as much work in each step; and out moves back.
Sources: Liu et al., "Ring Attention with Blockwise Transformers" (2023); Brandon et al., "Striped Attention" (2023); the zigzag
of Llama 3's context parallelism (2024).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..backend import select
from ..ops.attention.call import DIFFERENTIABLE, AttentionCall
from ..ops.attention.parts import PASSES, PartPasses, first, join
from ..ops.torch_op import differentiable_once, reference_only
from .exchange import Range, move_rows, rows_first, rows_third
from .ranks import Ranks
from .sequences import (
    Part,
    Sequences,
    Shards,
    align_to_counters,
    is_lopsided,
    of_ranks,
    part_of,
    places_of,
    split,
    visible,
)

# ---- who computes what ------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Hold a piece of this rank's queries and the piece of a rank's keys that it attends to."""

    i: int  # the number of the piece of queries
    j: int  # and of the piece of keys
    rows: slice  # of the queries in this rank's tensors
    columns: slice  # of the keys in the rows of all ranks
    placed: Part
    has_sink: bool  # A sink counts once, with the first keys of all that a rank computes with.

    def of_mask(self, mask: Tensor | None, has_rows: bool) -> Tensor | None:
        """Return the view of a mask, or of its gradient, for these rows and keys."""
        if mask is None:
            return None
        return mask[:, :, self.rows if has_rows else slice(None), self.columns if mask.shape[3] > 1 else slice(None)]


class Plan(NamedTuple):
    """Hold which rows each rank has while it computes, in one or two pieces, and which of them others need."""

    shards: Shards
    passes: PartPasses
    queries: list[list[Range]]  # of each rank
    keys: list[list[Range]]  # of each rank
    sees: list[list[list[bool]]]  # [rank][i][j]: whether this rank's piece i of queries sees that rank's piece j of keys
    sends: list[list[bool]]  # [rank][j]: whether that rank sees this rank's piece j of keys
    parts: list[list[_Part]]  # [rank]: what this rank computes with that rank's keys

    def needs(self, source: int) -> list[bool]:
        """Tell for each piece of a rank's keys whether this rank sees it."""
        return _any_of_each(self.sees[source])


def make_plan(shards: Shards, call: AttentionCall, passes: PartPasses) -> Plan:
    """Divide the work of a call among the ranks."""
    (_, rank, size), sequences = shards.ranks, Sequences.of(call, shards)
    left, right, total = call.left, call.right, sum(shards.keys)
    queries, keys = shards.query_ranges(), shards.key_ranges()
    if is_lopsided(call, total):
        queries, keys = split(sum(shards.queries), 2 * size), split(total, 2 * size)
    if call.dropout_p:
        keys = align_to_counters(sequences, keys)
    queries, keys = of_ranks(queries, size), of_ranks(keys, size)
    sees = [visible(sequences, queries[rank], of_rank, left, right) for of_rank in keys]
    sends = [_any_of_each(visible(sequences, of_rank, keys[rank], left, right)) for of_rank in queries]
    parts = [
        _parts(sequences, queries[rank], of_rank, seen, source == rank, call.query.device)
        for source, (of_rank, seen) in enumerate(zip(keys, sees))
    ]
    return Plan(shards, passes, queries, keys, sees, sends, parts)


def _parts(
    sequences: Sequences, queries: list[Range], keys: list[Range], sees: list[list[bool]], own: bool, device: torch.device
) -> list[_Part]:
    """Return what a rank computes with the pieces of keys of another, or, if ``own``, with its own.

    With its own first piece of keys there is a part in any case, so that each row has a result.
    """
    found = []
    for i, rows in enumerate(places_of(queries)):
        for j, columns in enumerate(keys):
            is_first = own and j == 0
            if sees[i][j] or is_first:
                placed = part_of(sequences, queries[i], columns, device)
                found.append(_Part(i, j, rows, slice(*columns), placed, is_first))
    return found


def _any_of_each(rows: list[list[bool]]) -> list[bool]:
    return [any(column) for column in zip(*rows)]


def attend(shards: Shards, call: AttentionCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return out and lse of this rank's rows, from the call of its rows."""
    barred = reference_only(*call[:DIFFERENTIABLE])
    plan = make_plan(shards, call, select("attention", PASSES, (call.query, call.value), backend, barred))
    query, key, value, mask, sinks, *rest = call

    def moved(tensor: Tensor, ranges: list[Range], wanted: list[list[Range]], back: bool = False) -> Tensor:
        have = [[rows] for rows in ranges]
        if have == wanted:
            return tensor
        return move_rows(shards.ranks, tensor, wanted, have) if back else move_rows(shards.ranks, tensor, have, wanted)

    of_queries, of_keys = (shards.query_ranges(), plan.queries), (shards.key_ranges(), plan.keys)
    out, lse = _Ring.apply(
        plan,
        rest,
        moved(query, *of_queries),
        moved(key, *of_keys),
        moved(value, *of_keys),
        moved(mask, *of_queries) if shards.mask_has_rows else mask,
        sinks,
    )
    return moved(out, *of_queries, back=True), moved(lse[..., None], *of_queries, back=True).squeeze(3)


# ---- keys and values on their way -------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]  # of keys and of values, (L, B, H, D) and contiguous: a piece of rows is sent where it lies


def _transfer(ranks: Ranks, target: int, sent: Sequence[Tensor], source: int, received: Sequence[Tensor]) -> list[dist.Work]:
    """Begin to send tensors to one rank, and to receive some from another."""

    def operations(kind: Callable, tensors: Sequence[Tensor], peer: int) -> list[dist.P2POp]:
        return [dist.P2POp(kind, tensor, group=ranks.group, group_peer=peer) for tensor in tensors if tensor.numel()]

    both = operations(dist.isend, sent, target) + operations(dist.irecv, received, source)
    return dist.batch_isend_irecv(both) if both else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _circulate(plan: Plan, own: list[Pair]) -> Iterator[tuple[int, list[Pair | None]]]:
    """Yield (rank, pairs) of this rank, and then of the others: a pair for each piece of keys that this rank sees, else None.

    While the caller computes with one rank's, the next are on their way.
    """
    ranks = plan.shards.ranks

    def start(step: int) -> tuple[list[dist.Work], list[Pair | None]]:
        source, target = (ranks.rank - step) % ranks.size, (ranks.rank + step) % ranks.size
        received = [
            tuple(tensor.new_empty(end - begin, *tensor.shape[1:]) for tensor in own[0]) if needed else None
            for (begin, end), needed in zip(plan.keys[source], plan.needs(source))
        ]
        sent = [pair if needed else None for pair, needed in zip(own, plan.sends[target])]
        return _transfer(ranks, target, _flat(sent), source, _flat(received)), received

    coming = start(1)
    yield ranks.rank, own
    for step in range(1, ranks.size):
        works, received = coming
        if step + 1 < ranks.size:
            coming = start(step + 1)
        _wait(works)
        yield (ranks.rank - step) % ranks.size, received


def _flat(pairs: Sequence[Pair | None]) -> list[Tensor]:
    return [tensor for pair in pairs if pair is not None for tensor in pair]


class _Homecoming:
    """Send the gradients of other ranks' keys and values home, and add up those of this rank's own, in the order of steps.

    ``totals`` are this rank's, of keys and of values (L, B, H, D), in float32 or better, and ``sums`` their pieces.
    """

    def __init__(self, plan: Plan, own: list[Pair]):
        self.plan, self.own = plan, own
        lengths = [len(key) for key, _ in own]
        dtype = torch.promote_types(own[0][0].dtype, torch.float32)
        self.totals = tuple(each.new_zeros(sum(lengths), *each.shape[1:], dtype=dtype) for each in own[0])
        self.sums: list[Pair | None] = list(zip(*(total.split(lengths) for total in self.totals)))
        self.under_way: list[tuple[list[dist.Work], Sequence[Tensor], list[Pair | None]]] = []

    def exchange(self, source: int, grads: list[Pair | None]) -> None:
        """Send the gradients of a rank's pieces home, and receive those of the rank that is as far on the other side."""
        ranks = self.plan.shards.ranks
        seer = (2 * ranks.rank - source) % ranks.size
        dtype = self.own[0][0].dtype
        sent = [grad.to(dtype).contiguous() for grad in _flat(grads)]
        del grads  # before memory is taken for those that come
        received = [tuple(map(torch.empty_like, pair)) if seen else None for pair, seen in zip(self.own, self.plan.sends[seer])]
        self.under_way.append((_transfer(ranks, source, sent, seer, _flat(received)), sent, received))
        if len(self.under_way) > 1:
            self._arrive()

    def _arrive(self) -> None:
        works, _, received = self.under_way.pop(0)  # What is sent must live until now.
        _wait(works)
        for total, pair in zip(self.sums, received):
            _sum(total, pair)

    def finish(self) -> Pair:
        """Return the totals."""
        while self.under_way:
            self._arrive()
        return self.totals


# ---- all steps --------------------------------------------------------------------------------------------------------------


def _call_of(plan: Plan, part: _Part, tensors: Sequence[Tensor | None], pair: Pair, rest: list) -> AttentionCall:
    """Return the call of a part of this rank's tensors, with a pair of keys and values."""
    query, _, _, mask, sinks = tensors
    key, value = map(rows_third, pair)
    of_mask = part.of_mask(mask, plan.shards.mask_has_rows)
    call = AttentionCall(query[:, :, part.rows], key, value, of_mask, sinks if part.has_sink else None, *rest)
    return call._replace(**part.placed._asdict())


class _Ring(Function):
    """Attend to the keys of all ranks. The tensors are this rank's, in the pieces of the plan."""

    @staticmethod
    def forward(ctx, plan: Plan, rest: list, *tensors: Tensor | None):
        query, key, value, *_ = tensors
        joined = {}
        for source, pairs in _circulate(plan, _pairs(plan, key, value)):
            for part in plan.parts[source]:
                call = _call_of(plan, part, tensors, pairs[part.j], rest)
                result, before = plan.passes.forward(call), joined.get(part.i)
                joined[part.i] = first(*result) if before is None else join(before, *result, plan.passes.unit(call))
        joined = ((out.to(query.dtype), *others) for _, (out, *others) in sorted(joined.items()))
        out, lse, statistics = (torch.cat(pieces, dim=2) for pieces in zip(*joined))
        ctx.save_for_backward(*tensors, out, lse, statistics)
        ctx.plan, ctx.rest = plan, rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
        *tensors, out, lse, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        grads = _gradients(ctx.plan, ctx.rest, tensors, (grad_out, grad_lse, out, lse, statistics), needed[3:])
        wanted = (grad.to(tensor.dtype) if need else None for need, grad, tensor in zip(needed, grads, tensors))
        return None, None, *wanted


def _pairs(plan: Plan, key: Tensor, value: Tensor) -> list[Pair]:
    """Return this rank's pieces of keys and values."""
    places = places_of(plan.keys[plan.shards.ranks.rank])
    return [tuple(rows_first(tensor[:, :, rows]).contiguous() for tensor in (key, value)) for rows in places]


def _gradients(
    plan: Plan, rest: list, tensors: Sequence[Tensor | None], of_rows: tuple, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, mask and sinks, in float32 or better.

    ``of_rows`` are grad_out, grad_lse, out, lse and statistics; ``needed`` says whether mask and sinks have gradients.
    """
    (query, key, value, mask, sinks), rank = tensors, plan.shards.ranks.rank
    grad_query, grad_mask, grad_sinks = _zeros(query), *(_zeros(t) if n else None for t, n in zip((mask, sinks), needed))
    own = _pairs(plan, key, value)
    home = _Homecoming(plan, own)

    def add_gradients(source: int, pairs: list[Pair | None], of_pairs: list[Pair | None]) -> list[Pair | None]:
        """Add the gradients of the parts with a rank's keys and values, and return those of these."""
        for part in plan.parts[source]:
            call = _call_of(plan, part, tensors, pairs[part.j], rest)
            of_part = (None if tensor is None else tensor[:, :, part.rows] for tensor in of_rows)
            need_sinks = needed[1] and part.has_sink
            of_query, *of_pair, of_mask, of_sinks = plan.passes.backward(*of_part, needed[0], need_sinks, call)
            grad_query[:, :, part.rows] += of_query
            of_pairs[part.j] = _sum(of_pairs[part.j], tuple(map(rows_first, of_pair)))
            if needed[0]:
                part.of_mask(grad_mask, plan.shards.mask_has_rows).add_(of_mask)
            if need_sinks:
                grad_sinks.add_(of_sinks)
        return of_pairs

    for source, pairs in _circulate(plan, own):
        if source == rank:
            add_gradients(source, pairs, home.sums)
        else:
            home.exchange(source, add_gradients(source, pairs, [None] * len(pairs)))
    return grad_query, *map(rows_third, home.finish()), grad_mask, grad_sinks


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _sum(total: Pair | None, pair: Pair | None) -> Pair | None:
    """Return a sum in float32 or better, in the place of ``total`` if there is one."""
    if total is None or pair is None:
        return total if pair is None else tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair)
    return tuple(map(Tensor.add_, total, pair))
