"""The command line of the language model: ``fastlm lm prepare``, and the commands of the other files of this folder."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from ..data.prepare import prepare
from ..data.read import UNITS
from ..data.tokenizer import VOCABULARIES
from .attend import add_attend
from .command import command
from .deploy import add_export, add_serve
from .finetune import add_finetune
from .generate import add_generate, add_interpolate
from .neighbours import add_neighbours
from .predict import add_predict
from .train import add_evaluate, add_train

PREPARE = """\
Make a corpus of your texts, ready to train on: repair wrong characters, drop noise and duplicates, cut long texts into windows
at sentence ends, split them into training, validation and test texts, and make a vocabulary for them."""

EXAMPLES = """\
examples:
  fastlm lm prepare                              the documentation inside Python, to try things out
  fastlm lm prepare books/ --output corpus       every .txt, .md, .rst, .jsonl, .json, .csv and .parquet file of a
                                                 folder, gzipped (.gz) or not
  fastlm lm prepare reviews.csv --text-field review --label-field stars --output reviews

The folder then holds train.jsonl, validation.jsonl and test.jsonl (a text a line), tokenizer.json (the vocabulary) and
report.json: what was read, what was dropped or skipped, and why, file by file."""


def add_prepare(commands: argparse._SubParsersAction) -> None:
    help = "make a corpus of text files: clean, without duplicates, split, with a vocabulary"
    parser = command(commands, run_prepare, "prepare", help, PREPARE, EXAMPLES)
    defaults = {name: parameter.default for name, parameter in inspect.signature(prepare).parameters.items()}

    def option(name: str, what: str, **kind) -> None:
        default = defaults[name.replace("-", "_")]
        parser.add_argument(f"--{name}", default=default, help=f"{what} (default: {default})", **kind)

    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="text, JSONL, JSON, CSV or Parquet files, or folders (default: Python's own)"
    )
    parser.add_argument("--output", default="corpus", help="folder for the corpus; replaces an earlier one (default: corpus)")
    option("unit", "what is one text of a text file: a paragraph ends at an empty line", choices=UNITS)
    option("text-field", "which field or column holds the text, in files that have them", metavar="NAME")
    option("label-field", "which one holds the label, where there is one", metavar="NAME")
    option("encoding", "of the files", metavar="NAME")
    option("min-characters", "drop shorter texts", type=int, metavar="N")
    option("min-letters", "drop texts with a smaller share of letters, such as tables and code", type=float, metavar="SHARE")
    option("similarity", "drop texts that are this similar to an earlier one; 1 keeps them", type=float, metavar="SHARE")
    option("window", "characters of a text at most; longer ones are cut", type=int, metavar="N")
    option("overlap", "characters that two windows of one text share at most", type=int, metavar="N")
    option("validation", "share of the texts to choose settings by", type=float, metavar="SHARE")
    option("test", "share of the texts for the last word", type=float, metavar="SHARE")
    option("vocab-size", "tokens of the vocabulary at most; 0 for none", type=int, metavar="N")
    option("vocabulary", "a byte-level BPE, or words, for train --vectors", choices=VOCABULARIES)


def run_prepare(arguments: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "command", "paths", "output")}
    report = str(prepare(arguments.paths, arguments.output, **options, progress=True))
    print(report.encode(errors="backslashreplace").decode())  # file names may contain lone surrogates
    print(f"\nThe corpus is in {Path(arguments.output).resolve()}")


def main(arguments: list[str], load_package: Callable[[], None] = lambda: None) -> int:
    """Run one command and return its exit code: 1 if its input is at fault, which standard error then names.

    ``load_package`` is that of `fastlm.cli.main`. A command's function imports what it needs when it runs, so that nothing
    here brings torch or transformers.
    """
    parser = argparse.ArgumentParser(prog="fastlm lm", description="The language model, from text files to generated text.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    using = (add_generate, add_interpolate, add_predict, add_evaluate, add_attend, add_neighbours, add_export, add_serve)
    for add in (add_prepare, add_train, add_finetune, *using):
        add(commands)
    parsed = parser.parse_args(arguments)
    load_package()
    try:
        parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastlm lm {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:  # training's own, `Interrupted`, says where its checkpoint is
        left = f"{stop}, and --resume goes on from it" if stop.args else "nothing was replaced"
        print(f"fastlm lm {parsed.command}: interrupted; {left}", file=sys.stderr)
        return 130
    return 0
