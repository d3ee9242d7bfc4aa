"""Caches that grow in place hold what transformers' hold, whatever is done with them. No tensor that they gave out changes."""

import copy
import pickle
import random

import pytest
import torch
import transformers as hf
from support.transformers_models import ARCHITECTURES, inputs_of
from transformers.cache_utils import DynamicCache, DynamicLayer

import fastlm
from fastlm.integrations.transformers import cache
from fastlm.integrations.transformers.cache import InPlaceLayer

OPERATIONS = ["update"] * 8 + [
    "crop",
    "reorder",
    "repeat",
    "select",
    "deepcopy",
    "copy",
    "pickle",
    "reset",
    "grad",
    "inference",
]


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """Let short sequences, too, outgrow their memory."""
    monkeypatch.setattr(cache, "_LEAST_ROOM", 5)


def states(generator: random.Random, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = generator.choice([1, 1, 1, 2, 7])
    return torch.randn(batch, 2, length, 4), torch.randn(batch, 2, length, 3)


def apply(operation: str, layer: DynamicLayer, new: tuple[torch.Tensor, torch.Tensor]) -> DynamicLayer:
    """Do one thing with a layer that is not empty, and return the layer to go on with."""
    if operation == "crop":
        layer.crop(-1)
    elif operation == "reorder":
        layer.reorder_cache(torch.arange(layer.keys.shape[0]).flip(0))
    elif operation == "repeat":
        layer.batch_repeat_interleave(2)
    elif operation == "select":
        layer.batch_select_indices(torch.tensor([0]))
    elif operation == "deepcopy":
        layer = copy.deepcopy(layer)
    elif operation == "copy":
        copy.copy(layer).update(*new)  # what a copy appends is not seen
    elif operation == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif operation == "reset":
        layer.reset()
    elif operation == "grad":
        with torch.enable_grad():
            layer.update(*(state.requires_grad_() for state in new))
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    elif operation == "inference":
        with torch.inference_mode():
            layer.update(*new)
    else:
        layer.update(*new)
    return layer


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_done_with_a_layer(seed):
    generator = random.Random(seed)
    torch.manual_seed(seed)
    expected, layer = DynamicLayer(), InPlaceLayer()
    given = []  # each tensor that the layer gave out, and what it held
    with torch.no_grad():
        for _ in range(40):
            empty = expected.get_seq_length() == 0
            new = states(generator, 2 if empty else expected.keys.shape[0])
            operation = "update" if empty else generator.choice(OPERATIONS)
            expected = apply(operation, expected, new)
            layer = apply(operation, layer, new)
            assert layer.get_seq_length() == expected.get_seq_length(), operation
            if layer.is_initialized:
                for name in ("keys", "values"):
                    tensor = getattr(layer, name)
                    assert torch.equal(tensor, getattr(expected, name)), operation
                    given.append((tensor, tensor.clone()))
        assert all(torch.equal(tensor, held) for tensor, held in given)


def test_tokens_are_appended_in_place():
    layer = InPlaceLayer()
    with torch.no_grad():
        addresses = [layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))[0].data_ptr() for _ in range(7)]
    assert len(set(addresses[1:])) == 1  # The second token makes room for itself and five more.


def test_what_does_not_fit_is_torch_cats():
    layer = InPlaceLayer()
    with torch.no_grad():
        for dtype in (torch.float32, torch.float32, torch.float64):
            keys, _ = layer.update(torch.randn(1, 2, 1, 4).to(dtype), torch.randn(1, 2, 1, 4).to(dtype))
        assert keys.dtype == torch.float64
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4))


# ---- models -----------------------------------------------------------------------------------------------------------------


def generate(model: hf.PreTrainedModel, **options):
    inputs = inputs_of(model, "left")
    if model.config.is_encoder_decoder:
        inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    options |= {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, disable_compile=True, no_repeat_ngram_size=2, **options)


def layers_of(model: hf.PreTrainedModel, **options) -> set[type]:
    output = generate(model, **options)
    found = next(value for value in output.values() if isinstance(value, hf.cache_utils.Cache))
    return set(map(type, getattr(found, "self_attention_cache", found).layers))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2", "Marian"])
def test_generation_after_replace(name, beams):
    model = ARCHITECTURES[name].build("eager")
    expected = generate(model, num_beams=beams).sequences
    fastlm.replace(model)
    assert torch.equal(generate(model, num_beams=beams).sequences, expected)
    fastlm.restore(model)
    assert torch.equal(generate(model, num_beams=beams).sequences, expected)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_guessed_tokens_that_are_taken_back(name):
    model = ARCHITECTURES[name].build("eager")
    ids = inputs_of(model)["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, disable_compile=True)
    fastlm.replace(model)
    guessed = model.generate(ids, max_new_tokens=12, do_sample=False, disable_compile=True, prompt_lookup_num_tokens=2)
    assert torch.equal(guessed, expected)


def test_replace_and_restore():
    model = ARCHITECTURES["Llama"].build("eager")
    assert layers_of(model) == {DynamicLayer}
    fastlm.replace(model)
    fastlm.replace(model)
    assert layers_of(model) == {InPlaceLayer}
    assert layers_of(copy.deepcopy(model)) == {InPlaceLayer}
    assert layers_of(pickle.loads(pickle.dumps(model))) == {InPlaceLayer}
    fastlm.restore(model)
    assert layers_of(model) == {DynamicLayer}
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


def test_a_model_that_was_made_on_fastlm():
    model = ARCHITECTURES["Llama"].build("fastlm")
    assert layers_of(model) == {DynamicLayer}
    assert fastlm.replace(model).swapped == {"": "its caches grow in place"}
    assert layers_of(model) == {InPlaceLayer}


def test_a_cache_of_the_users():
    """Go on with a cache that was begun before, and with one that has no config and makes its layers when they are needed."""
    model = ARCHITECTURES["Llama"].build("eager")
    ids = inputs_of(model)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
        begun = DynamicCache()
        model(ids[:, :4], cache=begun)
        fastlm.replace(model)
        for held in (begun, copy.deepcopy(begun)):
            model(ids[:, 4:8], cache=held)
            logits = [model(ids[:, i : i + 1], cache=held).logits for i in range(8, ids.shape[1])]
            torch.testing.assert_close(torch.cat(logits, 1), expected)
            assert set(map(type, held.layers)) == {InPlaceLayer}
        fresh = DynamicCache()
        model(ids, cache=fresh)
        assert set(map(type, fresh.layers)) == {InPlaceLayer}


def test_layers_of_other_kinds_stay_what_they_are():
    model = ARCHITECTURES["Gemma 2"].build("eager")
    before = layers_of(model)
    fastlm.replace(model)
    assert layers_of(model) == before - {DynamicLayer} | {InPlaceLayer}
    assert layers_of(model, cache_implementation="static").isdisjoint({InPlaceLayer})
