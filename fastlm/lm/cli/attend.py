"""The command ``fastlm lm attend``."""

import argparse
from pathlib import Path

from .command import command

ATTEND = """\
Look inside a trained model: write an HTML page on what it makes of a sentence or a longer text, of as many tokens as the model
has positions: 128 in the tiny preset, 320 in small, 1,024 in base (max_position_embeddings in its config.json). The page shows
where each head of attention looks, how sharply, and what a token that is clicked looks at; of up to 64 tokens, all weights.
Of a model with a latent it also shows what the most active units of the latent change, and a map of a corpus' texts."""

EXAMPLES = """\
examples:
  fastlm lm attend model "The value is returned as a list."
  fastlm lm attend model "The value is returned as a list." --corpus reviews --output attend.html
  fastlm lm attend model "$(cat chapter.txt)" --output chapter.html"""


def add_attend(commands: argparse._SubParsersAction) -> None:
    help = "write a page on where a model's attention looks, and on its latent"
    parser = command(commands, run_attend, "attend", help, ATTEND, EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a trained model")
    parser.add_argument("sentence", metavar="SENTENCE", help="what it reads; tokens beyond the model's positions are left out")
    parser.add_argument("--output", default="attend.html", metavar="FILE", help="the page (default: attend.html)")
    parser.add_argument("--corpus", metavar="FOLDER", help="whose texts are mapped (default: what the model was trained on)")


def run_attend(arguments: argparse.Namespace) -> None:
    from ..visualize.attend import attend

    page = attend(arguments.checkpoint, arguments.sentence, arguments.output, arguments.corpus)
    print(f"The page is {Path(page).resolve()}")
