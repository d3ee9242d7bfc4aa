"""The command ``fastlm lm neighbours``."""

import argparse

from .command import command

NEIGHBOURS = """\
Show the words whose vectors, in a trained model, are nearest to those of a word, by their cosine. The vectors are those of the
model's embedding, where fastlm lm train --vectors puts pre-trained ones. A word of several tokens has the mean of theirs."""

NEIGHBOURS_EXAMPLES = """\
examples:
  fastlm lm neighbours model list
  fastlm lm neighbours model list file --count 5"""


def add_neighbours(commands: argparse._SubParsersAction) -> None:
    help = "show the words that are nearest to a word in a model's embedding"
    parser = command(commands, run_neighbours, "neighbours", help, NEIGHBOURS, NEIGHBOURS_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a trained model")
    parser.add_argument("words", nargs="+", metavar="WORD", help="whose neighbours to show")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="neighbours of each (default: 10)")


def run_neighbours(arguments: argparse.Namespace) -> None:
    from ..model.checkpoint import load
    from ..model.neighbours import neighbours

    model, tokenizer = load(arguments.checkpoint)
    for word in arguments.words:
        print(f"{word}:")
        for other, cosine in neighbours(model, tokenizer, word, arguments.count):
            print(f"  {cosine:6.3f}  {other}")
