"""Context parallel: ranks that share the tokens of each text give the loss, the gradients and the checkpoints of one process.

The rule is that of the project: golden is one process in float64, plain is one process in float32, and what several ranks
compute in float32 may be a small factor as wrong as plain. The losses of a whole training are held to 2e-4, as those of data
parallel are in test_train.py: after the first step the weights differ by rounding.
"""

import csv
import os
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import run
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerCallback

import fastlm.integrations.transformers  # noqa: F401  registers "fastlm"
from fastlm.distributed import context_parallel
from fastlm.lm.data.batches import Collator, InRandomOrder, Texts
from fastlm.lm.data.tokenizer import load_tokenizer
from fastlm.lm.model.evaluate import elbo
from fastlm.lm.model.presets import build
from fastlm.lm.model.text_vae import TextVAE
from fastlm.lm.training import train as train_module
from fastlm.lm.training.context_parallel import PartCollator, groups_of
from fastlm.lm.training.settings import Settings
from fastlm.lm.training.train import train
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain

KINDS, METHODS = ("vae", "decoder"), ("all-to-all", "ring")
SETTINGS = Settings(preset="tiny", epochs=2, batch_size=16, free_bits=0.1, kl_schedule="cyclical", span_masking=0.1)
DTYPES = (torch.float32, torch.float64)  # of plain and golden
COLUMNS = ("loss", "reconstruction", "kl", "grad_norm", "eval_loss", "eval_reconstruction", "eval_kl")


def of_two_ranks(rank, world, corpus):
    """Compute all that the tests compare of two ranks, whose start takes longer than that."""
    steps = {(kind, method): part_of_a_step(rank, world, corpus, kind, method) for kind in KINDS for method in METHODS}
    with context_parallel():
        evaluations = {kind: evaluation(corpus, kind, part=(rank, world)) for kind in KINDS}
        refused = refusals(rank, corpus)
    others = {(mask, method): part_of_gemma(rank, mask, method) for mask in MASKS for method in METHODS}
    return {"steps": steps, "evaluations": evaluations, "others": others, "refused": refused}


@pytest.fixture(scope="module")
def two_ranks(corpus):
    return run(of_two_ranks, 2, corpus)


def summed(results, group=None):
    """Add up a dict of tensors over the ranks."""
    for tensor in results.values():
        dist.all_reduce(tensor, group=group)
    return results


# ---- the models of fastlm.lm ------------------------------------------------------------------------------------------------


def model_of(kind, tokenizer, dtype=torch.float32):
    """Build a model with weights so large that attention is not flat and z matters."""
    model = build(kind, "tiny", tokenizer, free_bits=0.1, mean_std=0.8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).train()


def items_of(corpus, tokenizer):
    """Return four texts of different lengths, of which two ranks cannot share the longest without padding."""
    texts = Texts(corpus, "train", tokenizer, 128)
    order = torch.tensor(texts.lengths).argsort().tolist()
    items = [texts[index] for index in (order[0], order[len(order) // 2], order[-2], order[-1])]
    longest = items[-1][0]
    return [*items[:-1], (longest[: len(longest) // 2 * 2 - 1], items[-1][1])]  # an odd length


def collator_of(kind, tokenizer):
    return Collator(tokenizer, encoder=kind == "vae", dropout=0.2, masking=0.2)


def results_of(model, batch, count):
    """Return the loss for so many labels and every parameter's gradient, and the parts of the loss of a `TextVAE`."""
    output = model(**batch, num_items_in_batch=count)
    output.loss.backward()
    found = {"loss": output.loss.detach()}
    if isinstance(model, TextVAE):
        found |= {"reconstruction": output.reconstruction, "kl": output.kl}
    # The projections of z to keys and values get a gradient on the first rank of a group only.
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return found | {f"grad {name}": gradient for name, gradient in gradients.items()}


def labels_of(batch):
    return int((batch["labels"][:, 1:] >= 0).sum())


def part_of_a_step(rank, world, corpus, kind, method="auto"):
    """Compute a step of ``world`` ranks in groups of two, where each group has its share of the texts."""
    tokenizer, group = load_tokenizer(corpus), dist.new_subgroups(2)[0]
    items, collate = items_of(corpus, tokenizer), collator_of(kind, tokenizer)
    count, shares = labels_of(collate(items)), world // 2
    own = items[rank // 2 :: shares]
    batch = PartCollator(collate, tokenizer.pad_token_id, rank % 2, 2)(own)
    with context_parallel(group, method=method):
        found = results_of(model_of(kind, tokenizer), batch, count)
    parts = {name: found.pop(name) for name in ("reconstruction", "kl") if name in found}
    return summed(found) | summed(parts, group)


def assert_as_one_process(found, corpus, kind, share=slice(None)):
    """Compare results of a step with those of one process, of whose texts a group has a ``share``."""
    tokenizer = load_tokenizer(corpus)
    batch = collator_of(kind, tokenizer)(items_of(corpus, tokenizer))
    plain, golden = (results_of(model_of(kind, tokenizer, dtype), batch, labels_of(batch)) for dtype in DTYPES)
    for results in (plain, golden):
        results |= {name: results[name][share] for name in ("reconstruction", "kl") if name in results}
    assert_good(found, plain, golden)


def assert_good(found, plain, golden):
    """Hold every result to the rule of errors."""
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        assert expected.abs().max() > 0, name
        factor = GRADIENT_FACTOR if name.startswith("grad") else VALUE_FACTOR
        assert_as_good_as_plain(found[name], plain[name], expected, factor, name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_one_process(kind, method, corpus, two_ranks):
    for found in two_ranks:
        assert_as_one_process(found["steps"][kind, method], corpus, kind)


def test_beside_data_parallel(corpus):
    for rank, found in enumerate(run(part_of_a_step, 4, corpus, "vae")):
        assert_as_one_process(found, corpus, "vae", slice(rank // 2, None, 2))


def evaluation(corpus, kind, dtype=torch.float32, part=None):
    """Return the validation loss of a model, and its parts, as tensors; ``part`` is (rank, ranks)."""
    tokenizer = load_tokenizer(corpus)
    texts, collate = Texts(corpus, "validation", tokenizer, 128), collator_of(kind, tokenizer).plain()
    collate = collate if part is None else PartCollator(collate, tokenizer.pad_token_id, *part)
    found = elbo(model_of(kind, tokenizer, dtype), texts.batches(5, collate))
    return {name: torch.tensor(value, dtype=dtype) for name, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_that_of_one_process(kind, corpus, two_ranks):
    plain, golden = (evaluation(corpus, kind, dtype) for dtype in DTYPES)
    for found in two_ranks:
        assert_good(found["evaluations"][kind], plain, golden)


# ---- other models -----------------------------------------------------------------------------------------------------------

MASKS = ("causal and windows", "padding on the left", "of the user")
LENGTH = 21
LENGTHS = (LENGTH, 13, LENGTH)
PART = (12, 9)  # of the ranks
IDS = torch.randint(3, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def gemma(dtype=torch.float32):
    """Build a decoder with softcap, windows, grouped heads and dropout."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 5, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Gemma2Config(**sizes, attn_logit_softcapping=20.0, attention_dropout=0.2, query_pre_attn_scalar=8)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="fastlm")
    return model.to(dtype).train()


def gemma_batch(mask):
    """Return the inputs of a batch (3, LENGTH), and the labels of the next positions."""
    batch, labels = {"input_ids": IDS, "position_ids": torch.arange(LENGTH).expand(3, -1)}, IDS
    if mask == "padding on the left":
        tokens = torch.stack([(torch.arange(LENGTH) >= LENGTH - length).long() for length in LENGTHS])
        batch |= {"attention_mask": tokens, "position_ids": (tokens.cumsum(1) - 1).clamp(min=0)}
        labels = IDS.masked_fill(tokens == 0, -100)
    if mask == "of the user":
        drawn = torch.rand((3, 1, LENGTH, LENGTH), generator=torch.Generator().manual_seed(5))
        batch["attention_mask"] = (drawn < 0.7) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return batch, F.pad(labels[:, 1:], (0, 1), value=-100)


def gemma_results(model, batch, targets):
    torch.manual_seed(7)  # of the dropout
    logits = model(**batch).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    loss.backward()
    return {"loss": loss.detach()} | {f"grad {name}": p.grad for name, p in model.named_parameters()}


def part_of_gemma(rank, mask, method):
    def part(tensor):
        return tensor.split(PART, -2 if tensor.dim() == 4 else 1)[rank]

    batch, targets = gemma_batch(mask)
    with context_parallel(method=method):
        found = gemma_results(gemma(), {name: part(tensor) for name, tensor in batch.items()}, part(targets))
    return summed(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", MASKS)
def test_another_decoder_of_transformers_trains_in_the_context(mask, method, two_ranks):
    """Softcap, windows, masks, parts of different lengths, and dropout whose noise goes by the place."""
    plain, golden = (gemma_results(gemma(dtype), *gemma_batch(mask)) for dtype in DTYPES)
    for found in two_ranks:
        assert_good(found["others"][mask, method], plain, golden)


def refusals(rank, corpus):
    """Return the messages of what is refused in the context."""

    def message(call):
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            return str(error)
        return "no error"

    ids, places, z = IDS.split(PART, 1)[rank], torch.arange(PART[rank]).expand(3, -1), torch.zeros(3, 16)
    vae, decoder = build("vae", "tiny", load_tokenizer(corpus)), gemma()
    decoder.config.use_cache = False  # With a cache transformers does not look for packed sequences.
    return [
        message(lambda: vae(input_ids=ids, latents=z)),
        message(lambda: vae(input_ids=ids, position_ids=places, encoder_input_ids=ids)),
        message(lambda: vae(input_ids=ids, position_ids=places, latents=z, labels=ids)),
        message(lambda: decoder(input_ids=ids, position_ids=places % 4)),
        message(lambda: decoder(input_ids=ids, position_ids=places, output_attentions=True)),
        message(lambda: decoder(input_ids=ids, position_ids=places, attention_mask=torch.ones(3, 1, 1, LENGTH) > 0)),
        message(lambda: decoder(input_ids=ids[rank:], attention_mask=torch.ones_like(ids[rank:]))),
    ]


def test_what_the_context_refuses(two_ranks):
    expected = ["position_ids must be given", "encoder_position_ids must be given", "shift_labels must be given"]
    expected += ["as for packed sequences", "attention weights were asked for", "was copied", "got batches of 3, 2"]
    for found in two_ranks:
        for message, wanted in zip(found["refused"], expected, strict=True):
            assert wanted in message


# ---- training ---------------------------------------------------------------------------------------------------------------


def as_torchrun(rank, world):
    """Set what torchrun sets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


class Death(TrainerCallback):
    """End the process without a word, in the middle of the training."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os._exit(1)


class Halfway(TrainerCallback):
    """Copy a run as it is after its first checkpoint into a folder beside it: "half_of_" and its name."""

    def __init__(self, folder):
        self.folder, self.copy = folder, folder.with_name(f"half_of_{folder.name}")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not self.copy.exists():
            shutil.copytree(self.folder, self.copy)


def trainings(rank, world, runs, last):
    """Train each (folder, corpus, settings, resume), one after the other; in the last one the second rank dies."""
    as_torchrun(rank, world)
    train_module.LOG_STEPS = 1
    for folder, corpus, settings, resume in runs:
        train(folder, corpus, settings, resume=resume, callbacks=[Halfway(folder)], context_parallel=world)
    try:
        train(*last, callbacks=[Death()] * rank, context_parallel=world)
    except RuntimeError as error:
        return str(error)


def curves(folder):
    with open(folder / "curves.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_curves(folder, expected):
    rows, wanted = curves(folder), curves(expected)
    assert len(rows) == len(wanted) == 8 + 2  # steps and evaluations
    for row, want in zip(rows, wanted):
        for name in COLUMNS:
            assert bool(row[name]) == bool(want[name])
            assert not want[name] or float(row[name]) == pytest.approx(float(want[name]), rel=2e-4), name


def test_training_and_its_checkpoints_are_those_of_one_process(corpus, tmp_path, monkeypatch):
    """Train in one process and in two, and each to the end from the other's checkpoint. Then let a rank die."""
    monkeypatch.setattr(train_module, "LOG_STEPS", 1)
    one = train(tmp_path / "one", corpus, SETTINGS, callbacks=[Halfway(tmp_path / "one")])
    two, to_two = tmp_path / "two", tmp_path / "half_of_one"
    runs = [(two, corpus, SETTINGS, False), (to_two, None, None, True)]
    error, _ = run(trainings, 2, runs, (tmp_path / "dead", corpus, SETTINGS), dead=(1,))
    to_one = train(tmp_path / "half_of_two", resume=True, callbacks=())
    for folder in (two, to_two, to_one):
        assert_same_curves(folder, one)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert "gloo" in error  # "Connection closed by peer", or reset


@pytest.mark.parametrize(
    ("processes", "ranks", "message"),
    [
        (None, 2, "context_parallel must be 1 in a single process; got 2: .* torchrun --nproc-per-node 2"),
        (4, 3, "context_parallel must divide the number of processes, 4; got 3"),
        (2, 0, "context_parallel must be at least 1; got 0"),
    ],
)
def test_processes_that_form_no_groups_are_refused(processes, ranks, message, monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", context_parallel=ranks)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_groups_do_not_divide_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert groups_of(2) == 3
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes that share it; got 16"):
        train(tmp_path / "run", None, SETTINGS, context_parallel=2)


# ---- the data ---------------------------------------------------------------------------------------------------------------


def test_groups_read_the_same_texts(corpus, tokenizer):
    """Process r of 4 reads every fourth share, as accelerate deals them out."""
    texts = Texts(corpus, "train", tokenizer, 128)
    sampler = InRandomOrder(texts, 8, shares=2, copies=2)
    shares = torch.tensor(list(sampler)).view(-1, 4, 4)  # (steps, processes, texts of a share)
    assert len(sampler) == shares.numel() and torch.equal(shares[:, ::2], shares[:, 1::2])
    assert shares[:, ::2].flatten().tolist() == list(InRandomOrder(texts, 8))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_parts_lie_side_by_side_as_the_whole_batch(ranks, corpus, tokenizer):
    collate, items = collator_of("vae", tokenizer), items_of(corpus, tokenizer)
    whole, parts = collate(items), [PartCollator(collate, tokenizer.pad_token_id, rank, ranks)(items) for rank in range(ranks)]
    length = whole["labels"].shape[1]
    fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "encoder_attention_mask": 0}
    for name, value in fill.items():
        joined = torch.cat([part[name] for part in parts], 1)
        assert joined.shape[1] % ranks == 0 and torch.equal(joined[:, :length], whole[name]), name
        assert (joined[:, length:] == value).all(), name
    targets = torch.cat([part["shift_labels"] for part in parts], 1)
    assert torch.equal(targets[:, : length - 1], whole["labels"][:, 1:]) and (targets[:, length - 1 :] == -100).all()
    for name in ("position_ids", "encoder_position_ids"):
        places = torch.cat([part[name] for part in parts], 1)
        assert (places == torch.arange(places.shape[1])).all()
    assert all(torch.equal(part["seeds"], whole["seeds"]) for part in parts)
    assert PartCollator(collate, 0, 0, ranks).plain().collate.dropout == 0
