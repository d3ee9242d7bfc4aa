"""Fine-tuning for classification: sentiment, topics, or any other label of a text."""

import os
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score
from transformers import (
    DataCollatorWithPadding,
    EuroBertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..data.prepare import SPLITS, read_split
from ..data.problems import Problems
from ..data.ready import sentiment
from ..model.checkpoint import load
from ..model.presets import ATTENTION, on_kernels
from ..model.text_vae import TextVAE
from .common import (
    BATCH,
    CONFUSION,
    Example,
    Examples,
    Tuning,
    check_new,
    course_of,
    examples_of,
    finetune,
    frame,
    problem_lines,
    read_examples,
    results,
    write_results,
)
from .tuning import READY

FIELDS = ("text", "label")
HEADS = {EuroBertForSequenceClassification: ("dense", "classifier"), LlamaForSequenceClassification: ("score",)}
NUMBERED = 25  # the cells of a confusion matrix of at most this many classes show their numbers
SHOWN = 30  # the most characters of a label in the picture


@dataclass
class Classification:
    """The results of a classifier on the test texts, stored beside it as metrics.json.

    Attributes:
        train, validation, test: the numbers of texts to train on, to choose the epoch by and to test on.
        labels: the labels in the order of their ids.
        accuracy: the share of the test texts whose predicted label is right.
        majority: the accuracy of always predicting the most frequent label of the training texts.
        macro_f1: the mean F1 of the labels that occur or were predicted in the test.
        problems: the rows that could not be read.
    """

    train: int
    validation: int
    test: int
    labels: list[str]
    accuracy: float
    majority: float
    macro_f1: float
    problems: Problems

    def __str__(self) -> str:
        lines = [
            f"texts     {self.train} to train on, {self.validation} to choose the epoch by, {self.test} to test on",
            f"labels    {len(self.labels)}: {', '.join(self.labels)[:100]}",
            f"accuracy  {self.accuracy:.1%} of the test texts (always the most frequent label: {self.majority:.1%})",
            f"macro F1  {self.macro_f1:.3f}",
        ]
        return "\n".join(lines) + problem_lines(self.problems)


def classify(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    data: str | os.PathLike | None = None,
    *,
    test: str | os.PathLike | None = None,
    fields: Sequence[str] = FIELDS,
    corpus: str | os.PathLike | None = None,
    classes: int = 10,
    tuning: Tuning | None = None,
    resume: bool = False,
) -> Classification:
    """Make a classifier of a checkpoint of `fastlm.lm`, and test it.

    ``output`` then holds the classifier, a checkpoint that transformers' ``AutoModelForSequenceClassification`` and
    ``pipeline("text-classification")`` read, with metrics.json, confusion.png and predictions.csv of the test texts.

    Args:
        checkpoint: the folder of a `TextVAE`, whose encoder is taken, or of a decoder.
        data: a .csv, .tsv, .jsonl, .json or .parquet file; None for the texts and labels of ``corpus``, which are the modules
            in Python's documentation, or, without a corpus either, for the reviews that ship with fastlm
            (`fastlm.lm.data.ready`).
        test, fields: see `fastlm.lm.finetuning.common.read_examples`; ``fields`` are the names of the text and of the label.
        corpus: a folder that `prepare` made.
        resume: go on after the last whole epoch of an interrupted run, to the same bits as without the interruption.
        classes: take this many of the corpus's labels, the most frequent ones.

    Raises:
        ValueError: ``output`` holds a checkpoint; there are fewer than two labels, or no text to train on has a label of a
            held-out text; as `fastlm.lm.finetuning.common.read_examples` and `fastlm.lm.model.checkpoint.load`.
        FileNotFoundError: there is no such checkpoint, file or corpus.
        OSError: the disk is full; ``output`` has no new model.
        Interrupted: Ctrl-C stopped the training after an epoch, whose checkpoint is left.
    """
    output, tuning = check_new(output), tuning or (READY["classify"] if data is None and corpus is None else Tuning())
    if data is not None:
        examples = read_examples(data, fields, test)
    elif corpus is not None:
        examples = corpus_examples(corpus, classes)
    else:
        examples = Examples(*(list(sentiment(split)) for split in SPLITS))
    labels = labels_of(examples, data or corpus)
    base, tokenizer = load(checkpoint)
    model = classifier_of(base, labels, tuning.seed)
    frame(tokenizer, tokenizer.eos_token, model.config.max_position_embeddings)
    train, validation = (items_of(part, tokenizer, labels) for part in (examples.train, examples.validation))
    collate = DataCollatorWithPadding(tokenizer)
    best = {"score": "accuracy", "compute_metrics": accuracy}
    with results(output, course_of("classify", checkpoint, examples, tuning), resume) as (folder, epochs):
        model = finetune(model, tuning, HEADS[type(model)], train, validation, collate, epochs, **best)
        texts, wanted = zip(*examples.test)
        found = predict(model, tokenizer, texts)
        result = Classification(**examples.counts, labels=labels, **scores(examples, found), problems=examples.problems)
        write_confusion(wanted, found, labels, folder / CONFUSION)
        write_results(folder, model, tokenizer, result, (*FIELDS, "predicted"), zip(texts, wanted, found))
    return result


def corpus_examples(corpus: str | os.PathLike, classes: int) -> Examples:
    """Return the texts of a prepared corpus that have one of its ``classes`` most frequent labels."""
    counts = Counter(record["label"] for record in read_split(corpus, "train") if record["label"])
    if len(counts) < 2:
        raise ValueError(f"{corpus} has {len(counts)} labels, and at least 2 are needed: give a file of texts and labels")
    kept = {label for label, _ in counts.most_common(classes)}
    return examples_of(corpus, lambda records: [(it["text"], it["label"]) for it in records if it["label"] in kept])


def labels_of(examples: Examples, source: object) -> list[str]:
    """Return the labels of the examples, sorted.

    Raises:
        ValueError: there are fewer than two labels, or no text to train on has one of them.
    """
    labels = {label for _, label in examples.train}
    for split in ("validation", "test"):
        if unknown := sorted({label for _, label in getattr(examples, split)} - labels):
            names = ", ".join(map(repr, unknown[:5]))
            raise ValueError(
                f"{source}: {split} texts have labels that no text to train on has: {names}; give more texts of each"
            )
    if len(labels) < 2:
        raise ValueError(f"{source} has one label only, {labels.pop()!r}; at least 2 are needed")
    return sorted(labels)


def classifier_of(base: PreTrainedModel, labels: Sequence[str], seed: int = 0) -> PreTrainedModel:
    """Return a classifier with the weights of ``base`` and a new head.

    Of a `TextVAE` it takes the encoder, which is bidirectional, and averages its output over the tokens. A decoder is taken as
    it is, and its last token is classified.
    """
    encoder = isinstance(base, TextVAE)
    config = deepcopy(base.config.encoder if encoder else base.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if encoder:
        config.classifier_pooling = "mean"
    kind = EuroBertForSequenceClassification if encoder else LlamaForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind._from_config(config, attn_implementation=ATTENTION)
    model.model.load_state_dict((base.encoder if encoder else base.model).state_dict())
    return on_kernels(model)


def items_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, labels: Sequence[str]) -> list[dict]:
    """Return ``input_ids``, ``attention_mask`` and ``labels`` of each example."""
    texts, wanted = zip(*examples)
    encoded = tokenizer(list(texts), truncation=True)
    columns = encoded["input_ids"], encoded["attention_mask"], map(labels.index, wanted)
    return [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in zip(*columns)]


def accuracy(evaluated) -> dict[str, float]:
    """Return the accuracy of the logits, given the label ids, both as the Trainer hands them over."""
    return {"accuracy": accuracy_score(evaluated.label_ids, np.argmax(evaluated.predictions, 1))}


def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[str]:
    """Return the predicted label of each text."""
    return [found for found, _ in label(model, tokenizer, texts)]


@torch.inference_mode()
def label(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[tuple[str, float]]:
    """Return the likeliest label of each text, and its probability."""
    found = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start : start + BATCH]), truncation=True, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        best = model(input_ids=ids, attention_mask=mask).logits.float().softmax(1).max(1)
        found += zip(best.indices.tolist(), best.values.tolist())
    return [(model.config.id2label[index], probability) for index, probability in found]


def scores(examples: Examples, found: Sequence[str]) -> dict[str, float]:
    """Return ``accuracy``, ``majority`` and ``macro_f1`` of the predicted labels ``found`` of the test texts."""
    wanted = [label for _, label in examples.test]
    (most, _), *_ = Counter(label for _, label in examples.train).most_common(1)
    return {
        "accuracy": accuracy_score(wanted, found),
        "majority": wanted.count(most) / len(wanted),
        "macro_f1": float(f1_score(wanted, found, average="macro", zero_division=0)),
    }


def write_confusion(wanted: Sequence[str], found: Sequence[str], labels: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, in numbers of texts."""
    size = 3 + 0.45 * len(labels)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    names = [label if len(label) <= SHOWN else f"{label[: SHOWN - 1]}…" for label in labels]
    options = {"labels": list(labels), "display_labels": names, "include_values": len(labels) <= NUMBERED}
    ConfusionMatrixDisplay.from_predictions(
        wanted, found, ax=axis, xticks_rotation="vertical", cmap="Blues", colorbar=False, **options
    )
    axis.set(xlabel="predicted", ylabel="true")
    figure.savefig(path, dpi=120)
