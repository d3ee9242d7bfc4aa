"""Test the numbers in words: their words, that no two are the same, and that they are what is translated without a file."""

import json
import re

import pytest

from fastlm.cli import main
from fastlm.lm.data.numbers import NUMBERS, WHAT, english, french, number_pairs
from fastlm.lm.data.tokenizer import begin_texts, load_tokenizer, train_bpe
from fastlm.lm.finetuning.translate import pairs_of
from fastlm.lm.model.checkpoint import save
from fastlm.lm.model.presets import build


@pytest.mark.parametrize(
    ("number", "in_english", "in_french"),
    [
        (0, "zero", "zéro"),
        (16, "sixteen", "seize"),
        (21, "twenty-one", "vingt et un"),
        (70, "seventy", "soixante-dix"),
        (71, "seventy-one", "soixante et onze"),
        (79, "seventy-nine", "soixante-dix-neuf"),
        (80, "eighty", "quatre-vingts"),
        (81, "eighty-one", "quatre-vingt-un"),
        (91, "ninety-one", "quatre-vingt-onze"),
        (100, "one hundred", "cent"),
        (101, "one hundred and one", "cent un"),
        (200, "two hundred", "deux cents"),
        (280, "two hundred and eighty", "deux cent quatre-vingts"),
        (1000, "one thousand", "mille"),
        (1971, "one thousand nine hundred and seventy-one", "mille neuf cent soixante et onze"),
        (2001, "two thousand and one", "deux mille un"),
        (9999, "nine thousand nine hundred and ninety-nine", "neuf mille neuf cent quatre-vingt-dix-neuf"),
    ],
)
def test_the_words_of_a_number(number, in_english, in_french):
    assert english(number) == in_english and french(number) == in_french


def test_no_two_numbers_have_the_same_words():
    for words in (english, french):
        made = {words(number) for number in range(10_000)}
        assert len(made) == 10_000 and all(re.fullmatch(r"[a-zé]+([ -][a-zé]+)*", text) for text in made)


def test_the_pairs_are_split_and_cover_all_digits():
    examples, what = pairs_of(None, None)
    assert what == WHAT and sum(examples.counts.values()) == len(NUMBERS) == len(number_pairs())
    assert 0.07 * len(NUMBERS) < examples.counts["test"] < 0.13 * len(NUMBERS)
    for place in (1, 10, 100, 1000):
        assert {number // place % 10 for number in NUMBERS} == set(range(10))


def test_without_a_file_the_numbers_are_translated(tmp_path, capsys, monkeypatch):
    """Read what the command takes, and train a tiny model for a few seconds, which learns most of the numbers."""
    train_bpe([text for pair in number_pairs() for text in pair], 400).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    begin_texts(tokenizer)
    save(build("decoder", "tiny", tokenizer), tokenizer, tmp_path / "model")
    monkeypatch.setattr("fastlm.lm.data.numbers.NUMBERS", range(0, 10_000, 11))
    options = ["--output", str(tmp_path / "out"), "--epochs", "6", "--learning-rate", "5e-3"]
    assert main(["lm", "finetune", str(tmp_path / "model"), "translate", *options]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"No DATA was given. The examples are {WHAT}." and f"data         {WHAT}" in rest
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["data"] == WHAT and metrics["bleu"] > 50


def test_a_test_file_goes_with_data(tmp_path, capsys):
    assert main(["lm", "finetune", str(tmp_path), "translate", "--test", "t.csv", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "fastlm lm finetune: --test goes with DATA\n"
