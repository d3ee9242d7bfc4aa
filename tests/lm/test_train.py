"""Training: resuming to the same bits, two processes as one, interruptions, a full disk, and refused arguments."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastlm.cli import main
from fastlm.lm.model.checkpoint import FILES, load
from fastlm.lm.model.text_vae import TextVAE
from fastlm.lm.training import trainer as trainer_module
from fastlm.lm.training.schedules import kl_weight
from fastlm.lm.training.train import Interrupted, Settings, train

SETTINGS = Settings(preset="tiny", epochs=2, batch_size=16, free_bits=0.1, kl_schedule="cyclical", span_masking=0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """Train without an interruption."""
    return train(tmp_path_factory.mktemp("whole") / "run", corpus, SETTINGS, callbacks=())


class At(TrainerCallback):
    """A callback that does something once, after a given step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def weights(run):
    return load_file(run / "model.safetensors")


def curves(run, but=("tokens_per_second",)):
    with open(run / "curves.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in but} for row in csv.DictReader(file)]


def assert_same_bits(actual, expected):
    actual, expected = weights(actual), weights(expected)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_it_learns_and_leaves_a_model(whole, corpus):
    rows = curves(whole)
    losses = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
    assert len(losses) == 2 and losses[1] < losses[0] and losses[1] < 5.67  # ln 290, all tokens alike
    model, tokenizer = load(whole)
    assert isinstance(model, TextVAE) and not model.training and model.kl_weight == 1.0 and len(tokenizer) == 290
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole / "settings.json").read_text())["corpus"] == str(corpus.resolve())


def test_a_finished_model_has_no_checkpoints_and_is_left_as_it_is(whole):
    files = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert set(files) == {*FILES, "settings.json", "curves.csv", "curves.png"}
    (whole / "checkpoints").mkdir()  # as of a process that was killed before it removed them
    train(whole, resume=True, callbacks=())
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == files


def test_an_interrupted_run_goes_on_to_the_same_bits(whole, corpus, tmp_path):
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="checkpoint-4"):  # the step after that of the signal
        train(run, corpus, SETTINGS, callbacks=[At(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert signal.getsignal(signal.SIGINT) is before
    assert not (run / "model.safetensors").exists() and (run / "curves.csv").exists()
    train(run, resume=True, callbacks=())
    assert_same_bits(run, whole)
    same = ("loss", "kl", "eval_loss")  # an interrupted run logs another step too
    last, expected = ([row for row in curves(each) if row["eval_loss"]][-1] for each in (run, whole))
    assert [last[name] for name in same] == [expected[name] for name in same]


def test_the_same_settings_give_the_same_bits_and_another_seed_does_not(whole, corpus, tmp_path):
    again = train(tmp_path / "again", corpus, SETTINGS, callbacks=())
    assert_same_bits(again, whole)
    assert curves(again) == curves(whole)
    other = train(tmp_path / "other", corpus, Settings(preset="tiny", epochs=0.2, batch_size=16, seed=1), callbacks=())
    assert not torch.equal(weights(other)["latent.linear.weight"], weights(whole)["latent.linear.weight"])


def test_two_processes_give_the_loss_of_one(whole, corpus, tmp_path):
    options = ["--preset", "tiny", "--epochs", "2", "--batch-size", "16", "--free-bits", "0.1"]
    options += ["--kl-schedule", "cyclical", "--span-masking", "0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastlm.cli", "lm"]
    command += ["train", "--output", str(tmp_path / "run"), "--corpus", str(corpus), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    both, one = curves(tmp_path / "run"), curves(whole)
    assert len(both) == len(one)
    for row, expected in zip(both, one):
        for name in ("loss", "reconstruction", "kl", "eval_loss", "eval_kl", "grad_norm"):
            assert (not expected[name] and not row[name]) or float(row[name]) == pytest.approx(float(expected[name]), rel=2e-4)


def test_a_full_disk_leaves_the_checkpoints_before(corpus, whole, tmp_path, monkeypatch):
    run, saves = tmp_path / "run", []
    write = trainer_module.Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        saves.append(folder)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(trainer_module.Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(run, corpus, SETTINGS, callbacks=())
    (left,) = (run / "checkpoints").iterdir()
    monkeypatch.undo()
    killed = shutil.copytree(left, run / "checkpoints" / "checkpoint-9")  # as of a process that was killed while it wrote
    (killed / "trainer_state.json").unlink()
    train(run, resume=True, callbacks=())
    assert_same_bits(run, whole)


def test_what_is_refused_before_anything_is_overwritten(whole, corpus, tmp_path):
    with pytest.raises(ValueError, match="output must be a new folder"):
        train(whole, corpus, SETTINGS)
    with pytest.raises(ValueError, match="another epochs, seed"):
        train(whole, settings=Settings(**vars(SETTINGS) | {"epochs": 3.0, "seed": 5}), resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        train(tmp_path / "none", resume=True)
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path} is no prepared corpus: make one, fastlm lm prepare TEXTS --output"
    ):
        train(tmp_path / "run", tmp_path, SETTINGS)
    (tmp_path / "report.json").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no vocabulary, as its --vocab-size was 0"):
        train(tmp_path / "run", tmp_path, SETTINGS)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_a_run_is_not_resumed_from_what_is_damaged_or_has_changed(whole, corpus, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(run, corpus, SETTINGS, callbacks=[At(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    for name, message in {"optimizer.pt": "optimizer.pt is damaged", "model.safetensors": "damaged or cut short"}.items():
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=message):
            train(run, resume=True)
        (last / name).write_bytes(content)
    kept = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(kept | {"corpus_digest": "another"}))
    with pytest.raises(ValueError, match="has changed since"):
        train(run, resume=True)
    (run / "settings.json").write_text('{"model": "vae"')
    with pytest.raises(ValueError, match="settings.json is damaged"):
        train(run, resume=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "gan"}, "model must be one of vae, decoder; got 'gan'"),
        ({"preset": "huge"}, "preset must be one of tiny, small, base"),
        ({"kl_schedule": "square"}, "kl_schedule must be one of constant, linear, cyclical"),
        ({"epochs": 0}, "epochs must be positive; got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive; got nan"),
        ({"free_bits": -1.0}, "free_bits must not be negative"),
        ({"mean_std": -0.1}, "mean_std must not be negative; got -0.1"),
        ({"word_dropout": 1.5}, "word_dropout must be from 0 to 1; got 1.5"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("schedule", "done", "options", "expected"),
    [
        ("constant", 0.0, {}, 1.0),
        ("constant", 0.3, {"beta": 0.5}, 0.5),
        ("linear", 0.0, {}, 0.0),
        ("linear", 0.25, {}, 0.5),
        ("linear", 0.9, {}, 1.0),
        ("cyclical", 0.0625, {}, 0.5),  # in each of four cycles the weight rises over the first half
        ("cyclical", 0.125, {}, 1.0),
        ("cyclical", 0.25, {}, 0.0),
        ("cyclical", 1.0, {}, 1.0),
        ("constant", 0.19, {"warm_start": 0.2}, 0.0),
        ("constant", 0.2, {"warm_start": 0.2}, 1.0),
        ("linear", 0.4, {"warm_start": 0.2, "beta": 2.0}, 1.0),  # a quarter of the training after the warm start
        ("linear", 1.0, {"warm_start": 1.0}, 1.0),
    ],
)
def test_the_weight_of_the_kl(schedule, done, options, expected):
    assert kl_weight(schedule, done, **options) == pytest.approx(expected)


def test_the_command_trains_a_decoder_and_evaluates_both(whole, corpus, tmp_path, capsys):
    run = tmp_path / "decoder"
    options = ["--model", "decoder", "--preset", "tiny", "--epochs", "0.5", "--batch-size", "16"]
    assert main(["lm", "train", "--corpus", str(corpus), "--output", str(run), *options]) == 0
    assert main(["lm", "train", "--corpus", str(corpus), "--output", str(run), *options]) == 1
    captured = capsys.readouterr()
    assert "output must be a new folder" in captured.err and f"The model is in {run}. It writes, for example:" in captured.out
    found = tmp_path / "found.json"
    assert main(["lm", "evaluate", str(whole), "--against", str(run), "--samples", "4", "--json", str(found)]) == 0
    out = capsys.readouterr().out
    assert "active units" in out and f"of that of {run}" in out
    figures = json.loads(found.read_text())
    assert figures[str(run)]["kl"] is None and figures[str(whole)]["samples"] == 4
    assert figures[str(run)]["tokens"] == figures[str(whole)]["tokens"] > 0
    assert main(["lm", "evaluate", str(run), "--against", f"{run}/../{run.name}"]) == 1
    assert "fastlm lm evaluate: --against must be another model than CHECKPOINT; both are" in capsys.readouterr().err
    assert main(["lm", "train", "--corpus", "nope", "--output", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == (
        "fastlm lm train: nope is no prepared corpus: make one, fastlm lm prepare TEXTS --output nope\n"
    )


def test_the_command_says_how_to_go_on_after_an_interruption(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastlm.lm.training.train.Progress", lambda: At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    arguments = ["lm", "train", "--corpus", str(corpus), "--output", str(tmp_path / "run"), "--preset", "tiny"]
    assert main(arguments) == 130
    assert "checkpoint-3, and --resume goes on from it" in capsys.readouterr().err
