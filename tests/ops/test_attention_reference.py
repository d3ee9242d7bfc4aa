"""Test the oracle of attention itself against a loop over single numbers, torch's own attention, and finite differences."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.philox_paper import philox_of_the_paper
from torch.autograd import gradcheck

import fastlm
from fastlm.reference.attention import drop_below, keep_mask
from fastlm.testing import seeded_normal

B, H, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 7, 3, 2


def qkv(q_len=LQ, k_len=LK):
    shapes = ((B, H, q_len, D), (B, HKV, k_len, D), (B, HKV, k_len, DV))
    return [seeded_normal(i, shape, torch.float64) for i, shape in enumerate(shapes)]


def attend(*tensors, **options):
    return fastlm.attention(*tensors, return_lse=True, backend="reference", **options)


# ---- by the definition, number by number ------------------------------------------------------------------------------------


def by_the_definition(query, key, value, mask=None, causal=False, window=(None, None), scale=None, softcap=None, slopes=None,
                      sinks=None):  # fmt: skip
    """Compute (out, lse) with Python's floats."""
    (batch, heads, q_len, dim), k_len = query.shape, key.shape[2]
    out, lse = torch.zeros(batch, heads, q_len, value.shape[3]).double(), torch.zeros(batch, heads, q_len).double()
    for b, h, i in product(range(batch), range(heads), range(q_len)):
        kv, place, weights = h // (heads // key.shape[1]), i + k_len - q_len, {}
        for j in range(k_len):
            s = (1 / math.sqrt(dim) if scale is None else scale) * sum((query[b, h, i] * key[b, kv, j]).tolist())
            s = softcap * math.tanh(s / softcap) if softcap else s
            s -= slopes.expand(batch, heads)[b, h].item() * abs(place - j) if slopes is not None else 0.0
            allowed = mask.expand(batch, heads, q_len, k_len)[b, h, i, j].item() if mask is not None else True
            s += allowed if mask is not None and mask.dtype != torch.bool else 0.0
            seen = allowed is not False and not (causal and j > place)
            seen = seen and (window[0] is None or j >= place - window[0]) and (window[1] is None or j <= place + window[1])
            if seen:
                weights[j] = math.exp(s)
        total = sum(weights.values()) + (math.exp(sinks[h].item()) if sinks is not None else 0.0)
        lse[b, h, i] = math.log(total) if total else -math.inf
        for j, weight in weights.items():
            out[b, h, i] += weight / total * value[b, kv, j]
    return out, lse


FEATURES = {
    "plain": {},
    "scale": {"scale": -0.7},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "window to the left": {"window": (1, None), "causal": True},
    "softcap": {"softcap": 0.8},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 2.0]).double()},
    "slopes per example": {"alibi_slopes": seeded_normal(7, (B, H), torch.float64).abs()},
    "sinks": {"sinks": seeded_normal(8, (H,), torch.float64)},
    "bool mask": {"mask": seeded_normal(9, (B, 1, LQ, LK), torch.float64) > 0},
    "mask": {"mask": seeded_normal(9, (H, LQ, LK), torch.float64)},
    "mask per key": {"mask": seeded_normal(9, (B, 1, 1, LK), torch.float64)},
    "everything": {
        "scale": 0.4, "softcap": 1.3, "window": (3, 1), "sinks": seeded_normal(8, (H,), torch.float64),
        "alibi_slopes": seeded_normal(7, (H,), torch.float64).abs(), "mask": seeded_normal(9, (LQ, LK), torch.float64),
    },
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", [(LQ, LK), (LQ, 3)], ids=["", "few keys"])
def test_the_reference_is_the_definition(feature, lengths):
    options = dict(FEATURES[feature])
    if "mask" in options:
        options["mask"] = options["mask"][..., : lengths[1]]
    tensors = qkv(*lengths)
    results = attend(*tensors, **options)
    options["slopes"] = options.pop("alibi_slopes", None)
    for result, expected in zip(results, by_the_definition(*tensors, **options)):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"attn_mask": seeded_normal(9, (LQ, LQ), torch.float64)}, {"is_causal": True}])
def test_the_reference_is_torch_s_attention(options):
    query, key, value = qkv(LQ, LQ)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    out, _ = attend(query, key, value, mask=options.get("attn_mask"), causal=options.get("is_causal", False))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


# ---- gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_finite_differences(feature):
    options = dict(FEATURES[feature])
    learned = {name: options.pop(name) for name in ("mask", "sinks") if name in options}
    fixed = {name: learned.pop(name) for name in list(learned) if not learned[name].is_floating_point()}
    leaves = [t.clone().requires_grad_() for t in (*qkv(), *learned.values())]

    def outputs(query, key, value, *more):
        return attend(query, key, value, **options, **fixed, **dict(zip(learned, more)))

    assert gradcheck(outputs, leaves)


def test_gradients_with_dropout_are_those_of_finite_differences():
    leaves = [t.requires_grad_() for t in qkv()]
    assert gradcheck(lambda *tensors: attend(*tensors, dropout_p=0.4, seed=3), leaves)


# ---- dropout ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [-5, torch.tensor([2**40 + 1, 7])], ids=["one", "per example"])
@pytest.mark.parametrize("dropout_p", [0.25, 0.3, 0.999])
def test_dropout_drops_what_philox_says(seeds, dropout_p):
    kept = keep_mask(torch.as_tensor(seeds), dropout_p, B, H, LQ, LK)
    for b, h, i, j in product(range(B), range(H), range(LQ), range(LK)):
        seed = (seeds if isinstance(seeds, int) else seeds[b].item()) % 2**64
        third = b * H + h if isinstance(seeds, int) else h
        word = philox_of_the_paper([j // 4, i, third, 0], [seed & 0xFFFFFFFF, seed >> 32])[j % 4]
        assert kept[b, h, i, j].item() == ((word + 0.5) / 2**32 >= dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 2.0**-33, 0.1, 0.5, 1 - 2.0**-33, 1 - 2.0**-53])
def test_the_first_word_that_is_kept_is_exact(dropout_p):
    """The condition in Python's integers is (2 word + 1) / 2**33 >= p."""
    numerator, denominator = dropout_p.as_integer_ratio()
    word = drop_below(dropout_p)
    assert (2 * word + 1) * denominator >= numerator * 2**33
    assert word == 0 or (2 * word - 1) * denominator < numerator * 2**33


def test_dropout_scales_what_it_keeps():
    query, key, value = qkv()
    weights = torch.eye(LK).double().expand(B, HKV, LK, LK)
    p, _ = attend(query, key, weights)
    dropped, lse = attend(query, key, weights, dropout_p=0.4, seed=3)
    kept = keep_mask(torch.tensor(3), 0.4, B, H, LQ, LK)
    torch.testing.assert_close(dropped, torch.where(kept, p / 0.6, 0.0))
    torch.testing.assert_close(lse, attend(query, key, value)[1])


# ---- rows that see no key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("how", ["mask", "float mask", "causal", "no keys"])
def test_a_row_with_nothing_to_attend_to_is_zero_and_so_are_its_gradients(backend, how):
    tensors = [t.float().requires_grad_() for t in qkv(9, 0 if how == "no keys" else 5)]
    mask = torch.ones(9, 5, dtype=torch.bool)
    mask[:4] = False
    options = {
        "mask": {"mask": mask},
        "float mask": {"mask": torch.zeros(9, 5).masked_fill(~mask, -math.inf).requires_grad_()},
        "causal": {"causal": True},
        "no keys": {},
    }[how]
    out, lse = fastlm.attention(*tensors, return_lse=True, backend=backend, **options)
    (out.sum() + lse.masked_fill(lse == -math.inf, 0).sum()).backward()
    empty = slice(0, 9 if how == "no keys" else 4)
    assert not out[:, :, empty].any() and (lse[:, :, empty] == -math.inf).all() and lse[:, :, empty.stop :].isfinite().all()
    assert not tensors[0].grad[:, :, empty].any()
    assert all(t.grad.isfinite().all() for t in tensors)
    if how == "float mask":
        assert not options["mask"].grad[empty].any() and options["mask"].grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_otherwise_empty_row_has_the_lse_of_its_sink(backend):
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    query, key, value = (t.float() for t in qkv(3, 0))
    out, lse = fastlm.attention(query, key, value, sinks=sinks, return_lse=True, backend=backend)
    lse.sum().backward()
    assert not out.any()
    torch.testing.assert_close(lse, sinks.detach()[:, None].expand(B, H, 3))
    torch.testing.assert_close(sinks.grad, torch.full((4,), 6.0))
