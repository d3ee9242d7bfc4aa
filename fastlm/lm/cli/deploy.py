"""The commands ``fastlm lm export`` and ``fastlm lm serve``, which hand a trained model to other programs."""

import argparse
from pathlib import Path

from .command import command

EXPORT = """\
Write a trained model as ONNX, for programs without torch: decoder.onnx, which writes token by token and keeps its own cache
(past_key_values, present), and of a model with a latent encoder.onnx too, from a text to the mean and the log-variance of its
latent. ONNX Runtime then writes a few tokens with them, which must be the model's own."""

EXPORT_EXAMPLES = """\
example:
  fastlm lm export model --output onnx

It needs ONNX's libraries: pip install 'fastlm[onnx]'. The vocabulary goes along: tokenizer.json, of the tokenizers library."""

SERVE = """\
Put a trained decoder behind HTTP, by transformers' own server (transformers serve), on fastlm's kernels: chat completions,
completions and responses, as OpenAI's clients ask for them. A model of texts goes on with what was said; one of finetune
translate answers a message with its translation."""

SERVE_EXAMPLES = """\
examples:
  fastlm lm serve model
  transformers chat model http://localhost:8000        in another terminal and the same folder, to talk to it

It needs the server's libraries: pip install 'fastlm[serve]'."""


def add_export(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, run_export, "export", "write a model as ONNX, and check it", EXPORT, EXPORT_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a trained model, or one of finetune translate")
    parser.add_argument("--output", default="onnx", metavar="FOLDER", help="for the files (default: onnx)")


def run_export(arguments: argparse.Namespace) -> None:
    from ..model.export import export

    print(export(arguments.checkpoint, arguments.output))
    print(f"\nThe files are in {Path(arguments.output).resolve()}")


def add_serve(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, run_serve, "serve", "put a model behind HTTP", SERVE, SERVE_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a trained decoder (train --model decoder)")
    parser.add_argument("--host", default="localhost", metavar="NAME", help="address to listen on (default: localhost)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (default: 8000)")
    batching = "answer requests that come together as one batch, which each joins and leaves by itself"
    parser.add_argument("--continuous-batching", action="store_true", help=batching)


def run_serve(arguments: argparse.Namespace) -> None:
    from ..model.serve import serve

    serve(arguments.checkpoint, arguments.host, arguments.port, arguments.continuous_batching)
