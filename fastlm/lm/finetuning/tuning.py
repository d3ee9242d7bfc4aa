"""The settings of fine-tuning. This file brings no torch: the command line shows their defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune.

    Attributes:
        epochs: how often all examples are read; the model of the best epoch on the validation examples is kept.
        batch_size: examples of a step.
        learning_rate: at its highest, after a warm-up; it falls to 0 along a cosine.
        lora: rank of LoRA's matrices (Hu et al. 2021, arXiv:2106.09685), 0 to train all weights.
        seed: of new weights and the order of the examples.
    """

    epochs: float = 5.0
    batch_size: int = 16
    learning_rate: float = 5e-4
    lora: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive; got {value}")
        for name in ("lora", "seed"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must not be negative; got {value}")
