"""Preparing a corpus of text files, in a stream: repair, filter, drop duplicates, cut into windows, split."""

import json
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from tqdm import tqdm

from ..files import replaced_together
from .default_corpus import default_corpus
from .duplicates import Duplicates, normal_form
from .in_processes import Steps, make_ready
from .problems import SHOWN, Problems
from .read import Document, documents, size_of
from .tokenizer import FILE as TOKENIZER
from .tokenizer import VOCABULARIES, check_bpe_size
from .windows import windows

SPLITS = ("train", "validation", "test")
REPORT = "report.json"  # is written last, as it records the sizes of the other files


@dataclass
class Report:
    """What `prepare` read, dropped and wrote. It is printable, and stored beside the corpus as report.json.

    Attributes:
        sources: the paths that were read, or a name for the default corpus.
        settings: the arguments of `prepare`.
        documents: the number of documents that were read.
        files: for each file, or module of Python, the number of its documents, and of what was dropped of it for each reason.
        dropped: for each reason, the number of documents and windows that were dropped.
        examples: for each reason, the origin and the beginning of the first five.
        problems: the rows and files that could not be read, and the files that were skipped.
        splits: for each split, its numbers of records, documents, characters and bytes.
        vocabulary: the number of tokens of the tokenizer; 0 if none was trained.
        warnings: what did not come out as it was asked for.
    """

    sources: list[str]
    settings: dict
    documents: int = 0
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    vocabulary: int = 0
    warnings: list[str] = field(default_factory=list)

    def read(self, document: Document) -> None:
        """Count a document that was read."""
        self.documents += 1
        self._count(document, "documents")

    def _count(self, document: Document, what: str) -> None:
        counts = self.files.setdefault(document.origin.rpartition(":")[0], {})
        counts[what] = counts.get(what, 0) + 1

    def drop(self, reason: str, document: Document, text: str) -> None:
        """Count a document or a window that is dropped."""
        self.dropped[reason] += 1
        self._count(document, f"dropped: {reason}")
        examples = self.examples.setdefault(reason, [])
        if len(examples) < SHOWN:
            examples.append(f"{document.origin}: {text[:60]!r}")

    def __str__(self) -> str:
        lines = [f"read        {self.documents} documents from {', '.join(self.sources)} ({len(self.files)} files)"]
        lines += [f"dropped     {count}: {reason}; e.g. {self.examples[reason][0]}" for reason, count in self.dropped.items()]
        if problems := self.problems.lines():
            lines += [*problems, f"            {REPORT} names every file and reason"]
        for name, split in self.splits.items():
            counts = f"{split['records']} texts of {split['documents']} documents, {split['characters']} characters"
            lines.append(f"{name:<12}{counts}")
        if self.vocabulary:
            lines.append(f"vocabulary  {self.vocabulary} tokens")
        lines += [f"warning     {warning}" for warning in self.warnings]
        return "\n".join(lines)


def place_of(text: str) -> float:
    """Return the place of a document in [0, 1), by a hash of its content; differences of case and white space do not count."""
    digest = blake2b(normal_form(text).encode(), digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(text: str, validation: float, test: float) -> str:
    """Return the split of a document: the places from 0 on are for the test, and those that follow for validation."""
    share = place_of(text)
    return "test" if share < test else "validation" if share < test + validation else "train"


def prepare(
    paths: Sequence[str | os.PathLike] | None,
    output: str | os.PathLike,
    *,
    unit: str = "paragraph",
    text_field: str = "text",
    label_field: str = "label",
    encoding: str = "utf-8",
    min_characters: int = 20,
    min_letters: float = 0.6,
    similarity: float = 0.8,
    window: int = 1000,
    overlap: int = 200,
    validation: float = 0.05,
    test: float = 0.05,
    vocab_size: int = 4096,
    vocabulary: str = "bpe",
    progress: bool = False,
) -> Report:
    """Make a corpus of text files: train.jsonl, validation.jsonl, test.jsonl, tokenizer.json and report.json in ``output``.

    Each line of a split is an object with these fields: ``text``; ``label`` (a text, or null); ``document``, a number that the
    windows of a document share; and ``origin``, where the text was read. The files replace earlier ones only when all of them
    are whole. Memory does not grow with the corpus, because the index that finds duplicates is a temporary file in ``output``.

    No two records are equal, case and white space aside, and no two records of different documents are nearly equal, as far as
    MinHash detects it (`fastlm.lm.data.duplicates`). All windows of a document are in one split, because they overlap. Where
    the documents are so few that the hashes leave validation or the test without one, one is moved there.

    Args:
        paths, unit, text_field, label_field, encoding: see `fastlm.lm.data.read.documents`. None or no path reads Python's own
            documentation (`fastlm.lm.data.default_corpus`).
        min_characters, min_letters: see `fastlm.lm.data.clean.why_noise`.
        similarity: texts with at least this Jaccard index are near duplicates; above 0.5, or 1 to keep near duplicates.
        window, overlap: the most characters of a record, and the most characters that two windows of a document share.
        validation, test: the shares of the documents in these splits.
        vocab_size: the number of tokens of the vocabulary that is trained on the training split, or fewer if the texts are too
            few; 0 trains none.
        vocabulary: "bpe", of bytes, or "words", for pre-trained word vectors.
        progress: whether to show a progress bar, if standard error is a terminal.

    Raises:
        ValueError: an argument is bad; ``output`` and a path lie one inside the other; a file cannot be read; no text is left
            to train on.
        OSError: a file is missing, or the disk is full.
    """
    settings = {name: value for name, value in locals().items() if name not in ("paths", "output", "progress")}
    _check(paths, validation, test, window, overlap)
    if vocabulary not in VOCABULARIES:
        raise ValueError(f"vocabulary must be one of {', '.join(VOCABULARIES)}; got {vocabulary!r}")
    if vocab_size and vocabulary == "bpe":
        check_bpe_size(vocab_size)
    output = Path(output)
    _check_apart(paths or (), output)
    report = Report([str(path) for path in paths or ()] or ["Python's own documentation"], settings)
    names = {"unit": unit, "text_field": text_field, "label_field": label_field, "encoding": encoding}
    read = documents(paths, report.problems, **names) if paths else default_corpus()
    if progress:
        read = _shown(read, size_of(paths or ()))
    filters = {"min_characters": min_characters, "min_letters": min_letters}
    with replaced_together(output, [f"{name}.jsonl" for name in SPLITS] + [TOKENIZER, REPORT]) as folder:
        try:
            with TemporaryDirectory(dir=folder) as scratch, Duplicates(Path(scratch) / "index", similarity) as seen:
                records = _records(read, seen, report, Steps(filters, window, overlap, similarity < 1))
                _write_splits(folder, records, report, validation, test)
        except sqlite3.OperationalError as error:
            raise OSError(f"{output}: the index of duplicates could not be written: {error}") from error
        if not report.splits["train"]["records"]:
            raise ValueError(f"no text is left to train on in {', '.join(report.sources)}:\n{report}")
        fill_splits(folder, report, {"validation": validation, "test": test})
        if vocab_size:
            if progress and sys.stderr.isatty():
                print("making the vocabulary", file=sys.stderr)
            tokenizer = VOCABULARIES[vocabulary](_texts(folder / "train.jsonl"), vocab_size)
            (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), "utf-8")  # raises an OSError if the disk is full
            report.vocabulary = tokenizer.get_vocab_size()
            if report.vocabulary < vocab_size:
                few = f"the vocabulary was to have {vocab_size} tokens, and the texts yield {report.vocabulary}"
                report.warnings.append(f"{few}, which are taken; more text yields more")
        with _create(folder / REPORT) as file:
            file.write(json.dumps(vars(report), default=vars, ensure_ascii=False, indent=1) + "\n")
    return report


def _check(paths: object, validation: float, test: float, window: int, overlap: int) -> None:
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"paths must be a sequence of paths, or None; got {paths!r}")
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(f"validation and test must be shares that leave some to train on; got {validation} and {test}")
    windows("", window, overlap)  # checks both


def _check_apart(paths: Sequence[str | os.PathLike], output: Path) -> None:
    """Raise a ValueError if a later run would read the corpus as a text, or if the corpus would overwrite a text."""
    output = output.resolve()
    for path in paths:
        resolved = Path(path).resolve()
        if output.is_relative_to(resolved) or resolved.is_relative_to(output):
            raise ValueError(f"output must be apart from what is read; {output} and {resolved} lie one inside the other")


def _records(
    read: Iterable[Document], seen: Duplicates, report: Report, steps: Steps
) -> Iterator[tuple[int, str, Document, list[str]]]:
    """Yield (number, clean text, document as read, its windows that are no duplicates) for each document that is kept."""
    for number, (document, text, noise, cut, marks) in enumerate(make_ready(read, steps)):
        report.read(document)
        if reason := noise or seen.add(marks[0], number):
            report.drop(reason, document, text)
            continue
        repeated = [seen.add(each, number) for each in marks[1:]] or [None] * len(cut)
        for part, reason in zip(cut, repeated):
            if reason:
                report.drop(f"window of a document: {reason}", document, part)
        if cut := [part for part, reason in zip(cut, repeated) if not reason]:
            yield number, text, document, cut


def _create(path: Path) -> TextIO:
    """Open a file for JSON; it stores a lone surrogate, which labels and file names may contain, as JSON's escape of it."""
    return open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")


def _write_splits(folder: Path, records: Iterable[tuple], report: Report, validation: float, test: float) -> None:
    with ExitStack() as stack:
        files = {name: stack.enter_context(_create(folder / f"{name}.jsonl")) for name in SPLITS}
        report.splits = {name: dict.fromkeys(("records", "documents", "characters", "bytes"), 0) for name in SPLITS}
        for number, text, document, cut in records:
            name = split_of(text, validation, test)
            report.splits[name]["documents"] += 1
            for part in cut:
                record = {"text": part, "label": document.label, "document": number, "origin": document.origin}
                files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
                report.splits[name]["records"] += 1
                report.splits[name]["characters"] += len(part)
    for name in SPLITS:
        report.splits[name]["bytes"] = (folder / f"{name}.jsonl").stat().st_size


def _shown(read: Iterable[Document], size: int | None) -> Iterator[Document]:
    """Yield the documents, and show how much text has been read, of ``size`` bytes where that is known."""
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", dynamic_ncols=True, disable=None) as bar:
        for number, document in enumerate(read, 1):
            yield document
            bar.set_postfix_str(f"{number} documents", refresh=False)
            bar.update(len(document.text.encode(errors="replace")))


def fill_splits(folder: Path, report: Report, shares: dict[str, float]) -> None:
    """Move a training document to each split that has a share and no document, or warn that there are too few.

    It is the one whose text's place is the least, so that it depends on the documents' content alone.
    """
    for name in (name for name, share in shares.items() if share and not report.splits[name]["records"]):
        places = {}
        for record in _rows(folder / "train.jsonl"):
            places.setdefault(record["document"], place_of(record["text"]))
        if len(places) < 3:
            few = f"the corpus has no {name} texts, which training and evaluation need, as it has {len(places)} documents"
            report.warnings.append(f"{few}: give more of them, or take paragraphs for documents (unit)")
        else:
            moved = _move(folder, report, min(places, key=places.get), name)
            report.warnings.append(f"of {len(places)} documents none fell to {name} by chance; one was moved there: {moved}")


def _move(folder: Path, report: Report, document: int, name: str) -> str:
    """Move the records of a document from the training split to another; return its origin."""
    paths, origin = {split: folder / f"{split}.jsonl" for split in ("train", name)}, ""
    with _create(folder / "rest.jsonl") as train, open(paths[name], "ab") as other, open(paths["train"], "rb") as every:
        for line in every:
            record = json.loads(line)
            if record["document"] != document:
                train.write(line.decode())
                continue
            other.write(line)
            origin = record["origin"]
            for split, sign in (("train", -1), (name, 1)):
                report.splits[split]["records"] += sign
                report.splits[split]["characters"] += sign * len(record["text"])
    os.replace(folder / "rest.jsonl", paths["train"])
    for split, sign in (("train", -1), (name, 1)):
        report.splits[split]["documents"] += sign
        report.splits[split]["bytes"] = paths[split].stat().st_size
    return origin


def read_split(folder: str | os.PathLike, split: str) -> Iterator[dict]:
    """Return an iterator over the records of a prepared split: see `prepare`.

    Raises:
        ValueError: there is no such split, or the size of its file is not that in report.json, because it was cut short or
            comes from another run.
        FileNotFoundError: ``folder`` is no prepared corpus.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    path, report = Path(folder) / f"{split}.jsonl", Path(folder) / REPORT
    if not report.is_file() or not path.is_file():
        raise FileNotFoundError(f"{folder} is no prepared corpus, as it lacks {report.name} or {path.name}: fastlm lm prepare")
    expected, size = json.loads(report.read_text("utf-8"))["splits"][split]["bytes"], path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, and {REPORT} says {expected}: prepare the corpus again")
    return _rows(path)


def _rows(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


def _texts(path: Path) -> Iterator[str]:
    return (record["text"] for record in _rows(path))
