"""The command ``fastlm lm predict``."""

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .command import command

if TYPE_CHECKING:  # the command line shows its help without torch
    from ..finetuning.predict import Prediction, Predictor

PREDICT = """\
Use what fastlm lm finetune taught: put a label on texts (classify), or find the answers to questions in a text (answer). Each
comes with the probability that the model gives it."""

PREDICT_EXAMPLES = """\
examples:
  fastlm lm predict stars "A fine film." "The soup was cold."
  fastlm lm predict stars --file reviews.csv --fields review --output predicted.csv
  fastlm lm predict stars --file lines.txt
  fastlm lm predict reader "What does pop return?" --context "pop(self) Return the last element of the list."
  fastlm lm predict reader --file questions.jsonl --fields question context"""


def add_predict(commands: argparse._SubParsersAction) -> None:
    help = "label texts, or answer questions, with a fine-tuned model"
    parser = command(commands, run_predict, "predict", help, PREDICT, PREDICT_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model that fastlm lm finetune made")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a text to label, or a question")
    parser.add_argument("--context", metavar="TEXT", help="the text that holds the answers to the questions")
    parser.add_argument(
        "--file", metavar="FILE", help="a CSV, JSONL, JSON or Parquet file of texts, or a text file with one on each line"
    )
    fields = "the fields or columns of the file (default: text; for questions, question context)"
    parser.add_argument("--fields", nargs="+", metavar="NAME", help=fields)
    parser.add_argument("--output", metavar="FILE", help="a CSV file for the predictions (default: they are printed)")


def run_predict(arguments: argparse.Namespace) -> None:
    from ..finetuning.predict import Predictor

    if bool(arguments.texts) == bool(arguments.file):
        raise ValueError("give each TEXT, or a --file of them, and not both")
    if arguments.fields and not arguments.file:
        raise ValueError("--fields goes with --file")
    predictor = Predictor(arguments.checkpoint)
    if predictor.reads and not arguments.file and arguments.context is None:
        raise ValueError(f"{arguments.checkpoint} answers questions: give the --context that holds the answers")
    if not predictor.reads and arguments.context is not None:
        raise ValueError(f"--context is for models of questions; {arguments.checkpoint} is a classifier")
    names, rows = _rows(arguments, predictor)
    columns = list(zip(*rows))
    found = predictor(columns[0], columns[1] if predictor.reads else None)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file).writerows(
                [(*names, "predicted", "probability"), *((*row, *each) for row, each in zip(rows, found))]
            )
        print(f"{len(rows)} predictions are in {Path(arguments.output).resolve()}")
    else:
        show_predictions([row[0] for row in rows], found)


def _rows(arguments: argparse.Namespace, predictor: "Predictor") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the names of the inputs, and the inputs: (text,), or (question, context), each."""
    from ..data.lines import Lines, check_file, suffix_of
    from ..data.problems import Problems
    from ..data.read import WITH_FIELDS
    from ..data.rows import rows

    default = ("question", "context") if predictor.reads else ("text",)
    if arguments.texts:
        more = (arguments.context,) if predictor.reads else ()
        return default, [(text, *more) for text in arguments.texts]
    names, path, problems = tuple(arguments.fields or default), Path(arguments.file), Problems()
    if len(names) != len(default):
        raise ValueError(f"--fields must be {len(default)} names, as {' '.join(default)}; got {' '.join(names)}")
    if suffix_of(path) in WITH_FIELDS:
        given = [tuple(row[name] for name in names) for _, row in rows(path, names, problems)]
    elif arguments.fields:
        raise ValueError(f"--fields is for files that have fields; {path} is text, with one on each line")
    elif predictor.reads and arguments.context is None:
        raise ValueError(f"{path} has a question on each line: give the --context that holds the answers")
    else:
        check_file(path, "utf-8")
        more = (arguments.context,) if predictor.reads else ()
        given = [(line, *more) for line in Lines(path, "utf-8", problems) if line.strip()]
    if problems.count:
        print(f"{problems.count} rows of {path} could not be read; e.g. {problems.first[0]}", file=sys.stderr)
    if not given:
        raise ValueError(f"{path} has no text")
    return names, given


def show_predictions(texts: list[str], found: "list[Prediction]") -> None:
    """Print a line for each text: prediction, probability and text, between tabs."""
    for text, (prediction, probability) in zip(texts, found):
        line = f"{prediction}\t{probability:.3f}\t{' '.join(text.split())}"
        print(line.encode(errors="backslashreplace").decode())
