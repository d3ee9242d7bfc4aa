"""Load handwritten digits as numbers in [0, 1]: the 8 x 8 ones that scikit-learn ships, or MNIST."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MNIST_FOLDER = Path("build/mnist")


@dataclass
class Digits:
    train: Tensor  # (N, side * side), float32 in [0, 1]
    test: Tensor
    side: int


def load_digits(name: str) -> Digits:
    """Load 'digits' (embedded, 1,437 + 360 images) or 'mnist' (downloaded by torchvision, 60,000 + 10,000)."""
    return {"digits": _embedded, "mnist": _mnist}[name]()


def _embedded() -> Digits:
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()  # UCI "Optical Recognition of Handwritten Digits": 0 to 16 per pixel
    split = model_selection.train_test_split(digits.data, test_size=0.2, stratify=digits.target, random_state=0)
    train, test = (torch.from_numpy(images).float() / 16.0 for images in split)
    return Digits(train, test, side=8)


def _mnist() -> Digits:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise SystemExit(f"--data mnist needs torchvision ({error}): pip install torchvision") from error
    try:
        train, test = (datasets.MNIST(str(MNIST_FOLDER), train=part, download=True).data for part in (True, False))
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError once no mirror answers
        raise SystemExit(f"--data mnist could not be downloaded to {MNIST_FOLDER}: {error}") from error
    train, test = (images.flatten(1).float() / 255.0 for images in (train, test))
    return Digits(train, test, side=28)
