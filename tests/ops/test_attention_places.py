"""Test calls that compute a part of a larger call: their rows say where they stand in it (`Place`).

Windows, causal limits, slopes and dropout go by a row's place in the whole, so that parts give the whole call's answer: equal
bits for parts of the queries, heads and examples, and the rule of errors for parts of the keys, which are joined by their LSE.
"""

import pytest
import torch
from cases import SPECS
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import Oracle, run
from support.parts import attention_in_parts
from test_attention_sweep import DIFFERENTIABLE, attention_calls

import fastlm
from fastlm.ops.attention.batched import IMPLEMENTATIONS
from fastlm.ops.attention.call import AttentionCall, Place
from fastlm.testing import seeded_normal

CASES = {name: case for name, case in SPECS["attention"].cases.items() if not name.startswith("no ")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUTS = {"key_cuts": (8, 64, 68), "query_cuts": (5, 48, 49)}
FEW = 8  # Up to so many rows of a group, the CPU's kernels add up in another order.


@pytest.mark.parametrize("name", CASES)
def test_parts_of_rows_have_the_bits_of_the_whole(isa, name):
    for dtype in DTYPES:
        call = CASES[name](dtype)
        half = call["query"].shape[2] // 2
        cuts = (half,) if half > FEW else ()
        expected = run(fastlm.attention, call, ("query",), backend="cpu")
        results = run(attention_in_parts, call | {"query_cuts": cuts}, ("query",), backend="cpu")
        for what, result in expected.items():
            assert torch.equal(results[what], result), (dtype, what)


@pytest.mark.parametrize("name", CASES)
def test_parts_of_keys_are_as_good_as_plain_pytorch(isa, name):
    for dtype in DTYPES:
        Oracle(attention_in_parts, CASES[name](dtype) | CUTS, DIFFERENTIABLE, set()).check(backend="cpu")


@settings(max_examples=100)
@given(
    attention_calls().filter(lambda call: len(call["query"])),
    st.lists(st.integers(1, 50), max_size=2, unique=True),
    st.sets(st.integers(1, 200), max_size=3),
)
def test_parts_anywhere(call, key_cuts, query_cuts):
    cuts = {"key_cuts": tuple(4 * cut for cut in sorted(key_cuts)), "query_cuts": tuple(sorted(query_cuts))}
    Oracle(attention_in_parts, call | cuts, DIFFERENTIABLE, set()).check(backend="cpu")


# ---- the record -------------------------------------------------------------------------------------------------------------


def a_call(place: Place, batch=1, seed=None, **options) -> AttentionCall:
    """Return a call of 2 heads, 20 queries and 30 keys, each of whose sequences stands at ``place``."""
    query, key, value = (seeded_normal(i, (batch, 2, rows, 8), torch.float32) for i, rows in enumerate((20, 30, 30)))
    fields = dict.fromkeys(AttentionCall._fields) | {"scale": 0.3, "softcap": 0.0, "dropout_p": 0.0}
    places = torch.tensor([place] * batch)
    return AttentionCall(**fields | {"query": query, "key": key, "value": value, "places": places, "seed": seed} | options)


BACKENDS = [pytest.param(i.run, id=i.backend) for i in IMPLEMENTATIONS if i.backend != "triton"]


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("position", [-1000, -21, 31, 10**6, 2**40])
def test_rows_far_from_the_keys_see_none(attend, position):
    out, lse = attend(a_call(Place(position, 0, 0, 0), left=0, right=0))
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("attend", BACKENDS)
def test_a_position_moves_the_causal_limit(attend):
    for position in (-20, -7, 0, 10, 40):
        keys = (torch.arange(20) + position + 1).clamp(0, 30)
        weights = torch.arange(30) < keys[:, None]
        expected = fastlm.attention(*a_call(Place(0, 0, 0, 0))[:3], mask=weights, scale=0.3, backend="reference")
        out, _ = attend(a_call(Place(position, 0, 0, 0), right=0))
        torch.testing.assert_close(out, expected)


def test_a_key_that_does_not_begin_a_counter_is_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        IMPLEMENTATIONS[0].run(a_call(Place(10, 0, 6, 0), seed=torch.tensor(1), dropout_p=0.5))


def test_packed_sequences_have_places_of_their_own():
    packed = torch.tensor([0, 12, 20], dtype=torch.int32), torch.tensor([0, 12, 30], dtype=torch.int32)
    places = torch.tensor([Place(3, 40, 8, 7), Place(-2, 1, 4, 2**31)])
    seed = torch.tensor(5)
    call = a_call(Place(0, 0, 0, 0), seed=seed, right=0, left=9, dropout_p=0.4)._replace(
        cu_seqlens_q=packed[0], cu_seqlens_k=packed[1], places=places
    )
    (cpu, cpu_lse), (golden, golden_lse) = (i.run(call) for i in IMPLEMENTATIONS if i.backend != "triton")
    torch.testing.assert_close(cpu, golden)
    torch.testing.assert_close(cpu_lse, golden_lse)
    for b, (rows, keys) in enumerate(((slice(0, 12), slice(0, 12)), (slice(12, 20), slice(12, 30)))):
        tensors = call.query[:, :, rows], call.key[:, :, keys], call.value[:, :, keys]
        alone = IMPLEMENTATIONS[0].run(a_call(places[b].tolist(), seed=seed, right=0, left=9, dropout_p=0.4)._replace(
            query=tensors[0], key=tensors[1], value=tensors[2]
        ))  # fmt: skip
        torch.testing.assert_close(alone[0], cpu[:, :, rows])
