"""The common steps of fine-tuning for each task, from the file of examples to the checkpoint."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
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
from ..data.read import Problems, rows
from ..files import replaced_together
from ..model.checkpoint import CONFIG, FILES, quiet, save
from ..training.trainer import Progress
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

    def check(self, source: object) -> None:
        """Raise a ValueError that names ``source`` if a part is empty."""
        for split, count in self.counts.items():
            if not count:
                counts = ", ".join(f"{name} {number}" for name, number in self.counts.items())
                raise ValueError(f"{source} has too few examples, none for {split} ({counts}){problem_lines(self.problems)}")


def problem_lines(problems: Problems) -> str:
    """Return lines that report the rows that could not be read, or "" if there are none."""
    if not problems.count:
        return ""
    return "\n".join([f"\nunreadable  {problems.count} rows; the first are", *(f"            {it}" for it in problems.first)])


def read_examples(data: str | os.PathLike, fields: Sequence[str], test: str | os.PathLike | None = None) -> Examples:
    """Read the examples of a JSONL or CSV file; `fastlm.lm.data.clean.clean` repairs both fields, and neither may be empty.

    A tenth is for validation and a tenth for the test, by a hash of the input, so that equal inputs are in one part.

    Args:
        fields: the names of the input and of the target.
        test: a separate file to test on; then ``data`` gives examples for training and validation only.

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.read.rows`, or a part has no example.
    """
    examples = Examples([], [], [])
    for given, wanted in _read(Path(data), fields, examples.problems):
        getattr(examples, split_of(given, HELD_OUT, 0 if test else HELD_OUT)).append((given, wanted))
    if test:
        examples.test += _read(Path(test), fields, examples.problems)
    examples.check(data)
    return examples


def _read(path: Path, fields: Sequence[str], problems: Problems) -> Iterator[Example]:
    given, wanted = fields
    # A label may be a number in JSON. `rows` accepts that in optional fields only.
    for line, row in rows(path, [given], problems, optional=[wanted]):
        example = clean(row[given]), clean(row.get(wanted, ""))
        if all(example):
            yield example
        else:
            problems.add(f"{path}:{line}", f"the field {fields[example.index('')]!r} is missing or empty")


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
    template, ids = [tokenizer.bos_token, "$A", end], tokenizer.convert_tokens_to_ids([tokenizer.bos_token, end])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=list(dict(zip((tokenizer.bos_token, end), ids)).items())
    )
    tokenizer.model_max_length = max_tokens


def adapted(model: PreTrainedModel, rank: int, heads: Sequence[str] = ()) -> torch.nn.Module:
    """Add LoRA to every linear layer of a model except its ``heads``, which are trained in full; freeze all other weights."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=[*heads], modules_to_save=[*heads]
    )
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
) -> torch.nn.Module:
    """Train a model with transformers' Trainer, and return that of the best epoch, in evaluation mode.

    Args:
        train, validation: items for ``collate``, whose lengths are those of their ``input_ids``.
        folder: takes the checkpoints of the epochs.
        score: the validation score that determines the best epoch: "loss", the lower the better, or a name of
            ``compute_metrics``, the higher the better.
        label_names: the names of the batch's tensors that the loss compares with.

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
        train_sampling_strategy="group_by_length",
        logging_steps=LOG_STEPS,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
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
    with quiet():
        trainer = Trainer(model, arguments, callbacks=[Epochs(score)], **keywords)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
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
    text = json.dumps(asdict(result), ensure_ascii=False, indent=1)
    (folder / METRICS).write_text(text + "\n", "utf-8")
    with open(folder / PREDICTIONS, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *table])
    save(model, tokenizer, folder)


def results(output: Path) -> AbstractContextManager[Path]:
    """Return a context manager of a temporary folder, whose results replace those of ``output`` if the block succeeds.

    config.json is replaced last.
    """
    return replaced_together(output, [METRICS, PREDICTIONS, CONFUSION, *FILES])
