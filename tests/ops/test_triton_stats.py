"""Test the statistics of attention's weights on the Triton kernels: on the GPU if there is one, in the interpreter elsewhere.

Golden is the reference in float64, for the statistics as for the gradients that flow back from them.
"""

import math

import pytest
import torch
from cases import SPECS
from hypothesis import given, settings
from support.guarded import Guarded
from support.oracle import Oracle, run
from support.stats import ALL_STATS, with_stats
from support.sweep import EVERY_DTYPE, scaled
from support.triton_interpreter import DEVICE
from test_attention_sweep import DIFFERENTIABLE, attention_calls, varlen_calls
from test_edge_numbers import huge_logits, masked_row, qkv
from test_triton_attention import DIMS, DTYPES, LENGTHS
from test_triton_derivatives import FEATURES, SEEN, grouped

import fastlm
from fastlm.testing import seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

TRITON = {"backend": "triton", "device": DEVICE}


def check(function, call: dict, names=ALL_STATS) -> dict:
    """Hold a call's results, statistics and gradients to the rule of errors."""
    return Oracle(with_stats(function, names), call | {"return_lse": True}, DIFFERENTIABLE, set()).check(**TRITON)


# ---- every feature ----------------------------------------------------------------------------------------------------------

CASES = [(name, case) for name in ("attention", "varlen_attention") for case in SPECS[name].cases]
ALONE = [(name,) for name in ALL_STATS]
CALLS = [  # Each case with all statistics or with one, in one dtype, in turns; with FASTLM_SWEEP=2 all of it.
    pytest.param(name, case, dtype, names, id=f"{name}-{case}-{str(dtype).removeprefix('torch.')}-{'+'.join(names)}")
    for i, (name, case) in enumerate(CASES)
    for dtype in (DTYPES if EVERY_DTYPE else DTYPES[i % 3 :][:1])
    for names in ([ALL_STATS, *ALONE] if EVERY_DTYPE else [ALL_STATS, ALONE[i // 2 % 3]][i % 2 :][:1])
]


@pytest.mark.parametrize(("name", "case", "dtype", "names"), CALLS)
def test_statistics_and_gradients_are_as_good_as_plain_pytorch(name, case, dtype, names):
    check(SPECS[name].function, SPECS[name].cases[case](dtype), names)


@pytest.mark.parametrize("name", ALL_STATS)
def test_one_statistic_alone_with_every_feature(name):
    check(fastlm.attention, FEATURES["everything"](torch.float32), (name,))


@settings(max_examples=scaled(5))
@given(attention_calls(LENGTHS, DIMS, most=2, groups=(1, 2)))
def test_statistics_anywhere(call):
    check(fastlm.attention, call)


@settings(max_examples=scaled(3))
@given(varlen_calls(LENGTHS, DIMS, groups=(1, 2)))
def test_statistics_of_packed_sequences_anywhere(call):
    check(fastlm.varlen_attention, call)


@pytest.mark.parametrize(("feature", "dtype"), [("causal", torch.bfloat16), ("everything", torch.float32)])
def test_out_and_lse_have_the_same_bits_without_statistics(feature, dtype):
    call = FEATURES[feature](dtype) | {"return_lse": True}
    expected, results = (run(function, call, (), **TRITON) for function in (fastlm.attention, with_stats(fastlm.attention)))
    for what, result in expected.items():
        assert torch.equal(results[what], result), what


# ---- what the statistics are ------------------------------------------------------------------------------------------------


def stats_of(call: dict, **options) -> fastlm.AttentionStats:
    """Return all statistics of a call on the Triton kernels."""
    call = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    *_, stats = fastlm.attention(**call, **options, return_stats=ALL_STATS, backend="triton")
    return fastlm.AttentionStats(*(stat.cpu() for stat in stats))


def test_the_mass_of_all_keys_is_the_number_of_rows_that_see_a_key():
    call = grouped(mask=SEEN, causal=True, dropout_p=0.5, seed=3)(torch.float32)
    seen = SEEN & (torch.arange(40) <= torch.arange(33)[:, None] + 7)
    number = seen.any(-1).sum().item()
    assert number < 33
    torch.testing.assert_close(stats_of(call).key_mass.sum(-1), torch.full((1, 2), float(number)))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -math.inf])], ids=["without sinks", "with sinks"])
@pytest.mark.parametrize("mask", [SEEN, SEEN.float().log()], ids=["bool", "float"])
def test_a_row_without_keys(mask, sinks):
    """Its statistics say so, and nothing flows back from them."""
    call = grouped(mask=mask, sinks=sinks)(torch.float32)
    stats = stats_of(call)
    assert not stats.entropy[:, :, 5].any() and (stats.max_logit[:, :, 5] == -math.inf).all()
    assert (stats.entropy >= 0).all() and stats.key_mass.isfinite().all()
    leaves = {name: call[name].to(DEVICE).requires_grad_() for name in ("query", "key", "value")}
    others = {name: value.to(DEVICE) for name, value in call.items() if name not in leaves and value is not None}
    *_, stats = fastlm.attention(**leaves, **others, return_stats=ALL_STATS, backend="triton")
    of_the_row = stats.entropy[:, :, 5].sum() + stats.max_logit[:, :, 5].sum()
    for gradient in torch.autograd.grad(of_the_row, [leaves["query"], leaves["key"]]):
        assert not gradient.any()


def test_the_first_of_equal_logits_gets_the_gradient():
    """Integers have exact products, so that nothing but the choice of the key can differ."""
    query, key = (seeded_normal(i, (1, 2, 40, 4), torch.float32).round().clamp(-1, 1) for i in range(2))
    call = {"query": query, "key": key, "value": key, "scale": 0.5, "causal": True}

    def gradients(outputs, _):
        return [torch.zeros_like(outputs[0]), torch.arange(80.0).view(1, 2, 40)]

    function = with_stats(fastlm.attention, ("max_logit",))
    expected = run(function, call, ("query", "key"), gradients, backend="reference")
    results = run(function, call, ("query", "key"), gradients, **TRITON)
    for what in ("output 1", "gradient of query", "gradient of key"):
        assert torch.equal(results[what], expected[what]), what


@pytest.mark.parametrize("sinks", [(80.0, -80.0), (-math.inf, 0.0), (math.inf, math.nan)], ids=str)
def test_the_entropy_counts_the_sink_as_a_key(sinks):
    check(fastlm.attention, grouped(sinks=torch.tensor(sinks), causal=True)(torch.float32))


@pytest.mark.parametrize(("fill", "dtype"), list(zip((-1e9, -math.inf, torch.finfo(torch.float32).min), DTYPES)))
def test_a_row_of_large_negative_numbers(fill, dtype):
    check(fastlm.attention, masked_row(fill)(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits(dtype):
    check(fastlm.attention, huge_logits()(dtype))


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_score_that_is_not_finite(number):
    """Let it fill the row's largest logit, as torch does, and no other row's."""
    call = {**qkv(torch.float32, 40, 40), "mask": torch.zeros(40, 40)}
    call["mask"][3, 7] = number
    results = run(with_stats(fastlm.attention), call, (), **TRITON)
    expected = run(with_stats(fastlm.attention), call, (), backend="reference")
    for what in ("output 1", "output 2"):
        torch.testing.assert_close(results[what], expected[what], equal_nan=True)


# ---- bits and memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask", "sinks"])
def test_a_row_does_not_depend_on_its_batch_and_every_run_gives_the_same_bits(name):
    call = {tensor: seeded_normal(i, (3, 2, 40, 16), torch.float32) for i, tensor in enumerate(("query", "key", "value"))}
    call[name] = seeded_normal(5, (3, 1, 40, 40) if name == "mask" else (2,), torch.float32)
    call |= {"causal": True, "return_lse": True}
    leaves = ("query", "key", "value", "mask") if name == "mask" else ("query", "key", "value")
    function = with_stats(fastlm.attention)
    whole, again = (run(function, call, leaves, **TRITON) for _ in range(2))
    alone = {k: v[1:2] if isinstance(v, torch.Tensor) and v.dim() == 4 else v for k, v in call.items()}
    sizes = [(3, 2, 40, 16), *[(3, 2, 40)] * 4]
    gradients = [seeded_normal(100 + i, size, torch.float32)[1:2] for i, size in enumerate(sizes)]
    for what, result in run(function, alone, leaves, lambda *_: gradients, **TRITON).items():
        assert torch.equal(whole[what], again[what]), what
        assert torch.equal(result, whole[what][1:2]), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_outside_the_tensors(dtype):
    """NaN surrounds every dimension of the inputs."""
    shapes = {"query": (2, 33, 24), "key": (1, 40, 24), "value": (1, 40, 17), "mask": (2, 33, 40)}
    guarded = Guarded(DEVICE)
    call = {name: guarded.put(seeded_normal(i, (1, *shape), dtype)) for i, (name, shape) in enumerate(shapes.items())}
    leaves = {name: tensor.requires_grad_() for name, tensor in call.items()}
    outputs = with_stats(fastlm.attention)(**leaves, causal=True, backend="triton")
    gradients = torch.autograd.grad([out.sum() for out in outputs], list(leaves.values()))
    assert all(result.isfinite().all() for result in (*outputs, *gradients))
    guarded.check(math.nan)


def test_opcheck():
    tensors = [seeded_normal(i, (1, 2, 9, 16), torch.float32).to(DEVICE) for i in range(3)]
    call = (*tensors, *[None] * 7, 2, 0, 0.3, 0.0, 0.0)
    ops = torch.ops.fastlm
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.triton_attention_stats.default, (*wanted, *call), raise_exception=True)
    out, lse, statistics, entropy, _, max_key, key_mass = ops.triton_attention_stats(True, True, *call)
    saved = out, lse, out, lse, statistics, entropy, lse, key_mass, entropy, max_key, False, False
    torch.library.opcheck(ops.triton_attention_stats_backward.default, (*saved, *call), raise_exception=True)
