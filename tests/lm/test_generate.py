"""A `TextGenerator` writes what its model says: the same alone and in a batch, at once and in pieces, and by the seed."""

import argparse
import threading
import time

import pytest
import torch
from transformers import EuroBertConfig, LlamaConfig, LlamaForCausalLM

import fastlm.integrations.transformers  # noqa: F401
from fastlm.lm.cli.generate import add_generate, add_interpolate
from fastlm.lm.data.tokenizer import load_tokenizer, train_bpe
from fastlm.lm.model import generate
from fastlm.lm.model.checkpoint import save
from fastlm.lm.model.generate import Draw, Sampling, TextGenerator
from fastlm.lm.model.text_vae import TextVAE, TextVAEConfig

TEXTS = [
    "the cat sat on the mat",
    "a dog ran after the cat, and the cat ran home",
    "no one saw the dog again",
    "Ünïcode! 语言\n",
]
MAX_TOKENS, LATENT = 40, 6
PROMPTS = ["the cat", "a", "the dog ran after the cat again, and then", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS * 2, 290).save(str(path))
    return load_tokenizer(path)


def randomized(model):
    """Build models with weights so large that their texts vary with z and the prompt."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return model.eval()


@pytest.fixture(scope="module")
def models(tokenizer):
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    common |= {"max_position_embeddings": MAX_TOKENS, "tie_word_embeddings": True} | special
    decoder = LlamaConfig(**common, num_hidden_layers=2, num_key_value_heads=2)
    encoder = EuroBertConfig(**common | {"tie_word_embeddings": False}, num_hidden_layers=1, mask_token_id=3)
    vae = TextVAEConfig(encoder=encoder, decoder=decoder, latent_dim=LATENT)
    kinds = {"vae": (TextVAE, vae), "decoder": (LlamaForCausalLM, decoder)}
    return {kind: randomized(cls._from_config(config, attn_implementation="fastlm")) for kind, (cls, config) in kinds.items()}


@pytest.fixture(params=["vae", "decoder"])
def generator(request, models, tokenizer):
    return TextGenerator(models[request.param], tokenizer)


@pytest.fixture
def vae(models, tokenizer):
    """Make a text generator whose model has a latent."""
    return TextGenerator(models["vae"], tokenizer)


def ids_of(tokenizer, text):
    return [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]


@torch.no_grad()
def decoded(model, tokenizer, z):
    """Decode greedily, and compute each token from the whole text before it."""
    ids = [tokenizer.bos_token_id]
    while len(ids) < MAX_TOKENS and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(input_ids=torch.tensor([ids]), latents=z[None]).logits[0, -1].argmax()))
    return tokenizer.decode(ids, skip_special_tokens=True)


def posterior_of(model, tokenizer, text):
    ids = [*ids_of(tokenizer, text), tokenizer.eos_token_id][:MAX_TOKENS]
    with torch.no_grad():
        mu, logvar = model.posterior(torch.tensor([ids]))
    return mu[0], logvar[0]


# ---- new texts --------------------------------------------------------------------------------------------------------------


def test_the_same_seed_the_same_texts(generator):
    state = torch.get_rng_state()
    texts = generator.sample(4, seed=3)
    torch.rand(7)
    assert generator.sample(4, seed=3) == texts and len(set(texts)) == 4
    assert generator.sample(2, seed=3) == texts[:2], "however many there are"
    assert not set(generator.sample(4, seed=4)) & set(texts)
    torch.set_rng_state(state)
    generator.sample(2)
    list(generator.stream())
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0, "max_new_tokens": 5}, {"top_p": 1.0}, {"top_k": 9}])
def test_prompts_of_a_batch_give_what_they_give_alone(generator, options):
    """The longest prompt leaves less room than the others, which still use theirs."""
    together = generator.sample(2, prompt=PROMPTS, seed=1, **options)
    assert together == [text for prompt in PROMPTS for text in generator.sample(2, prompt=prompt, seed=1, **options)]
    for text, prompt in zip(together[::2], PROMPTS):
        assert text.startswith(prompt) and text != prompt


def test_batches_change_nothing(generator, monkeypatch):
    whole = generator.sample(5, prompt=PROMPTS[:2])
    monkeypatch.setattr(generate, "BATCH", 3)
    assert generator.sample(5, prompt=PROMPTS[:2]) == whole


@torch.no_grad()
def test_a_decoder_goes_on_with_the_likeliest(models, tokenizer):
    for prompt in PROMPTS:
        ids = ids_of(tokenizer, prompt)
        for _ in range(6):
            ids.append(int(models["decoder"](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert TextGenerator(models["decoder"], tokenizer).sample(prompt=prompt, temperature=0, max_new_tokens=6) == [expected]


def test_without_chance_there_is_one_text(generator):
    likeliest = generator.sample(prompt="a dog", temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        assert generator.sample(prompt="a dog", **options) == likeliest
    assert generator.sample(prompt="a dog", top_p=1.0) != likeliest


@torch.no_grad()
def test_only_the_tokens_asked_for_are_drawn(models, tokenizer, monkeypatch):
    """The model's own logits at each position tell which tokens were possible."""
    generator, rows = TextGenerator(models["decoder"], tokenizer), []
    spy(monkeypatch, generator.model, lambda inputs, output: rows.extend(output))
    generator.sample(20, top_k=3, top_p=1.0, max_new_tokens=8)
    generator.sample(20, top_p=0.5, max_new_tokens=8)
    ranks, before = [], []
    for row in rows:
        row = row[: int((row != tokenizer.pad_token_id).sum())]
        likely = generator.model(input_ids=row[None]).logits[0, :-1].softmax(-1)
        own = likely.gather(1, row[1:, None])
        ranks.append((likely > own).sum(1))
        before.append((likely * (likely > own)).sum(1))
    assert torch.cat(ranks[:20]).unique().tolist() == [0, 1, 2]
    assert 0.3 < torch.cat(before[20:]).max() < 0.5 and torch.cat(ranks[20:]).max() > 3


def spy(monkeypatch, model, look):
    """Call ``look(inputs, output)`` at each call of the model's generate."""
    original = model.generate

    def generate(**inputs):
        output = original(**inputs)
        look(inputs, output)
        return output

    monkeypatch.setattr(model, "generate", generate)


def test_draws_are_of_the_softmax():
    logits = torch.tensor([[2.0, 0.0, -torch.inf, 1.0, -3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    draw, count, times = Draw([1, 2]), torch.zeros(2, 5), 4000
    for _ in range(times):
        count += torch.nn.functional.one_hot(draw(None, logits).argmax(-1), 5)
    p = logits.softmax(-1)
    assert ((count / times - p).abs() <= 4 * (p * (1 - p) / times).sqrt()).all()


def test_rows_with_their_own_seeds_are_independent():
    logits = torch.zeros(2, 5)
    alike, different = Draw([1, 1])(None, logits), Draw([1, 2])(None, logits)
    assert torch.equal(alike[0], alike[1]) and not torch.equal(different[0], different[1])
    assert torch.equal(different[0], alike[0])


def test_latents_come_from_the_prior_and_from_the_posterior(vae, monkeypatch):
    drawn = []

    def record(**inputs):
        drawn.append(inputs["latents"])
        return inputs["input_ids"]

    monkeypatch.setattr(vae.model, "generate", record)
    vae.sample(1000)
    prior = torch.cat(drawn)
    drawn.clear()
    vae.vary(TEXTS[0], 1000)
    mu, logvar = posterior_of(vae.model, vae.tokenizer, TEXTS[0])
    for z in (prior, (torch.cat(drawn) - mu) * torch.exp(-0.5 * logvar)):
        assert z.shape == (1000, LATENT)
        assert z.mean(0).abs().max() < 4 / 1000**0.5
        assert (z.T.cov() - torch.eye(LATENT)).abs().max() < 4 * (2 / 1000) ** 0.5


# ---- how long ---------------------------------------------------------------------------------------------------------------


def test_no_text_is_longer_than_the_model(generator, tokenizer, monkeypatch):
    monkeypatch.setattr(generator.model.generation_config, "eos_token_id", None)
    lengths = []
    spy(monkeypatch, generator.model, lambda inputs, output: lengths.append(output.shape[1]))
    for prompt in PROMPTS:
        generator.sample(prompt=prompt, max_new_tokens=1000)
        generator.sample(prompt=prompt, max_new_tokens=3)
        assert lengths[-2:] == [MAX_TOKENS, len(ids_of(tokenizer, prompt)) + 3]


def test_a_prompt_without_room(generator, tokenizer):
    """The longest possible prompt leaves one token beside <|bos|>."""
    text = "d" * (MAX_TOKENS - 2)
    assert len(tokenizer(text)["input_ids"]) == MAX_TOKENS - 2
    assert generator.sample(prompt=text, max_new_tokens=9)[0].startswith(text)
    for write in (lambda: generator.sample(prompt=["a", text + "d"]), lambda: generator.stream(text + "d")):
        with pytest.raises(ValueError, match=f"a prompt must have at most 38 tokens; that of 'd{{39}}'… has {MAX_TOKENS - 1}"):
            write()


# ---- in pieces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "the cat"])
def test_pieces_make_the_text(generator, prompt):
    for seed in range(5):
        pieces = list(generator.stream(prompt, seed=seed, top_p=1.0))
        assert "".join(pieces) == generator.sample(prompt=prompt, seed=seed, top_p=1.0)[0]
        assert all(pieces)


def test_an_error_reaches_who_takes_the_pieces(generator):
    calls = []

    def fail(*rest):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no more ink")

    with generator.model.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="no more ink"):
        list(generator.stream("the cat"))
    assert generator.sample(prompt="the cat") == ["".join(generator.stream("the cat"))], "and the next text is whole"


def test_who_takes_no_more_stops_the_writing(generator, monkeypatch):
    monkeypatch.setattr(generator.model.generation_config, "eos_token_id", None)
    calls = []

    def slow(*rest):
        calls.append(threading.current_thread())
        time.sleep(0.05)

    with generator.model.register_forward_pre_hook(slow):
        pieces = generator.stream("the cat ")
        assert next(pieces) == "the cat "
        pieces.close()
    assert len(calls) < 20 < MAX_TOKENS - 4 and not calls[0].is_alive()


# ---- of a latent ------------------------------------------------------------------------------------------------------------


def test_reconstructions_are_the_likeliest_of_the_mean(vae):
    expected = [decoded(vae.model, vae.tokenizer, posterior_of(vae.model, vae.tokenizer, text)[0]) for text in TEXTS]
    assert vae.reconstruct(TEXTS) == expected and len(set(expected)) == len(TEXTS)
    assert [vae.reconstruct(text) for text in TEXTS] == [[text] for text in expected]
    assert vae.reconstruct([]) == []


def test_of_a_long_text_the_rest_is_not_seen(vae):
    long = "a dog " * 40
    kept = vae.tokenizer.decode(vae.tokenizer(long)["input_ids"][: MAX_TOKENS - 1])
    assert vae.reconstruct(long + "cat") == vae.reconstruct(long) == vae.reconstruct(kept + " and then more")
    means = vae.posterior([long, long + "cat", kept + " and then more", "no" + long])[0]
    assert torch.equal(means[0], means[1]) and torch.equal(means[0], means[2])
    assert (means[0] - means[3]).abs().max() > 0.01


def test_an_interpolation_is_the_straight_line_between_means(vae):
    first, second = (posterior_of(vae.model, vae.tokenizer, text)[0] for text in TEXTS[:2])
    texts = vae.interpolate(*TEXTS[:2], steps=4)
    assert texts == [decoded(vae.model, vae.tokenizer, first + (second - first) * step / 3) for step in range(4)]
    assert [texts[0], texts[-1]] == vae.reconstruct(TEXTS[:2])
    assert vae.interpolate(*TEXTS[:2], steps=2) == [texts[0], texts[-1]]


def test_variations_are_drawn_around_the_text(vae, monkeypatch):
    texts = vae.vary(TEXTS[0], 6, seed=2)
    assert vae.vary(TEXTS[0], 6, seed=2) == texts and vae.vary(TEXTS[0], 2, seed=2) == texts[:2]
    assert len(set(texts)) > 3 and vae.vary(TEXTS[0], 6, seed=3) != texts
    posterior = vae.posterior
    monkeypatch.setattr(vae, "posterior", lambda texts: (posterior(texts)[0], posterior(texts)[1] - 60))
    assert vae.vary(TEXTS[0], 2) == vae.reconstruct(TEXTS[0]) * 2, "with no variance there is no variation"


# ---- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1; got 0"),
        ({"temperature": -0.1}, "temperature must be finite and not negative; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative; got nan"),
        ({"top_k": -1}, "top_k must be at least 0; got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"seed": -1}, "seed must be from 0 to 2\\*\\*32 - 1; got -1"),
        ({"seed": 2**32}, "seed must be from 0 to 2\\*\\*32 - 1; got 4294967296"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
    ],
)
def test_bad_options(generator, options, message):
    with pytest.raises(ValueError, match=message):
        generator.sample(**options)
    if "count" not in options:
        with pytest.raises(ValueError, match=message):
            generator.stream(**options)  # before a piece is taken


def test_other_bad_input(vae):
    with pytest.raises(ValueError, match="steps must be at least 2; got 1"):
        vae.interpolate("a", "b", steps=1)
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        vae.vary("a", 0)
    with pytest.raises(TypeError, match="top_q"):
        vae.sample(top_q=1)
    for write in (lambda text: vae.sample(prompt=text), vae.stream, vae.reconstruct, vae.vary):
        with pytest.raises(ValueError, match="a text must be Unicode: .* position 1: surrogates not allowed"):
            write("a\udcff")
    with pytest.raises(TypeError, match="a text must be a str; got int"):
        vae.reconstruct(["a", 3])


def test_a_decoder_alone_has_no_latent(models, tokenizer):
    generator = TextGenerator(models["decoder"], tokenizer)
    for tell in (lambda: generator.reconstruct("a"), lambda: generator.interpolate("a", "b"), lambda: generator.vary("a")):
        with pytest.raises(ValueError, match="needs a model with a latent, a TextVAE; got a LlamaForCausalLM"):
            tell()


# ---- the commands -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(models, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind, model in models.items():
        save(model, tokenizer, folder / kind)
    return folder


def run(*arguments):
    parser = argparse.ArgumentParser(prog="fastlm lm")
    commands = parser.add_subparsers(dest="command")
    add_generate(commands)
    add_interpolate(commands)
    parsed = parser.parse_args(list(map(str, arguments)))
    parsed.run(parsed)


def shown(capsys, *arguments):
    run(*arguments)
    return capsys.readouterr().out


def test_the_commands_write_what_a_writer_does(checkpoints, vae, capsys):
    folder, (first, second, *_) = checkpoints / "vae", TEXTS
    drawing = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 6}
    options = [part for name, value in drawing.items() for part in (f"--{name.replace('_', '-')}", value)]
    expected = {
        (): vae.sample(),
        ("the cat", "a", "--count", 2, "--seed", 5, *options): vae.sample(2, prompt=["the cat", "a"], seed=5, **drawing),
        ("the cat", "--stream", "--seed", 5): vae.sample(prompt="the cat", seed=5),
        ("--reconstruct", first, second): vae.reconstruct([first, second]),
        ("--vary", first, "--count", 3, "--seed", 5): vae.vary(first, 3, seed=5),
    }
    for arguments, texts in expected.items():
        assert shown(capsys, "generate", folder, *arguments) == "\n---\n".join(texts) + "\n"
    texts = vae.interpolate(first, second, 3)
    assert shown(capsys, "interpolate", folder, first, second, "--steps", 3) == "\n---\n".join(texts) + "\n"


def test_a_decoder_from_the_command_line(checkpoints, models, tokenizer, capsys):
    expected = TextGenerator(models["decoder"], tokenizer).sample(prompt="the cat")
    assert shown(capsys, "generate", checkpoints / "decoder", "the cat") == expected[0] + "\n"
    with pytest.raises(ValueError, match="needs a model with a latent"):
        run("interpolate", checkpoints / "decoder", "a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--reconstruct", "b"), "a PROMPT goes with neither --reconstruct nor --vary"),
        (("a", "--vary", "b"), "a PROMPT goes with neither --reconstruct nor --vary"),
        (("a", "b", "--stream"), "--stream writes one text"),
        (("--stream", "--count", "2"), "--stream writes one text"),
        (("--top-p", "2"), "top_p must be above 0 and at most 1; got 2"),
    ],
)
def test_errors_of_the_command_line_come_before_the_model_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        run("generate", "no such folder", *arguments)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint of fastlm.lm"):
        run("generate", tmp_path)


def test_help_tells_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        run("generate", "--help")
    out = " ".join(capsys.readouterr().out.split())
    for name in (
        "count N",
        "seed N",
        "stream",
        "reconstruct TEXT",
        "vary TEXT",
        "temperature X",
        "top-k N",
        "max-new-tokens N",
    ):
        assert f"--{name}" in out
    assert f"together have this probability; 1 for all (default: {Sampling().top_p})" in out and "examples:" in out
