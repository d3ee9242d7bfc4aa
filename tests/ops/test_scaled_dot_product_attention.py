"""Test that fastlm.scaled_dot_product_attention has the signature, shapes, alignment and answers of torch's."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.testing import seeded_normal

OURS, TORCHS = fastlm.scaled_dot_product_attention, F.scaled_dot_product_attention
# Other tests hold both to the exact answer by the rule of errors (test_cases.py). Here they are compared with each other.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the op."""


def normals(*shape, seed=1, dtype=torch.float32):
    return seeded_normal(seed, shape, dtype)


def assert_same(tensors, dtype=torch.float32, **options):
    """Compare values, and the gradients of every tensor that may have one."""
    results = []
    for function in (OURS, TORCHS):
        call = {**dict(zip(("query", "key", "value"), tensors)), **options}
        leaves = {n: t.clone().requires_grad_() for n, t in call.items() if torch.is_tensor(t) and t.is_floating_point()}
        out = function(**{**call, **leaves})
        gradients = torch.autograd.grad(out, list(leaves.values()), normals(*out.shape, seed=9, dtype=dtype))
        results.append((out, *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * (1 + theirs.abs().max().item()))


def test_the_signature_is_torch_s():
    """torch's function is in C, but its documentation begins with the signature."""
    ours = list(inspect.signature(OURS).parameters)
    documented = TORCHS.__doc__[TORCHS.__doc__.index("(") + 1 : TORCHS.__doc__.index(")")]
    theirs = [part.split("=")[0].strip() for part in documented.replace("*", "").split(",") if part.split("=")[0].strip()]
    assert ours[: len(theirs)] == theirs and ours[len(theirs) :] == ["backend"]


@DTYPES
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (5, 11), (11, 5)])
def test_values_and_gradients(dtype, is_causal, lengths):
    q_len, k_len = lengths
    shapes = (2, 3, q_len, 8), (2, 3, k_len, 8), (2, 3, k_len, 12)
    assert_same([normals(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)], dtype, is_causal=is_causal)


SHAPES = {
    "two dimensions": ((5, 8), (7, 8), (7, 8)),
    "three dimensions": ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "five dimensions": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
    "six dimensions": ((2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8), (2, 1, 2, 3, 7, 8)),
    "a batch of keys for all": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "leading dimensions that broadcast": ((4, 1, 3, 5, 8), (2, 3, 7, 8), (1, 2, 3, 7, 8)),
    "a head of keys for all": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "a head of queries for all": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "a head of values for all": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_number_of_dimensions(shapes, is_causal):
    assert_same([normals(*shape, seed=i) for i, shape in enumerate(shapes)], is_causal=is_causal)


MASKS = [(5, 7), (1, 7), (5, 1), (3, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7), (4, 1, 3, 5, 7)]  # torch requires two dimensions.


@pytest.mark.parametrize("mask_shape", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_any_shape(mask_shape, kind):
    lead = (4,) if len(mask_shape) == 5 else ()
    tensors = [normals(*lead, 2, 3, rows, 8, seed=rows) for rows in (5, 7, 7)]
    mask = normals(*mask_shape, seed=4)
    assert_same(tensors, attn_mask=mask if kind == "float" else mask > -1)


def test_grouped_heads_and_a_scale():
    tensors = normals(2, 6, 5, 8), normals(2, 2, 7, 8, seed=2), normals(2, 2, 7, 8, seed=3)
    assert_same(tensors, enable_gqa=True, scale=0.2, is_causal=True)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        OURS(*tensors)
    assert_same((*tensors[:2], normals(2, 3, 7, 8)), enable_gqa=True)  # Keys and values may have different groups.


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_gradients_too(is_causal):
    """Small calls take this path."""
    for heads, kv_heads, q_len, k_len in ((3, 3, 5, 7), (4, 2, 7, 5), (1, 1, 1, 9)):
        tensors = normals(2, heads, q_len, 8), *(normals(2, kv_heads, k_len, 8, seed=seed) for seed in (2, 3))
        options = {"is_causal": is_causal, "enable_gqa": heads != kv_heads}
        torch.testing.assert_close(OURS(*tensors, **options), TORCHS(*tensors, **options))


def test_a_row_without_keys_is_zero_as_torch_has_it():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    tensors = [normals(2, 3, rows, 8, seed=rows) for rows in (5, 7, 7)]
    assert not OURS(*tensors, attn_mask=mask)[:, :, 2].any()
    torch.testing.assert_close(OURS(*tensors, attn_mask=mask), TORCHS(*tensors, attn_mask=mask))


def test_dropout_drops_its_share_by_torch_s_generator():
    query = torch.zeros(1, 1, 64, 8)
    key, value = torch.zeros(1, 1, 64, 8), torch.eye(64).expand(1, 1, 64, 64)
    torch.manual_seed(1)
    weights = OURS(query, key, value, dropout_p=0.25)
    assert weights.unique().tolist() == pytest.approx([0.0, 1 / 64 / 0.75])
    share = (weights == 0).double().mean().item()
    assert abs(share - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 64**2)
    torch.manual_seed(1)
    assert torch.equal(OURS(query, key, value, dropout_p=0.25), weights)
    assert not torch.equal(OURS(query, key, value, dropout_p=0.25), weights)


BAD = [
    ({"query": torch.zeros(8)}, ValueError, "query must have shape"),
    ({"key": torch.zeros(2, 3, 7, 9)}, ValueError, "key must have query's head_dim 8"),
    ({"key": torch.zeros(5, 3, 7, 8)}, ValueError, "leading dimensions that broadcast"),
    ({"value": torch.zeros(2, 3, 6, 8)}, ValueError, "value must have key's shape"),
    ({"query": torch.zeros(2, 4, 5, 8)}, ValueError, "key must have 1 or 4 heads"),
    ({"attn_mask": torch.zeros(5, 6)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": torch.zeros(3, 1, 5, 7)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": torch.zeros(2, 1, 1, 5, 7)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": torch.zeros(5, 7).int()}, TypeError, "attn_mask must be bool"),
    ({"attn_mask": torch.zeros(5, 7), "is_causal": True}, ValueError, "attn_mask must be None where is_causal"),
    ({"is_causal": None}, TypeError, "is_causal must be a bool"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must lie between 0 and 1"),
    ({"query": torch.zeros(())}, ValueError, "query must have shape"),
    ({"scale": math.inf}, ValueError, "scale must be finite"),
    ({"key": torch.zeros(2, 3, 7, 8).double()}, TypeError, "key must have query's dtype"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input_is_refused_by_name(wrong, error, message):
    call = {"query": torch.zeros(2, 3, 5, 8), "key": torch.zeros(2, 3, 7, 8), "value": torch.zeros(2, 3, 7, 8)}
    with pytest.raises(error, match=message):
        OURS(**{**call, **wrong})
