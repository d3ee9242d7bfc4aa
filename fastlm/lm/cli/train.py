"""The commands ``fastlm lm train`` and ``fastlm lm evaluate``."""

import argparse
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

from ..data.prepare import SPLITS
from ..model.sizes import KINDS, PRESETS
from ..training.schedules import SCHEDULES
from ..training.settings import CONTINUED, Settings, settings_of
from .command import command
from .generate import show

SHOWN = 3  # example texts of a new model

TRAIN = """\
Train a language model from nothing: a variational autoencoder of texts ("vae"), or its decoder alone ("decoder"). With nothing
else given, the small preset learns the documentation inside Python, in a quarter of an hour on two cores, and then writes."""

TRAIN_EXAMPLES = """\
examples:
  fastlm lm train                                          to try things out
  fastlm lm train --corpus books --output model            on a corpus that fastlm lm prepare made
  fastlm lm train --from model --corpus law --output new   go on from a trained model, on other texts
  fastlm lm train --corpus books --vectors glove.300d.txt  with pre-trained word vectors in its embedding
  fastlm lm train --output model --resume                  go on where Ctrl-C or a crash stopped it
  torchrun --nproc-per-node 2 --no-python fastlm lm train  in two processes, which share the texts of each batch
  torchrun --nproc-per-node 2 --no-python fastlm lm train --context-parallel 2
                                                           in two processes, which share the tokens of each text

The folder then holds the model, in transformers' format, and the course of the loss, curves.png and curves.csv. While it
trains, its last two checkpoints are in the folder's checkpoints/, which is removed when the model is whole."""

EVALUATE = """\
How good a model is on texts that it has not seen: its negative log-likelihood and perplexity; and of a variational autoencoder,
whether its latent says something of the text or has collapsed."""

EVALUATE_EXAMPLES = """\
examples:
  fastlm lm evaluate model
  fastlm lm train --model decoder --output decoder
  fastlm lm evaluate model --against decoder     beside a model without a latent, on the same texts"""


def add_train(commands: argparse._SubParsersAction) -> None:
    help = "train a language model on a prepared corpus"
    parser = command(commands, run_train, "train", help, TRAIN, TRAIN_EXAMPLES)
    defaults = asdict(Settings())

    def option(name: str, what: str, **kind) -> None:
        # An option that is not given is absent, so that a resumed run keeps its own setting.
        what += f" (default: {defaults[name.replace('-', '_')]})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=what, **kind)

    parser.add_argument("--output", default="model", help="folder for the model (default: model)")
    parser.add_argument("--corpus", help="folder that fastlm lm prepare made (default: Python's own documentation)")
    what = (
        "go on from this trained model, with its kind, size and vocabulary. The weight of the KL is whole from the beginning "
    )
    what += f"and the learning rate {CONTINUED['learning_rate']}, unless other ones are given"
    parser.add_argument("--from", dest="start", metavar="CHECKPOINT", default=argparse.SUPPRESS, help=what)
    what = "a word2vec or GloVe file, whose vectors the embedding begins with where a token of the vocabulary is a word of it"
    parser.add_argument("--vectors", metavar="FILE", default=argparse.SUPPRESS, help=what)
    what = "leave these vectors as they are, which costs likelihood, as the output layer shares them"
    parser.add_argument("--freeze-vectors", action="store_true", default=argparse.SUPPRESS, help=what)
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, with its own settings")
    option("model", "a variational autoencoder, or the decoder without a latent", choices=KINDS)
    option("preset", "how large", choices=PRESETS)
    option("epochs", "how often all texts are read", type=float, metavar="N")
    option("batch-size", "texts of a step, over all processes", type=int, metavar="N")
    option("learning-rate", "at its highest", type=float, metavar="X")
    option("weight-decay", "of AdamW", type=float, metavar="X")
    option("kl-schedule", "how the weight of the KL grows", choices=SCHEDULES)
    option("beta", "the weight of the KL at its highest", type=float, metavar="X")
    option("warm-start", "share of the training without the KL, as a plain autoencoder", type=float, metavar="SHARE")
    option("free-bits", "nats that each dimension of the latent may take for nothing", type=float, metavar="NATS")
    option("mean-std", "standard deviation of the latent's means over a batch; 0: as they come", type=float, metavar="X")
    option("word-dropout", "share of the tokens hidden from the decoder", type=float, metavar="SHARE")
    option("span-masking", "share of the tokens hidden from the encoder", type=float, metavar="SHARE")
    option("seed", "of the weights, the order of the texts and the noise", type=int, metavar="N")
    what = "how many processes of torchrun share the tokens of each text, for texts that one has no memory for; the rest share "
    what += "the texts of a batch. A run may be resumed with another number (default: 1)"
    parser.add_argument("--context-parallel", type=int, default=1, metavar="N", help=what)
    parser.add_argument("--bfloat16", action="store_true", default=argparse.SUPPRESS, help="train in mixed precision")


def run_train(arguments: argparse.Namespace) -> None:
    from ..model.checkpoint import load
    from ..model.generate import generate
    from ..training.train import train

    output = Path(arguments.output)
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings) if hasattr(arguments, field.name)}
    if "start" in given and (own := [name for name in ("model", "preset", "mean_std") if name in given]):
        raise ValueError(f"--from goes on with a model as it is: leave out --{own[0].replace('_', '-')}")
    new = Settings(**CONTINUED) if "start" in given else Settings()
    settings = replace(settings_of(output)[0] if arguments.resume else new, **given)
    train(output, arguments.corpus, settings, resume=arguments.resume, context_parallel=arguments.context_parallel)
    if int(os.environ.get("RANK", 0)) == 0:  # the first process of torchrun
        print(f"The model is in {output.resolve()}. It writes, for example:\n")
        show(generate(*load(output), SHOWN, temperature=0.7, max_new_tokens=60))


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    help = "how good a model is on texts it has not seen, and whether its latent is used"
    parser = command(commands, run_evaluate, "evaluate", help, EVALUATE, EVALUATE_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model that fastlm lm train made")
    parser.add_argument("--against", metavar="CHECKPOINT", help="another model, to compare the likelihood with")
    parser.add_argument("--corpus", help="folder that fastlm lm prepare made (default: the one that it was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which of its texts (default: test)")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="latents drawn for each text (default: 32)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")


def run_evaluate(arguments: argparse.Namespace) -> None:
    from ..data.batches import Texts
    from ..model.checkpoint import load
    from ..model.evaluate import evaluate

    folders = [Path(folder) for folder in (arguments.checkpoint, arguments.against) if folder]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"--against must be another model than CHECKPOINT; both are {arguments.against}")
    corpus = Path(arguments.corpus) if arguments.corpus else settings_of(folders[0])[1]
    found = {}
    for folder in folders:
        model, tokenizer = load(folder)
        texts = Texts(corpus, arguments.split, tokenizer, model.config.get_text_config().max_position_embeddings)
        found[str(folder)] = evaluate(model, tokenizer, texts, arguments.samples)
        print(f"{folder}, {arguments.split} texts of {corpus}\n{found[str(folder)]}\n")
    if arguments.against:
        ours, theirs = (each.nll_per_word for each in found.values())
        print(f"NLL per word of {folders[0]}: {ours / theirs - 1:+.2%} of that of {folders[1]}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=1) + "\n")
