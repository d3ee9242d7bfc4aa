"""Fine-tuning for text to text: translation, answers to questions, summaries.

    <|bos|> source <|bos|> target <|eos|>

A decoder reads the source and continues with the target, which begins after the second <|bos|>.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..data.numbers import WHAT, number_pairs
from ..data.problems import Problems
from ..model.checkpoint import load
from ..model.overlap import scores
from ..model.presets import ATTENTION, on_kernels
from ..model.text_vae import IGNORED, TextVAE
from .common import (
    BATCH,
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
    split_examples,
    write_results,
)

FIELDS = ("source", "target")
CHAT = "{{ bos_token }}{{ messages[-1]['content'] }}{{ bos_token }}"  # the last message is the source, and the reply the target


@dataclass
class Translation:
    """The results of a model on the test pairs, stored beside it as metrics.json.

    Attributes:
        data: what the pairs are.
        train, validation, test: the numbers of pairs to train on, to choose the epoch by and to test on.
        bleu: sacrebleu's BLEU of the test pairs, 0 to 100. It counts up to four words in a row, and is 0 if no target has four.
        chrf: sacrebleu's chrF, 0 to 100, which counts up to six characters in a row, in any language and in short targets, too.
        signature, chrf_signature: sacrebleu's descriptions of how it computed them; see `fastlm.lm.model.overlap`.
        exact: the share of the test pairs whose prediction is the target.
        problems: the rows that could not be read.
    """

    data: str
    train: int
    validation: int
    test: int
    bleu: float
    chrf: float
    signature: str
    chrf_signature: str
    exact: float
    problems: Problems

    def __str__(self) -> str:
        lines = [
            f"data         {self.data}",
            f"pairs        {self.train} to train on, {self.validation} to choose the epoch by, {self.test} to test on",
            f"BLEU         {self.bleu:.2f} ({self.signature})",
            f"chrF         {self.chrf:.2f} ({self.chrf_signature})",
            f"exact match  {self.exact:.1%} of the test pairs",
        ]
        return "\n".join(lines) + problem_lines(self.problems)


def translate(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    data: str | os.PathLike | None = None,
    *,
    test: str | os.PathLike | None = None,
    fields: Sequence[str] = FIELDS,
    corpus: str | os.PathLike | None = None,
    tuning: Tuning | None = None,
    resume: bool = False,
) -> Translation:
    """Teach a checkpoint of `fastlm.lm` to go from source to target, and test it.

    ``output`` then holds the model, a checkpoint that transformers' ``AutoModelForCausalLM`` and
    ``pipeline("text-generation")`` read, with metrics.json and predictions.csv of the test pairs. A source takes up to half of
    the model's positions.

    Args:
        checkpoint: the folder of a decoder, or of a `TextVAE`, whose decoder is taken.
        data: a .csv, .tsv, .jsonl, .json or .parquet file; None for the summaries of ``corpus`` (see `summaries`), or without
            one for numbers in words: `fastlm.lm.data.numbers`.
        test, fields: see `fastlm.lm.finetuning.common.read_examples`; ``fields`` are the names of the source and the target.
        corpus: a folder that `prepare` made.
        resume: go on after the last whole epoch of an interrupted run, to the same bits as without the interruption.

    Raises:
        ValueError: ``output`` holds a checkpoint; as `fastlm.lm.finetuning.common.read_examples` and
            `fastlm.lm.model.checkpoint.load`.
        FileNotFoundError: there is no such checkpoint, file or corpus.
        OSError: the disk is full; ``output`` has no new model.
        Interrupted: Ctrl-C stopped the training after an epoch, whose checkpoint is left.
    """
    output, tuning = check_new(output), tuning or Tuning()
    if data is None and test is not None:
        raise ValueError(f"test goes with data; got test={str(test)!r} and no data")
    examples, what = pairs_of(data, test, fields, corpus)
    base, tokenizer = load(checkpoint)
    model = decoder_of(base)
    places = model.config.max_position_embeddings
    frame(tokenizer, tokenizer.bos_token, places // 2)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT
    train, validation = (items_of(part, tokenizer, places) for part in (examples.train, examples.validation))
    model.generation_config.max_new_tokens = max(map(answer, train))  # training has no longer target
    with results(output, course_of("translate", checkpoint, examples, tuning), resume) as (folder, epochs):
        model = finetune(model, tuning, (), train, validation, DataCollatorWithFlattening(), epochs, sampling="random")
        sources, targets = zip(*examples.test)
        found = generate(model, tokenizer, sources)
        result = Translation(data=what, **examples.counts, **scores(targets, found), problems=examples.problems)
        write_results(folder, model, tokenizer, result, (*FIELDS, "predicted"), zip(sources, targets, found))
    return result


def pairs_of(
    data: str | os.PathLike | None,
    test: str | os.PathLike | None,
    fields: Sequence[str] = FIELDS,
    corpus: str | os.PathLike | None = None,
) -> tuple[Examples, str]:
    """Return the pairs of a file, of a corpus, or numbers in words, and what they are."""
    if data is not None:
        return read_examples(data, fields, test), str(data)
    if corpus is not None:
        return examples_of(corpus, summaries), f"the first lines of the documents of {corpus}, from the rest of each"
    return split_examples(number_pairs()), WHAT


def summaries(records: Iterable[dict]) -> Iterator[Example]:
    """Yield (rest, first line) of each document whose first line stands alone, as the summary of a docstring does (PEP 257)."""
    document = None
    for record in records:
        first, _, rest = record["text"].partition("\n\n")
        if record["document"] != document and rest and "\n" not in first:  # only the first window has the beginning
            yield rest, first
        document = record["document"]


def decoder_of(base: PreTrainedModel) -> LlamaForCausalLM:
    """Return a decoder as it is, or that of a `TextVAE` as a model of its own."""
    if not isinstance(base, TextVAE):
        return base
    decoder = LlamaForCausalLM._from_config(base.config.decoder, attn_implementation=ATTENTION)
    decoder.load_state_dict(base.decoder.state_dict())
    return on_kernels(decoder).eval()


def items_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, places: int) -> list[dict]:
    """Return ``input_ids`` and ``labels`` of each pair, at most ``places`` each; a target that is cut has no <|eos|>."""
    sources, targets = map(list, zip(*examples))
    read = tokenizer(sources, truncation=True)["input_ids"]
    written = tokenizer(targets, add_special_tokens=False)["input_ids"]
    items = []
    for source, target in zip(read, written):
        target = [*target, tokenizer.eos_token_id][: places - len(source)]
        items.append({"input_ids": source + target, "labels": [IGNORED] * len(source) + target})
    return items


def answer(item: dict) -> int:
    """Return the number of tokens of the target, with its <|eos|>."""
    return sum(label != IGNORED for label in item["labels"])


@torch.inference_mode()
def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sources: Sequence[str]) -> list[str]:
    """Return the model's greedy output for each source, computed in batches of about equal lengths."""
    found = {}
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        batch = tokenizer([sources[index] for index in part], truncation=True, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        made = model.generate(input_ids=ids, attention_mask=mask, do_sample=False)[:, ids.shape[1] :]
        found |= zip(part, map(str.strip, tokenizer.batch_decode(made, skip_special_tokens=True)))
    return [found[index] for index in range(len(sources))]
