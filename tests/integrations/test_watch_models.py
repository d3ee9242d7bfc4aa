"""Test `fastlm.watch` on models of transformers, against the weights that the untouched model gives away."""

import copy

import pytest
import torch
import transformers as hf
from support.transformers_models import ARCHITECTURES, BERT, TOKENS, Architecture, golden_masks, inputs_of
from support.watched import nothing_is_left as nothing_is_left
from torch import Tensor, nn

import fastlm
from fastlm.testing import VALUE_FACTOR, allowed_error, assert_within, ulp_of_largest, worst_error

MODELS = {name: ARCHITECTURES[name] for name in ("GPT-2", "Llama", "BERT", "T5")}
MODELS["ALBERT"] = Architecture(hf.AlbertForMaskedLM, {**BERT, "embedding_size": 16, "num_hidden_layers": 3})
CAUSAL = ("GPT-2", "Llama")


def nudged(model: nn.Module) -> nn.Module:
    """Return a float64 model whose weights are off by an ulp of float32, at random."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
        parameter.data = parameter * (1 + torch.finfo(torch.float32).eps * signs)
    return model


def weights_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the weights (B, H, Lq, Lk) of all attentions of an eager model, in an order of the kinds."""
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, use_cache=False)
    kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    return [weights for kind in kinds for weights in outputs.get(kind) or ()]


def by_hand(layers: list[Tensor], seen: Tensor) -> dict[str, Tensor]:
    """Return the mean entropy (H,) and key mass (H, keys) over the rows (B, Lq) that saw a key, and all calls of a layer."""
    rows = len(layers) * seen.sum()
    kept = [weights * seen[:, None, :, None] for weights in layers]
    return {
        "entropy": sum(torch.special.entr(p).sum((0, 2, 3)) for p in kept) / rows,
        "key_mass": sum(p.sum((0, 2)) for p in kept) / rows,
    }


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT", "ALBERT"])
def test_a_model_has_the_statistics_of_its_weights(name, padding):
    model = MODELS[name].build()
    inputs = inputs_of(model, padding)
    mask = inputs["attention_mask"].bool()
    seen = mask.cummax(1).values if name in CAUSAL else torch.ones_like(mask)  # Before its first token, a text sees nothing.
    exact = copy.deepcopy(model).double()
    with golden_masks():
        golden, near, plain = (weights_of(m, inputs) for m in (exact, nudged(exact), model))
    if name == "ALBERT":  # One layer is run three times.
        golden, near, plain = [golden], [near], [plain]
    else:
        golden, near, plain = ([[weights] for weights in each] for each in (golden, near, plain))
    model.set_attn_implementation("fastlm")
    with torch.no_grad(), fastlm.watch(model, key_mass=True) as stats:
        model(**inputs)
    assert len(stats) == len(golden) and not stats.missed and not stats.unseen
    for layer, *weights in zip(stats.values(), golden, near, plain):
        assert layer.rows.tolist() == [len(weights[0]) * seen.sum().item()] * len(layer.rows)
        answer, off, rough = (by_hand(each, seen) for each in weights)
        for what in ("entropy", "key_mass"):
            actual = getattr(layer, what)
            if what == "key_mass":
                keys = actual.shape[1]
                assert not answer[what][:, keys:].any()
                answer[what], off[what], rough[what] = (each[what][:, :keys] for each in (answer, off, rough))
            slack = ulp_of_largest(answer[what], torch.float32) + worst_error(off[what], answer[what])
            assert_within(actual, answer[what], allowed_error(rough[what], answer[what], VALUE_FACTOR, slack), what)


@pytest.mark.parametrize("name", MODELS)
def test_replaced_models_give_the_same_bits_and_every_layer_is_named(name):
    model = MODELS[name].build()
    fastlm.replace(model)
    inputs = inputs_of(model, "right")

    def step():
        model.zero_grad()
        out = model(**inputs, use_cache=False).logits
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    before = step()
    with fastlm.watch(model) as stats:
        inside = step()
    for ours, theirs in zip(inside, before, strict=True):
        assert torch.equal(ours, theirs)
    assert len(stats) == (1 if name == "ALBERT" else MODELS[name].attentions) and not stats.unseen


def test_a_packed_batch_counts_its_tokens_alone():
    model = MODELS["BERT"].build()
    fastlm.replace(model)
    inputs = inputs_of(model, "right")
    with torch.no_grad(), fastlm.watch(model) as stats:
        model(**inputs)
    assert [layer.rows[0] for layer in stats.values()] == [inputs["attention_mask"].sum()] * 2


@pytest.mark.parametrize("implementation", ["fastlm", "replaced"])
def test_generation_counts_every_query_once(implementation):
    model = MODELS["GPT-2"].build()
    if implementation == "replaced":
        fastlm.replace(model)
    else:
        model.set_attn_implementation(implementation)
    ids = torch.randint(3, TOKENS["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    before = model.generate(ids, **options)
    with fastlm.watch(model, key_mass=True) as stats:
        tokens = model.generate(ids, **options)
    with torch.no_grad(), fastlm.watch(model, key_mass=True) as at_once:
        model(tokens[:, :-1])
    assert torch.equal(tokens, before)
    for steps, whole in zip(stats.values(), at_once.values(), strict=True):
        assert steps.calls == 5 and torch.equal(steps.rows, whole.rows) and steps.rows[0] == 2 * 11
        torch.testing.assert_close(steps.entropy, whole.entropy, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(steps.key_mass, whole.key_mass, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(steps.max_logit, whole.max_logit, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_counts_once():
    model = MODELS["Llama"].build("fastlm").train()
    model.gradient_checkpointing_enable()
    with fastlm.watch(model) as stats:
        model(**inputs_of(model), use_cache=False).logits.sum().backward()
    assert [layer.calls for layer in stats.values()] == [1, 1]
