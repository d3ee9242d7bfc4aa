"""What an op tells the tests of itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """An op as the tests see it.

    ``cases`` builds the keyword arguments of calls that between them cover the features; tests run each on every backend, dtype
    and instruction set against the reference in float64. The tensors named in ``differentiable`` get gradients.
    """

    name: str
    function: Callable
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str, ...]
    differentiable: tuple[str, ...]
    cases: dict[str, Callable[[torch.dtype], dict]]
