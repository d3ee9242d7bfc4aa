"""Test that transformers' Trainer logs what `fastlm.watch` sees."""

import pytest
import torch
import transformers as hf
from support.transformers_models import ARCHITECTURES, VOCABULARY

from fastlm.integrations.transformers import WatchCallback


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(3, VOCABULARY, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class Reporter(hf.TrainerCallback):
    """Keep what a reporter such as W&B's is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Rows(hf.TrainerCallback):
    """Keep the number of rows that a WatchCallback has seen when it logs."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append(int(self.callback.stats["transformer.h.0.attn"].rows[0]))


def trainer_of(folder, callbacks=(), **options):
    model = ARCHITECTURES["GPT-2"].build("fastlm").train()
    arguments = hf.TrainingArguments(
        output_dir=str(folder), max_steps=6, logging_steps=3, eval_steps=2, eval_strategy="steps", save_strategy="no",
        per_device_train_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    return hf.Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=list(callbacks))


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def steps_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_logs_have_every_layer(tmp_path, accumulation):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=accumulation)
    reporter = Reporter()
    trainer.add_callback(reporter)
    callback = WatchCallback(key_mass=True).add_to(trainer)
    rows = Rows(callback)
    trainer.callback_handler.callbacks.insert(0, rows)
    trainer.train()
    assert rows.seen == [3 * accumulation * 2 * 8] * 2  # without those of evaluations
    names = {"entropy", "lowest_entropy", "max_logit", "first_key_mass"}
    expected = {f"attention/{name}/layer_{i}" for name in names for i in range(2)} | {
        "attention/entropy",
        "attention/max_logit",
    }
    for logs in (steps_of(trainer), [log for log in reporter.logs if "loss" in log]):
        assert len(logs) == 2
        for log in logs:
            assert expected == {name for name in log if name.startswith("attention/")}
            assert all(isinstance(log[name], float) for name in expected)
            assert log["attention/max_logit"] == max(log[f"attention/max_logit/layer_{i}"] for i in range(2))
    others = [log for log in trainer.state.log_history if "loss" not in log]
    assert others and not any(name.startswith("attention/") for log in others for name in log)
    assert callback.layers == ["transformer.h.0.attn", "transformer.h.1.attn"] and not hooks_of(trainer.model)


def test_as_a_callback_of_the_constructor_it_logs_and_changes_nothing(tmp_path):
    watched, plain = trainer_of(tmp_path, [WatchCallback()]), trainer_of(tmp_path)
    watched.train(), plain.train()
    first = steps_of(watched)[0]
    assert "attention/entropy/layer_1" in first and "attention/first_key_mass/layer_1" not in first
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_after_an_exception_it_closes(tmp_path):
    callback = WatchCallback()
    trainer = trainer_of(tmp_path, [callback])
    handle = trainer.model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert callback.stats.is_open
    callback.close()
    handle.remove()
    assert not hooks_of(trainer.model) and not callback.stats.is_open


def test_a_model_that_is_not_on_fastlm_warns(tmp_path):
    trainer = trainer_of(tmp_path, [WatchCallback()])
    trainer.model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="saw no call of attention on fastlm in GPT2LMHeadModel"):
        trainer.train()
    assert not any(name.startswith("attention/") for log in trainer.state.log_history for name in log)
