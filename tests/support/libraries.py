"""Prove in tests of integrations that fastlm's ops ran, and hold them to the rule with a library's own code as plain."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.testing import (
    GRADIENT_FACTOR,
    VALUE_FACTOR,
    allowed_error,
    assert_within,
    seeded_normal,
    ulp_of_largest,
    worst_error,
)


class Ops(TorchDispatchMode):
    """Record the torch ops that run in a ``with`` block, in order: ``all`` has all of them, ``fastlm`` only our own."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all.append(str(function.name()))
        return function(*args, **(kwargs or {}))

    @property
    def fastlm(self) -> list[str]:
        return [name.removeprefix("fastlm::") for name in self.all if name.startswith("fastlm::")]


def assert_held(
    actual: dict[str, Tensor], plain: dict[str, Tensor], golden: dict[str, Tensor], nudged: dict[str, Tensor] | None = None
) -> None:
    """Assert that each result is as good as ``plain``, the library's own in the same dtype. ``golden`` is that in float64.

    A name that starts with "gradient" has the factor of gradients. The dtypes of actual and plain may differ: a KL is float32.
    ``nudged`` is golden with its inputs off by an ulp, where plain may be right by luck alone, as in a deep model (`oracle`).
    """
    assert actual.keys() == plain.keys() == golden.keys()
    for what in golden:
        factor = GRADIENT_FACTOR if what.startswith("gradient") else VALUE_FACTOR
        slack = ulp_of_largest(golden[what], actual[what].dtype)
        slack += worst_error(nudged[what], golden[what]) if nudged else 0.0
        assert_within(actual[what], golden[what], allowed_error(plain[what], golden[what], factor, slack), what)


def off_by_an_ulp(tensor: Tensor, seed: int) -> Tensor:
    """Convert float32 numbers to float64, each off by an ulp, up or down."""
    signs = seeded_normal(seed, tensor.shape, torch.float64).sign()
    return tensor.double() * (1 + torch.finfo(torch.float32).eps * signs)
