"""Test the weights of chosen queries and the largest weights of every query against the whole matrix."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import SPECS
from support.oracle import Oracle

import fastlm
from fastlm.reference.attention import positions, scores, softmax_weights
from fastlm.testing import VALUE_FACTOR, assert_as_good_as_plain, seeded_normal

CASES = [name for name in SPECS["attention"].cases if name not in ("no batch", "no queries")]
OPTIONS = ("mask", "causal", "window", "scale", "softcap", "alibi_slopes", "sinks")


def qkv(q_len=20, k_len=30, heads=2, dim=8) -> dict:
    return {name: seeded_normal(i, (1, heads, rows, dim), torch.float32) for i, (name, rows) in enumerate(
        {"query": q_len, "key": k_len, "value": k_len}.items())}  # fmt: skip


def looked_at(call: dict, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Return query, key, lse and the options of a call."""
    call = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    _, lse = fastlm.attention(**call)
    return call["query"], call["key"], lse, {name: call[name] for name in OPTIONS if name in call}


def matrix(query, key, lse, dtype=torch.float64, **options):
    """Return the whole matrix of weights."""
    mask, sinks = (
        None if t is None else t if t.dtype == torch.bool else t.to(dtype) for t in map(options.get, ("mask", "sinks"))
    )
    left, right = options.get("window", (None, None))
    right = 0 if options.get("causal") else right
    scale, softcap = options.get("scale") or query.shape[3] ** -0.5, options.get("softcap") or 0.0
    s = scores(
        query.to(dtype),
        key.to(dtype),
        mask,
        options.get("alibi_slopes"),
        left,
        right,
        scale,
        softcap,
        positions(query, key, None),
    )
    return softmax_weights(s, sinks)[0][..., : key.shape[2]]


# ---- values -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chosen_queries_have_the_weights_of_the_matrix(case, dtype):
    query, key, lse, options = looked_at(SPECS["attention"].cases[case](torch.float32), dtype)
    rows = torch.tensor([query.shape[2] - 1, 0, query.shape[2] // 2])
    weights = fastlm.attention_weights(query, key, lse, rows=rows, **options)
    golden, plain = (matrix(query, key, lse, each, **options)[:, :, rows] for each in (torch.float64, torch.float32))
    assert_as_good_as_plain(weights, plain, golden, VALUE_FACTOR, "weights")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 5, 32])
def test_the_largest_weights_are_those_of_the_matrix(case, k):
    query, key, lse, options = looked_at(SPECS["attention"].cases[case](torch.float64), torch.float64)
    indices, weights = fastlm.top_keys(query, key, lse, k, **options)
    assert indices.shape == weights.shape == (*query.shape[:3], k)
    whole = matrix(query, key, lse, **options)
    expected = torch.zeros_like(weights)
    n = min(k, key.shape[2])
    expected[..., :n] = whole.topk(n, dim=3).values
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    assert ((indices == -1) == (weights == 0.0)).all()
    picked = torch.gather(whole, 3, indices.clamp(min=0)) if key.shape[2] else torch.zeros_like(weights)
    torch.testing.assert_close(torch.where(indices < 0, 0.0, picked), weights, rtol=0, atol=1e-12)


def largest_weights(backend=None, **call):
    """Return the 7 largest weights of each query."""
    _, lse = fastlm.attention(**call, backend=backend)
    options = {name: call[name] for name in OPTIONS if name in call}
    return fastlm.top_keys(call["query"], call["key"], lse, 7, **options, backend=backend)[1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_finds_weights_as_good_as_plain_pytorch(case, dtype, isa):
    """Rounding may exchange keys of nearly one weight: so each weight is held to its rank's, and to its key's."""
    call = SPECS["attention"].cases[case](dtype)
    weights = Oracle(largest_weights, call, (), set()).check(backend="cpu")["output 0"]
    query, key, options = call["query"], call["key"], {name: call[name] for name in OPTIONS if name in call}
    _, lse = fastlm.attention(**call)
    indices, same = fastlm.top_keys(query, key, lse, 7, **options, backend="cpu")
    assert torch.equal(same, weights) and (weights.diff(dim=3) <= 0).all()
    whole = F.pad(matrix(query, key, lse, **options), (0, 1))  # -1 is a key of weight 0.
    torch.testing.assert_close(weights, whole.gather(3, indices % whole.shape[3]).float())
    ordered = indices.sort(dim=3).values
    assert ((ordered.diff(dim=3) > 0) | (ordered[..., 1:] == -1)).all()


def test_many_queries_are_taken_in_parts(monkeypatch):
    query, key, lse, options = looked_at({**qkv(), "causal": True, "return_lse": True}, torch.float64)
    expected = fastlm.top_keys(query, key, lse, 4, **options)
    monkeypatch.setattr("fastlm.reference.attention_weights._CHUNK", 2 * 30 * 3)  # three queries
    indices, weights = fastlm.top_keys(query, key, lse, 4, **options)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(weights, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_first_of_equal_keys_comes_first(backend, isa):
    query, key = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 50, 4)
    indices, weights = fastlm.top_keys(query, key, torch.full((1, 1, 3), 2.0 + math.log(50)), 3, backend=backend)
    assert indices.tolist() == [[[[0, 1, 2]] * 3]]
    torch.testing.assert_close(weights, torch.full((1, 1, 3, 3), 1 / 50))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
def test_rows_of_huge_scores_keep_the_number_of_keys(fill, backend, isa):
    """Beside -1e9 the LSE has no room for log(30), but all keys have the same weight."""
    call = qkv()
    mask = torch.full((20, 30), fill)
    _, lse = fastlm.attention(**call, mask=mask, return_lse=True)
    weights = fastlm.attention_weights(call["query"], call["key"], lse, rows=torch.arange(20), mask=mask)
    torch.testing.assert_close(weights, torch.full((1, 2, 20, 30), 1 / 30))
    largest = fastlm.top_keys(call["query"], call["key"], lse, 2, mask=mask, backend=backend)[1]
    torch.testing.assert_close(largest, weights[..., :2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_part_of_the_keys_has_its_part_of_the_weights(backend, isa):
    """Give a part of the keys, as one rank of several holds it, and the log-sum-exp of all."""
    call = qkv()
    _, lse = fastlm.attention(**call, return_lse=True)
    rows = torch.arange(20)
    whole = fastlm.attention_weights(call["query"], call["key"], lse, rows=rows)
    part = fastlm.attention_weights(call["query"], call["key"][:, :, :11], lse, rows=rows)
    torch.testing.assert_close(part, whole[..., :11])
    largest = fastlm.top_keys(call["query"], call["key"][:, :, :11], lse, 3, backend=backend)[1]
    torch.testing.assert_close(largest, part.topk(3, dim=3).values)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_comes_first_as_in_torch(backend, isa):
    call = qkv()
    mask = torch.zeros(20, 30)
    mask[3, 17] = math.nan
    _, lse = fastlm.attention(**call, mask=mask, return_lse=True)
    indices, weights = fastlm.top_keys(call["query"], call["key"], lse, 2, mask=mask, backend=backend)
    assert (indices[:, :, 3, 0] == 17).all() and weights[:, :, 3].isnan().all() and weights.isnan().sum() == 4


@pytest.mark.parametrize("causal", [True, False])
def test_any_number_of_threads_finds_the_same(causal, threads, widest_isa):
    call = qkv(q_len=300, k_len=500, heads=3, dim=32)
    _, lse = fastlm.attention(**call, causal=causal, return_lse=True)
    threads(1)
    expected = fastlm.top_keys(call["query"], call["key"], lse, 8, causal=causal, backend="cpu")
    for count in (2, 3, 7):
        threads(count)
        results = fastlm.top_keys(call["query"], call["key"], lse, 8, causal=causal, backend="cpu")
        assert all(map(torch.equal, results, expected))


# ---- gradients, and the rest of torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}, {"sinks": torch.tensor([0.2, -1.0])}], ids=str)
def test_the_gradient_is_that_of_finite_differences(options):
    """Differentiate through the log-sum-exp, too, which is a function of the same tensors."""
    leaves = [tensor.double().requires_grad_() for tensor in qkv(q_len=7, k_len=5).values()][:2]
    options = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    rows = torch.tensor([6, 1])

    def weights(query, key):
        _, lse = fastlm.attention(query, key, key, return_lse=True, **options)
        return fastlm.attention_weights(query, key, lse, rows=rows, **options)

    assert torch.autograd.gradcheck(weights, leaves)


def test_autocast_leaves_the_weights_alone():
    call = qkv()
    _, lse = fastlm.attention(**call, return_lse=True)
    rows = torch.arange(20)
    expected = fastlm.attention_weights(call["query"], call["key"], lse, rows=rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastlm.attention_weights(call["query"], call["key"], lse, rows=rows), expected)


def test_the_op_passes_opcheck_and_compiles_and_maps(widest_isa):
    call = qkv()
    query, key, lse = call["query"], call["key"], torch.zeros(1, 2, 20)
    arguments = (query, key, lse, None, None, None, None, 0, 0.3, 0.0, 4)
    torch.library.opcheck(torch.ops.fastlm.attention_top_keys.default, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: fastlm.top_keys(*t, 4), fullgraph=True, backend="aot_eager")
    expected = fastlm.top_keys(query, key, lse, 4)
    assert all(map(torch.equal, compiled(query, key, lse), expected))
    mapped = torch.vmap(lambda *t: fastlm.top_keys(*t, 4))(*(t.unsqueeze(0) for t in (query, key, lse)))
    assert all(torch.equal(result[0], value) for result, value in zip(mapped, expected))


# ---- bad input --------------------------------------------------------------------------------------------------------------

GOOD = {"lse": torch.zeros(1, 2, 20), "rows": torch.tensor([1])}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lse": torch.zeros(1, 2, 21)}, ValueError, "lse must have shape"),
        ({"lse": None}, TypeError, "lse must be a tensor"),
        ({"lse": torch.zeros(1, 2, 20, dtype=torch.int32)}, TypeError, "lse must be float32"),
        ({"rows": [1]}, TypeError, "rows must be an int64"),
        ({"rows": torch.tensor([1.0])}, TypeError, "rows must be int64"),
        ({"rows": torch.tensor(1)}, ValueError, "rows must have shape"),
        ({"rows": torch.tensor([3, 20])}, ValueError, "rows must lie between 0 and 19; got 20"),
        ({"rows": torch.tensor([-1])}, ValueError, "rows must lie between 0 and 19; got -1"),
        ({"key": torch.zeros(1, 2, 30, 9)}, ValueError, "key must have query's batch"),
        ({"key": torch.zeros(1, 3, 30, 8)}, ValueError, "key must have a number of heads"),
        ({"key": torch.zeros(1, 2, 30, 8).bfloat16()}, TypeError, "key must have query's dtype"),
        ({"mask": torch.zeros(20, 31)}, ValueError, "mask must broadcast"),
        ({"window": 3}, TypeError, "window must be a pair"),
    ],
    ids=str,
)
def test_bad_input_of_attention_weights_is_refused(changed, error, message):
    call = qkv()
    with pytest.raises(error, match=message):
        fastlm.attention_weights(**{"query": call["query"], "key": call["key"], **GOOD, **changed})


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (33, ValueError), (2.0, TypeError), (True, TypeError)], ids=str)
def test_bad_numbers_of_keys_are_refused(k, error):
    call = qkv()
    with pytest.raises(error, match="k must"):
        fastlm.top_keys(call["query"], call["key"], GOOD["lse"], k)
