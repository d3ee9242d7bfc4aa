"""The text VAE agrees with a decoder in plain PyTorch, with eager attention, and with its own formulas."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.drop_in import assert_as_good_as_original
from transformers import AutoConfig, AutoModel, EuroBertConfig, LlamaConfig

import fastlm
import fastlm.integrations.transformers  # noqa: F401
from fastlm.lm.data.batches import packed
from fastlm.lm.model.text_vae import IGNORED, TextVAE, TextVAEConfig
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain

VOCABULARY, LATENT, FREE_BITS = 40, 6, 0.3
PAD, BOS, EOS = 0, 1, 2
IDS = torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = (9, 5, 2)
SEEDS = torch.tensor([5, -7, 2**40])


def config_of(**changes) -> TextVAEConfig:
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    common |= {"max_position_embeddings": 24, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    decoder = LlamaConfig(**common | changes, num_hidden_layers=2, num_key_value_heads=2)
    encoder = EuroBertConfig(**common, num_hidden_layers=1, mask_token_id=3)
    return TextVAEConfig(encoder=encoder, decoder=decoder, latent_dim=LATENT, free_bits=FREE_BITS)


def build(implementation: str = "fastlm", dtype: torch.dtype = torch.float32, mean_std: float = 0.0) -> TextVAE:
    """Build a model with weights so large that attention is not flat and z matters; every call makes the same weights."""
    config = config_of()
    config.mean_std = mean_std
    model = TextVAE._from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return model.to(dtype).eval()


def draw(batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((batch, LATENT), generator=torch.Generator().manual_seed(2)).to(dtype)


def batch_of(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make a batch as `fastlm.lm.data.batches.Collator` does."""
    ids, labels = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value) for value in (PAD, IGNORED))
    return {
        "input_ids": ids,
        "labels": labels,
        "encoder_input_ids": ids,
        "encoder_attention_mask": (labels != IGNORED).long(),
        "seeds": SEEDS[: len(rows)],
    }


def ragged() -> list[torch.Tensor]:
    return [ids[:length] for ids, length in zip(IDS, LENGTHS)]


# ---- the decoder ------------------------------------------------------------------------------------------------------------


def decoded(model: TextVAE, ids: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Compute the logits (L, vocabulary) of one text by the formulas of Llama, with z as the first key and value."""
    weights, config = model.state_dict(), model.config.decoder
    heads, kv_heads, size, length = config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(ids)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        """Rotate the token of each position by its angles: (heads, L, size)."""
        speeds = 10000.0 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
        angles = torch.arange(length, dtype=x.dtype)[:, None] * speeds
        one, other = x.chunk(2, -1)
        return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(length, count, size).transpose(0, 1)

    slots = [linear(name, z).view(config.num_hidden_layers, kv_heads, 1, size) for name in ("to_keys", "to_values")]
    visible = torch.ones(length, length + 1, dtype=torch.bool).tril(1)  # (L, 1 + L): z and the tokens up to each
    x = weights["decoder.model.embed_tokens.weight"][ids] + linear("to_embedding", z)
    for index in range(config.num_hidden_layers):
        layer = f"decoder.model.layers.{index}"
        y = norm(f"{layer}.input_layernorm", x)
        query = rotated(split(linear(f"{layer}.self_attn.q_proj", y), heads))
        key = torch.cat([slots[0][index], rotated(split(linear(f"{layer}.self_attn.k_proj", y), kv_heads))], 1)
        value = torch.cat([slots[1][index], split(linear(f"{layer}.self_attn.v_proj", y), kv_heads)], 1)
        key, value = (part.repeat_interleave(heads // kv_heads, 0) for part in (key, value))
        scores = (query @ key.mT / size**0.5).masked_fill(~visible, -torch.inf)
        x = x + linear(f"{layer}.self_attn.o_proj", (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1))
        y = norm(f"{layer}.post_attention_layernorm", x)
        gate, up = linear(f"{layer}.mlp.gate_proj", y), linear(f"{layer}.mlp.up_proj", y)
        x = x + linear(f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
    return norm("decoder.model.norm", x) @ weights["decoder.model.embed_tokens.weight"].T


@torch.no_grad()
def written_out(dtype: torch.dtype) -> torch.Tensor:
    model, latents = build(dtype=dtype), draw(3, dtype)
    return torch.stack([decoded(model, ids, z) for ids, z in zip(IDS, latents)])


def in_one(model: TextVAE, z: torch.Tensor) -> torch.Tensor:
    return model(input_ids=IDS, latents=z).logits


def in_chunks(model: TextVAE, z: torch.Tensor, *ends: int) -> torch.Tensor:
    cache, logits = None, []
    for start, end in zip((0, *ends), (*ends, IDS.shape[1])):
        output = model(input_ids=IDS[:, start:end], latents=z, cache=cache)
        cache = output.cache
        logits.append(output.logits)
    assert cache.get_seq_length() == IDS.shape[1] + 1
    return torch.cat(logits, 1)


def token_by_token(model: TextVAE, z: torch.Tensor) -> torch.Tensor:
    return in_chunks(model, z, *range(1, IDS.shape[1]))


def prompt_and_rest(model: TextVAE, z: torch.Tensor) -> torch.Tensor:
    return in_chunks(model, z, 4, 5)


def prefixes(model: TextVAE, z: torch.Tensor) -> torch.Tensor:
    ends = range(1, IDS.shape[1] + 1)
    return torch.cat([model(input_ids=IDS[:, :end], latents=z, logits_to_keep=1).logits for end in ends], 1)


def padded_on_the_left(model: TextVAE, z: torch.Tensor) -> torch.Tensor:
    ids, mask = F.pad(IDS, (3, 0), value=PAD), F.pad(torch.ones_like(IDS), (3, 0))
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, latents=z, attention_mask=mask, position_ids=places).logits[:, 3:]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["fastlm", "eager"])
@pytest.mark.parametrize("read", [in_one, token_by_token, prompt_and_rest, prefixes, padded_on_the_left])
def test_the_decoder_is_the_one_written_out(read, implementation):
    """All ways to read a text agree, where z is the first key and value but takes no position."""
    logits = read(build(implementation), draw(3))
    assert_as_good_as_plain(logits, written_out(torch.float32), written_out(torch.float64), VALUE_FACTOR)


@torch.no_grad()
@pytest.mark.parametrize("part", ["to_keys", "to_values", "to_embedding"])
def test_each_way_to_tell_z_counts(part):
    model = build()
    before = in_one(model, draw(3))
    getattr(model, part).weight.zero_()
    assert (in_one(model, draw(3)) - before).abs().amax((1, 2)).min() > 0.01


# ---- the encoder, the latent, and gradients ---------------------------------------------------------------------------------


def test_values_and_gradients_are_as_good_as_eager():
    """Gradients flow from the logits through the decoder, z and its noise into the encoder."""
    batch = batch_of(ragged())
    del batch["labels"]

    def call(model: TextVAE, inputs: dict) -> torch.Tensor:
        return model(**batch).logits

    assert_as_good_as_original(build("fastlm"), build("eager"), call, {})


def test_gradients_reach_every_parameter():
    model = build().train()
    model(**batch_of(ragged())).loss.backward()
    parts = {"encoder", "decoder", "latent", "to_keys", "to_values", "to_embedding"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == parts
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_padding_and_the_rest_of_a_batch_change_nothing():
    model = build(dtype=torch.float64)
    batch = batch_of(ragged())
    together = model(**batch)
    mu, logvar = model.posterior(batch["encoder_input_ids"], batch["encoder_attention_mask"])
    z = model.latent.sample(mu, logvar, seed=SEEDS)[0]
    for index, ids in enumerate(ragged()):
        row, seed = ids.unsqueeze(0), SEEDS[index : index + 1]
        alone = model(input_ids=row, labels=row, encoder_input_ids=row, seeds=seed)
        own_mu, own_logvar = model.posterior(row)
        torch.testing.assert_close(own_mu[0], mu[index])
        torch.testing.assert_close(own_logvar[0], logvar[index])
        torch.testing.assert_close(model.latent.sample(own_mu, own_logvar, seed=seed)[0][0], z[index])
        torch.testing.assert_close(alone.kl[0], together.kl[index])
        torch.testing.assert_close(alone.reconstruction[0], together.reconstruction[index])
    assert (mu[0] - mu[1]).abs().max() > 0.01


def packed_of(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make a packed batch as `fastlm.lm.data.batches.Collator` does."""
    return packed({"input_ids": rows, "encoder_input_ids": rows, "labels": rows}) | {"seeds": SEEDS[: len(rows)]}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_packed_texts_are_as_good_as_padded_ones(training, autocast):
    """Compare the loss, its parts and the gradients, with a norm of means that sees the whole batch."""

    def results(dtype: torch.dtype, implementation: str, batch: dict) -> dict[str, torch.Tensor]:
        model = build(implementation, dtype, mean_std=0.8).train(training)
        model.kl_weight = 0.4
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            output = model(**batch, num_items_in_batch=31)
        output.loss.backward()
        found = {"loss": output.loss.detach(), "reconstruction": output.reconstruction, "kl": output.kl}
        return found | {name: parameter.grad for name, parameter in model.named_parameters()}

    found = results(torch.float32, "fastlm", packed_of(ragged()))
    plain, golden = (results(dtype, "eager", batch_of(ragged())) for dtype in (torch.float32, torch.float64))
    assert found.keys() == golden.keys() and found["kl"].shape == (3,)
    for name, value in found.items():
        assert_as_good_as_plain(value, plain[name], golden[name], GRADIENT_FACTOR if "." in name else VALUE_FACTOR)


@torch.no_grad()
def test_packed_texts_change_nothing_in_one_another():
    model, rows = build(), ragged()
    together = model(**packed_of(rows))
    for index, ids in enumerate(rows):
        alone = model(**packed_of([ids]) | {"seeds": SEEDS[index : index + 1]})
        torch.testing.assert_close(alone.reconstruction[0], together.reconstruction[index])
        torch.testing.assert_close(alone.kl[0], together.kl[index])


def test_packed_texts_that_are_refused():
    batch = packed_of(ragged())
    for name in ("position_ids", "encoder_position_ids"):
        with pytest.raises(ValueError, match=f"^{name} must be given beside cu_seq_lens_q; got None"):
            build()(**{key: value for key, value in batch.items() if key != name})
    for name in ("attention_mask", "encoder_attention_mask"):
        with pytest.raises(ValueError, match="cu_seq_lens_q takes no attention_mask, encoder_attention_mask or cache"):
            build()(**batch, **{name: torch.ones_like(batch["input_ids"])})
    with pytest.raises(ValueError, match="cu_seq_lens_q needs attn_implementation='fastlm'; got eager"):
        build("eager")(**batch)


@torch.no_grad()
def test_an_encoder_that_sees_what_follows():
    """Change the last token, and find the output of the first changed."""
    model = build()
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1 - 4) % (VOCABULARY - 4) + 4
    hidden = [model.encoder(input_ids=ids).last_hidden_state[:, 0] for ids in (IDS, changed)]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


# ---- the loss ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_formula(training):
    model = build().train(training)
    model.kl_weight = 0.4
    rows, batch = ragged(), batch_of(ragged())
    output = model(**batch)
    mu, logvar = model.posterior(batch["encoder_input_ids"], batch["encoder_attention_mask"])
    divergence = 0.5 * (mu.double() ** 2 + logvar.double().exp() - 1 - logvar.double())  # (B, D)
    z = fastlm.reparameterize(mu, logvar, seed=SEEDS)
    nll = []
    for ids, latent in zip(rows, z):
        log_p = model(input_ids=ids[None], latents=latent[None]).logits[0].double().log_softmax(-1)
        nll.append(-sum(log_p[place, token] for place, token in enumerate(ids[1:].tolist())))
    nll = torch.stack(nll)
    torch.testing.assert_close(output.reconstruction, nll, check_dtype=False)
    torch.testing.assert_close(output.kl, divergence.sum(1), check_dtype=False)
    assert (divergence < FREE_BITS).any() and (divergence > FREE_BITS).any()
    kl = 0.4 * divergence.clamp(min=FREE_BITS).sum(1) if training else divergence.sum(1)
    total, labels = (nll + kl).sum(), sum(len(ids) - 1 for ids in rows)
    torch.testing.assert_close(output.loss, total / labels, check_dtype=False)
    for items in (100, torch.tensor(100)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, total / 100, check_dtype=False)
    given = model(input_ids=batch["input_ids"], labels=batch["labels"], latents=z)
    torch.testing.assert_close(given.loss, nll.sum() / labels, check_dtype=False)
    assert given.kl is None


def test_the_gradient_of_the_kl_stops_at_the_free_bits():
    """With a very large kl_weight, mu gets a gradient only in dimensions whose KL exceeds the free bits."""
    model = build().train()
    model.kl_weight = 1e6
    batch = batch_of(ragged())
    mu, logvar = model.posterior(batch["encoder_input_ids"], batch["encoder_attention_mask"])
    (gradient,) = torch.autograd.grad(model(**batch).loss, model.latent.linear.bias)
    divergence = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    expected = (mu * (divergence > FREE_BITS)).sum(0) * 1e6 / sum(len(ids) - 1 for ids in ragged())
    torch.testing.assert_close(gradient[:LATENT], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# ---- generation -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_is_one_likeliest_token_after_the_other():
    model, z, options = build(), draw(3), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = IDS[:, :2]
    for _ in range(8):
        expected = torch.cat([expected, model(input_ids=expected, latents=z).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(IDS[:, :2], latents=z, **options), expected)
    assert torch.equal(model.generate(IDS[:, :2], latents=z, num_beams=1, **options), expected)
    assert len(set(map(tuple, expected[:, 2:].tolist()))) == 3  # each z has its own text


@torch.no_grad()
def test_beam_search_finds_the_likeliest_pair():
    """With one beam per token of the vocabulary, two steps are an exhaustive search."""
    model, z, prompt = build(), draw(2), IDS[:2, :3]
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    found = model.generate(prompt, latents=z, num_beams=VOCABULARY, **options)
    for row, latent, answer in zip(prompt, z, found):
        texts = torch.cat([row.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
        log_p = model(input_ids=texts, latents=latent.expand(VOCABULARY, -1)).logits.log_softmax(-1)  # (V, 4, V)
        first = log_p[0, 2]
        best = (first[:, None] + log_p[:, 3]).argmax()
        assert answer[3:].tolist() == [int(best) // VOCABULARY, int(best) % VOCABULARY]
    narrow = model.generate(prompt, latents=z, num_beams=2, **options)
    alone = [model.generate(prompt[i : i + 1], latents=z[i : i + 1], num_beams=2, **options) for i in range(2)]
    assert torch.equal(narrow, torch.cat(alone))


# ---- files, and bad input ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_is_the_same(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert [name for name in saved if "embed_tokens" in name or "lm_head" in name] == ["decoder.model.embed_tokens.weight"]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TextVAEConfig)
    loaded, info = AutoModel.from_pretrained(tmp_path, attn_implementation="fastlm", output_loading_info=True)
    assert type(loaded) is TextVAE and not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for part in (loaded, loaded.encoder, loaded.decoder):
        assert part.config._attn_implementation == "fastlm"
    tied = (loaded.decoder.lm_head, loaded.decoder.model.embed_tokens, loaded.encoder.embed_tokens)
    assert len({part.weight.data_ptr() for part in tied}) == 1
    assert (loaded.config.latent_dim, loaded.config.free_bits, loaded.config.eos_token_id) == (LATENT, FREE_BITS, EOS)
    batch = batch_of(ragged())
    assert torch.equal(loaded.eval()(**batch).loss, model(**batch).loss)


def test_a_watch_sees_every_layer_and_changes_nothing():
    model, batch = build(), batch_of(ragged())
    before = model(**batch).loss
    with fastlm.watch(model) as stats:
        assert torch.equal(model(**batch).loss, before)
    layers = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    assert list(stats) == layers and len(layers) == 3 and not stats.unseen


def test_bad_input():
    with pytest.raises(ValueError, match="TextVAE needs latents, or encoder_input_ids to draw them from"):
        build()(input_ids=IDS)
    for name, wrong in (("vocab_size", VOCABULARY + 1), ("hidden_size", 64)):
        with pytest.raises(ValueError, match=f"encoder and decoder must have the same {name}; got"):
            config_of(**{name: wrong})
