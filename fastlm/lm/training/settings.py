"""The settings of a training run. This file brings no torch: the command line shows their defaults."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from ..model.sizes import KINDS, PRESETS
from .schedules import SCHEDULES

SETTINGS = "settings.json"
# What suits a model that goes on from another: its latent is in use, and its weights are not to be forgotten.
CONTINUED = {"learning_rate": 5e-4, "kl_schedule": "constant", "warm_start": 0.0}


@dataclass(frozen=True)
class Settings:
    """How to train. The settings are stored beside the model as settings.json.

    Attributes:
        model: "vae", or "decoder" for the same decoder without a latent.
        preset: the size, a name of `fastlm.lm.model.sizes.PRESETS`.
        epochs: how often all texts are read.
        batch_size: the number of texts in a step, over all processes.
        learning_rate: the highest learning rate, after a warm-up; it falls to 0 along a cosine.
        weight_decay: of AdamW.
        kl_schedule, beta, warm_start: see `fastlm.lm.training.schedules.kl_weight`.
        free_bits, mean_std: see `fastlm.lm.model.text_vae.TextVAEConfig`; ``mean_std`` is a new model's.
        word_dropout: the share of the tokens that are hidden from the decoder, so that it needs the latent.
        span_masking: the share of the tokens that are hidden from the encoder.
        seed: determines the weights, the order of the texts and the noise.
        bfloat16: train in mixed precision.
        start: the folder of a model to go on from, with its kind, size and vocabulary instead of ``model`` and ``preset``; ""
            for a new model.
        vectors: a file of word vectors for the embedding of a new model (`fastlm.lm.model.vectors`); "" for none.
        freeze_vectors: whether they stay as they are. The rows of words that the file lacks are trained in either case.
    """

    model: str = "vae"
    preset: str = "small"
    epochs: float = 6.0
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    kl_schedule: str = "linear"
    beta: float = 1.0
    warm_start: float = 0.2
    free_bits: float = 0.5
    mean_std: float = 0.8
    word_dropout: float = 0.0
    span_masking: float = 0.0
    seed: int = 0
    bfloat16: bool = False
    start: str = ""
    vectors: str = ""
    freeze_vectors: bool = False

    def __post_init__(self) -> None:
        for name, choices in {"model": KINDS, "preset": PRESETS, "kl_schedule": SCHEDULES}.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name in ("epochs", "batch_size", "learning_rate"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive; got {value}")
        for name in ("weight_decay", "beta", "free_bits", "mean_std", "seed"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must not be negative; got {value}")
        for name in ("warm_start", "word_dropout", "span_masking"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be from 0 to 1; got {value}")
        if self.start and self.vectors:
            raise ValueError("vectors are for a new model, and start is a model that has an embedding: give one of them")
        if self.freeze_vectors and not self.vectors:
            raise ValueError("freeze_vectors needs vectors")


def settings_of(output: Path) -> tuple[Settings, Path]:
    """Return (settings, corpus) of the run in ``output``.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: settings.json is damaged.
    """
    path = output / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{output} holds no run, as it lacks {SETTINGS}: fastlm lm train")
    try:
        kept = json.loads(path.read_text("utf-8"))
        given = {field.name: kept[field.name] for field in fields(Settings) if field.name in kept}  # a newer version has more
        return Settings(**given), Path(kept["corpus"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
