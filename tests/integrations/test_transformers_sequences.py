"""Packed sequences have the answers that each has alone: by positions that begin anew, and by flash attention's arguments."""

import copy

import pytest
import torch
import transformers as hf
from support.transformers_models import ARCHITECTURES, BERT, TOKENS, golden_masks
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import create_causal_mask

import fastlm
import fastlm.integrations.transformers
from fastlm.integrations.transformers import sequences
from fastlm.integrations.transformers.attention import attend
from fastlm.integrations.transformers.mask import as_eager_mask
from fastlm.integrations.transformers.sequences import PACKED, Sequences, as_mask, causal_bounds, sequences_of
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain

LENGTHS = (6, 1, 9, 3)
IDS = [torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
DECODERS = ("Llama", "Mistral", "Gemma 2", "Gemma 3", "GPT-2")
CASES = [(name, flash) for name in DECODERS for flash in (False, True)]
CASES += [("GPT-OSS", True)]  # It makes its masks without the positions.


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Note (queries, causal, window) of each packed attention."""
    seen, original = [], sequences.varlen_attention

    def noted(query, *args, causal, window, **kwargs):
        seen.append((query.shape[0], causal, window))
        return original(query, *args, causal=causal, window=window, **kwargs)

    monkeypatch.setattr(sequences, "varlen_attention", noted)
    return seen


def packed(flash: bool, positions: bool = True) -> dict:
    """Pack the sequences as transformers does."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_position_ids=positions)
    batch = collate([{"input_ids": ids.tolist()} for ids in IDS])
    return {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}


def results(logits: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    """Return logits (tokens, vocabulary) and the gradients of a weighted sum of them."""
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7)).to(logits.dtype)
    return [logits.detach(), *torch.autograd.grad((logits * upstream).sum(), list(model.parameters()))]


def alone(model: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """Run each sequence by itself, in a copy of the model on eager."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation("eager")
    with golden_masks():
        logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in IDS]
    return results(torch.cat(logits), model)


@pytest.mark.parametrize("name, flash", CASES)
def test_values_and_gradients_are_those_of_each_alone(name, flash, calls):
    model = ARCHITECTURES[name].build("fastlm")
    found = results(model(**packed(flash)).logits[0], model)
    windows = {window for _, _, window in calls}
    assert {(tokens, causal) for tokens, causal, _ in calls} == {(sum(LENGTHS), True)} and len(calls) == 2
    assert windows == {"Llama": {None}, "GPT-2": {None}, "Mistral": {(3, None)}}.get(name, {None, (3, None)})
    plain, golden = (alone(model, dtype) for dtype in (torch.float32, torch.float64))
    for index, triple in enumerate(zip(found, plain, golden)):
        assert_as_good_as_plain(*triple, GRADIENT_FACTOR if index else VALUE_FACTOR)


def test_bounds_without_positions_count(calls):
    """GPT-2 adds position_ids to embeddings; a model that finds positions elsewhere may give the bounds alone."""
    batch = packed(flash=True)
    positions = batch.pop("position_ids")
    model = ARCHITECTURES["Llama"].build("fastlm")
    together = model.model(**batch, position_ids=torch.arange(sum(LENGTHS))[None]).last_hidden_state
    assert len(calls) == 2 and all(causal for _, causal, _ in calls)
    # RoPE sees differences of positions alone.
    torch.testing.assert_close(together, model.model(**batch, position_ids=positions).last_hidden_state)


def test_an_encoder_sees_both_sides_of_its_own_sequence(calls):
    torch.manual_seed(0)
    config = hf.EuroBertConfig(**BERT, **TOKENS)
    model = hf.EuroBertModel._from_config(config, attn_implementation="fastlm").eval()
    batch = packed(flash=True)
    del batch["use_cache"]
    found = model(**batch).last_hidden_state[0]
    assert calls == [(sum(LENGTHS), False, None)] * 2
    torch.testing.assert_close(found, torch.cat([model(input_ids=ids[None]).last_hidden_state[0] for ids in IDS]))


def test_training_with_the_collator_that_flattens(tmp_path, calls):
    model = ARCHITECTURES["Llama"].build("fastlm")
    arguments = hf.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, report_to="none")
    texts = [{"input_ids": ids.tolist()} for ids in IDS]
    hf.Trainer(model, arguments, DataCollatorWithFlattening(), texts).train()
    assert [tokens for tokens, _, _ in calls] == [sum(LENGTHS)] * 4


def test_the_memory_of_a_mask_is_not_taken():
    ids, config = torch.zeros(1, 4096, 8), ARCHITECTURES["Mistral"].build("fastlm").config
    mask = create_causal_mask(config, ids, None, None, position_ids=torch.arange(64).repeat(64)[None])
    assert mask.dtype is PACKED and mask.untyped_storage().nbytes() < 1024


# ---- what cannot go without a mask ------------------------------------------------------------------------------------------


def test_rows_beside_one_another_have_a_mask(calls):
    model = ARCHITECTURES["Llama"].build("fastlm")
    batch = {name: value.repeat(2, 1) for name, value in packed(flash=False).items() if name != "use_cache"}
    assert_both_are_alike(model(**batch, use_cache=False).logits, model(**packed(flash=False)).logits)
    assert len(calls) == 2


def assert_both_are_alike(two: torch.Tensor, one: torch.Tensor) -> None:
    for row in two:
        torch.testing.assert_close(row, one[0])


def test_weights_are_eager_s():
    model = ARCHITECTURES["Mistral"].build("fastlm")
    with pytest.warns(UserWarning, match="attention weights were asked for"):
        output = model(**packed(flash=True), output_attentions=True)
    for weights in output.attentions:
        assert (weights[0, :, 6:, :6] == 0).all() and (weights[0, :, :6, 6:] == 0).all()
    torch.testing.assert_close(output.logits, model(**packed(flash=True)).logits)


def test_masks_and_biases_beside_the_bounds():
    """Both hold: the sequences' bounds, and what is given beside them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 7, 8, generator=generator).unbind(0)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    bias = torch.randn(1, 2, 7, 7, generator=generator)
    allowed = torch.rand(1, 1, 7, 7, generator=generator) < 0.8
    within = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()
    module = torch.nn.Identity()

    def expected(mask):
        return fastlm.attention(query, key, value, mask=mask).transpose(1, 2)

    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    for mask, both in ((allowed, allowed & within), (bias, torch.where(within, bias, -torch.inf))):
        torch.testing.assert_close(attend(module, query, key, value, mask, **given)[0], expected(both))
    biased = attend(module, query, key, value, bounds, position_bias=bias)[0]
    torch.testing.assert_close(biased, expected(torch.where(within, bias, -torch.inf)))


@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_bounds_as_a_mask(window):
    place = causal_bounds(torch.tensor([0, 0, 0, 1, 2, 2]), window)
    assert place[0].tolist() == [0, 3, 4, 6] and sequences_of(place.clone()).window[0] == (window or 6) - 1
    distance = torch.arange(6) - torch.arange(6)[:, None]
    within = torch.block_diag(torch.ones(3, 3), torch.ones(1, 1), torch.ones(2, 2)).bool()
    expected = within & (distance <= 0) & (distance > -(window or 6))
    assert torch.equal(as_mask(sequences_of(place), 6, 6)[0, 0], expected)
    query = torch.zeros(1, 1, 6, 4)
    assert torch.equal(as_eager_mask(as_mask(sequences_of(place), 6, 6), query, query)[0, 0] == 0, expected)
    bounds = torch.tensor([0, 3, 3, 4, 6])
    assert torch.equal(as_mask(sequences_of(bounds.int()), 6, 6)[0, 0], within)  # A sequence may be empty.


def test_more_keys_than_queries_as_a_mask():
    """Align the last query of each sequence with its last key."""
    found = as_mask(Sequences(torch.tensor([0, 1, 3]), torch.tensor([0, 2, 5]), True, None), 3, 5)[0, 0]
    assert found.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_compiled_models_have_a_mask(calls):
    model = ARCHITECTURES["Llama"].build("fastlm")
    expected, count = model(**packed(flash=True)).logits, len(calls)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**packed(flash=True)).logits, expected)
    assert len(calls) == count


def test_bad_input():
    model = ARCHITECTURES["Llama"].build("fastlm")
    batch = packed(flash=True)
    rows = {name: value.repeat(2, 1) for name, value in batch.items() if name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="cu_seq_lens_q needs a batch of one row of packed sequences; got 2 rows"):
        model(**batch | rows)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        model(**batch | {"cu_seq_lens_q": batch["cu_seq_lens_q"] + 1})
