"""Fine-tuning for extractive question answering: the answer to a question is a span of a text, the context.

    <|bos|> question <|eos|> context <|eos|>

The model gives each token two logits, as the first and as the last of the answer. A context that does not fit is read in
overlapping windows; where a window has no answer, both are to point at <|bos|>. BERT reads SQuAD so (Devlin et al. 2019).
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.text import squad
from transformers import (
    AutoModelForQuestionAnswering,
    EuroBertConfig,
    EuroBertPreTrainedModel,
    LlamaForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GenericForQuestionAnswering

from ..data.batches import padded_ids
from ..data.clean import clean
from ..data.problems import Problems
from ..data.ready.questions import Question, documented_questions
from ..data.rows import rows
from ..data.tokenizer import frame_texts
from ..model.checkpoint import load
from ..model.presets import ATTENTION, on_kernels
from ..model.text_vae import TextVAE
from .common import (
    BATCH,
    HELD_OUT,
    Examples,
    Tuning,
    check_new,
    course_of,
    finetune,
    problem_lines,
    results,
    split_examples,
    write_results,
)
from .tuning import READY

FIELDS = ("question", "context", "answer")
LONGEST = 64  # tokens of an answer
LABELS = ("start_positions", "end_positions")


class EuroBertForQuestionAnswering(GenericForQuestionAnswering, EuroBertPreTrainedModel):
    """A EuroBERT with a logit for each token to begin, and one to end, the answer."""


AutoModelForQuestionAnswering.register(EuroBertConfig, EuroBertForQuestionAnswering, exist_ok=True)  # its config is stock


@dataclass
class Answering:
    """The results of a reader on the test questions, stored beside it as metrics.json.

    Attributes:
        train, validation, test: the numbers of questions to train on, to choose the epoch by and to test on.
        exact_match: the share of the test questions whose answer is found to the word, as SQuAD compares: without case,
            punctuation and articles.
        f1: the mean F1 of the words of the answers, found and true (Rajpurkar et al. 2016, arXiv:1606.05250).
        majority_exact_match, majority_f1: those of always giving the most frequent answer of the training questions.
        problems: the rows that could not be read, or whose answer is not in the context.
    """

    train: int
    validation: int
    test: int
    exact_match: float
    f1: float
    majority_exact_match: float
    majority_f1: float
    problems: Problems

    def __str__(self) -> str:
        lines = [
            f"questions    {self.train} to train on, {self.validation} to choose the epoch by, {self.test} to test on",
            f"exact match  {self.exact_match:.1%} (always the most frequent answer: {self.majority_exact_match:.1%})",
            f"F1           {self.f1:.3f} (always the most frequent answer: {self.majority_f1:.3f})",
        ]
        return "\n".join(lines) + problem_lines(self.problems)


def answer(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    data: str | os.PathLike | None = None,
    *,
    test: str | os.PathLike | None = None,
    fields: Sequence[str] = FIELDS,
    tuning: Tuning | None = None,
    resume: bool = False,
) -> Answering:
    """Teach a checkpoint of `fastlm.lm` to find the answers to questions in texts, and test it.

    ``output`` then holds the reader, a checkpoint that transformers' ``AutoModelForQuestionAnswering`` reads (after importing
    this module, if it is an encoder), with metrics.json and predictions.csv of the test questions.

    Args:
        checkpoint: the folder of a `TextVAE`, whose encoder is taken, or of a decoder.
        data: a .csv, .tsv or .jsonl file; None for questions on Python's own documentation (`documented_questions`).
        test: a separate file to test on; None to keep a tenth of ``data`` apart, with all questions on the same context.
        fields: the names of the question, the context and the answer, which stands in the context; the first place counts.
        resume: go on after the last whole epoch of an interrupted run, to the same bits as without the interruption.

    Raises:
        ValueError: ``output`` holds a checkpoint; a file cannot be read, or a part of the examples is empty.
        FileNotFoundError: there is no such checkpoint or file.
        OSError: the disk is full; ``output`` has no new model.
        Interrupted: Ctrl-C stopped the training after an epoch, whose checkpoint is left.
    """
    output, problems = check_new(output), Problems()
    tuning = tuning or (READY["answer"] if data is None else Tuning())
    questions = read_questions(data, fields, problems) if data else documented_questions()
    examples = split_questions(questions, 0 if test else HELD_OUT, problems)
    if test:
        examples.test += read_questions(test, fields, problems)
    examples.check(data, "questions")
    base, tokenizer = load(checkpoint)
    model = reader_of(base, tuning.seed)
    places = model.config.max_position_embeddings
    frame_pairs(tokenizer, places)
    train, validation = (items_of(part, tokenizer) for part in (examples.train, examples.validation))
    collate = Spans(tokenizer.pad_token_id)
    with results(output, course_of("answer", checkpoint, examples, tuning), resume) as (folder, epochs):
        model = finetune(model, tuning, ("qa_outputs",), train, validation, collate, epochs, label_names=LABELS)
        found = [text for text, _ in find(model, tokenizer, [each[:2] for each in examples.test])]
        result = Answering(**examples.counts, **scores(examples.train, examples.test, found), problems=problems)
        table = ((*each[:3], text) for each, text in zip(examples.test, found))
        write_results(folder, model, tokenizer, result, (*FIELDS, "predicted"), table)
    return result


def read_questions(path: str | os.PathLike, fields: Sequence[str], problems: Problems) -> Iterator[Question]:
    """Yield the questions of a file; those whose answer is not in the context go to ``problems``.

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.read.rows`.
    """
    for line, row in rows(Path(path), fields, problems):
        question, context, wanted = (clean(row[name]) for name in fields)
        start = context.find(wanted)
        if question and wanted and start >= 0:
            yield Question(question, context, wanted, start)
        else:
            why = "is empty" if not wanted else "is not in the context" if start < 0 else "has no question"
            problems.add(Path(path), f"the answer {why}", line=line, detail=f": {wanted[:40]!r}")


def split_questions(questions: Iterable[Question], test: float, problems: Problems | None = None) -> Examples:
    """Return the questions in parts: all on a context are in one."""
    return split_examples(questions, test, problems, by=attrgetter("context"))


def reader_of(base: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Return a reader with the weights of ``base``, of a `TextVAE` those of its encoder, and a new head."""
    encoder = isinstance(base, TextVAE)
    kind = EuroBertForQuestionAnswering if encoder else LlamaForQuestionAnswering
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = deepcopy(base.config.encoder if encoder else base.config)
        model = kind._from_config(config, attn_implementation=ATTENTION)
    model.base_model.load_state_dict((base.encoder if encoder else base.model).state_dict())
    return on_kernels(model)


def frame_pairs(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
    """Make a tokenizer put <|bos|> before a pair of texts and <|eos|> after each, and cut to ``max_tokens``."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    frame_texts(tokenizer, [bos, "$A", eos], pair=[bos, "$A", eos, "$B:1", f"{eos}:1"])
    tokenizer.model_max_length = max_tokens


def windows_of(question: str, context: str, tokenizer: PreTrainedTokenizerFast):
    """Return the BatchEncoding of the windows of a context, each after the question, which gets up to half of the room."""
    places = tokenizer.model_max_length
    spans = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    question = question[: spans[: places // 2][-1][1]] if spans else ""
    options = {"truncation": "only_second", "max_length": places, "stride": places // 8}
    return tokenizer([question], [context], return_overflowing_tokens=True, return_offsets_mapping=True, **options)


def items_of(questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    """Return ``input_ids`` of each window, with the ``start_positions`` and ``end_positions`` of the answer, both included."""
    items = []
    for question, context, wanted, start in questions:
        encoded = windows_of(question, context, tokenizer)
        for index, ids in enumerate(encoded["input_ids"]):
            places = [encoded.char_to_token(index, at, sequence_index=1) for at in (start, start + len(wanted) - 1)]
            places = [0, 0] if None in places else places
            items.append({"input_ids": ids} | dict(zip(LABELS, places)))
    return items


class Spans:
    """Make a batch of items: ``input_ids`` and ``attention_mask`` (B, L), padded on the right, and the places (B,)."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        ids, mask = padded_ids([torch.tensor(item["input_ids"]) for item in items], self.pad)
        return {"input_ids": ids, "attention_mask": mask} | {
            name: torch.tensor([item[name] for item in items]) for name in LABELS if name in items[0]
        }


@torch.inference_mode()
def find(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[tuple[str, str]]
) -> list[tuple[str, float]]:
    """Return the likeliest answer to each (question, context), and its probability; "" where the context has no token."""
    found = [("", 0.0)] * len(asked)
    windows = []  # (number of the question, ids, offsets in the context or None for each token)
    for number, pair in enumerate(asked):
        encoded = windows_of(*pair, tokenizer)
        for index, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"])):
            inside = [span if part == 1 else None for part, span in zip(encoded.sequence_ids(index), offsets)]
            if any(inside):
                windows.append((number, ids, inside))
    windows.sort(key=lambda window: len(window[1]))
    collate = Spans(tokenizer.pad_token_id)
    for begin in range(0, len(windows), BATCH):
        part = windows[begin : begin + BATCH]
        batch = collate([{"input_ids": ids} for _, ids, _ in part])
        outputs = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        for (number, _, inside), starts, ends in zip(part, outputs.start_logits.cpu(), outputs.end_logits.cpu()):
            start, end, probability = best_span(starts, ends, [place for place, span in enumerate(inside) if span])
            if probability > found[number][1]:
                text = asked[number][1][inside[start][0] : inside[end][1]]
                found[number] = text.strip(), probability
    return found


def best_span(starts: Tensor, ends: Tensor, places: Sequence[int]) -> tuple[int, int, float]:
    """Return (start, end, probability) of the likeliest span of at most LONGEST of the ``places``, which are consecutive.

    Args:
        starts, ends: logits (L,). The probability is relative to the ``places`` and place 0, which stands for no answer.
    """
    first, last = places[0], places[-1] + 1
    logs = [torch.cat([logits[:1], logits[first:last]]).float().log_softmax(0)[1:] for logits in (starts, ends)]
    scores = (logs[0].unsqueeze(1) + logs[1]).exp()  # (start, end)
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST - 1)
    start, end = divmod(int(scores.masked_fill(~allowed, -1).argmax()), last - first)
    return first + start, first + end, float(scores[start, end])


def scores(train: Sequence[Question], test: Sequence[Question], found: Sequence[str]) -> dict[str, float]:
    """Return SQuAD's ``exact_match`` and ``f1`` of the answers ``found``, and those of the most frequent answer, in [0, 1]."""
    wanted = [
        {"answers": {"text": [each.answer], "answer_start": [each.start]}, "id": str(number)}
        for number, each in enumerate(test)
    ]
    (most, _), *_ = Counter(each.answer for each in train).most_common(1)
    result = {}
    for prefix, texts in (("", found), ("majority_", [most] * len(test))):
        given = [{"prediction_text": text, "id": str(number)} for number, text in enumerate(texts)]
        result |= {f"{prefix}{name}": value.item() / 100 for name, value in squad(given, wanted).items()}
    return result
