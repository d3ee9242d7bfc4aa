"""Test fine-tuning for speech on tones, which stand for words, with a tiny Whisper and a tiny wav2vec2 of random weights."""

import csv
import importlib.util
import json
import random
import subprocess
import wave

import jiwer
import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
    set_seed,
)

import fastlm.integrations.transformers.attention as attention
from fastlm.cli import main
from fastlm.lm.data.read import Problems
from fastlm.lm.finetuning import speech
from fastlm.lm.finetuning.common import Tuning
from fastlm.lm.finetuning.speech import recordings, scores, transcribe

RATE = 8000
TONES = {"low": 300, "middle": 900, "high": 2000}


def record(path, words, rate=RATE):
    """Write a tone of 0.15 s for each word, as 16-bit samples."""
    times = np.arange(int(0.15 * rate)) / rate
    samples = np.concatenate([np.sin(2 * np.pi * TONES[word] * times) for word in words])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 20000).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Record 60 tones, half of them at twice the model's rate, and their names."""
    folder, draw = tmp_path_factory.mktemp("tones"), random.Random(0)
    for index in range(60):
        word = draw.choice(list(TONES))
        record(folder / f"{index:02}.wav", [word], RATE * (1 + index % 2))
        (folder / f"{index:02}.txt").write_text(f"{word}\n")
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary = {token: index for index, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=special)
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1, hop_length=160, n_fft=400)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    ids = {"pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 257}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 25}
    config = WhisperConfig(vocab_size=len(tokenizer), max_target_positions=24, begin_suppress_tokens=None, **sizes, **ids)
    set_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    """Save a wav2vec2 whose vocabulary has capitals alone."""
    folder = tmp_path_factory.mktemp("wav2vec2")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False}
    config = Wav2Vec2Config(vocab_size=len(letters), ctc_loss_reduction="mean", pad_token_id=0, layerdrop=0.0, **sizes)
    set_seed(0)
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of attention that run on fastlm."""
    calls, run = [], attention.attention
    monkeypatch.setattr(attention, "attention", lambda *given, **options: calls.append(1) or run(*given, **options))
    return calls


def test_a_whisper_learns_tones(tmp_path, tones, whisper, calls, capsys):
    options = ["--output", str(tmp_path / "out"), "--epochs", "12", "--batch-size", "4", "--learning-rate", "5e-3"]
    assert main(["lm", "finetune", str(whisper), "speech", str(tones), *options]) == 0
    assert len(calls) > 100
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "text", "predicted"] and len(rows) == metrics["test"]
    assert sum(metrics[split] for split in ("train", "validation", "test")) == 60
    _, wanted, found = map(list, zip(*rows))
    assert metrics["wer"] == jiwer.wer(wanted, found) < 0.4
    assert f"word error rate  {metrics['wer']:.1%}" in capsys.readouterr().out
    listener = pipeline("automatic-speech-recognition", str(tmp_path / "out"), device="cpu")
    sounds = [{"raw": speech.load_audio(str(tones / file), sampling_rate=RATE), "sampling_rate": RATE} for file, _, _ in rows]
    heard = listener(sounds, generate_kwargs={"max_new_tokens": 10})
    assert [one["text"].strip() for one in heard] == found


def test_a_wav2vec2_is_trained(tmp_path, tones, wav2vec2, calls):
    """Its vocabulary has capitals alone, and LoRA trains few of its weights."""
    result = transcribe(wav2vec2, tmp_path / "out", tones, tuning=Tuning(epochs=1, lora=2))
    assert len(calls) >= 5 and result.train + result.validation + result.test == 60
    assert {"metrics.json", "predictions.csv", "config.json", "vocab.json"} <= {it.name for it in (tmp_path / "out").iterdir()}
    model = Wav2Vec2ForCTC.from_pretrained(tmp_path / "out")
    processor = Wav2Vec2Processor.from_pretrained(tmp_path / "out")
    (item,) = speech.items_of(tones, [("00.wav", "low")], processor, RATE, Problems())
    assert processor.tokenizer.convert_ids_to_tokens(item["input_ids"]) == ["L", "O", "W"]
    assert item["audio"].shape == (int(0.15 * RATE),)
    assert len(speech.listen(model, processor, [item])) == 1


def test_word_error_rate_by_hand():
    """Of six words one is wrong, one is missing and one is too many; case and punctuation do not count."""
    found = scores(["The cat sees.", "a dog, here"], ["the cat hears", "A dog too many"])
    assert found == {"wer": (1 + 2) / 6, "exact": 0.0}
    assert scores(["The cat."], ["the cat"]) == {"wer": 0.0, "exact": 1.0}


def test_recordings_that_are_left_out(tmp_path, tones, whisper):
    for name in ("good", "no_text", "empty", "damaged"):
        record(tmp_path / f"{name}.wav", ["low"])
        (tmp_path / f"{name}.txt").write_text("low")
    (tmp_path / "no_text.txt").unlink()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "damaged.wav").write_bytes(b"RIFF, and no more")
    problems = Problems()
    pairs = list(recordings(tmp_path, problems))
    processor = WhisperProcessor.from_pretrained(whisper)
    assert [item["text"] for item in speech.items_of(tmp_path, pairs, processor, RATE, problems)] == ["low"]
    assert problems.count == 3
    for name, reason in (("no_text.wav", "no_text.txt has no text"), ("empty.wav", "empty"), ("damaged.wav", "no recording")):
        assert any(name in it and reason in it for it in problems.first)


def test_what_is_refused(tmp_path, tones, whisper, capsys, monkeypatch):
    def refused(checkpoint, *arguments) -> str:
        assert main(["lm", "finetune", str(checkpoint), "speech", *arguments, "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err.removeprefix("fastlm lm finetune: ")

    BertConfig().save_pretrained(tmp_path / "bert")
    assert refused(tmp_path / "none", str(tones)).startswith(f"{tmp_path}/none is no checkpoint, as it lacks config.json")
    assert "is a checkpoint of a model of type 'bert'; speech needs 'whisper' or 'wav2vec2'" in refused(tmp_path / "bert")
    assert refused(whisper, str(tmp_path / "gone")) == f"{tmp_path}/gone: no such folder of recordings\n"
    assert refused(whisper, str(tmp_path / "bert")).startswith(f"{tmp_path}/bert has too few examples, none for train")
    assert refused(whisper, str(tones), "--test", "t.csv").startswith("--test does not go with speech")
    monkeypatch.setattr(speech, "which", lambda name: None)
    assert "espeak-ng speaks the ready recordings, and is not installed (apt install espeak-ng" in refused(whisper)
    find = importlib.util.find_spec
    monkeypatch.setattr("fastlm.lm.extras.find_spec", lambda name: None if name == "jiwer" else find(name))
    assert refused(whisper, str(tones)) == "this needs jiwer: pip install 'fastlm[speech]'\n"
    assert not (tmp_path / "out").exists()


def test_espeak_ng_is_asked_for_numbers(tmp_path, monkeypatch):
    """Where espeak-ng is missing, a stand-in takes its command line."""
    if speech.which("espeak-ng") is None:
        monkeypatch.setattr(speech, "which", lambda name: name)
        monkeypatch.setattr(subprocess, "run", lambda command, **options: record(command[command.index("-w") + 1], ["low"]))
    monkeypatch.setattr(speech, "SPOKEN", 3)
    speech.speak(tmp_path)
    pairs = list(recordings(tmp_path, Problems()))
    assert [text for _, text in pairs][:2] == ["zero", "three thousand three hundred and thirty-three"] and len(pairs) == 3
    for path, _ in pairs:
        with wave.open(str(tmp_path / path)) as file:
            assert file.getnframes() > 0.1 * file.getframerate()
