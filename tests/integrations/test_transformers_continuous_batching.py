"""Continuous batching writes what `generate` writes for each prompt alone, and reads caches where they lie."""

import pytest
import torch
import transformers as hf
from support.transformers_models import ARCHITECTURES, VOCABULARY
from transformers.generation.continuous_batching import cache as paged
from transformers.generation.continuous_batching import continuous_api

import fastlm
from fastlm.integrations.transformers import continuous_batching
from fastlm.integrations.transformers.attention import attend
from fastlm.reference.attention import attend as naive
from fastlm.testing import VALUE_FACTOR, assert_as_good_as_plain, seeded_normal

NEW = 10  # tokens
LENGTHS = (1, 4, 9, 17, 30)  # of the prompts; a page has 4 tokens


def prompts() -> list[list[int]]:
    """Make prompts of these lengths, and one that begins like the longest."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [*made, made[-1][:17] + made[0]]


def alone(model: hf.PreTrainedModel) -> list[list[int]]:
    """Let transformers' eager attention go on with each prompt by itself, without stopping at a token."""
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts()]


def batched(model: hf.PreTrainedModel, tokens: int) -> list[list[int]]:
    """Let a batch go on with all prompts, at most so many tokens at a time."""
    greedy = hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = hf.ContinuousBatchingConfig(page_size=4, num_blocks=80, max_batch_tokens=tokens)
    outputs = model.generate_batch(prompts(), generation_config=greedy, continuous_batching_config=batching)
    assert not any(output.error for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


@pytest.fixture
def calls(monkeypatch):
    """Record how often each of fastlm's functions attends to a batch."""
    counts = {"varlen_attention": 0, "kvcache_attention": 0}

    def counted(name: str):
        run = getattr(fastlm, name)

        def attention(*args, **options):
            counts[name] += 1
            return run(*args, **options)

        return attention

    for name in counts:
        monkeypatch.setattr(continuous_batching, name, counted(name))
    return counts


FULL = ["Llama", "GPT-2"]  # All of their layers see the whole cache.
SLIDING = ["Mistral", "Qwen2 with a window", "Gemma 2", "GPT-OSS"]


WHOLE, IN_PIECES = 128, 7  # tokens of a batch; a prompt that has found pages of its own beginning is one in pieces, too


@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, WHOLE) for name in FULL + SLIDING), ("Llama", IN_PIECES), ("Gemma 3", IN_PIECES)]
)
def test_a_batch_writes_what_generate_writes(name, tokens, calls):
    model = ARCHITECTURES[name].build()
    expected = alone(model)
    model.set_attn_implementation("fastlm")
    assert batched(model, tokens) == expected
    assert model.config._attn_implementation == "fastlm"
    assert calls["varlen_attention"] > 0
    assert (calls["kvcache_attention"] > 0) == (name in FULL), "transformers has no block table for a window"


def test_a_replaced_model_batches_and_a_restored_one_is_transformers_own(calls):
    model = ARCHITECTURES["Llama"].build()
    expected = alone(model)
    model.set_attn_implementation("sdpa")
    fastlm.replace(model)
    assert batched(model, WHOLE) == expected
    assert calls["kvcache_attention"] > 0
    fastlm.restore(model)
    calls.update(dict.fromkeys(calls, 0))
    assert batched(model, WHOLE) == expected
    assert not any(calls.values())


# ---- one call ---------------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 16, 8
OPTIONS = {"scale": 0.3, "softcap": 2.0}


def seen(query, key, value, sinks, window):
    """Attend to one request's last queries (tokens, H, D) of all its keys, by the reference; causal."""
    rows = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    left = None if window is None else window - 1
    out, _ = naive(*rows, None, sinks, None, None, None, None, None, left, 0, OPTIONS["scale"], OPTIONS["softcap"], 0.0)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_requests_are_as_good_as_plain(dtype, window):
    queries, keys = (1, 6, 3), (9, 6, 20)
    query = seeded_normal(1, (sum(queries), HEADS, HEAD_DIM), dtype)
    key, value = (seeded_normal(i, (sum(keys), KV_HEADS, HEAD_DIM), dtype) for i in (2, 3))
    sinks = seeded_normal(4, (HEADS,), dtype)
    given = {
        "cu_seq_lens_q": torch.tensor([0, *queries]).cumsum(0).int(),
        "cu_seq_lens_k": torch.tensor([0, *keys]).cumsum(0).int(),
        "block_table": None,
        "sliding_window": window,
    }

    def by_request(dtype):
        parts = zip(query.to(dtype).split(queries), key.to(dtype).split(keys), value.to(dtype).split(keys))
        return torch.cat([seen(*part, sinks.to(dtype), window) for part in parts])

    padding = 4  # A compiled batch is padded by tokens that belong to no request.
    padded = [torch.cat([t, t[:padding]]).transpose(0, 1)[None] for t in (query, key, value)]
    out = continuous_batching.attend_batch(*padded, given, sinks=sinks, **OPTIONS)
    assert out.shape == (1, sum(queries) + padding, HEADS, HEAD_DIM)
    assert_as_good_as_plain(out[0, : sum(queries)], by_request(dtype), by_request(torch.float64), VALUE_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_requests_that_decode_are_as_good_as_plain_and_append_in_place(dtype):
    cached = (0, 7, 8, 21)  # rows of the requests before their new token; a page has 8
    pages = torch.tensor([[4, -1, -1], [3, -1, -1], [9, 6, -1], [2, 5, 8], [-1, -1, -1]], dtype=torch.int32)
    stored = seeded_normal(1, (11, 2, PAGE, KV_HEADS, HEAD_DIM), dtype)  # as transformers: a page's keys, then its values
    k_cache, v_cache = stored.unbind(1)
    query = seeded_normal(2, (1, HEADS, len(pages), HEAD_DIM), dtype)
    key, value = (seeded_normal(i, (1, KV_HEADS, len(pages), HEAD_DIM), dtype) for i in (3, 4))
    sinks = seeded_normal(5, (HEADS,), dtype)
    lengths = torch.tensor([0, *(length + 1 for length in cached), 0]).cumsum(0).int()  # The last request is padding.
    given = {"cu_seq_lens_k": lengths, "block_table": pages, "k_cache": k_cache, "v_cache": v_cache}
    before = stored.clone()
    out = continuous_batching.attend_batch(query, key, value, given, sinks=sinks, **OPTIONS)

    def by_request(dtype):
        outs = []
        for r, length in enumerate(cached):
            rows = [
                torch.cat([cache[pages[r].clamp(min=0).long()].flatten(0, 1)[:length], new[0, :, r][None]])
                for cache, new in ((before[:, 0], key), (before[:, 1], value))
            ]
            outs.append(seen(query[0, :, r][None].to(dtype), *(t.to(dtype) for t in rows), sinks.to(dtype), None))
        return torch.cat(outs)

    assert out.shape == (1, len(pages), HEADS, HEAD_DIM)
    assert_as_good_as_plain(out[0, : len(cached)], by_request(dtype), by_request(torch.float64), VALUE_FACTOR)
    for r, length in enumerate(cached):
        place = int(pages[r, length // PAGE]), length % PAGE
        assert torch.equal(k_cache[place], key[0, :, r]) and torch.equal(v_cache[place], value[0, :, r])
        before[place[0], 0, place[1]], before[place[0], 1, place[1]] = key[0, :, r], value[0, :, r]
    assert torch.equal(stored[1:], before[1:]), "nothing else is written, but in the first page, which no request has"


# ---- which names ------------------------------------------------------------------------------------------------------------


def test_transformers_answers_for_its_own_names():
    ours = paged.is_flash_attention_requested
    for name, expected in (("fastlm", True), ("sdpa", False), ("paged|eager", False), ("flash_attention_2", True)):
        assert ours(requested_attention_implementation=name) is expected
    assert not ours(requested_attention_implementation="fastlm", version=2)
    with pytest.raises(ValueError, match="flex_attention is not supported for continuous batching"):
        model = ARCHITECTURES["Llama"].build("flex_attention")
        continuous_api.ContinuousBatchingManager(model, model.generation_config, hf.ContinuousBatchingConfig())


def test_what_would_run_eager_is_an_error():
    model = ARCHITECTURES["Llama"].build("fastlm")
    rows = [torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)]
    given = {"write_index": [], "block_table": None, "output_attentions": True}
    with pytest.raises(NotImplementedError, match="LlamaAttention cannot run in continuous batching: attention weights"):
        attend(model.model.layers[0].self_attn, *rows, None, **given)
