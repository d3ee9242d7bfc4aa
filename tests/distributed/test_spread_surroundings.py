"""Test spread attention in its surroundings: seeds, derivatives, autocast, checkpoints, groups, and what travels."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support import ranks
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.distributed import attention, ring
from fastlm.distributed.ranks import Ranks
from fastlm.distributed.sequences import Shards
from fastlm.ops.attention.call import AttentionCall
from fastlm.ops.attention.parts import PASSES
from fastlm.testing import GRADIENT_FACTOR, assert_as_good_as_plain, seeded_normal

METHODS = ("all-to-all", "all-gather", "ring")
NAMES = ("query", "key", "value")
ROWS = 24
on_reference = partial(fastlm.attention, backend="reference")


def whole(dtype=torch.float32, heads=4) -> dict:
    """Return a call of as many queries as keys."""
    return {name: seeded_normal(i, (2, heads, ROWS, 8), dtype) for i, name in enumerate(NAMES)}


def own(tensors: dict, rank: int, world: int) -> dict:
    """Return a rank's rows of tensors whose rows are their third dimension."""
    return {name: tensor.chunk(world, 2)[rank] for name, tensor in tensors.items()}


def joined(results: list) -> torch.Tensor:
    return torch.cat(results, dim=2)


# ---- seeds ------------------------------------------------------------------------------------------------------------------


def drawn(rank: int, world: int) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    call = own(whole(), rank, world) | {"dropout_p": 0.4, "causal": True}
    outs = [attention(**call, method=method) for method in METHODS]
    torch.manual_seed(rank)
    return [*outs, checkpoint(lambda q: attention(**call | {"query": q}), call["query"], use_reentrant=False)]


def test_a_seed_is_drawn_once_for_all_ranks():
    torch.manual_seed(0)
    seeds = [int(torch.randint(2**63 - 1, ())) for _ in METHODS]
    expected = [fastlm.attention(**whole(), dropout_p=0.4, causal=True, seed=seed) for seed in (*seeds, seeds[0])]
    for result, golden in zip(map(joined, zip(*ranks.run(drawn, 2))), expected):
        torch.testing.assert_close(result, golden)


# ---- derivatives ------------------------------------------------------------------------------------------------------------


def second_order(call: dict, function) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a gradient's squares."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in call.items()}
    out = function(**leaves, causal=True)
    grads = torch.autograd.grad((out**2).sum(), leaves.values(), create_graph=True)
    return torch.autograd.grad(sum((grad**2).sum() for grad in grads), leaves.values())


def forward_mode(call: dict, function) -> torch.Tensor:
    """Return the tangent of out in the direction of the call itself."""
    with forward_ad.dual_level():
        out = function(**{name: forward_ad.make_dual(tensor, tensor.flip(-1)) for name, tensor in call.items()}, causal=True)
        return forward_ad.unpack_dual(out).tangent


def derivatives(rank: int, world: int):
    call = own(whole(), rank, world)
    try:
        second_order(call, lambda **kwargs: attention(**kwargs, method="ring"))
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    gather = partial(attention, method="all-gather")
    by_gathering = second_order(call, gather), forward_mode(call, gather)
    return second_order(call, attention), forward_mode(call, attention), *by_gathering, error


def test_all_derivatives_but_of_the_ring_which_has_one():
    second, tangents, second_by_gathering, tangents_by_gathering, errors = zip(*ranks.run(derivatives, 2))
    for result, golden in zip(map(joined, zip(*second)), second_order(whole(), fastlm.attention)):
        torch.testing.assert_close(result, golden)
    assert torch.equal(joined(tangents), forward_mode(whole(), fastlm.attention))
    plain, golden = (second_order(whole(dtype), on_reference) for dtype in (torch.float32, torch.float64))
    for result, *of_one in zip(map(joined, zip(*second_by_gathering)), plain, golden):
        assert_as_good_as_plain(result, *of_one, GRADIENT_FACTOR)
    torch.testing.assert_close(joined(tangents_by_gathering), forward_mode(whole(), fastlm.attention))
    assert all("no derivatives of this order" in error for error in errors)


STATS = ("entropy", "max_logit", "key_mass")


def with_statistics(call: dict, function) -> list[torch.Tensor]:
    """Return out, lse, the statistics, and the gradients that a sum of their squares has."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in call.items()}
    out, lse, stats = function(**leaves, causal=True, return_lse=True, return_stats=STATS)
    results = out, lse, *stats
    grads = torch.autograd.grad(sum((result**2).sum() for result in results), list(leaves.values()))
    return [*(result.detach() for result in results), *grads]


def statistics(rank: int, world: int, heads: int):
    return with_statistics(own(whole(heads=heads), rank, world), attention)


def test_statistics_are_those_of_one_process():
    for result, golden in zip(map(joined, zip(*ranks.run(statistics, 2, 4))), with_statistics(whole(), fastlm.attention)):
        assert torch.equal(result, golden)


def test_statistics_of_fewer_heads_than_ranks_are_right_to_rounding():
    plain, golden = (with_statistics(whole(dtype, heads=1), on_reference) for dtype in (torch.float32, torch.float64))
    for result, *of_one in zip(map(joined, zip(*ranks.run(statistics, 2, 1))), plain, golden):
        assert_as_good_as_plain(result, *of_one, GRADIENT_FACTOR)


def watched(rank: int, world: int) -> list[str]:
    """Return the tables of a watch around a module whose attention is spread, and around one with DTensors."""
    mesh = dist.init_device_mesh("cpu", (world,))

    class Spread(torch.nn.Module):
        def forward(self, method, query, key, value):
            if method == "dtensor":
                return fastlm.attention(*(DTensor.from_local(t, mesh, [Shard(0)]) for t in (query, key, value)))
            return attention(query, key, value, method=method)

    tables, model = [], Spread()
    for method in (*METHODS, "dtensor"):
        with fastlm.watch(model) as stats:
            model(method, *own(whole(), rank, world).values())
        tables.append(stats.table())
    return tables


def test_a_watch_tells_that_it_cannot_see_spread_calls():
    for tables in ranks.run(watched, 2):
        for table in tables:
            assert "spread over ranks" in table and "entropy" not in table.split("spread")[1]


# ---- with the rest of torch -------------------------------------------------------------------------------------------------


def with_autocast(rank: int, world: int):
    with torch.autocast("cpu", torch.bfloat16):
        return [attention(**own(whole(), rank, world), method=method) for method in METHODS]


def test_autocast_gives_the_dtype_of_products():
    half = fastlm.attention(**whole(torch.bfloat16))
    for result in map(joined, zip(*ranks.run(with_autocast, 2))):
        torch.testing.assert_close(result, half, atol=0.02, rtol=0.0)


def compiled(rank: int, world: int):
    call = own(whole(), rank, world)

    def step(query, key, value, method):
        return attention(query * 1.0, key, value, method=method) * 2.0

    return [torch.compile(step, backend="eager")(**call, method=method) for method in METHODS]


def test_compiled_code_calls_it():
    for result in map(joined, zip(*ranks.run(compiled, 2))):
        torch.testing.assert_close(result, fastlm.attention(**whole()) * 2.0)


def in_halves(rank: int, world: int):
    """Return the results in two groups of two, by a mesh's groups and by the mesh itself."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    call = {name: tensor[rank // 2 : rank // 2 + 1] for name, tensor in own(whole(), rank % 2, 2).items()}
    given = {"mesh": mesh["cp"]}, {"group": mesh.get_group("cp")}
    return [attention(**call, **place, method=method, causal=True) for place, method in itertools.product(given, METHODS)]


def test_groups_of_some_processes():
    found = ranks.run(in_halves, 4)
    for example, parts in enumerate((found[:2], found[2:])):
        golden = fastlm.attention(**{name: t[example : example + 1] for name, t in whole().items()}, causal=True)
        for result in map(joined, zip(*parts)):
            torch.testing.assert_close(result, golden)


# ---- who does what ----------------------------------------------------------------------------------------------------------


def plan_of(rank: int, world: int, rows=4096, **options) -> ring.Plan:
    """Return the plan of one rank."""
    query = torch.empty(1, 1, rows // world, 1)
    fields = dict.fromkeys(AttentionCall._fields) | {"query": query, "key": query, "value": query, "dropout_p": 0.0} | options
    shards = Shards(Ranks(None, rank, world), (rows // world,) * world, (rows // world,) * world, False)
    return ring.make_plan(shards, AttentionCall(**fields), PASSES[-1].run)


def scores_of(rank: int, world: int, source: int) -> int:
    """Return how many scores a rank computes of a causal call, with the keys of another."""
    plan = plan_of(rank, world, right=0)
    pieces = itertools.product(plan.queries[rank], plan.keys[source])
    return sum(max(0, min(i + 1, end) - begin) for queries, (begin, end) in pieces for i in range(*queries))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_causal_work_is_balanced_in_each_step(world):
    for step in range(world):
        work = [scores_of(rank, world, (rank - step) % world) for rank in range(world)]
        assert max(work) == min(work)


def test_keys_that_a_window_does_not_reach_are_left_out():
    plan = plan_of(3, 8, left=512, right=0)  # 512 rows a rank
    assert plan.queries == [[rows] for rows in plan.shards.query_ranges()]
    assert plan.sees == [[[source in (2, 3)]] for source in range(8)]
    assert plan.sends == [[target in (3, 4)] for target in range(8)]
    assert plan_of(3, 8, left=513, right=0).sees == [[[source in (1, 2, 3)]] for source in range(8)]
    assert plan_of(3, 8, left=1, right=1).sees == [[[source in (2, 3, 4)]] for source in range(8)]


def test_a_window_as_long_as_the_sequence_is_balanced():
    assert plan_of(0, 4, left=4096, right=0).queries == plan_of(0, 4, right=0).queries
    assert plan_of(0, 4, right=0).queries[0] == plan_of(0, 4, right=0).keys[0] == [(0, 512), (3584, 4096)]


def messages(rank: int, world: int) -> list[int]:
    """Return how many tensors this rank sends and receives in the ring, forward and backward."""
    counts, begin = [0, 0], dist.batch_isend_irecv

    def counted(operations):
        for operation in operations:
            counts[operation.op is dist.irecv] += 1
        return begin(operations)

    dist.batch_isend_irecv = counted
    leaves = {name: tensor.requires_grad_() for name, tensor in own(whole(), rank, world).items()}
    attention(**leaves, method="ring", window=(ROWS // 4, 0)).sum().backward()
    return counts


def test_only_what_is_seen_travels():
    found = ranks.run(messages, 4)  # Keys and values forward, again in the backward, and their gradients home.
    assert found == [[4, 2], [6, 6], [6, 6], [2, 4]]
