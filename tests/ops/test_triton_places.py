"""Test parts of larger calls (`Place`) on the Triton kernels: on the GPU if there is one, in the interpreter elsewhere.

Golden is the reference in float64: of the whole call, where parts are put together, and of the part's own record elsewhere.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.derivatives import add_tangents, and_tangents, with_tangents
from support.oracle import Oracle, run
from support.parts import attention_at, attention_in_parts
from support.stats import with_stats
from support.sweep import EVERY_DTYPE, scaled
from support.triton_interpreter import DEVICE
from test_attention_places import CASES
from test_attention_sweep import DIFFERENTIABLE
from test_triton_attention import DTYPES
from test_triton_derivatives import FEATURES, grouped, normals, with_hidden

from fastlm.ops.attention.call import Place
from fastlm.reference.attention import keep_mask

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

TRITON = {"backend": "triton", "device": DEVICE}


def check(function, call: dict, names=DIFFERENTIABLE) -> dict:
    """Hold a call's results and gradients to the rule of errors."""
    return Oracle(function, call, names, set()).check(**TRITON)


# ---- parts, put together ----------------------------------------------------------------------------------------------------

CUTS = {"key_cuts": (8, 36), "query_cuts": (5,)}
SOME = ("causal, more queries than keys", "window", "dropout", "dropout per example")
PUT_TOGETHER = {name: CASES[name] for name in SOME} | {"everything": FEATURES["everything"]}
CALLS = [  # Each case in one dtype; with FASTLM_SWEEP=2 in all dtypes.
    pytest.param(case, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for i, (name, case) in enumerate(PUT_TOGETHER.items())
    for dtype in (DTYPES if EVERY_DTYPE else DTYPES[i % 3 :][:1])
]


@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_parts_are_as_good_as_plain_pytorch(case, dtype):
    check(attention_in_parts, case(dtype) | CUTS)


# ---- a part by itself -------------------------------------------------------------------------------------------------------

AMONG, BEHIND = Place(5, 40, 64, 3), Place(-12, 2, 8, 2**31)  # The first twelve rows of BEHIND see no key at all.
PART = grouped(
    batch=2, places=torch.tensor([AMONG, BEHIND]), mask=with_hidden, softcap=2.0, sinks=normals(2), left=20, right=0,
    alibi_slopes=torch.tensor([0.5, 0.1]), dropout_p=0.2, seed=torch.tensor(3),
)  # fmt: skip
PACKED = grouped(
    places=torch.tensor([AMONG, BEHIND]), cu_seqlens_q=torch.tensor([0, 12, 33]).int(), left=9, right=0, dropout_p=0.4,
    cu_seqlens_k=torch.tensor([0, 21, 40]).int(), seed=torch.tensor([3, 2**62]), alibi_slopes=torch.tensor([[0.5, 0.1]] * 2),
)  # fmt: skip
PARTS = [
    pytest.param(make, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for i, (name, make) in enumerate({"everything": PART, "packed": PACKED}.items())
    for dtype in (DTYPES if EVERY_DTYPE else DTYPES[i:][:1])
]


@pytest.mark.parametrize(("make", "dtype"), PARTS)
def test_derivatives_of_a_part(make, dtype):
    call = add_tangents(make(dtype), DIFFERENTIABLE)
    check(with_tangents(attention_at), call, and_tangents(DIFFERENTIABLE))


@pytest.mark.parametrize(("make", "dtype"), PARTS)
def test_statistics_of_a_part(make, dtype):
    check(with_stats(attention_at), make(dtype), DIFFERENTIABLE)


LIMITS = st.one_of(st.none(), st.integers(-60, 60), st.just(2**62))
POSITIONS = st.one_of(st.integers(-80, 80), st.sampled_from([-(2**40), 10**6]))
LENGTHS = st.sampled_from([1, 15, 16, 33, 48, 65])


@settings(max_examples=scaled(10))
@given(LIMITS, LIMITS, st.tuples(POSITIONS, POSITIONS), LENGTHS, LENGTHS, st.booleans(), st.sampled_from(DTYPES))
def test_a_part_anywhere(left, right, positions, q_len, k_len, has_mask, dtype):
    """Negative limits, too, which leave out the keys around a row."""
    call = grouped(q_len, k_len, batch=2, dim=8, left=left, right=right, dropout_p=0.3, seed=1)(dtype)
    call["places"] = torch.tensor([Place(position, 7, 4 * b, b) for b, position in enumerate(positions)])
    if has_mask:  # It hides whole blocks, and is one for both examples.
        call["mask"] = (torch.arange(k_len) // 16 + torch.arange(q_len)[:, None] // 32) % 3 > 0
    check(with_stats(attention_at, ("key_mass",)), call)


@pytest.mark.parametrize("position", [-(2**62), -1000, -33, 40, 10**6, 2**40])
def test_rows_far_from_the_keys_see_none(position):
    call = grouped(places=torch.tensor([Place(position, 0, 0, 0)]), left=0, right=0)(torch.float32)
    results = run(attention_at, call, ("query", "key", "value"), **TRITON)
    assert (results.pop("output 1") == -torch.inf).all()
    assert not any(result.any() for result in results.values())


@pytest.mark.parametrize("seed", [torch.tensor(7), torch.tensor([3, 2**62])], ids=["one seed", "a seed for each"])
def test_dropout_goes_on_from_the_place(seed):
    """With equal scores, and unit vectors for values, the output is zero where a weight was dropped."""
    batch, heads, queries, keys = 2, 3, 33, 50
    places = torch.tensor([Place(0, 1000, 36, 5), Place(0, 2**32 - 33, 2**33 + 4, 2**32 - 3)])
    value = torch.eye(keys).expand(batch, heads, keys, keys)
    call = {"query": torch.zeros(batch, heads, queries, 8), "key": torch.zeros(batch, heads, keys, 8), "value": value}
    call |= {"dropout_p": 0.4, "seed": seed, "places": places}
    keep = keep_mask(seed, 0.4, batch, heads, queries, keys, places=places)
    for backend in (TRITON, {"backend": "cpu"}):
        assert torch.equal(run(attention_at, call, (), **backend)["output 0"] != 0, keep), backend
