"""Test that the same inputs and seed give the same bits on any number of threads, in any batch, and in every repetition."""

import pytest
import torch
from support.oracle import run

import fastlm
from fastlm.testing import seeded_normal

DIFFERENTIABLE = ("query", "key", "value", "mask", "sinks")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def qkv(dtype, batch, heads, kv_heads, q_len, k_len, head_dim=32, **options) -> dict:
    shapes = {"query": (heads, q_len, head_dim), "key": (kv_heads, k_len, head_dim), "value": (kv_heads, k_len, head_dim)}
    tensors = {name: seeded_normal(i, (batch, *shape), dtype) for i, (name, shape) in enumerate(shapes.items())}
    return {**tensors, "return_lse": True, **options}


def results_of(call: dict, function=fastlm.attention) -> dict:
    return run(function, call, DIFFERENTIABLE if function is not fastlm.kvcache_attention else (), backend="cpu")


def assert_same_bits(results: dict, expected: dict) -> None:
    assert results.keys() == expected.keys()
    for what, result in results.items():
        assert torch.equal(result, expected[what]), what


# These calls are large enough to be split among several threads, in each of the ways of splitting.
LARGE_CALLS = {
    "many heads": lambda dtype: qkv(dtype, 2, 8, 8, 150, 170, causal=True),
    "one head": lambda dtype: qkv(dtype, 1, 1, 1, 700, 650),
    "three heads": lambda dtype: qkv(dtype, 1, 3, 3, 300, 333, causal=True, window=(100, None)),
    "grouped": lambda dtype: qkv(dtype, 1, 12, 2, 130, 140, sinks=seeded_normal(7, (12,), dtype)),
    "few queries": lambda dtype: qkv(dtype, 1, 8, 2, 2, 1700),
    "mask for all": lambda dtype: qkv(dtype, 2, 4, 2, 120, 130, mask=seeded_normal(8, (120, 130), dtype)),
    "mask per key": lambda dtype: qkv(dtype, 2, 4, 4, 220, 90, mask=seeded_normal(8, (2, 1, 1, 90), dtype)),
    "one mask for all queries": lambda dtype: qkv(dtype, 1, 2, 2, 220, 90, mask=seeded_normal(8, (90,), dtype)),
    "dropout": lambda dtype: qkv(dtype, 2, 2, 1, 200, 210, dropout_p=0.3, seed=5),
}


@DTYPES
@pytest.mark.parametrize("case", LARGE_CALLS)
def test_any_number_of_threads_gives_the_same_bits(case, dtype, threads, isa):
    call = LARGE_CALLS[case](dtype)
    threads(1)
    expected = results_of(call)
    for count in (2, 3, 4, 7):
        threads(count)
        assert_same_bits(results_of(call), expected)


@pytest.mark.parametrize("case", LARGE_CALLS)
def test_a_repeated_call_gives_the_same_bits(case, widest_isa):
    call = LARGE_CALLS[case](torch.float32)
    expected = results_of(call)
    for _ in range(3):
        assert_same_bits(results_of(call), expected)


# ---- the batch around a sequence --------------------------------------------------------------------------------------------

PER_EXAMPLE = ("query", "key", "value", "alibi_slopes", "seed")


def gradients_of_examples(outputs, dtype):
    """Make gradients that are the same for an example at any place in the batch."""
    return [seeded_normal(i, out.shape[1:], dtype).to(out.dtype).expand(out.shape) for i, out in enumerate(outputs)]


def examples_of(call: dict, rows) -> dict:
    return {name: value[rows] if name in PER_EXAMPLE else value for name, value in call.items()}


@DTYPES
@pytest.mark.parametrize("sizes", [(3, 4, 2, 90, 100), (5, 1, 1, 400, 410), (4, 8, 1, 1, 1300), (7, 2, 2, 33, 20)])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_an_example_is_the_same_anywhere_in_any_batch(sizes, dtype, options, threads, isa):
    call = qkv(dtype, *sizes, causal=True)
    batch, heads = sizes[:2]
    if options == "all":
        call |= {"dropout_p": 0.2, "seed": torch.arange(batch) * 2**33 - 5, "softcap": 5.0}
        call |= {"alibi_slopes": seeded_normal(9, (batch, heads), torch.float32).abs() / 9}
    names = ("query", "key", "value")
    threads(2)
    expected = run(fastlm.attention, call, names, gradients_of_examples, backend="cpu")
    for rows in (torch.tensor([batch - 1]), torch.arange(batch).flip(0), torch.tensor([1, 1, 0])):
        results = run(fastlm.attention, examples_of(call, rows), names, gradients_of_examples, backend="cpu")
        for what, result in results.items():
            assert torch.equal(result, expected[what][rows]), what


@DTYPES
def test_a_packed_sequence_has_the_bits_of_the_same_in_a_batch(dtype, isa):
    call = qkv(dtype, 3, 4, 2, 75, 90, causal=True, dropout_p=0.2, seed=torch.tensor([4, 5, 6]))
    expected = run(fastlm.attention, call, ("query", "key", "value"), gradients_of_examples, backend="cpu")
    packed = {name: call[name].transpose(1, 2).flatten(0, 1) for name in ("query", "key", "value")}
    offsets = {f"cu_seqlens_{n}": torch.arange(4, dtype=torch.int32) * rows for n, rows in (("q", 75), ("k", 90))}

    def same_gradients(outputs, dtype):
        out, lse = gradients_of_examples([torch.empty(3, 4, 75, 32), torch.empty(3, 4, 75)], dtype)
        return [out.transpose(1, 2).flatten(0, 1), lse.float().transpose(0, 1).flatten(1)]

    results = run(
        fastlm.varlen_attention, {**call, **packed, **offsets}, ("query", "key", "value"), same_gradients, backend="cpu"
    )
    for what, result in results.items():
        wanted = expected[what].transpose(1, 2) if expected[what].dim() == 4 else expected[what].transpose(0, 1)
        wanted = wanted.flatten(0, 1) if expected[what].dim() == 4 else wanted.flatten(1)
        assert torch.equal(result, wanted), what


def test_strides_do_not_change_the_bits(isa):
    """A transpose, a third of one tensor and a contiguous copy hold the same numbers here."""
    call = qkv(torch.float32, 2, 4, 4, 60, 60, causal=True)
    expected = results_of(call)
    names = ("query", "key", "value")
    transposed = {name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in names}
    thirds = dict(zip(names, torch.stack([call[name] for name in names], dim=3).unbind(3)))
    for views in (transposed, thirds):
        assert_same_bits(results_of({**call, **views}), expected)


def test_small_calls_have_the_bits_of_those_with_all_outputs(isa):
    """Calls without options take a shorter path."""
    for sizes in ((1, 1, 1, 16, 16), (2, 6, 2, 33, 70), (1, 8, 8, 1, 600)):
        call = qkv(torch.float32, *sizes)
        tensors = [call[name] for name in ("query", "key", "value")]
        expected = fastlm.attention(*tensors, return_lse=True, causal=True)[0]
        assert torch.equal(fastlm.attention(*tensors, causal=True), expected)


# ---- decoding ---------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("q_len", [1, 3])
def test_decoding_a_sequence_is_the_same_on_any_threads_in_any_batch(q_len, dtype, threads, isa):
    """The lengths are on both sides of the one from which keys are split, so that one sequence uses all threads."""
    lengths = torch.tensor([5000, 511, 1, 513, 2049], dtype=torch.int32)
    call = qkv(dtype, 5, 8, 2, q_len, 5003)
    cache = {"key_cache": call.pop("key"), "value_cache": call.pop("value"), "cache_seqlens": lengths}
    threads(1)
    expected = run(fastlm.kvcache_attention, {**call, **cache}, (), backend="cpu")
    for count in (2, 3, 4):
        threads(count)
        assert_same_bits(run(fastlm.kvcache_attention, {**call, **cache}, (), backend="cpu"), expected)
    for rows in ([0], [3], [4, 2, 0]):
        some = {**call, "query": call["query"][rows], **{name: tensor[rows] for name, tensor in cache.items()}}
        results = run(fastlm.kvcache_attention, some, (), backend="cpu")
        assert_same_bits(results, {what: result[rows] for what, result in expected.items()})
