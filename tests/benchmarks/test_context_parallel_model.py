"""Test the cost model of context parallelism against counts by hand, and against counting every element and every score."""

import math
from pathlib import Path

import pytest
from context_parallel import tables
from context_parallel.layer import Layer, length, parts
from context_parallel.links import FREE, H100, LINKS, MODELS, Link, Processor, layer_of
from context_parallel.times import exposed_seconds, exposed_share, one_process_seconds, pass_seconds, seconds
from context_parallel.traffic import METHODS, NOTHING, AllToAll, Ring, Traffic, one_process_memory

import fastlm

SLOW = Link("slow", 1e9, 1e-5)
LAYERS = {
    "full": Layer(48, 4, 4, 8),
    "causal": Layer(48, 4, 4, 8, causal=True),
    "grouped": Layer(48, 8, 2, 8, batch=3, itemsize=4, causal=True),
    "window": Layer(48, 4, 4, 8, causal=True, window=(5, None)),
    "wide window": Layer(48, 4, 4, 8, causal=True, window=(20, None)),
    "both sides": Layer(48, 4, 2, 8, window=(7, 3)),
    "uneven": Layer(50, 4, 4, 8, causal=True),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
both_passes = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def sees(layer: Layer, i: int, j: int) -> bool:
    left, right = layer.reach
    return (left is None or j - i >= -left) and (right is None or j - i <= right)


def owner_of(layer: Layer, ranks: int) -> list[int]:
    """Return the rank that holds each row."""
    return [rank for rank, (start, stop) in enumerate(parts(layer.sequence, ranks)) for _ in range(start, stop)]


# ---- by hand ----------------------------------------------------------------------------------------------------------------


def test_all_to_all_bytes_of_two_ranks():
    """Count by hand: 8 rows of 4 query and 2 key heads of 16 numbers of 2 bytes; half of a rank's 4 rows' heads go away."""
    plan = AllToAll(Layer(8, 4, 2, 16), 2)
    q = 4 * 2 * 16 * 2  # rows, heads, numbers, bytes
    k = 4 * 1 * 16 * 2
    assert plan.before(0, False) == Traffic(q + 2 * k, q + 2 * k)
    assert plan.after(0, False) == Traffic(q, q)
    assert plan.traffic(1, True) == Traffic(2 * q + 2 * k, 2 * q + 2 * k)


def test_all_to_all_bytes_with_fewer_key_heads_than_ranks():
    """Count by hand: each of 4 ranks needs one of 2 key heads, so that a rank's 2 rows of a key head go to three others."""
    plan = AllToAll(Layer(8, 4, 2, 16), 4)
    row = 16 * 2
    assert plan.before(0, False) == Traffic(2 * 3 * row + 2 * (2 * 3 * row), 6 * row + 2 * (6 * row))


def test_ring_bytes_of_two_ranks():
    """Count by hand: keys and values of 4 rows go to the other, and in the backward their gradients come back."""
    plan = Ring(Layer(8, 4, 2, 16), 2)
    pair = 2 * 4 * 2 * 16 * 2  # key and value, rows, heads, numbers, bytes
    assert plan.traffic(0, False) == Traffic(pair, pair)
    assert plan.traffic(0, True) == Traffic(2 * pair, 2 * pair)


def test_causal_ring_bytes_of_two_ranks():
    """Count by hand: rank 0 computes pieces 0 and 3 of 4, rank 1 pieces 1 and 2, and so each sends one piece of 2 rows."""
    plan = Ring(Layer(8, 4, 2, 16, causal=True), 2)
    assert plan.rows == [[(0, 2), (6, 8)], [(2, 4), (4, 6)]]
    query, pair, lse = 2 * 4 * 16 * 2, 2 * 2 * 2 * 16 * 2, 2 * 4 * 4  # of a piece
    # Queries, keys and values there, out and log-sum-exps back. Rank 0 sees all pieces of keys, rank 1 not the last.
    moved = 2 * query + pair + lse
    assert [plan.traffic(rank, False) for rank in (0, 1)] == [
        Traffic(moved + pair, moved + 2 * pair),
        Traffic(moved + 2 * pair, moved + pair),
    ]
    # Gradients of out there, of queries, keys and values back; keys and values again, and their gradients home.
    backward = 2 * query + pair + pair + 2 * pair
    assert [plan.traffic(rank, True) for rank in (0, 1)] == [Traffic(backward, backward)] * 2


def test_a_window_inside_a_part_reaches_one_rank():
    """Count by hand: with 4 keys to the left, each of 4 ranks of 8 rows sees the part before its own, and the first none."""
    plan = Ring(Layer(32, 1, 1, 16, causal=True, window=(4, None)), 4)
    pair = 2 * 8 * 16 * 2
    found = [plan.traffic(rank, False) for rank in range(4)]
    assert found == [Traffic(pair, 0), Traffic(pair, pair), Traffic(pair, pair), Traffic(0, pair)]


def test_operations_of_a_square():
    """Count by hand: two products of 2 operations in the forward, five in the backward, for each of 8 x 8 scores."""
    plan = AllToAll(Layer(8, 4, 2, 16), 2)
    assert plan.flops(0, False) == 2 * 2 * 16 * 64 * 2
    assert plan.flops(0, True) == 5 * 2 * 16 * 64 * 2


def test_seconds_of_two_ranks():
    """Add up by hand: what the all-to-all exchanges is added to the computation, what the ring sends is behind it."""
    link, processor = Link("", 100.0, 0.5), Processor("", 1000.0)
    layer = Layer(8, 2, 2, 1, itemsize=2)
    everything, of_rows = 4 * 64 * 2, 4 * 2 * 2  # operations of the forward; bytes of a rank's rows of one tensor
    all_to_all = 3 * (0.5 + of_rows / 2 / 100) + everything / 2 / 1000 + 0.5 + of_rows / 2 / 100
    assert pass_seconds(AllToAll(layer, 2), False, link, processor) == pytest.approx(all_to_all)
    step, transfer = everything / 4 / 1000, 0.5 + 2 * of_rows / 100
    assert pass_seconds(Ring(layer, 2), False, link, processor) == pytest.approx(max(step, transfer) + step)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_of_a_causal_ring_do_not_wait_for_each_other(ranks):
    layer = Layer(1 << 16, 8, 8, 64, causal=True)
    assert seconds(Ring(layer, ranks), FREE, H100) == pytest.approx(one_process_seconds(layer, H100) / ranks)


# ---- by counting every element ----------------------------------------------------------------------------------------------


@every_layer
def test_scores_are_the_pairs_that_see_each_other(layer):
    """Count the visible pairs of blocks one by one."""
    for queries in parts(layer.sequence, 3):
        for keys in parts(layer.sequence, 5):
            counted = sum(sees(layer, i, j) for i in range(*queries) for j in range(*keys))
            assert layer.scores(queries, keys) == counted


@every_layer
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_all_to_all_moves_each_row_of_a_head_to_the_rank_of_that_head(layer, ranks):
    """Walk over rows and heads, and count those that are needed away from their rank."""
    plan, owner = AllToAll(layer, ranks), owner_of(layer, ranks)
    sent, received = [0] * ranks, [0] * ranks
    last, group = 0, layer.query_heads // layer.key_heads
    for reader, number in enumerate(plan.query_heads):
        first, last = last, last + number
        heads = [*range(first, last), *2 * sorted({head // group for head in range(first, last)})]
        for row in range(layer.sequence):
            if owner[row] != reader:
                sent[owner[row]] += len(heads) * layer.row_bytes(1)
                received[reader] += len(heads) * layer.row_bytes(1)
    assert last == layer.query_heads
    assert [plan.before(rank, False) for rank in range(ranks)] == list(map(Traffic, sent, received))


@every_layer
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ring_sends_keys_to_every_rank_that_sees_one_of_them(layer, ranks):
    """Walk over pairs of a query and a key, and count which pieces of keys each rank sees."""
    plan, owner = Ring(layer, ranks), owner_of(layer, ranks)
    rows = [[i for piece in own for i in range(*piece)] for own in plan.rows]
    assert sorted(sum(rows, [])) == list(range(layer.sequence))
    pieces = [(holder, piece) for holder, own in enumerate(plan.rows) for piece in own]
    pair = 2 * layer.row_bytes(layer.key_heads)
    for rank in range(ranks):
        sent = received = 0
        for holder, piece in pieces:
            for reader in range(ranks):
                seen = any(sees(layer, i, j) for i in rows[reader] for j in range(*piece))
                if holder != reader and seen:
                    sent += pair * length([piece]) * (holder == rank)
                    received += pair * length([piece]) * (reader == rank)
        assert plan.circulated(rank) == Traffic(sent, received)
        away = sum(owner[i] != rank for i in rows[rank])
        of_row = layer.row_bytes(layer.query_heads) + pair
        assert plan.before(rank, False).received == plan.after(rank, True).sent == away * of_row


# ---- what always holds ------------------------------------------------------------------------------------------------------


@every_layer
@every_method
@both_passes
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_all_ranks_send_is_what_all_receive(layer, method, backward, ranks):
    plan = method(layer, ranks)
    traffic = [plan.traffic(rank, backward) for rank in range(ranks)]
    assert sum(each.sent for each in traffic) == sum(each.received for each in traffic) > 0


@every_layer
@every_method
@both_passes
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_do_together_what_one_process_does(layer, method, backward, ranks):
    plan, alone = method(layer, ranks), method(layer, 1)
    assert sum(plan.flops(rank, backward) for rank in range(ranks)) == alone.flops(0, backward)


@every_layer
@every_method
@both_passes
def test_one_rank_sends_nothing(layer, method, backward):
    assert method(layer, 1).traffic(0, backward) == NOTHING
    assert exposed_seconds(method(layer, 1), SLOW, H100) == 0.0


@every_method
@both_passes
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_as_wide_as_the_sequence_is_none(method, backward, causal):
    wide = Layer(48, 4, 4, 8, causal=causal, window=(47, 47))
    none = Layer(48, 4, 4, 8, causal=causal)
    for rank in range(4):
        assert method(wide, 4).traffic(rank, backward) == method(none, 4).traffic(rank, backward)
        assert method(wide, 4).flops(rank, backward) == method(none, 4).flops(rank, backward)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_causal_work_is_balanced(ranks):
    plan = Ring(Layer(1024, 8, 8, 64, causal=True), ranks)
    assert len({plan.flops(rank, False) for rank in range(ranks)}) == 1


@every_method
@pytest.mark.parametrize("causal", [False, True])
def test_what_grows_and_what_falls(method, causal):
    """Hold that longer sequences and faster links expose a smaller share, and that ranks share memory."""
    share = [exposed_share(method(layer_of("Llama-3-8B", 1 << n, causal), 8), SLOW, H100) for n in range(11, 22)]
    assert share == sorted(share, reverse=True) and share[0] > share[-1]
    by_speed = sorted(LINKS, key=lambda link: link.bandwidth)
    exposed = [exposed_seconds(method(layer_of("GPT-2", 8192, causal), 4), link, H100) for link in by_speed]
    assert exposed == sorted(exposed, reverse=True)
    layer = layer_of("Llama-3-8B", 1 << 16, causal)
    memory = [max(method(layer, ranks).memory(rank) for rank in range(ranks)) for ranks in (2, 4, 8, 16)]
    assert memory == sorted(memory, reverse=True) and memory[-1] < one_process_memory(layer) / 4


@every_layer
@every_method
def test_no_link_makes_ranks_faster_than_their_share_of_the_work(layer, method):
    for ranks in (2, 3, 4):
        assert seconds(method(layer, ranks), FREE, H100) >= one_process_seconds(layer, H100) / ranks * (1 - 1e-12)


def test_all_to_all_needs_a_query_head_for_each_rank():
    with pytest.raises(ValueError, match="12 for 16 ranks"):
        AllToAll(layer_of("GPT-2", 1024), 16)


def test_the_page_has_the_figures_of_the_model():
    """Hold the tables of fastlm/distributed/README.md to what the model says today."""
    page = (Path(fastlm.__file__).parent / "distributed" / "README.md").read_text()
    for row in (*tables.crossover_rows(causal=True), *tables.crossover_rows(causal=False), *tables.hiding_rows()):
        assert f"| {' | '.join(row)} |" in page


def test_links_and_models_are_in_their_units():
    """Hold bandwidths to the published bits per second, so that no figure of both directions slips in."""
    published = {"NVLink 4": 3600, "PCIe 5 x16": 504, "InfiniBand NDR": 400, "InfiniBand HDR": 200, "Ethernet 100 Gb/s": 100}
    for link in LINKS:
        if link.name in published:
            assert math.isclose(link.bandwidth * 8e-9, published[link.name], rel_tol=1e-3)
    assert all(queries % keys == 0 for queries, keys, _ in MODELS.values())
