"""The language model of the tutorial, from text files to generated text: an extra, ``pip install 'fastlm[lm]'``.

from fastlm import lm

lm.prepare(["books/"], "corpus")
lm.train("model", "corpus")
model, tokenizer = lm.load("model")
lm.generate(model, tokenizer, 3, prompt="The function")
lm.classify("model", "stars", "reviews.csv", fields=("review", "stars"))
lm.predict("stars", ["A fine film."])

After ``import fastlm.lm`` transformers' AutoModel, AutoModelForCausalLM and pipelines load a `TextVAE` by its folder's name.
"""

import sys
from importlib import import_module

from .extras import require

require(
    "lm",
    "accelerate",
    "ftfy",
    "matplotlib",
    "peft",
    "sacrebleu",
    "safetensors",
    "sklearn",
    "tokenizers",
    "torchmetrics",
    "tqdm",
    "transformers",
    what="fastlm.lm",
)

_MODULES = {
    "prepare": "data.prepare",
    "train": "training.train",
    "load": "model.checkpoint",
    "generate": "model.generate",
    "evaluate": "model.evaluate",
    "classify": "finetuning.classify",
    "translate": "finetuning.translate",
    "answer": "finetuning.answer",
    "predict": "finetuning.predict",
    "neighbours": "model.neighbours",
    "transcribe": "finetuning.speech",
    "export": "model.export",
}
__all__ = list(_MODULES)

if "torch" in sys.modules:  # not in a help text of the command line, which takes no torch
    import_module(f"{__name__}.model.presets")


def __getattr__(name: str):
    """Import a function when it is first asked for, so that it does not bring the libraries of the others."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
