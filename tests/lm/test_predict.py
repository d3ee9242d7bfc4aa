"""Predictions of classifiers, and the ready reviews that one learns from."""

import csv
import gzip
import json

import pytest
import torch

import fastlm.lm.finetuning.classify as classification
from fastlm.cli import main
from fastlm.lm.data.ready import sentiment
from fastlm.lm.finetuning.common import frame
from fastlm.lm.finetuning.predict import predict
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.presets import build

TEXTS = ["the cat sees a dog", "the", "a river is near the house and the old stone is under the tree " * 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Save an untrained decoder, and a classifier and an untrained TextVAE's classifier whose labels are "no" and "yes"."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("vae", "decoder"):
        model = build(kind, "tiny", tokenizer)
        save(model, tokenizer, folder / kind)
        framed = load(folder / kind)[1]
        classifier = classification.classifier_of(model, ["no", "yes"])
        frame(framed, framed.eos_token, classifier.config.max_position_embeddings)
        save(classifier, framed, folder / f"{kind}-classifier")
    return folder


@pytest.mark.parametrize("kind", ["vae", "decoder"])
def test_the_label_and_its_probability_are_the_softmax_of_the_logits(folder, kind):
    found = predict(folder / f"{kind}-classifier", TEXTS)
    model = {"vae": classification.EuroBertForSequenceClassification, "decoder": classification.LlamaForSequenceClassification}
    stock, (_, tokenizer) = model[kind].from_pretrained(folder / f"{kind}-classifier"), load(folder / kind)
    for text, (label, probability) in zip(TEXTS, found):
        ids = [1, *tokenizer(text)["input_ids"], 2]
        ids = ids if len(ids) <= 128 else [*ids[:127], 2]  # as in training, a text is cut before its <|eos|>
        with torch.no_grad():
            expected = stock(torch.tensor([ids])).logits.softmax(1)[0]
        assert label == ("no", "yes")[expected.argmax()] and probability == pytest.approx(expected.max().item(), abs=1e-4)


def test_a_file_of_texts(folder, tmp_path, capsys):
    (tmp_path / "in.csv").write_text('review\n"one, two"\nthree\na,b\n')
    classifier, out = str(folder / "vae-classifier"), tmp_path / "out.csv"
    assert main(["lm", "predict", classifier, "--file", f"{tmp_path}/in.csv", "--fields", "review", "--output", str(out)]) == 0
    assert "1 rows of" in capsys.readouterr().err
    with open(out, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["review", "predicted", "probability"] and [row[0] for row in rows] == ["one, two", "three"]
    for row, expected in zip(rows, predict(classifier, ["one, two", "three"])):
        assert row[1] == expected.found and float(row[2]) == expected.probability


def test_gzipped_files_with_fields_are_read(folder, tmp_path, capsys):
    with gzip.open(tmp_path / "in.json.gz", "wt") as file:
        json.dump([{"text": "one"}, {"text": "two"}], file)
    assert main(["lm", "predict", str(folder / "vae-classifier"), "--file", f"{tmp_path}/in.json.gz"]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]


def test_what_is_no_classifier_is_refused(folder, tmp_path, capsys):
    for arguments, message in (
        ([folder / "decoder", "x"], "holds a LlamaForCausalLM, which predicts nothing yet: fastlm lm finetune"),
        ([folder / "vae", "x"], "holds a TextVAE, which predicts nothing yet"),
        ([tmp_path / "gone", "x"], "gone is no checkpoint of fastlm.lm"),
        ([folder / "vae-classifier", "x", "--context", "y"], "--context is for models of questions"),
    ):
        assert main(["lm", "predict", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="contexts are for models of questions"):
        predict(folder / "vae-classifier", ["x"], ["y"])
    with pytest.raises(TypeError, match="texts must be a sequence of texts"):
        predict(folder / "vae-classifier", "x")


def test_the_ready_reviews_are_balanced_and_in_pairs():
    splits = {name: list(sentiment(name)) for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 262, "validation": 54, "test": 104}
    assert len({text for rows in splits.values() for text, _ in rows}) == 420
    for rows in splits.values():
        assert [label for _, label in rows] == ["positive", "negative"] * (len(rows) // 2)


def test_classify_without_data_takes_the_reviews(folder, tmp_path, capsys):
    options = ["--output", str(tmp_path / "out"), "--epochs", "0.1"]
    assert main(["lm", "finetune", str(folder / "decoder"), "classify", *options]) == 0
    out = capsys.readouterr().out
    assert "No DATA was given. The examples are 420 short reviews" in out
    assert "262 to train on, 54 to choose the epoch by, 104 to test on" in out and "negative, positive" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "--test", "x.csv"], "--test goes with DATA"),
        (["answer", "--corpus", "x"], "--corpus is for classify and translate"),
        (["answer", "x.csv", "--fields", "a", "b"], "--fields of answer must be 3 names, as question context answer; got 2"),
    ],
)
def test_finetuning_that_is_refused(folder, tmp_path, capsys, arguments, message):
    assert main(["lm", "finetune", str(folder / "vae"), *arguments, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
