"""Predictions of a fine-tuned checkpoint: the label of a text, or the answer to a question on a text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import EuroBertForSequenceClassification, LlamaForQuestionAnswering, LlamaForSequenceClassification

from ..model.checkpoint import CONFIG, kind_of, load
from .answer import EuroBertForQuestionAnswering, find
from .classify import label

READERS = (EuroBertForQuestionAnswering, LlamaForQuestionAnswering)
KINDS = {kind.__name__: kind for kind in (EuroBertForSequenceClassification, LlamaForSequenceClassification, *READERS)}


class Prediction(NamedTuple):
    """A label or an answer, and the probability that the model gives it."""

    found: str
    probability: float


class Predictor:
    """A checkpoint that `fastlm lm finetune` made for ``classify`` or ``answer``; ``reads`` tells whether it answers questions.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, or of another task.
    """

    def __init__(self, checkpoint: str | os.PathLike):
        folder = Path(checkpoint)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of fastlm.lm, as it lacks {CONFIG}: fastlm lm finetune")
        model_type = kind_of(folder)
        (name,) = json.loads((folder / CONFIG).read_text("utf-8")).get("architectures") or [None]
        if name not in KINDS:
            tasks = "classify, answer"
            raise ValueError(
                f"{folder} holds a {name}, which predicts nothing yet: fastlm lm finetune (for {tasks}) teaches it"
            )
        self.model, self.tokenizer = load(folder, {model_type: KINDS[name]})
        self.tokenizer.model_max_length = self.model.config.max_position_embeddings
        self.folder, self.reads = folder, KINDS[name] in READERS

    def __call__(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> list[Prediction]:
        """Return the prediction for each text, or for each question and its context.

        Raises:
            ValueError: contexts are missing, not wanted, or of another number.
        """
        if not self.reads:
            if contexts is not None:
                raise ValueError(f"contexts are for models of questions; {self.folder} is a classifier")
            return [Prediction(*each) for each in label(self.model, self.tokenizer, texts)]
        if contexts is None or len(contexts) != len(texts):
            got = None if contexts is None else len(contexts)
            raise ValueError(f"contexts must be one for each of the {len(texts)} questions of {self.folder}; got {got}")
        return [Prediction(*each) for each in find(self.model, self.tokenizer, list(zip(texts, contexts)))]


def predict(checkpoint: str | os.PathLike, texts: Sequence[str], contexts: Sequence[str] | None = None) -> list[Prediction]:
    """Return what a fine-tuned checkpoint predicts for each text, or for each question and its context: see `Predictor`."""
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts; got one text")
    return Predictor(checkpoint)(texts, contexts)
