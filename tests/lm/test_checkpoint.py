"""Checkpoints are loaded as they were saved, survive a failed save, and are refused if damaged or of another model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, LlamaForCausalLM

from fastlm.lm.model.checkpoint import FILES, load, save
from fastlm.lm.model.presets import build
from fastlm.lm.model.text_vae import TextVAE


@pytest.fixture(params=["vae", "decoder"])
def saved(request, tokenizer, tmp_path):
    model = build(request.param, "tiny", tokenizer, seed=1)
    save(model, tokenizer, tmp_path / "model")
    return model, tmp_path / "model"


def test_what_is_saved_comes_back(saved, tokenizer):
    model, folder = saved
    again, its_tokenizer = load(folder)
    assert type(again) is type(model) and again.config._attn_implementation == "fastlm" and not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert {path.name for path in folder.iterdir()} <= set(FILES)  # none of which is unpickled
    embedding = again.get_input_embeddings().weight
    assert again.get_output_embeddings().weight is embedding
    assert not isinstance(again, TextVAE) or again.encoder.embed_tokens.weight is embedding


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_cut_short(saved, share):
    _, folder = saved
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        load(folder)


def test_weights_of_another_model(saved):
    _, folder = saved
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    for changed, message in (
        ({key: tensor for key, tensor in weights.items() if key != name}, "missing [123], "),
        (weights | {"extra": torch.zeros(2)}, "unexpected 1"),
        (weights | {name: torch.zeros(3, 3)}, "mismatched 1|damaged"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(folder)


def test_a_config_that_is_damaged_or_another_s(saved, tmp_path):
    _, folder = saved
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json is damaged"):
        load(folder)
    BertModel(BertConfig(num_hidden_layers=1, vocab_size=290)).save_pretrained(folder)
    with pytest.raises(ValueError, match="of type 'bert'; expected 'fastlm_text_vae' or 'llama'"):
        load(folder)


def test_only_the_models_asked_for(saved):
    model, folder = saved
    if isinstance(model, TextVAE):
        with pytest.raises(ValueError, match="of type 'fastlm_text_vae'; expected 'llama'"):
            load(folder, {"llama": LlamaForCausalLM})


def test_a_vocabulary_of_another_size(saved):
    _, folder = saved
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 290, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="the tokenizer has 291 tokens, and the model 290"):
        load(folder)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint of fastlm.lm, as it lacks config.json"):
        load(tmp_path)


def test_a_full_disk_leaves_the_last_good_one(saved, tokenizer, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)  # fails after the weights were written
    with pytest.raises(OSError, match="No space left"):
        save(build("decoder", "tiny", tokenizer, seed=2), tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
