"""Words of a vocabulary, their neighbours, and pre-trained vectors in a model's embedding, which training may leave alone."""

import os
import signal
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.lm_corpus import texts
from test_train import At

from fastlm.cli import main
from fastlm.lm.data.prepare import prepare
from fastlm.lm.data.tokenizer import load_tokenizer
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.neighbours import neighbours, words_of
from fastlm.lm.model.presets import build
from fastlm.lm.model.vectors import projected, use_vectors
from fastlm.lm.training.train import Interrupted, Settings, train


def write(path, vectors):
    path.write_text("".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in vectors.items()), "utf-8")
    return path


def cosines(matrix):
    unit = torch.nn.functional.normalize(matrix, dim=-1)
    return unit @ unit.T


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Prepare a corpus with a vocabulary of words."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "in.txt").write_text("\n\n".join(text.capitalize() for text in texts(96)))
    options = {"validation": 0.15, "test": 0.15, "similarity": 1.0}
    prepare([folder / "in.txt"], folder / "corpus", vocabulary="words", vocab_size=24, **options)
    return folder / "corpus"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Write vectors (of 16 numbers) for words of the small corpus; "cat" and "dog" point alike."""
    rng = np.random.default_rng(0)
    made = {word: rng.standard_normal(16).round(4) for word in ("cat", "house", "the", "THE", "unheard")}
    return write(tmp_path_factory.mktemp("vectors") / "vectors.txt", made | {"dog": made["cat"] * 2})


def test_the_words_of_a_bpe_are_its_tokens_with_and_without_a_blank(tokenizer):
    words = words_of(tokenizer)
    whole = tokenizer.convert_tokens_to_ids("Ġthe")
    assert words["the"][0] == whole and words["t"] == tokenizer.convert_tokens_to_ids(["Ġt", "t"])
    every = [number for ids in words.values() for number in ids]
    assert len(every) == len(set(every)) and not set(every) & set(tokenizer.all_special_ids)
    assert all(tokenizer.decode([number]).strip() == word for word, ids in words.items() for number in ids)


def test_a_vocabulary_of_words_is_made_and_trained_on(words):
    tokenizer = load_tokenizer(words)
    found = words_of(tokenizer)
    assert len(found) == 24 - 5 and {"cat", "dog", "the"} <= found.keys() and tokenizer.unk_token == "<|unk|>"
    assert tokenizer("the cat").input_ids == [found["the"][0], found["cat"][0]]


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_each_matched_token_gets_the_vector_of_its_word(kind, tokenizer, words, vectors):
    tokenizer = tokenizer if kind == "bpe" else load_tokenizer(words)
    model = build("decoder", "tiny", tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    matched = use_vectors(model, tokenizer, vectors)
    after, found = model.get_input_embeddings().weight, words_of(tokenizer)
    known = [word for word in ("cat", "dog", "house", "the") if word in found]
    assert len(known) >= 3 and matched.words == len(known) + ("The" in found) + (kind == "bpe" and "THE" in found)
    assert matched.of == len(found) and matched.width == 16 and matched.kept == 1
    lines = dict(line.split(" ", 1) for line in vectors.read_text().splitlines())
    given = torch.tensor([[float(x) for x in lines[word].split()] for word in known])
    rows = after.detach()[[found[word][0] for word in known]]
    assert torch.allclose(cosines(rows), cosines(given), atol=1e-5), "a larger space keeps every cosine"
    assert sorted(matched.ids.tolist()) == sorted(number for word in known for number in found[word]) or "The" in found
    rest = sorted(set(range(len(tokenizer))) - set(matched.ids.tolist()))
    assert torch.equal(after[rest], before[rest]) and torch.equal(after[matched.ids], matched.vectors)
    assert matched.vectors.square().mean().sqrt() == pytest.approx(before.square().mean().sqrt().item(), rel=0.5)
    assert f"{matched.words} of the vocabulary's {matched.of} words" in str(matched)
    assert model.get_output_embeddings().weight is after, "the output shares them"


def test_a_capitalised_word_takes_the_vector_of_its_lower_case(tokenizer, tmp_path):
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_tokens(["Cat", "CAT"])
    model = build("decoder", "tiny", tokenizer)
    matched = use_vectors(model, tokenizer, write(tmp_path / "in.txt", {"cat": [1, 2], "CAT": [3, -1], "dog": [0, 1]}))
    rows = dict(zip(matched.ids.tolist(), matched.vectors))
    found = words_of(tokenizer)
    assert torch.equal(rows[found["Cat"][0]], rows[found["cat"][0]])
    assert not torch.equal(rows[found["CAT"][0]], rows[found["cat"][0]])


def test_wide_vectors_keep_their_principal_directions():
    rng = torch.Generator().manual_seed(0)
    plane = torch.randn(40, 3, generator=rng) @ torch.randn(3, 90, generator=rng)
    made, kept = projected(plane, 8)
    assert made.shape == (40, 8) and kept == pytest.approx(1) and torch.allclose(cosines(made), cosines(plane), atol=1e-4)
    noise = torch.randn(40, 90, generator=rng)
    made, kept = projected(noise, 8)
    singular = torch.linalg.svdvals(noise).square()
    assert kept == pytest.approx((singular[:8].sum() / singular.sum()).item(), rel=1e-4) and kept < 0.6
    assert projected(noise, 90)[0] is noise


def test_vectors_for_no_word_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="in.txt has a vector for none of the .* words of the vocabulary"):
        use_vectors(build("decoder", "tiny", tokenizer), tokenizer, write(tmp_path / "in.txt", {"unheard": [1.0, 2.0]}))


@pytest.mark.parametrize("freeze", [True, False])
def test_training_moves_the_vectors_or_leaves_them_to_the_bit(words, vectors, tmp_path, capsys, freeze):
    settings = Settings(model="decoder", preset="tiny", epochs=1, batch_size=16, vectors=str(vectors), freeze_vectors=freeze)
    train(tmp_path / "run", words, settings, callbacks=())
    out = capsys.readouterr().out
    model = build("decoder", "tiny", load_tokenizer(words))
    first = model.get_input_embeddings().weight.detach().clone()
    matched = use_vectors(model, load_tokenizer(words), vectors, frozen=freeze)
    assert (0.5 < matched.vectors.norm(dim=1).mean() < 2) == freeze, "what stays is as long as the logits need"
    assert f"{vectors}: {matched}" in out
    after = load_file(tmp_path / "run" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(after[matched.ids], matched.vectors) == freeze
    rest = sorted(set(range(24)) - set(matched.ids.tolist()) - {0, 3})
    assert not torch.equal(after[rest], first[rest]), "the other words are trained"


def test_neighbours_are_the_nearest_words_of_the_embedding(words, vectors, tmp_path, capsys):
    tokenizer = load_tokenizer(words)
    model = build("vae", "tiny", tokenizer)
    use_vectors(model, tokenizer, vectors)
    (nearest, cosine), *rest = neighbours(model, tokenizer, "cat", 5)
    assert nearest == "dog" and cosine == pytest.approx(1, abs=1e-5) and len(rest) == 4
    assert [value for _, value in rest] == sorted((value for _, value in rest), reverse=True) and rest[0][1] < 0.99
    names = [name for name, _ in neighbours(model, tokenizer, "cat", 10**6)]
    assert len(names) == len(set(names)) == len(words_of(tokenizer)) - 1 and "cat" not in names
    save(model, tokenizer, tmp_path / "model")
    assert main(["lm", "neighbours", str(tmp_path / "model"), "cat", "dog", "--count", "1"]) == 0
    assert capsys.readouterr().out == "cat:\n   1.000  dog\ndog:\n   1.000  cat\n"


def test_a_word_of_several_tokens_has_their_mean(tokenizer):
    model = build("decoder", "tiny", tokenizer)
    ids, matrix = tokenizer(" zebra")["input_ids"], model.get_input_embeddings().weight.detach()
    assert len(ids) > 1 and "zebra" not in words_of(tokenizer)
    best, cosine = neighbours(model, tokenizer, "zebra", 1)[0]
    expected = torch.nn.functional.cosine_similarity(matrix[words_of(tokenizer)[best][0]], matrix[ids].mean(0), dim=0)
    assert cosine == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("word", "count", "message"), [(" ", 3, "word must not be empty"), ("cat", 0, "count must be at least 1")]
)
def test_neighbours_that_are_refused(tokenizer, word, count, message):
    with pytest.raises(ValueError, match=message):
        neighbours(build("decoder", "tiny", tokenizer), tokenizer, word, count)


def test_an_unknown_word_of_a_vocabulary_of_words(words):
    tokenizer = load_tokenizer(words)
    with pytest.raises(ValueError, match="which has no token for 'zebra'"):
        neighbours(build("decoder", "tiny", tokenizer), tokenizer, "zebra")


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="give one of them"):
        Settings(start="model", vectors="glove.txt")
    with pytest.raises(ValueError, match="freeze_vectors needs vectors"):
        Settings(freeze_vectors=True)


# ---- going on from a trained model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Prepare a corpus of other words, with another vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    lines = (text.replace("the", "some").replace("cat", "lamp").replace("red", "blue") for text in texts(96, seed=1))
    (folder / "in.txt").write_text("\n\n".join(lines))
    prepare([folder / "in.txt"], folder / "corpus", validation=0.15, test=0.15, vocab_size=300, similarity=1.0)
    return folder / "corpus"


@pytest.mark.parametrize("kind", ["vae", "decoder"])
def test_training_goes_on_from_a_model_with_its_own_vocabulary(kind, tokenizer, other, tmp_path, capsys):
    base = build(kind, "tiny", tokenizer, seed=3)
    save(base, tokenizer, tmp_path / "base")
    options = ["--from", str(tmp_path / "base"), "--corpus", str(other), "--epochs", "2", "--batch-size", "16"]
    assert main(["lm", "train", "--output", str(tmp_path / "run"), *options, "--learning-rate", "2e-3"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation loss" in line]
    losses = [float(line.split("validation loss ")[1].split()[0]) for line in lines]
    assert "epoch 0.0:" in lines[0] and losses[-1] < losses[0] - 0.3, "the first is that of the model as it was"
    model, its = load(tmp_path / "run")
    assert type(model) is type(base) and its.get_vocab() == tokenizer.get_vocab()


def test_a_continued_run_begins_with_the_weights_of_the_model(tokenizer, other, tmp_path):
    base = build("vae", "tiny", tokenizer, seed=3)
    save(base, tokenizer, tmp_path / "base")
    settings = Settings(
        start=str(tmp_path / "base"), epochs=0.2, batch_size=16, learning_rate=1e-12, weight_decay=0, free_bits=0.25
    )
    train(tmp_path / "run", other, settings, callbacks=())
    for name, weight in load(tmp_path / "run")[0].state_dict().items():
        assert torch.allclose(weight, base.state_dict()[name], atol=1e-6), name
    assert load(tmp_path / "run")[0].latent.free_bits == 0.25


def test_an_interrupted_continued_run_is_resumed_to_the_same_bits(tokenizer, other, tmp_path):
    save(build("decoder", "tiny", tokenizer, seed=3), tokenizer, tmp_path / "base")
    settings = Settings(start=str(tmp_path / "base"), epochs=2, batch_size=16, learning_rate=1e-3)
    train(tmp_path / "whole", other, settings, callbacks=())
    with pytest.raises(Interrupted):
        train(tmp_path / "part", other, settings, callbacks=[At(1, lambda: os.kill(os.getpid(), signal.SIGINT))])
    train(tmp_path / "part", resume=True, callbacks=())
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(part[name], value) for name, value in whole.items())


@pytest.mark.parametrize("option", ["--model=vae", "--preset=tiny", "--mean-std=1"])
def test_the_model_to_go_on_from_is_not_chosen_again(tmp_path, capsys, option):
    assert main(["lm", "train", "--from", "base", option, "--output", str(tmp_path / "run")]) == 1
    assert f"--from goes on with a model as it is: leave out {option.partition('=')[0]}" in capsys.readouterr().err
