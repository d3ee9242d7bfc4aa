"""Padded batches of encoders are packed after replace, give eager's answers, and are left alone where somebody looks in."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from support.transformers_models import (
    ARCHITECTURES,
    BERT,
    LENGTH,
    REPLACED,
    Architecture,
    assert_as_good_as_eager,
    inputs_of,
    valid_of,
)

import fastlm
import fastlm.integrations.transformers
from fastlm.integrations.transformers import sequences

DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
ENCODERS = {
    "ALBERT": Architecture(hf.AlbertForMaskedLM, {**BERT, "embedding_size": 16}),
    "BERT": ARCHITECTURES["BERT"],
    "CamemBERT": Architecture(hf.CamembertForMaskedLM, BERT),
    "DistilBERT": Architecture(hf.DistilBertForMaskedLM, DISTILBERT),
    "ELECTRA": Architecture(hf.ElectraForMaskedLM, {**BERT, "embedding_size": 16}),
    "RoBERTa": Architecture(hf.RobertaForMaskedLM, BERT),
    "RoBERTa PreLayerNorm": Architecture(hf.RobertaPreLayerNormForMaskedLM, BERT),
    "XLM-RoBERTa": Architecture(hf.XLMRobertaForMaskedLM, BERT),
    "XLM-RoBERTa XL": Architecture(hf.XLMRobertaXLForMaskedLM, BERT),
}


@pytest.fixture
def packed(monkeypatch) -> list[int]:
    """Note the number of tokens of each packed attention."""
    tokens, original = [], sequences.varlen_attention

    def noted(query, *args, **kwargs):
        tokens.append(query.shape[0])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(sequences, "varlen_attention", noted)
    return tokens


def replaced(name: str = "BERT", **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a model on eager, and a copy after replace."""
    model = ENCODERS[name].build(**options)
    swapped = copy.deepcopy(model)
    assert "padding is dropped" in str(fastlm.replace(swapped))
    return model, swapped


# ---- the same answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_values_and_gradients(name, dtype, padding, packed):
    model = ENCODERS[name].build().train()
    assert_as_good_as_eager(model, dtype, padding, gradients=True, implementation=REPLACED)
    assert packed == [LENGTH + LENGTH - 4 + 1] * 2


@pytest.mark.parametrize(
    "rows",
    [[[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]], [[0] * 6, [1, 1, 0, 0, 0, 0]], [[1, 1, 0, 0, 0, 0], [0] * 6]],
    ids=["gaps", "first is empty", "last is empty"],
)
def test_any_places_of_the_tokens(rows, packed):
    model, swapped = replaced()
    mask = torch.tensor(rows)
    with torch.inference_mode():
        outputs = [m.bert(input_ids=torch.arange(12).view(2, 6) + 3, attention_mask=mask)[0] for m in (model, swapped)]
    torch.testing.assert_close(outputs[1][mask.bool()], outputs[0][mask.bool()])
    assert not outputs[1][mask == 0].any() and packed == [mask.sum()] * 2


def test_a_batch_without_tokens(packed):
    _, swapped = replaced()
    logits = swapped(input_ids=torch.full((2, 6), 3), attention_mask=torch.zeros(2, 6, dtype=torch.long)).logits
    assert logits.isfinite().all() and not packed


def test_the_pooled_output_and_a_loss():
    config = hf.BertConfig(**BERT, vocab_size=60, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = hf.BertForSequenceClassification(config)
    swapped, inputs = copy.deepcopy(model), inputs_of(model, "right") | {"labels": torch.tensor([0, 1, 2])}
    fastlm.replace(swapped)
    losses = [m(**inputs).loss for m in (model, swapped)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for theirs, ours in zip(model.parameters(), swapped.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_weights_twice(reentrant, packed):
    gradients = []
    for checkpointing in (False, True):
        model = replaced(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2)[1].train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        loss = model(**inputs_of(model, "right")).logits.square().sum()
        loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients) and len(packed) == 2 + 4


# ---- where nothing is packed ------------------------------------------------------------------------------------------------


def watched_by_a_hook(model):
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda module, args, output: None)
    return {}


def chunked(model):
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    return {}


class AUsersLayer(torch.nn.Linear):
    """Stand for code that may look at neighbouring tokens."""


def with_a_layer_of_the_user_s(model):
    model.bert.encoder.layer[0].intermediate.dense.__class__ = AUsersLayer
    return {}


def with_another_forward(model):
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.forward = dense.forward
    return {}


LEFT = {
    "hidden states are asked for": lambda model: {"output_hidden_states": True},
    "weights are asked for": lambda model: {"output_attentions": True},
    "a hook of the user's": watched_by_a_hook,
    "a chunked feed-forward": chunked,
    "a layer of the user's": with_a_layer_of_the_user_s,
    "a forward on the instance": with_another_forward,
    "another implementation": lambda model: model.set_attn_implementation("sdpa") or {},
}


@pytest.mark.filterwarnings("ignore:fastlm. BertSelfAttention runs on transformers' eager")
@pytest.mark.parametrize("case", LEFT)
def test_where_somebody_looks_in_nothing_is_packed(case, packed):
    model, swapped = replaced()
    inputs, options = inputs_of(model, "right"), LEFT[case](swapped)
    expected, actual = model(**inputs, **options), swapped(**inputs, **options)
    valid = valid_of(inputs)
    torch.testing.assert_close(actual.logits[valid], expected.logits[valid])
    for ours, theirs in zip(actual.hidden_states or (), expected.hidden_states or ()):
        torch.testing.assert_close(ours[valid], theirs[valid])
    assert not packed


def test_once_asked_for_hidden_states_a_model_packs_again(packed):
    _, swapped = replaced()
    inputs = inputs_of(swapped, "right")
    swapped(**inputs, output_hidden_states=True)
    swapped(**inputs)
    assert len(packed) == 2


def test_batches_without_padding_masks_of_the_user_s_and_decoders(packed):
    _, swapped = replaced()
    inputs = inputs_of(swapped)
    swapped(**inputs)
    swapped(input_ids=inputs["input_ids"], attention_mask=torch.ones(3, 1, LENGTH, LENGTH).tril().bool())
    decoder = hf.BertLMHeadModel(hf.BertConfig(**BERT, vocab_size=60, is_decoder=True))
    assert "padding" not in str(fastlm.replace(decoder))
    decoder(**inputs_of(decoder, "right"))
    assert not packed


def test_compiled_and_traced_models_are_not_packed(packed):
    model, swapped = replaced()
    inputs = inputs_of(model, "right")
    valid, expected = valid_of(inputs), model(**inputs).logits
    torch.compiler.reset()
    compiled = torch.compile(swapped, fullgraph=True, backend="eager")(**inputs).logits
    torch.testing.assert_close(compiled[valid], expected[valid])
    traced = torch.jit.trace(swapped.bert, (inputs["input_ids"], inputs["attention_mask"]), strict=False, check_trace=False)
    torch.testing.assert_close(
        traced(inputs["input_ids"], inputs["attention_mask"])["last_hidden_state"][valid],
        model.bert(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[valid],
    )
    assert not packed


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert", "Electra", "Albert"])
def test_models_that_read_padding_compute_it(name, packed):
    """Look for a question's answer at all positions: what eager has at padding counts, in the loss and the argmax."""
    options = {**BERT, **DISTILBERT, "embedding_size": 16, "vocab_size": 60}
    model = getattr(hf, f"{name}ForQuestionAnswering")(getattr(hf, f"{name}Config")(**options)).eval()
    swapped = copy.deepcopy(model)
    assert "at padding" in str(fastlm.replace(swapped))
    inputs = inputs_of(model, "right") | {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([2, 3, 0])}
    expected, actual = model(**inputs), swapped(**inputs)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.start_logits, expected.start_logits)
    assert not packed


def test_distilbert_in_chunks(packed):
    model, swapped = replaced("DistilBERT", chunk_size_feed_forward=1)
    inputs = inputs_of(model, "right")
    valid = valid_of(inputs)
    torch.testing.assert_close(swapped(**inputs).logits[valid], model(**inputs).logits[valid])
    assert not packed


# ---- models that travel -----------------------------------------------------------------------------------------------------


def test_copies_and_pickles_pack_and_restore_undoes_it(packed):
    model, swapped = replaced()
    inputs = inputs_of(model, "right")
    for other in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        other(**inputs)
        assert len(packed) == 2
        assert "padding is computed" in str(fastlm.restore(other))
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
        packed.clear()
