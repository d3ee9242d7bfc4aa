"""The command ``fastlm lm finetune``."""

import argparse
from pathlib import Path

from ..finetuning.tuning import Tuning
from .command import command

TASKS = ("classify", "translate")

FINETUNE = """\
Teach a trained model a task by examples: classify puts a label on a text (sentiment, topics), translate goes from a source to
a target (another language, the answer to a question, a summary)."""

EXAMPLES = """\
examples:
  fastlm lm finetune model classify                          which module of Python a text of its documentation is about
  fastlm lm finetune model classify reviews.csv --fields review stars --output stars
  fastlm lm finetune model translate                         the first line of a documentation from the rest of it
  fastlm lm finetune model translate pairs.jsonl --lora 8    change few weights: for small data and large models

The folder then holds the model, as transformers reads it; metrics.json (accuracy and F1, or BLEU, on texts kept apart);
predictions.csv (those texts); and for classify confusion.png (which labels are taken for which)."""


def add_finetune(commands: argparse._SubParsersAction) -> None:
    help = "teach a trained model to classify texts, or to translate"
    parser = command(commands, run_finetune, "finetune", help, FINETUNE, EXAMPLES)
    defaults = Tuning()

    def option(name: str, what: str, **kind) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", default=default, help=f"{what} (default: {default})", **kind)

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a trained model: fastlm lm train")
    parser.add_argument("task", choices=TASKS, help="what to teach it")
    parser.add_argument("data", nargs="?", metavar="DATA", help="a CSV or JSONL file of examples (default: made of the corpus)")
    parser.add_argument("--output", default="finetuned", help="a new folder for the result (default: finetuned)")
    parser.add_argument("--test", metavar="FILE", help="examples to test on (default: a tenth of DATA, kept apart)")
    fields = "the two fields or columns of an example (default: text label, or source target)"
    parser.add_argument("--fields", nargs=2, metavar="NAME", help=fields)
    parser.add_argument("--corpus", default="corpus", help="a prepared corpus, for when there is no DATA (default: corpus)")
    option("lora", "rank of the small matrices that LoRA trains instead of all weights; 0 for all", type=int, metavar="RANK")
    option("epochs", "how often all examples are read; the best epoch is kept", type=float, metavar="N")
    option("batch-size", "examples of a step", type=int, metavar="N")
    option("learning-rate", "at its highest; LoRA often wants more", type=float, metavar="RATE")
    option("seed", "the same seed gives the same result", type=int, metavar="N")


def run_finetune(arguments: argparse.Namespace) -> None:
    from ..finetuning.classify import classify
    from ..finetuning.translate import translate

    names = ("epochs", "batch_size", "learning_rate", "lora", "seed")
    options = {"test": arguments.test, "corpus": arguments.corpus}
    if arguments.fields:
        options["fields"] = arguments.fields
    tuning = Tuning(**{name: getattr(arguments, name) for name in names})
    task = {"classify": classify, "translate": translate}[arguments.task]
    result = str(task(arguments.checkpoint, arguments.output, arguments.data, tuning=tuning, **options))
    print(result.encode(errors="backslashreplace").decode())
    print(f"\nThe model is in {Path(arguments.output).resolve()}")
