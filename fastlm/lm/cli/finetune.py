"""The command ``fastlm lm finetune``."""

import argparse
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path

from ..data.numbers import WHAT
from ..finetuning.tuning import READY, Tuning
from .command import command

TASKS = {  # and the fields of their examples
    "classify": ("text", "label"),
    "translate": ("source", "target"),
    "answer": ("question", "context", "answer"),
    "speech": (),
}
EXAMPLES_OF = {  # what a task takes without DATA
    "classify": "420 short reviews that ship with fastlm, half of them positive",
    "translate": WHAT,
    "answer": "questions on the functions of Python's library, made from its documentation",
}

FINETUNE = """\
Teach a trained model a task by examples: classify puts a label on a text (sentiment, topics), answer finds the answer to a
question in a text, translate goes from a source to a target (another language, a summary, an answer in words of its own),
speech writes what is said, with a Whisper or a wav2vec2 of transformers as the CHECKPOINT."""

EXAMPLES = """\
examples:
  fastlm lm finetune model classify                          whether a review is positive, by short reviews that ship with it
  fastlm lm finetune model classify --corpus corpus          which module of Python a text of its documentation is about
  fastlm lm finetune model classify reviews.csv --fields review stars --output stars
  fastlm lm finetune model answer --output reader            questions on Python's functions, made from their documentation
  fastlm lm finetune model answer squad.csv --fields question context answer
  fastlm lm finetune model translate                         numbers in words, from English to French
  fastlm lm finetune model translate pairs.jsonl --lora 8    change few weights: for small data and large models
  fastlm lm finetune whisper-tiny/ speech recordings/        NAME.wav and its text, NAME.txt
  fastlm lm finetune whisper-tiny/ speech                    numbers, spoken by espeak-ng

The folder then holds the model, as transformers reads it; metrics.json (accuracy and F1, exact match and F1, BLEU, or word
error rate, on texts kept apart); predictions.csv (those texts); and for classify confusion.png (which labels are taken for
which). fastlm lm predict uses what classify and answer taught. The ready examples of these two take a minute; their learning
rate is 2e-3, and classify takes 12 epochs of them, unless other numbers are given."""


def add_finetune(commands: argparse._SubParsersAction) -> None:
    help = "teach a trained model to classify texts, to answer questions, or to translate"
    parser = command(commands, run_finetune, "finetune", help, FINETUNE, EXAMPLES)
    defaults = Tuning()

    def option(name: str, what: str, **kind) -> None:
        # An option that is not given is absent, so that ready examples bring settings of their own.
        what += f" (default: {getattr(defaults, name.replace('-', '_'))})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=what, **kind)

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a trained model")
    parser.add_argument("task", choices=TASKS, help="what to teach it")
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="a CSV, JSONL, JSON or Parquet file of examples, or a folder of speech (default: ready ones, see the examples)",
    )
    parser.add_argument("--output", default="finetuned", help="a new folder for the result (default: finetuned)")
    parser.add_argument("--test", metavar="FILE", help="examples to test on (default: a tenth of DATA, kept apart)")
    fields = "; ".join(f"{task}: {' '.join(names)}" for task, names in TASKS.items() if names)
    fields = f"the fields or columns of an example (default: {fields})"
    parser.add_argument("--fields", nargs="+", metavar="NAME", help=fields)
    corpus = "a prepared corpus to make examples of: labels, or first lines from the rest (default: ready ones)"
    parser.add_argument("--corpus", metavar="FOLDER", help=corpus)
    parser.add_argument(
        "--resume", action="store_true", help="go on after the last epoch of an interrupted run, given as it was"
    )
    option("lora", "rank of the small matrices that LoRA trains instead of all weights; 0 for all", type=int, metavar="RANK")
    option("epochs", "how often all examples are read; the best epoch is kept", type=float, metavar="N")
    option("batch-size", "examples of a step", type=int, metavar="N")
    option("learning-rate", "at its highest; LoRA often wants more", type=float, metavar="RATE")
    option("seed", "the same seed gives the same result", type=int, metavar="N")


def run_finetune(arguments: argparse.Namespace) -> None:
    options = {name: value for name in ("test", "fields", "corpus", "resume") if (value := getattr(arguments, name))}
    settings = {field.name: getattr(arguments, field.name) for field in fields_of(Tuning) if hasattr(arguments, field.name)}
    task, tuning = arguments.task, Tuning()
    _check_options(task, options)
    if not arguments.data and "corpus" not in options and task in EXAMPLES_OF:
        if "test" in options:
            raise ValueError("--test goes with DATA")
        tuning = READY.get(task, tuning)
        print(f"No DATA was given. The examples are {EXAMPLES_OF[task]}.", flush=True)
    from ..finetuning.answer import answer
    from ..finetuning.classify import classify
    from ..finetuning.speech import transcribe
    from ..finetuning.translate import translate

    teach = {"classify": classify, "translate": translate, "answer": answer, "speech": transcribe}[task]
    result = str(teach(arguments.checkpoint, arguments.output, arguments.data, tuning=replace(tuning, **settings), **options))
    print(result.encode(errors="backslashreplace").decode())
    print(f"\nThe model is in {Path(arguments.output).resolve()}")


def _check_options(task: str, options: dict) -> None:
    """Refuse options that a task has no use for."""
    fields = TASKS[task]
    if task == "speech" and options:
        raise ValueError(f"--{min(options)} does not go with speech, whose DATA is a folder of NAME.wav and NAME.txt")
    if len(options.get("fields", fields)) != len(fields):
        raise ValueError(f"--fields of {task} must be {len(fields)} names, as {' '.join(fields)}; got {len(options['fields'])}")
    if task == "answer" and "corpus" in options:
        raise ValueError("--corpus is for classify and translate; answer takes DATA, or its ready questions")
