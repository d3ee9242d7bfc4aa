"""The parts of the page of ``fastlm lm attend``, on attention made by hand."""

import base64
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fastlm.lm.visualize.attention_maps import Attention
from fastlm.lm.visualize.heads import cards_of, glance_of
from fastlm.lm.visualize.look import Look
from fastlm.lm.visualize.pictures import binned, png_of, strip
from fastlm.lm.visualize.reader import data_of, kept_keys, reader_of
from fastlm.lm.visualize.script import SCRIPT


def made(labels, keys=None, layers=2, heads=3, k=4):
    """Return attention on a text of ``labels``, with random weights that a whole matrix holds, and the matrix."""
    torch.manual_seed(0)
    keys = labels if keys is None else keys
    weights = torch.softmax(3 * torch.randn(layers, heads, len(labels), len(keys)), -1)
    top_weights, top_keys = weights.topk(k)
    entropy = torch.special.entr(weights).sum(-1)
    look = Look(entropy, weights.amax(-1), weights.sum(-2), top_keys.int(), top_weights, None)
    return Attention("encoder", labels, keys, torch.full((len(labels),), len(keys)), look), weights


def read_data(data):
    """Return the keys and weights (layers, heads, Lq, kept) that the script reads."""
    shape = [data[name] for name in ("layers", "heads", "queries", "kept")]
    keys = np.frombuffer(base64.b64decode(data["keys"]), f"<u{data['bytes']}")
    weights = np.frombuffer(base64.b64decode(data["weights"]), np.uint8)
    return keys.reshape(shape), (weights.reshape(shape) / 255) ** 2


def test_a_page_that_would_be_too_large_keeps_fewer_keys(monkeypatch):
    found, _ = made(list("abcdefg"))
    monkeypatch.setattr("fastlm.lm.visualize.reader.BUDGET", 2 * 4 * 3 * 2 * 3 * 7)
    assert kept_keys([found, found]) == 3
    keys, weights = read_data(data_of(found, 3))
    np.testing.assert_array_equal(keys, found.look.top_keys[..., :3])
    np.testing.assert_allclose(weights, found.look.top_weights[..., :3], atol=1 / 255)
    assert "more than the 3 largest of each token" in reader_of(found, 3) and "too large" not in reader_of(found, 4)
    monkeypatch.setattr("fastlm.lm.visualize.reader.BUDGET", 0)
    assert kept_keys([found]) == 1


def test_many_keys_have_longer_numbers():
    found, _ = made(["a"], ["a"] * 70_000, 1, 1)
    found.look.top_keys[0, 0, 0, 0] = 69_999
    keys, _ = read_data(data_of(found, 4))
    np.testing.assert_array_equal(keys, found.look.top_keys)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_script_finds_the_top_keys_of_a_head_and_their_average():
    found, matrix = made([str(i) for i in range(9)], k=9)
    keys, weights = read_data(data_of(found, 9))
    data = {"heads": 3, "queries": 9, "kept": 9, "keys": keys.flatten().tolist()}
    data["weights"] = np.rint(255 * np.sqrt(weights)).astype(int).flatten().tolist()
    script = f"const document = {{querySelectorAll: () => []}};\n{SCRIPT}\nconst data = {json.dumps(data)};\n"
    script += "console.log(JSON.stringify([0, 2, -1].map((head) => topKeys(data, 1, head, 5))));"
    answers = json.loads(subprocess.run(["node", "-"], input=script, capture_output=True, text=True, check=True).stdout)
    for pairs, expected in zip(answers, (matrix[1, 0, 5], matrix[1, 2, 5], matrix[1, :, 5].mean(0))):
        row = np.zeros(9)
        for key, weight in pairs:
            row[key] = weight
        np.testing.assert_allclose(row, expected, atol=1 / 255)
        assert [weight for _, weight in pairs] == sorted(row[row > 0], reverse=True)


def test_hostile_labels_stay_text():
    hostile = ["<img src=x onerror=alert(1)>", '"&<script>', "</script>", "\udc80", "↵"]
    found, _ = made(hostile)
    for part in (reader_of(found, 4), cards_of(found), glance_of(found)):
        assert "<img" not in part and part.count("<script") == part.count("</script>") == part.count('class="data"')
    assert "&lt;img src=x onerror=alert(1)&gt;</span>" in reader_of(found, 4) and "\udc80" in reader_of(found, 4)


@pytest.mark.parametrize("alone", [1, 2])
def test_bars_keep_the_sum_and_show_the_first_keys_alone(alone):
    shares = np.random.default_rng(0).random(1000)
    bars = binned(shares, alone, 50)
    assert len(bars) == 50 and bars.sum() == pytest.approx(shares.sum())
    np.testing.assert_array_equal(bars[:alone], shares[:alone])
    np.testing.assert_array_equal(binned(shares[:50], alone, 50), shares[:50])
    assert len(binned(shares[:51], alone, 50)) == 50


def test_a_sink_towers_and_a_quarter_is_half_as_high():
    assert 'd="M0 100V0h1V50h1V100h1V100z"' in strip(torch.tensor([0.8, 0.2, 0.0]), 1)


def test_a_picture_holds_the_square_roots_of_the_weights():
    weights = torch.tensor([[1.0, 0, 0], [0.25, 0.25, 0.5]])
    pixels = imread(io.BytesIO(base64.b64decode(png_of(weights).partition(",")[2])), format="png")
    np.testing.assert_allclose(pixels[..., 3], weights.sqrt(), atol=0.5 / 255)
