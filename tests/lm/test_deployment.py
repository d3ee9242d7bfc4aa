"""Test that what others build on loads a model: transformers' Auto classes and pipelines, and ONNX Runtime."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from support.processes import printed
from tokenizers import Tokenizer
from transformers import AutoTokenizer, pipeline, set_seed

from fastlm.cli import main
from fastlm.lm.data.tokenizer import begin_texts, load_tokenizer
from fastlm.lm.model import export as exporting
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.export import export
from fastlm.lm.model.presets import build
from fastlm.lm.model.sizes import PRESETS

SETTINGS = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, corpus):
    """Save an untrained checkpoint of each kind, whose output depends on the tokens before and on the latent."""
    folder, tokenizer = tmp_path_factory.mktemp("deployed"), load_tokenizer(corpus)
    begin_texts(tokenizer)
    for kind in ("vae", "decoder"):
        with pytest.MonkeyPatch.context() as patch:
            if kind == "decoder":  # one layer is exported in half the time
                patch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], layers=1))
            model = build(kind, "tiny", tokenizer, mean_std=0.8, seed=3)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 4
            if kind == "vae":
                model.to_embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
        save(model, tokenizer, folder / kind)
    return folder


# ---- transformers -----------------------------------------------------------------------------------------------------------


def test_auto_model_loads_a_text_vae_after_import_fastlm_lm(checkpoints):
    code = f"""
import fastlm.lm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
for kind in (AutoModel, AutoModelForCausalLM):
    print(type(kind.from_pretrained({str(checkpoints / "vae")!r}, attn_implementation="fastlm")).__name__)
print(AutoTokenizer.from_pretrained({str(checkpoints / "vae")!r}).bos_token)
"""
    assert printed(code).split() == ["TextVAE", "TextVAE", "<|bos|>"]


def test_a_pipeline_goes_on_as_the_model_was_trained(checkpoints):
    """Compare with a prompt that begins with <|bos|>, as texts did in training."""
    found = pipeline("text-generation", str(checkpoints / "decoder"), device="cpu")("the cat", **SETTINGS)
    model, tokenizer = load(checkpoints / "decoder")
    ids = [tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0, len(ids) :]
    assert found == [{"generated_text": tokenizer.decode(made, skip_special_tokens=True)}]


def test_a_pipeline_draws_a_latent_for_each_prompt(checkpoints):
    writer = pipeline("text-generation", str(checkpoints / "vae"), device="cpu")
    prompts = ["the cat"] * 4
    set_seed(1)
    first = writer(prompts, **SETTINGS)
    set_seed(1)
    assert writer(prompts, **SETTINGS) == first
    assert len({text for ((text,),) in (map(dict.values, texts) for texts in first)}) > 1
    given = writer(prompts, latents=torch.zeros(1, 16), **SETTINGS)
    assert all(texts == given[0] for texts in given), "a latent that is given is used"


def test_a_pipeline_takes_the_decoder_of_a_text_vae(checkpoints):
    model, tokenizer = load(checkpoints / "vae")
    ((found,),) = pipeline("text-generation", model.decoder, tokenizer=tokenizer)(["the cat"], **SETTINGS)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    made = model.decoder.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    assert found["generated_text"] == tokenizer.decode(made, skip_special_tokens=True)


def test_a_dialogue_is_one_text(checkpoints):
    again = AutoTokenizer.from_pretrained(checkpoints / "decoder")
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sees"}]
    ids = again.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == again("the cat sees")["input_ids"] and ids[0] == again.bos_token_id


# ---- ONNX -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx(tmp_path_factory, checkpoints):
    """Export the TextVAE from the command line."""
    torch.use_deterministic_algorithms(False)  # the exporter uses ops that are not deterministic
    folder = tmp_path_factory.mktemp("onnx")
    assert main(["lm", "export", str(checkpoints / "vae"), "--output", str(folder)]) == 0
    return folder


def session(folder, name):
    return onnxruntime.InferenceSession(folder / name)


def test_the_files_have_what_a_program_needs(onnx, checkpoints):
    assert {path.name for path in onnx.iterdir()} == {"decoder.onnx", "encoder.onnx", "tokenizer.json", "config.json"}
    assert (
        Tokenizer.from_file(str(onnx / "tokenizer.json")).encode("the cat").ids
        == load(checkpoints / "vae")[1]("the cat")["input_ids"]
    )
    assert json.loads((onnx / "config.json").read_text())["model_type"] == "fastlm_text_vae"
    decoder = session(onnx, "decoder.onnx")
    entries = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{entry}" for entry in entries), "latents"]
    assert [given.name for given in decoder.get_inputs()] == names
    assert [made.name for made in decoder.get_outputs()] == ["logits", *(f"present.{entry}" for entry in entries)]


def test_the_encoder_s_latents(onnx, checkpoints):
    model, tokenizer = load(checkpoints / "vae")
    batch = tokenizer(["the cat sees a dog.", "stone"], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = session(onnx, "encoder.onnx").run(["mu", "logvar"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(
            [torch.from_numpy(it) for it in found], list(model.posterior(ids, mask)), rtol=1e-4, atol=1e-4
        )


def test_the_decoder_writes_the_same_tokens(onnx, checkpoints):
    """Go on from two prompts of different lengths, with latents of their own."""
    model, tokenizer = load(checkpoints / "vae")
    tokenizer.padding_side = "left"
    batch = tokenizer(["the cat sees a dog under the", "stone"], padding=True, return_tensors="pt")
    latents = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    model.generation_config.eos_token_id = None
    expected = model.generate(**batch, latents=latents, **options)[:, batch["input_ids"].shape[1] :]

    decoder = session(onnx, "decoder.onnx")
    names = [given.name for given in decoder.get_inputs()][2:-1]
    cache = [np.zeros((2, 2, 0, 16), np.float32) for _ in names]
    new, mask, found = batch["input_ids"].numpy(), batch["attention_mask"].numpy(), []
    for _ in range(20):
        inputs = {"input_ids": new, "attention_mask": mask, "latents": latents.numpy(), **dict(zip(names, cache))}
        logits, *cache = decoder.run(None, inputs)
        new = logits[:, -1:].argmax(-1)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        found.append(new)
    assert np.concatenate(found, 1).tolist() == expected.tolist()
    assert cache[0].shape == (2, 2, batch["input_ids"].shape[1] + 19, 16), "the latent is no token of the cache"


def test_a_decoder_alone(tmp_path, checkpoints, capsys, monkeypatch):
    """Export one, and see a file refused that writes other tokens than the model."""
    torch.use_deterministic_algorithms(False)
    result = export(checkpoints / "decoder", tmp_path / "out")
    assert {path.name for path in result.files} == {"decoder.onnx", "tokenizer.json", "config.json"} and result.tokens > 1
    assert [given.name for given in session(tmp_path / "out", "decoder.onnx").get_inputs()][-1] == "past_key_values.0.value"
    assert f"the same {result.tokens} tokens" in str(result)
    monkeypatch.setattr(exporting, "write_graphs", lambda model, folder: None)
    monkeypatch.setattr(exporting, "written_by_onnx", lambda folder, tokenizer, count: [0] * count)
    before = (tmp_path / "out" / "decoder.onnx").read_bytes()
    with pytest.raises(RuntimeError, match="ONNX Runtime goes on from 'The' with the tokens"):
        export(checkpoints / "decoder", tmp_path / "out")
    assert (tmp_path / "out" / "decoder.onnx").read_bytes() == before


def test_what_is_missing_is_named(checkpoints, capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr("fastlm.lm.extras.find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert main(["lm", "export", str(checkpoints / "decoder"), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "fastlm lm export: this needs onnxruntime: pip install 'fastlm[onnx]'\n"
    assert not (tmp_path / "out").exists()
