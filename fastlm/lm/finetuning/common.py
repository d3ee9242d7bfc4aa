"""The common steps of fine-tuning for each task, from the file of examples to the checkpoint."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..data.clean import clean
from ..data.prepare import SPLITS, read_split, split_of
from ..data.problems import Problems
from ..data.rows import rows
from ..data.tokenizer import frame_texts
from ..files import replaced_together
from ..model.checkpoint import CONFIG, FILES, quiet, save
from ..training.settings import SETTINGS
from ..training.trainer import CHECKPOINTS, Interrupted, Progress, last_checkpoint
from .tuning import Tuning

METRICS, PREDICTIONS, CONFUSION = "metrics.json", "predictions.csv", "confusion.png"
HELD_OUT = 0.1  # the share of a file's examples for validation, and as much again for the test
BATCH = 64  # examples of a batch without training
LOG_STEPS = 10

Example = tuple[str, str]  # (input, target)


@dataclass
class Examples:
    """The examples to train on, to choose the best epoch by, and to test on, and the rows that could not be read."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    problems: Problems = field(default_factory=Problems)

    @property
    def counts(self) -> dict[str, int]:
        return {split: len(getattr(self, split)) for split in SPLITS}

    def check(self, source: object, what: str = "examples") -> None:
        """Raise a ValueError that names ``source`` if a part is empty."""
        for split, count in self.counts.items():
            if not count:
                counts = ", ".join(f"{name} {number}" for name, number in self.counts.items())
                raise ValueError(f"{source} has too few {what}, none for {split} ({counts}){problem_lines(self.problems)}")


def problem_lines(problems: Problems) -> str:
    """Return lines that report the rows that could not be read, or "" if there are none."""
    return "".join(f"\n{line}" for line in problems.lines())


def read_examples(data: str | os.PathLike, fields: Sequence[str], test: str | os.PathLike | None = None) -> Examples:
    """Read the examples of a JSONL, JSON, CSV or Parquet file.

    `fastlm.lm.data.clean.clean` repairs both fields, and neither may be empty.
    A tenth is for validation and a tenth for the test: see `split_examples`.

    Args:
        fields: the names of the input and of the target.
        test: a separate file to test on; then ``data`` gives examples for training and validation only.

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.read.rows`, or a part has no example.
    """
    problems = Problems()
    examples = split_examples(_read(Path(data), fields, problems), 0 if test else HELD_OUT, problems)
    if test:
        examples.test += _read(Path(test), fields, examples.problems)
    examples.check(data)
    return examples


def split_examples(
    found: Iterable[Example], test: float = HELD_OUT, problems: Problems | None = None, by: Callable = itemgetter(0)
) -> Examples:
    """Return the examples in parts, a tenth for validation and ``test`` for the test, by a hash of ``by(example)``.

    That is the input by default, so that equal inputs are in one part.
    """
    examples = Examples([], [], [], problems or Problems())
    for example in found:
        getattr(examples, split_of(by(example), HELD_OUT, test)).append(example)
    return examples


def _read(path: Path, fields: Sequence[str], problems: Problems) -> Iterator[Example]:
    given, wanted = fields
    # A label may be a number in JSON. `rows` accepts that in optional fields only.
    for line, row in rows(path, [given], problems, optional=[wanted]):
        example = clean(row[given]), clean(row.get(wanted, ""))
        if all(example):
            yield example
        else:
            problems.add(path, f"the field {fields[example.index('')]!r} is missing or empty", line=line)


def examples_of(corpus: str | os.PathLike, make: Callable[[Iterable[dict]], Iterable[Example]]) -> Examples:
    """Return the examples that ``make`` makes of the records of a prepared corpus, in the corpus's own splits.

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.prepare.read_split`, or a part has no example.
    """
    examples = Examples(**{split: list(make(read_split(corpus, split))) for split in SPLITS})
    examples.check(corpus)
    return examples


def check_new(output: str | os.PathLike) -> Path:
    """Return ``output`` as a Path, or raise a ValueError if it is a file or holds a checkpoint."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder; {output} is a file")
    if (output / CONFIG).exists():
        raise ValueError(f"output must be a new folder; {output} holds another checkpoint")
    return output


def frame(tokenizer: PreTrainedTokenizerFast, end: str, max_tokens: int) -> None:
    """Make a tokenizer put <|bos|> before a text and ``end`` after it, and truncate to ``max_tokens`` in all.

    transformers' pipelines then do as training did, because the tokenizer is saved with the model.
    """
    frame_texts(tokenizer, [tokenizer.bos_token, "$A", end])
    tokenizer.model_max_length = max_tokens


def adapted(model: PreTrainedModel, rank: int, heads: Sequence[str] = ()) -> torch.nn.Module:
    """Add LoRA to every linear layer of a model except its ``heads``, which are trained in full; freeze all other weights."""
    kept_whole = {model.get_output_embeddings(), *map(model.get_submodule, heads)}
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module not in kept_whole]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=[*heads])
    return get_peft_model(model, config)


def fit(
    model: torch.nn.Module,
    tuning: Tuning,
    train: list[dict],
    validation: list[dict],
    collate: Callable[[list[dict]], dict[str, torch.Tensor]],
    folder: Path,
    *,
    score: str = "loss",
    compute_metrics: Callable | None = None,
    label_names: Sequence[str] = ("labels",),
    sampling: str = "group_by_length",
) -> torch.nn.Module:
    """Train a model with transformers' Trainer, and return that of the best epoch, in evaluation mode.

    Args:
        train, validation: items for ``collate``, whose lengths are those of their ``input_ids``.
        folder: takes the checkpoints of the epochs; training goes on from the last one there is.
        score: the validation score that determines the best epoch: "loss", the lower the better, or a name of
            ``compute_metrics``, the higher the better.
        label_names: the names of the batch's tensors that the loss compares with.
        sampling: the Trainer's order of the items: by length for batches that are padded, "random" for packed ones.

    Raises:
        OSError: the disk is full.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=tuning.epochs,
        per_device_train_batch_size=tuning.batch_size,
        per_device_eval_batch_size=BATCH,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a share of all steps
        weight_decay=0.01,
        seed=tuning.seed,
        train_sampling_strategy=sampling,
        logging_steps=LOG_STEPS,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{score}",
        greater_is_better=score != "loss",
        prediction_loss_only=compute_metrics is None,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        label_names=list(label_names),
        disable_tqdm=True,
        report_to="none",
    )
    keywords = {
        "data_collator": collate,
        "train_dataset": train,
        "eval_dataset": validation,
        "compute_metrics": compute_metrics,
    }
    last = last_checkpoint(folder)
    with quiet():
        trainer = Trainer(model, arguments, callbacks=[Epochs(score)], **keywords)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=last and str(last))
        except SafetensorError as error:
            raise OSError(f"{folder}: the weights could not be written: {error}") from error
    return model.eval()


class Epochs(Progress):
    """Show a progress bar with the loss, and a line for each epoch."""

    def __init__(self, score: str):
        self.score = score

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        names = dict.fromkeys(("loss", self.score))
        scores = ", ".join(f"{name} {metrics[f'eval_{name}']:.3f}" for name in names)
        self.bar.write(f"epoch {state.epoch:.1f}: validation {scores}", file=self.bar.fp)


def finetune(model: PreTrainedModel, tuning: Tuning, heads: Sequence[str], *arguments, **keywords) -> PreTrainedModel:
    """Train all weights, or LoRA's, by `fit`; return a model without LoRA's layers in either case."""
    set_seed(tuning.seed)
    if not tuning.lora:
        return fit(model, tuning, *arguments, **keywords)
    return fit(adapted(model, tuning.lora, heads), tuning, *arguments, **keywords).merge_and_unload()


def write_results(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, result, header: Sequence[str], table: Iterable
) -> None:
    """Write the checkpoint, metrics.json and predictions.csv."""
    write_report(folder, result, header, table)
    save(model, tokenizer, folder)


def write_report(folder: Path, result, header: Sequence[str], table: Iterable) -> None:
    """Write metrics.json and predictions.csv."""
    text = json.dumps(asdict(result), ensure_ascii=False, indent=1)
    (folder / METRICS).write_text(text + "\n", "utf-8")
    with open(folder / PREDICTIONS, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *table])


@contextmanager
def results(output: Path, course: dict, resume: bool) -> Iterator[tuple[Path, Path]]:
    """Give the block a temporary folder, whose results replace those of ``output`` if it succeeds, and one for `fit`.

    config.json is replaced last. The folder for `fit` is removed then; if the block fails after an epoch, it stays.

    Args:
        course: what makes the run, as JSON: a run is resumed with the same.

    Raises:
        FileNotFoundError, ValueError: there is nothing to resume, or a run of another course; or, without ``resume``, there
            is a run to resume.
        Interrupted: Ctrl-C stopped the block after an epoch.
    """
    checkpoints = output / CHECKPOINTS
    _begin(checkpoints, course, resume)
    try:
        with replaced_together(output, [METRICS, PREDICTIONS, CONFUSION, *FILES]) as folder:
            yield folder, checkpoints
    except BaseException as stop:
        last = last_checkpoint(checkpoints)
        if last is None:
            shutil.rmtree(checkpoints)
        elif isinstance(stop, KeyboardInterrupt):
            raise Interrupted(f"a checkpoint is in {last}") from None
        raise
    shutil.rmtree(checkpoints)


def _begin(checkpoints: Path, course: dict, resume: bool) -> None:
    path, text = checkpoints / SETTINGS, json.dumps(course)
    if not resume:
        if path.exists():
            raise ValueError(f"output must be a new folder; {checkpoints.parent} holds a run to go on with: --resume")
        checkpoints.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return
    if not path.exists():
        raise FileNotFoundError(f"{checkpoints.parent} holds no run to resume")
    before = json.loads(path.read_text("utf-8"))
    if differ := [name for name, value in json.loads(text).items() if value != before.get(name)]:
        raise ValueError(
            f"a run is resumed with its own settings and examples; {checkpoints.parent} has another {', '.join(differ)}"
        )


def course_of(task: str, checkpoint: str | os.PathLike, examples: Examples, tuning: Tuning) -> dict:
    """Return what makes a run: the task, the checkpoint, a digest of the examples, and the settings."""
    every = json.dumps([getattr(examples, split) for split in SPLITS])
    digest = blake2b(every.encode(), digest_size=16).hexdigest()
    return {"task": task, "checkpoint": str(Path(checkpoint).resolve()), "examples": digest, **asdict(tuning)}
