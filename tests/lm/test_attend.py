"""``fastlm lm attend``: what is seen of attention, the latent's traversals and map, and the page that shows them."""

import argparse
import base64
import json
import math
import random
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastlm.lm.cli.attend import add_attend
from fastlm.lm.data.batches import encode_text
from fastlm.lm.data.prepare import prepare
from fastlm.lm.data.tokenizer import load_tokenizer
from fastlm.lm.model import checkpoint
from fastlm.lm.model.presets import build
from fastlm.lm.training.train import Settings
from fastlm.lm.visualize.attend import attend, inspect_model
from fastlm.lm.visualize.attention_maps import Attention, attention_of, token_labels
from fastlm.lm.visualize.latent_maps import active_units, decoded, held_out, map_of, means_of, traverse
from fastlm.lm.visualize.look import Look
from fastlm.lm.visualize.page import ModelView, page_of

WORDS = ["river", "stone", "ladder", "yellow", "quiet", "harbour", "morning", "engine", "paper", "window", "garden", "silver"]
CLEAR_REFS = Path("/proc/self/clear_refs")  # Writing 5 resets the peak of the resident memory (man 5 proc).
SENTENCE = "A quiet morning in the garden."


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with a corpus and two checkpoints, whose weights are so large that attention is far from uniform."""
    folder = tmp_path_factory.mktemp("attend")
    rng = random.Random(0)
    with open(folder / "texts.jsonl", "w") as file:
        for number in range(60):
            text = " ".join(rng.choices(WORDS, k=14)).capitalize() + "."
            file.write(json.dumps({"text": text, "label": ["<b>bold</b>", "plain", None][number % 3]}) + "\n")
    options = {"validation": 0.2, "test": 0.2, "vocab_size": 270, "similarity": 1}
    prepare([folder / "texts.jsonl"], folder / "corpus", **options)
    tokenizer = load_tokenizer(folder / "corpus")
    for kind in ("vae", "decoder"):
        model = build(kind, "tiny", tokenizer, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8)
        checkpoint.save(model, tokenizer, folder / kind)
    return folder


@pytest.fixture(scope="module")
def vae(runs):
    return checkpoint.load(runs / "vae")


@pytest.fixture(scope="module")
def view(runs):
    return inspect_model(runs / "vae", SENTENCE)


def ids_of(text, tokenizer):
    return torch.tensor([encode_text(text, tokenizer, 64)])


# ---- attention --------------------------------------------------------------------------------------------------------------


def by_hand(attention, rotary, hidden, memory=None, causal=True):
    """Compute the scores q k / sqrt(d) of one layer in float64: (heads, L, Lk); ``memory`` (kv heads, d) is the first key."""
    length = hidden.shape[1]
    cos, sin = rotary(hidden, torch.arange(length)[None])
    query, key = (
        project(hidden).view(1, length, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    query, key = (tensor.double() for tensor in apply_rotary_pos_emb(query, key, cos, sin))
    rows = []
    for head in range(query.shape[1]):
        own = key[0, head // (query.shape[1] // key.shape[1])]
        scores = query[0, head] @ own.T / math.sqrt(attention.head_dim)
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        if memory is not None:
            first = query[0, head] @ memory[head // (query.shape[1] // key.shape[1])].double() / math.sqrt(attention.head_dim)
            scores = torch.cat([first[:, None], scores], 1)
        rows.append(scores)
    return torch.stack(rows)


def inputs_of(modules, run):
    """Record the input of the attention in each of the decoder's layers."""
    seen, hooks = [], []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["hidden_states"]), with_kwargs=True))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def check_layer(look, layer, scores):
    """Compare all that is kept of a layer with what its scores (heads, L, Lk) in float64 give."""
    expected = scores.softmax(-1)
    assert expected[:, -1].max() > 3 / expected.shape[-1]  # far from uniform, or else the comparison would say little
    options = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(look.entropy[layer].double(), torch.special.entr(expected).sum(-1), **options)
    torch.testing.assert_close(look.max_logit[layer].double(), scores.amax(-1), **options)
    torch.testing.assert_close(look.key_mass[layer].double(), expected.sum(-2), **options)
    top = look.top_keys[layer].long()
    largest = expected.topk(top.shape[-1]).values
    torch.testing.assert_close(look.top_weights[layer].double(), largest, **options)
    seen = scores.isfinite().sum(-1, keepdim=True)
    assert torch.equal(top >= 0, torch.arange(top.shape[-1]) < seen)
    torch.testing.assert_close(expected.gather(-1, top.clamp(min=0)) * (top >= 0), largest, **options)
    if look.weights is not None:
        torch.testing.assert_close(look.weights[layer].double(), expected, **options)


def test_a_decoder_is_seen_as_its_scores_say(runs):
    model, tokenizer = checkpoint.load(runs / "decoder")
    ids = ids_of(SENTENCE, tokenizer)
    (found,) = attention_of(model, tokenizer, ids)
    attentions = [layer.self_attn for layer in model.model.layers]
    hidden = inputs_of(attentions, lambda: model(input_ids=ids[:, :-1]))
    for layer, (attention, entering) in enumerate(zip(attentions, hidden)):
        check_layer(found.look, layer, by_hand(attention, model.model.rotary_emb, entering))
    assert found.stack == "decoder" and found.keys == found.queries == token_labels(ids[0, :-1].tolist(), tokenizer)
    assert found.visible.tolist() == list(range(1, ids.shape[1]))


def test_the_decoder_of_a_vae_looks_at_its_latent_first(vae):
    model, tokenizer = vae
    ids = ids_of(SENTENCE, tokenizer)
    found, _ = attention_of(model, tokenizer, ids)
    with torch.no_grad():
        mu, _ = model.posterior(ids)
        memories = model.to_keys(mu).view(2, 2, 16)  # (layers, kv heads, head_dim)
    attentions = [layer.self_attn for layer in model.decoder.model.layers]
    hidden = inputs_of(attentions, lambda: model(input_ids=ids[:, :-1], latents=mu))
    for layer, attention in enumerate(attentions):
        expected = by_hand(attention, model.decoder.model.rotary_emb, hidden[layer], memories[layer])
        check_layer(found.look, layer, expected)
    assert found.keys == ["z", *found.queries] and found.visible.tolist() == list(range(2, ids.shape[1] + 1))


def test_the_encoders_weights(vae):
    model, tokenizer = vae
    ids = ids_of(SENTENCE, tokenizer)
    _, found = attention_of(model, tokenizer, ids)
    attention = model.encoder.layers[0].self_attn
    (hidden,) = inputs_of([attention], lambda: model.posterior(ids))
    check_layer(found.look, 0, by_hand(attention, model.encoder.rotary_emb, hidden, causal=False))
    assert found.stack == "encoder" and found.keys == found.queries and found.queries[-1] == "<|eos|>"


def test_rows_sum_to_one_and_nothing_looks_ahead(vae):
    model, tokenizer = vae
    decoder, encoder = attention_of(model, tokenizer, ids_of(SENTENCE, tokenizer))
    for found in (decoder, encoder):
        weights = found.look.weights
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        torch.testing.assert_close(found.shares.sum(-1), torch.ones(weights.shape[:2]))
    assert decoder.look.weights[..., 1:].triu(1).count_nonzero() == 0 and encoder.look.weights.all()


def test_a_model_that_was_looked_at_is_as_before(vae):
    model, tokenizer = vae
    with pytest.raises(IndexError):
        attention_of(model, tokenizer, torch.tensor([[1, 2, len(tokenizer)]]))
    attention_of(model, tokenizer, ids_of(SENTENCE, tokenizer))
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"fastlm"}
    means_of(model, tokenizer, [SENTENCE])


def test_breadth_is_a_share_of_uniform_attention():
    uniform = torch.tensor([0, math.log(2), math.log(3)])
    nothing = torch.zeros(1, 2, 3)
    look = Look(torch.stack([uniform, torch.zeros(3)])[None], nothing, nothing, nothing[..., None], nothing[..., None], None)
    found = Attention("decoder", list("abc"), list("abc"), torch.tensor([1, 2, 3]), look)
    assert found.uniform == pytest.approx(math.log(6) / 3)
    torch.testing.assert_close(found.entropy, torch.tensor([[math.log(6) / 3, 0.0]]))
    torch.testing.assert_close(found.breadth, torch.tensor([[1.0, 0.0]]))


def test_tokens_are_shown_as_text(vae):
    _, tokenizer = vae
    ids = tokenizer("a\tb c\n", add_special_tokens=False)["input_ids"]
    assert "".join(token_labels(ids, tokenizer)) == "a⇥b·c↵"


# ---- a long text ------------------------------------------------------------------------------------------------------------


LENGTH = 2500  # tokens


@pytest.fixture(scope="module")
def long(vae):
    """Return the ids of a text of thousands of tokens, what is seen of it, and the bytes by which memory rose meanwhile."""
    model, tokenizer = vae
    ids = torch.tensor([encode_text(" ".join(random.Random(1).choices(WORDS, k=2000)), tokenizer, LENGTH)])
    attention_of(model, tokenizer, ids[:, :600])  # what is allocated once
    if not CLEAR_REFS.exists():
        return ids, attention_of(model, tokenizer, ids), None
    CLEAR_REFS.write_text("5")
    before = status("VmRSS")
    found = attention_of(model, tokenizer, ids)
    return ids, found, status("VmHWM") - before


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def test_a_long_text_takes_no_quadratic_memory(long):
    ids, found, peak = long
    if peak is None:
        pytest.skip("only Linux counts the peak of the memory")
    weights = 4 * LENGTH**2 * sum(attention.entropy.numel() for attention in found)
    assert ids.shape == (1, LENGTH) and weights == 300_000_000 and peak < weights / 3


def test_a_long_text_is_seen_as_its_scores_say(vae, long):
    model, _ = vae
    ids, (decoder, encoder), _ = long
    assert decoder.look.weights is None and encoder.look.weights is None and decoder.look.top_keys.dtype == torch.int32
    attention = model.encoder.layers[0].self_attn
    (hidden,) = inputs_of([attention], lambda: model.posterior(ids))
    check_layer(encoder.look, 0, by_hand(attention, model.encoder.rotary_emb, hidden, causal=False))


def test_the_page_of_a_long_text(long):
    text = page_of(ModelView("long", LENGTH, True, long[1]))
    page = Page(text)
    assert len(text) < 3e6 and "The first 2500 tokens; the rest is left out." in page.text
    assert page.tags.count("details") == 12 == page.text.count("share of the weights") and "image" not in page.tags
    assert page.classes.count("token") == 2499 + 2500 and page.classes.count("key") == 1


# ---- the latent -------------------------------------------------------------------------------------------------------------


def test_means_do_not_depend_on_the_batch_around_them(vae):
    model, tokenizer = vae
    texts = [" ".join(WORDS[:k]) for k in (9, 1, 12, 3, 5, 2, 11, 4, 10, 6)]
    with torch.no_grad():
        alone = torch.cat([model.posterior(ids_of(text, tokenizer))[0] for text in texts])
    torch.testing.assert_close(means_of(model, tokenizer, texts, 64), alone, rtol=1e-4, atol=1e-4)


def test_a_traversal_through_the_own_value_is_the_reconstruction(vae):
    model, tokenizer = vae
    z = means_of(model, tokenizer, [SENTENCE], 64)[0]
    own = float(z[3])
    first, second = traverse(model, tokenizer, z, [3, 5], [own, own + 50], max_tokens=12)
    (reconstruction,) = decoded(model, tokenizer, z[None], 12)
    assert first.texts[0] == reconstruction and first.unit == 3 and first.own == own
    moved = z.clone()
    moved[5] = own + 50
    assert second.texts[1] == decoded(model, tokenizer, moved[None], 12)[0] != reconstruction


def test_decoding_takes_the_most_likely_token_each_time(vae):
    model, tokenizer = vae
    z = means_of(model, tokenizer, [SENTENCE], 64)
    ids = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        while ids.shape[1] < 9 and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(input_ids=ids, latents=z).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert decoded(model, tokenizer, z, 8) == tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_active_units():
    means = torch.tensor([[0.0, 5, 1], [0, 5, 3], [0.5, 5, 2]])
    sentence = torch.tensor([-3.0, 1, 2])
    assert active_units(sentence, means, 2) == [2, 0] and active_units(sentence, None, 2) == [0, 2]


def test_the_map_is_that_of_a_singular_value_decomposition():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(40, 6)) * [5, 1, 3, 0.5, 0.2, 0.1] + 7
    sentence = rng.normal(size=6)
    found = map_of(torch.tensor(means), torch.tensor(sentence), [])
    left, scale, right = np.linalg.svd(means - means.mean(0))
    sign = np.sign((found.points * (left * scale[0])[:, :2]).sum(0))
    np.testing.assert_allclose(found.points, left[:, :2] * scale[:2] * sign, atol=1e-8)
    np.testing.assert_allclose(found.sentence, (sentence - means.mean(0)) @ right[:2].T * sign, atol=1e-8)
    np.testing.assert_allclose(found.explained, (scale**2 / (scale**2).sum())[:2])


def test_the_most_frequent_labels_are_named():
    records = [{"label": label} for label in ["a"] * 3 + ["b"] * 2 + [None] * 9 + list("cdefghijk")]
    found = map_of(torch.eye(5), torch.zeros(5), records).labels
    assert found[:2] == [("a", 3), ("b", 2)] and len(found) == 8 and all(count == 1 for _, count in found[2:])


def test_test_texts_come_before_validation_texts(runs):
    report = json.loads((runs / "corpus" / "report.json").read_text())["splits"]
    found = held_out(runs / "corpus", 1000)
    assert len(found) == report["test"]["records"] + report["validation"]["records"]
    with open(runs / "corpus" / "test.jsonl") as file:
        tests = [json.loads(line) for line in file]
    assert found[: len(tests)] == tests and held_out(runs / "corpus", 3) == tests[:3]


# ---- the page ---------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collect the tags, the addresses and the text of a page, and fail if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.classes, self.ids, self.text, self.data, self.open = [], [], [], [], "", [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.classes += [value for name, value in attributes if name == "class"]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.data.append(data)
        else:
            self.text += data


def test_a_page_of_a_vae(runs, tmp_path):
    hostile = 'a <script>alert("1")</script> & </title> b'
    assert attend(runs / "vae", hostile, tmp_path / "new" / "page.html", runs / "corpus") == tmp_path / "new" / "page.html"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    text = (tmp_path / "new" / "page.html").read_text("utf-8")
    page = Page(text)
    assert page.tags.count("script") == 2 + 1 and "link" not in page.tags and hostile in page.text
    assert hostile.replace(" ", "·") in page.text  # the tokens
    assert not re.search(r"http|url\(|import|fetch|innerHTML", re.sub(r"[\w+/=]{200,}", "", text))
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert pictures and all(address.startswith("data:image/png;base64,") for address in pictures)
    assert {address[1:] for address in page.addresses if address.startswith("#")} == set(page.ids)  # from each head to its card
    assert page.tags.count("image") == page.tags.count("details") == 2 * 4 + 1 * 4  # all heads
    assert page.text.count("Unit ") == 5 and page.tags.count("caption") == 5
    assert page.tags.count("circle") == len(held_out(runs / "corpus", 1000)) + 1 and "<b>bold</b>" in page.text


def test_the_page_names_the_sharpest_and_the_broadest_heads(view):
    shares = {
        f"{found.stack} {layer + 1}.{head + 1}": float(found.breadth[layer, head])
        for found in view.attentions
        for layer in range(found.breadth.shape[0])
        for head in range(found.breadth.shape[1])
    }
    text = page_of(view)
    named = re.search(r"sharpest heads are <strong>(.*?) \(.*?the broadest are <strong>(.*?) \(", text).groups()
    assert named == (min(shares, key=shares.get), max(shares, key=shares.get))
    for stack in view.attentions:
        for nats in stack.entropy.flatten().tolist():
            assert f"{nats:.2f} nats" in text


def test_without_a_corpus_there_is_no_map_and_without_a_latent_neither(runs, tmp_path):
    without = Page(attend(runs / "vae", SENTENCE, tmp_path / "page.html").read_text("utf-8")).text
    assert "Without a corpus there is no map." in without and "largest means" in without
    plain = Page(attend(runs / "decoder", SENTENCE, tmp_path / "page.html", runs / "corpus").read_text("utf-8")).text
    assert "it has no latent" in plain and "Unit" not in plain and "Attention of the encoder" not in plain


def test_the_corpus_of_the_run_is_the_default(runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for path in (runs / "vae").iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    for corpus, expected in ((runs / "corpus", "Map of the corpus"), (tmp_path / "gone", "Without a corpus")):
        (run / "settings.json").write_text(json.dumps(asdict(Settings()) | {"corpus": str(corpus)}))
        assert expected in attend(run, SENTENCE, tmp_path / "page.html").read_text("utf-8")


def test_a_long_sentence_is_cut_and_the_page_says_so(runs, view):
    long = inspect_model(runs / "vae", " ".join(WORDS * 8))
    decoder, encoder = long.attentions
    assert long.cut and long.tokens == 128
    assert decoder.look.top_keys.shape == (2, 4, 127, 8) and encoder.look.key_mass.shape == (1, 4, 128)
    assert "The first 128 tokens; the rest is left out." in page_of(long) and "left out" not in page_of(view)


def test_the_data_of_the_page_are_the_top_keys(view):
    for found, text in zip(view.attentions, Page(page_of(view)).data):
        data = json.loads(text)
        shape = [data[name] for name in ("layers", "heads", "queries", "kept")]
        keys = np.frombuffer(base64.b64decode(data["keys"]), "<u2").reshape(shape)
        weights = (np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(shape) / 255) ** 2
        assert data["before"] == len(found.keys) - len(found.queries) and data["kept"] == 8 and data["bytes"] == 2
        np.testing.assert_array_equal(keys, found.look.top_keys.clamp(min=0))
        np.testing.assert_allclose(weights, found.look.top_weights, atol=1 / 255)
        assert (weights[found.look.top_keys < 0] == 0).all()


# ---- the command line, and errors -------------------------------------------------------------------------------------------


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_attend(parser.add_subparsers())
    parsed = parser.parse_args(["attend", *map(str, arguments)])
    parsed.run(parsed)


def test_the_command_writes_the_page(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(runs / "vae", SENTENCE, "--corpus", runs / "corpus")
    assert capsys.readouterr().out == f"The page is {tmp_path / 'attend.html'}\n"
    assert "Map of the corpus" in (tmp_path / "attend.html").read_text("utf-8")


@pytest.mark.parametrize("sentence", ["", " \n"])
def test_an_empty_sentence(runs, tmp_path, sentence):
    with pytest.raises(ValueError, match="sentence must not be empty"):
        attend(runs / "vae", sentence, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_named_and_the_last_page_stays(runs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("before")
    with pytest.raises(FileNotFoundError, match="nowhere is no checkpoint"):
        attend(tmp_path / "nowhere", SENTENCE, page)
    for kind in ("vae", "decoder"):
        with pytest.raises(FileNotFoundError, match="nowhere is no prepared corpus"):
            attend(runs / kind, SENTENCE, page, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="character 3 is a lone surrogate"):
        attend(runs / "vae", "ab\udc80", page)
    with pytest.raises(ValueError, match="output must be a file"):
        attend(runs / "vae", SENTENCE, tmp_path)
    assert page.read_text() == "before" and list(tmp_path.iterdir()) == [page]


def test_a_corpus_of_one_text_makes_no_map(tmp_path):
    rows = [{"text": "The only one."}]
    sizes = {}
    for split, texts in (("train", []), ("validation", []), ("test", rows)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        sizes[split] = {"bytes": (tmp_path / f"{split}.jsonl").stat().st_size}
    (tmp_path / "report.json").write_text(json.dumps({"splits": sizes}))
    with pytest.raises(ValueError, match="at least two test and validation texts for a map; it has 1"):
        held_out(tmp_path, 10)
