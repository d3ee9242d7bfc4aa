"""The commands ``fastlm lm generate`` and ``fastlm lm interpolate``, which write texts with a trained model."""

import argparse
from collections.abc import Iterable
from dataclasses import fields

from ..model.sampling import Sampling
from .command import command

GENERATE = """\
Write texts with a trained model: new ones, continuations of a prompt, or, with a model that has a latent (fastlm lm train
--model vae), a text again as the model remembers it, or variations of it. A model of fastlm lm finetune ... translate gets its
source as the prompt, and writes the likeliest target."""

GENERATE_EXAMPLES = """\
examples:
  fastlm lm generate model --count 3                          three new texts
  fastlm lm generate model "The function returns" --stream    go on from here, and show the words as they come
  fastlm lm generate model "A list" "A file" --temperature 0  the likeliest continuation of each
  fastlm lm generate finetuned "The source to translate."     with a model of fastlm lm finetune model translate
  fastlm lm generate model --reconstruct "A list is sorted."  what the latent keeps of a text
  fastlm lm generate model --vary "A list is sorted." --count 5

The same seed gives the same texts. A text ends where the model ends it, or at the length that the model was made for."""

INTERPOLATE = """\
Write the texts that lie between two: the latents of both are joined by a straight line, and each of --steps points on it
is written as a text, the two ends included."""

INTERPOLATE_EXAMPLES = """\
example:
  fastlm lm interpolate model "The file is closed." "A list is sorted in place." --steps 7

It needs a model with a latent: fastlm lm train --model vae."""


CHECKPOINT = "folder of a trained model, as fastlm lm train leaves it"


def add_generate(commands: argparse._SubParsersAction) -> None:
    help = "write texts: new ones, continuations of a prompt, reconstructions, variations"
    parser = command(commands, run_generate, "generate", help, GENERATE, GENERATE_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    defaults = Sampling()
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the texts begin with (default: nothing)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="texts, for each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one gives other texts (default: 0)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--stream", action="store_true", help="show one text while it is written")
    kind.add_argument("--reconstruct", nargs="+", metavar="TEXT", help="write these texts again from their latents alone")
    kind.add_argument("--vary", metavar="TEXT", help="write texts whose latents are near to that of this one")
    drawing = parser.add_argument_group("how the next token is drawn, for new texts and continuations")

    def option(name: str, what: str, kind: type) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        shown = "as many as the model can" if default is None else default
        shown = f"{shown}; 0 where the model translates" if name == "temperature" else shown
        metavar = "N" if kind is int else "X"
        # An option that is not given is absent, so that the model decides.
        help = f"{what} (default: {shown})"
        drawing.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help)

    option("temperature", "below 1: likelier texts; 0: always the likeliest token, without chance", float)
    option("top-k", "of this many of the likeliest tokens only; 0 for all", int)
    option("top-p", "of the likeliest tokens only that together have this probability; 1 for all", float)
    option("max-new-tokens", "tokens after the prompt at most", int)


def run_generate(arguments: argparse.Namespace) -> None:
    from ..model.checkpoint import load
    from ..model.generate import TextGenerator

    if arguments.prompts and (arguments.reconstruct or arguments.vary is not None):
        raise ValueError("a PROMPT goes with neither --reconstruct nor --vary")
    if arguments.stream and (len(arguments.prompts) > 1 or arguments.count != 1):
        raise ValueError("--stream writes one text: at most one PROMPT, and no --count")
    sampling = {field.name: getattr(arguments, field.name) for field in fields(Sampling) if hasattr(arguments, field.name)}
    Sampling(**sampling)  # raises its errors before the model is loaded
    generator, prompts = TextGenerator(*load(arguments.checkpoint)), arguments.prompts or [""]
    if arguments.reconstruct:
        show(generator.reconstruct(arguments.reconstruct))
    elif arguments.vary is not None:
        show(generator.vary(arguments.vary, arguments.count, seed=arguments.seed))
    elif arguments.stream:
        for piece in generator.stream(prompts[0], seed=arguments.seed, **sampling):
            print(piece, end="", flush=True)
        print()
    else:
        show(generator.sample(arguments.count, prompt=prompts, seed=arguments.seed, **sampling))


def add_interpolate(commands: argparse._SubParsersAction) -> None:
    help = "write the texts between two"
    parser = command(commands, run_interpolate, "interpolate", help, INTERPOLATE, INTERPOLATE_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("first", metavar="FIRST", help="the text to start from")
    parser.add_argument("second", metavar="SECOND", help="the text to arrive at")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="texts in all, both ends included (default: 5)")


def run_interpolate(arguments: argparse.Namespace) -> None:
    from ..model.checkpoint import load
    from ..model.generate import TextGenerator

    show(TextGenerator(*load(arguments.checkpoint)).interpolate(arguments.first, arguments.second, arguments.steps))


def show(texts: Iterable[str]) -> None:
    """Print texts with a line of dashes between them, as a text may contain empty lines."""
    print("\n---\n".join(texts))
