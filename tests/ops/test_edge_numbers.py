"""Test every backend on one table of edge cases of attention's softmax.

They are rows without keys, masks of large finite numbers, infinities, NaN, huge logits, empty dimensions, and the ends of
dropout and softcap. Golden is the definition, written here in float64 without the reference. The tests hold the reference to
the definition, and the kernels to the reference.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from support.derivatives import add_tangents, and_tangents, with_tangents
from support.oracle import Oracle
from support.stats import with_stats

import fastlm
from fastlm.testing import seeded_normal, worst_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, HEADS, QUERIES, KEYS, DIM = 1, 2, 70, 130, 16
ROW = 3  # The row that a case is about.


def qkv(dtype, queries=QUERIES, keys=KEYS, dim=DIM, value_dim=DIM, batch=BATCH, heads=HEADS) -> dict:
    shapes = {"query": (queries, dim), "key": (keys, dim), "value": (keys, value_dim)}
    return {name: seeded_normal(i, (batch, heads, *shape), dtype) for i, (name, shape) in enumerate(shapes.items())}


def masked_row(fill: float, **options):
    """Return a maker of a call with a float mask of zeros whose row ROW is all ``fill``."""

    def make(dtype):
        mask = torch.zeros(QUERIES, KEYS, dtype=dtype)
        mask[ROW] = max(fill, torch.finfo(dtype).min) if math.isfinite(fill) else fill
        return {**qkv(dtype), "mask": mask, **options}

    return make


def mask_at(row: int, value: float):
    """Return a maker of a call with a float mask of zeros and one other number."""

    def make(dtype):
        mask = torch.zeros(QUERIES, KEYS, dtype=dtype)
        mask[row, 5] = value
        return {**qkv(dtype), "mask": mask}

    return make


def huge_logits(**options):
    """Return a maker of a call with products up to 2^34, exact in float32 in any order of summation, in whole tiles of keys."""

    def make(dtype):
        signs = [seeded_normal(i, (1, 1, 128, 16), dtype).sign() * 2.0**15 for i in (5, 6)]
        return {"query": signs[0][:, :, :72], "key": signs[1], "value": seeded_normal(7, (1, 1, 128, 16), dtype), **options}

    return make


def with_options(**options):
    return lambda dtype: {**qkv(dtype), **{k: v(dtype) if callable(v) else v for k, v in options.items()}}


def hidden(*rows):
    """Make a bool mask that hides every key from those rows."""
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    mask[list(rows)] = False
    return mask


def lowest_but_one(dtype):
    mask = torch.full((QUERIES, KEYS), torch.finfo(dtype).min, dtype=dtype)
    mask[:, 9] = 0
    return mask


LOWEST = torch.finfo(torch.float32).min  # A mask holds the lowest number of its own dtype.
CASES = {
    "a row that a bool mask hides": with_options(mask=hidden(ROW)),
    "a row of -inf": masked_row(-math.inf),
    "a row of -1e4": masked_row(-1e4),
    "a row of -1e8": masked_row(-1e8),
    "a row of -1e9": masked_row(-1e9),
    "a row of -2.5e38": masked_row(-2.5e38),
    "a row of the lowest number": masked_row(LOWEST),
    "a row of the lowest number, causal": masked_row(LOWEST, causal=True),
    "a row of the lowest number, with ALiBi": masked_row(LOWEST, softcap=5.0, alibi_slopes=torch.tensor([0.5, 2.0])),
    "a row of -1e9, with dropout": masked_row(-1e9, dropout_p=0.5, seed=3),
    "all but one key at the lowest number": lambda dtype: {**qkv(dtype), "mask": lowest_but_one(dtype)},
    "NaN in the mask": mask_at(ROW, math.nan),
    "+inf in the mask": mask_at(ROW, math.inf),
    "a large positive mask": mask_at(ROW, 1e4),
    "huge logits": huge_logits(),
    "huge logits, masked": huge_logits(mask=torch.zeros(72, 128)),
    "huge logits, causal": huge_logits(causal=True),
    "huge logits, negative scale": huge_logits(scale=-0.25),
    "a sink and a row without keys": with_options(mask=hidden(ROW), sinks=lambda dtype: torch.tensor([0.5, -2.0], dtype=dtype)),
    "a sink of NaN": with_options(mask=hidden(ROW), sinks=lambda dtype: torch.tensor([math.nan, 1.0], dtype=dtype)),
    "a sink of -inf": with_options(mask=hidden(ROW), sinks=lambda dtype: torch.tensor([-math.inf, 1.0], dtype=dtype)),
    "a sink above all scores": with_options(sinks=lambda dtype: torch.tensor([6e4, -6e4], dtype=dtype)),
    "a sink beside a row of -1e9": masked_row(-1e9, sinks=torch.tensor([0.0, -1.0])),
    "scale 0": with_options(scale=0.0),
    "the smallest softcap": with_options(softcap=1e-46),
    "the largest softcap": with_options(softcap=1e300),
    "dropout of all but nothing": with_options(dropout_p=1 - 1e-10, seed=1),
    "dropout of everything": with_options(dropout_p=1.0, seed=1),
    "no keys": lambda dtype: qkv(dtype, keys=0),
    "no queries": lambda dtype: qkv(dtype, queries=0),
    "no batch": lambda dtype: qkv(dtype, batch=0),
    "no heads": lambda dtype: qkv(dtype, heads=0),
    "values of width 0": lambda dtype: qkv(dtype, value_dim=0),
    "a head_dim of 0": lambda dtype: qkv(dtype, dim=0),
}  # fmt: skip
DIFFERENTIABLE = ("query", "key", "value", "mask", "sinks")
ON_KERNELS = [name for name in CASES if name not in ("values of width 0", "a head_dim of 0")]


def attention(**arguments):
    return fastlm.attention(**arguments, return_lse=True)


# ---- the reference against the definition -----------------------------------------------------------------------------------


def by_definition(query, key, value, mask=None, causal=False, scale=None, softcap=None, alibi_slopes=None, sinks=None):
    """Return (out, lse) of float64 tensors. A row is without keys if all of them are hidden, not just far away."""
    queries, keys = query.shape[2], key.shape[2]
    s = query @ key.mT * (scale if scale is not None else query.shape[3] ** -0.5 if query.shape[3] else 1.0)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    s = s if alibi_slopes is None else s - alibi_slopes.double()[:, None, None] * distance.abs()
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    s = s.masked_fill(distance > 0, -math.inf) if causal else s
    s = s if sinks is None else torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], dim=3)
    if s.shape[3] == 0:
        return value.new_zeros(*s.shape[:3], value.shape[3]), value.new_full(s.shape[:3], -math.inf)
    weights = F.softmax(s, dim=3)
    weights = torch.where((s == -math.inf).all(dim=3, keepdim=True), 0.0, weights)
    lse = torch.logsumexp(s, dim=3)
    return weights[..., :keys] @ value, lse.masked_fill(lse == math.inf, math.nan)  # As the row is NaN, so is its LSE.


@pytest.mark.parametrize("case", [name for name in CASES if "dropout" not in name])
def test_the_reference_follows_the_definition(case):
    arguments = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in CASES[case](DTYPES[0]).items()
    }
    results, expected = attention(**arguments, backend="reference"), by_definition(**arguments)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-10, equal_nan=True)


# ---- the kernels against the reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ON_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_as_good_as_plain_pytorch(case, dtype, isa):
    Oracle(attention, CASES[case](dtype), DIFFERENTIABLE, set()).check(backend="cpu")


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("a row of", "huge", "no ", "a head", "values"))])
def test_gradients_are_never_nan_where_the_answer_is_not(case, widest_isa):
    arguments = CASES[case](torch.float32)
    leaves = {name: t.requires_grad_() for name, t in arguments.items() if name in DIFFERENTIABLE and t.is_floating_point()}
    out, _ = attention(**arguments)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), list(leaves.values())))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_nan_is_in_every_derivative_that_torch_has_it_in(name, isa):
    """Hold apart a row whose scores are all NaN and a row without keys."""

    def derivatives(backend):
        call = {key: tensor.requires_grad_() for key, tensor in qkv(torch.float32).items()}
        with torch.no_grad():
            call[name][0, 0, ROW, 0] = torch.nan
        leaves = tuple(call.values())
        first = torch.autograd.grad(attention(**call, backend=backend)[0].sum(), leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    for gradient, expected in zip(derivatives("cpu"), derivatives("reference")):
        assert torch.equal(gradient.isnan(), expected.isnan())


@pytest.mark.parametrize("case", ON_KERNELS)
def test_tangents_at_the_edge_are_as_good_as_plain_pytorch(case, widest_isa):
    call = add_tangents(CASES[case](torch.float32), DIFFERENTIABLE)
    Oracle(with_tangents(attention), call, and_tangents(DIFFERENTIABLE), set()).check(backend="cpu")


@pytest.mark.parametrize("case", ON_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_at_the_edge_are_as_good_as_plain_pytorch(case, dtype, widest_isa):
    Oracle(with_stats(attention), CASES[case](dtype), DIFFERENTIABLE, set()).check(backend="cpu")


# ---- known answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [-1e9, -2.5e38, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_of_large_finite_numbers_weighs_all_keys_the_same(fill, backend, isa):
    """torch computes the same in float32. The scores vanish beside the mask, and so does log(n) in the LSE."""
    arguments = masked_row(fill)(torch.float32)
    value = arguments["value"].requires_grad_()
    out, lse = attention(**arguments, backend=backend)
    torch.testing.assert_close(out[:, :, ROW], value.mean(dim=2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[:, :, ROW], torch.full((BATCH, HEADS), fill))
    (gradient,) = torch.autograd.grad(out[:, :, ROW].sum(), value)
    torch.testing.assert_close(gradient, torch.full_like(value, 1 / KEYS), rtol=1e-5, atol=0)


def test_differences_between_the_lowest_numbers_still_count(isa):
    """-3e38 is far below -2.5e38, though both times log2(e) would overflow."""
    arguments = masked_row(-3e38)(torch.float32)
    arguments["mask"][ROW, 7] = -2.5e38
    out, _ = attention(**arguments, backend="cpu")
    torch.testing.assert_close(out[:, :, ROW], arguments["value"][:, :, 7], rtol=1e-6, atol=0)


@pytest.mark.parametrize("value_dim", [2, 40, 70])
def test_a_row_with_all_weight_on_one_key_has_no_gradient_of_scores(value_dim, isa):
    """Find 0 to the bit, though the sums that cancel are rounded: both add up columns in one order."""
    arguments = qkv(torch.float32, value_dim=value_dim)
    arguments["key"][:, :, 5] *= 1e4  # The row's score is then far above or far below the others.
    arguments["query"] = arguments["key"][:, :, 5:6] / 100 + arguments["query"]
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    out, _ = attention(**arguments, backend="cpu")
    assert torch.equal(out, arguments["value"][:, :, 5:6].expand_as(out))
    of_query, of_key, of_value = torch.autograd.grad(out, leaves, seeded_normal(9, out.shape, torch.float32))
    assert not of_query.any() and not of_key.any() and of_value[:, :, 5].any()


@pytest.mark.parametrize("dropout_p", [1.0, 1 - 1e-10])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropout_of_everything_gives_zeros(dropout_p, backend, isa):
    arguments = qkv(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    out = fastlm.attention(**arguments, dropout_p=dropout_p, seed=1, backend=backend)
    assert not out.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_places_beyond_2_to_the_24_are_whole_numbers(isa):
    """ALiBi's distance is an integer, because float32 would be off by one there."""
    keys, seen, slopes = (1 << 24) + 67, 40, torch.tensor([0.5])
    query = seeded_normal(1, (1, 1, 9, 1), torch.bfloat16)
    key, value = torch.zeros(2, 1, 1, keys, 1, dtype=torch.bfloat16)
    key[:, :, -100:], value[:, :, -100:] = (seeded_normal(i, (1, 1, 100, 1), torch.bfloat16) for i in (2, 3))
    options = {"window": (seen, 0), "alibi_slopes": slopes, "backend": "cpu"}
    far = fastlm.attention(query, key, value, **options)
    near = fastlm.attention(query, key[:, :, -100:], value[:, :, -100:], **options)
    assert worst_error(far, near) <= 2**-7 * near.abs().max()


# ---- the same numbers, packed and cached ------------------------------------------------------------------------------------

WITHOUT_MASKS = [name for name in CASES if "mask" not in CASES[name](torch.float32) and "dropout" not in name]


@pytest.mark.parametrize("case", [name for name in WITHOUT_MASKS if name != "no batch"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_sequences_have_the_same_edges(case, backend, widest_isa):
    arguments = CASES[case](torch.float32)
    out, lse = attention(**arguments)
    lengths = [torch.tensor([0, arguments[name].shape[2]], dtype=torch.int32) for name in ("query", "key")]
    packed = {name: t[0].transpose(0, 1) if name in ("query", "key", "value") else t for name, t in arguments.items()}
    backend = backend if case in ON_KERNELS else "reference"
    results = fastlm.varlen_attention(
        **packed, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1], return_lse=True, backend=backend
    )
    torch.testing.assert_close(results[0].transpose(0, 1), out[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], lse[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", WITHOUT_MASKS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("queries", [1, None], ids=["one query", "all queries"])
def test_caches_have_the_same_edges(case, queries, backend, widest_isa):
    arguments = CASES[case](torch.float32)
    query = arguments.pop("query")[:, :, -(queries or QUERIES) :]
    key, value = arguments.pop("key"), arguments.pop("value")
    expected = attention(query=query, key=key, value=value, **arguments)
    lengths = torch.full((len(key),), key.shape[2], dtype=torch.int32)
    backend = backend if case in ON_KERNELS else "reference"
    results = fastlm.kvcache_attention(query, key, value, lengths, **arguments, return_lse=True, backend=backend)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


# ---- torch's own function ---------------------------------------------------------------------------------------------------

SHAPES = {
    "values of width 0": ((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 0)),
    "a head_dim of 0": ((2, 3, 5, 0), (2, 3, 5, 0), (2, 3, 5, 4)),
    "no keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "no queries": ((2, 3, 0, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    "no batch": ((0, 3, 5, 8), (0, 3, 5, 8), (0, 3, 5, 8)),
    "no heads": ((2, 0, 5, 8), (2, 0, 5, 8), (2, 0, 5, 8)),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 1.0}], ids=["plain", "causal", "dropout"])
def test_empty_dimensions_get_torchs_answer(case, options):
    tensors = [seeded_normal(i, shape, torch.float32) for i, shape in enumerate(SHAPES[case])]
    expected = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(fastlm.scaled_dot_product_attention(*tensors, **options), expected)
