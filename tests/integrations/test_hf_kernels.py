"""The folder that Hugging Face's kernels library loads, and the name by which transformers takes it then."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
import transformers as hf
from support.transformers_models import ARCHITECTURES, PAD, inputs_of, valid_of
from transformers import modeling_flash_attention_utils
from transformers.integrations import hub_kernels

import fastlm
from fastlm.integrations import hf_kernels
from fastlm.integrations.transformers import attention, continuous_batching

NAME = "fastlm/flash-attn"


def load(*args, **options) -> ModuleType:
    """Load the folder as the kernels library does: its file by its path, under the id of its metadata."""
    metadata = json.loads((hf_kernels.PATH / "metadata.json").read_text())
    assert metadata["id"] not in ("fastlm", hf_kernels.__name__), "the id becomes a module's name, and must be no other's"
    spec = importlib.util.spec_from_file_location(metadata["id"], hf_kernels.PATH / "__init__.py")
    sys.modules[metadata["id"]] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Stand in for the library, and forget the name afterwards."""
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", load)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    yield
    del hf.AttentionInterface._global_mapping[NAME], hf.AttentionMaskInterface._global_mapping[NAME]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "BERT"])
def test_a_model_under_that_name_gives_eager_s_answers(name, padding, monkeypatch):
    model = ARCHITECTURES[name].build()
    inputs = inputs_of(model, padding)
    expected = model(**inputs).logits
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return fastlm.attention(*args, **options)

    monkeypatch.setattr(attention, "attention", counted)
    model.set_attn_implementation(NAME)
    valid = valid_of(inputs)
    torch.testing.assert_close(model(**inputs).logits[valid], expected[valid], atol=2e-5, rtol=2e-5)
    assert len(calls) == ARCHITECTURES[name].attentions


def test_it_generates_and_batches_continuously(monkeypatch):
    model = ARCHITECTURES["Llama"].build()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def alone() -> list[list[int]]:
        return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]

    expected = alone()
    model.set_attn_implementation(NAME)
    assert alone() == expected
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return fastlm.kvcache_attention(*args, **options)

    monkeypatch.setattr(continuous_batching, "kvcache_attention", counted)
    greedy = hf.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    batching = hf.ContinuousBatchingConfig(page_size=4, num_blocks=32, max_batch_tokens=32)
    outputs = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=batching)
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert calls, "requests that decode read their pages in place"
