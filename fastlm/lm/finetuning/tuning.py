"""The settings of fine-tuning. This file brings no torch: the command line shows their defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune.

    Attributes:
        epochs: how often all examples are read. The model of the epoch that does best on the validation examples is kept.
        batch_size: the number of examples in a step.
        learning_rate: the highest learning rate, after a warm-up; it falls to 0 along a cosine.
        lora: the rank of LoRA's matrices (Hu et al. 2021, arXiv:2106.09685); 0 trains all weights.
        seed: determines the new weights and the order of the examples.
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


READY = {"classify": Tuning(epochs=12, learning_rate=2e-3), "answer": Tuning(learning_rate=2e-3)}  # for a task's ready examples
