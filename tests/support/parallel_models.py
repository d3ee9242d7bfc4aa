"""Train models on several ranks, and compare with one process: losses, and weights after some steps."""

import copy
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import gelu

import fastlm
from fastlm.nn.linear import Linear
from fastlm.testing import GRADIENT_FACTOR, assert_as_good_as_plain, seeded_normal

WIDTH, HEADS, KEY_HEADS = 16, 4, 2


class Block(nn.Module):
    """A decoder's block with grouped heads, whose number the projections decide: those of a rank, where they are sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, n * self.head_dim) for n in (HEADS, KEY_HEADS, KEY_HEADS))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, S, WIDTH) for x of that shape."""
        y = self.norm1(x)
        heads = (part(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(fastlm.attention(*heads, causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(gelu(self.up(self.norm2(x))))


def blocks() -> nn.Sequential:
    """Return two blocks, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def batch() -> Tensor:
    """Return an input of `blocks`."""
    return seeded_normal(9, (4, 6, WIDTH), torch.float32)


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def with_fastlm(model: nn.Module) -> nn.Module:
    """Return the model after `fastlm.replace`, which here takes even linear layers that are too small to gain by it."""
    with mock.patch("fastlm.nn.linear.gains", lambda weight: True):
        fastlm.replace(model)
    assert any(type(module) is Linear for module in model.modules())
    return model


@contextmanager
def linear_on_the_kernel():
    """Run every `fastlm.linear` that names no backend on the C++ kernel, however small it is."""
    with mock.patch("fastlm.ops.linear.DEFAULT", "cpu"):
        yield


Inputs = Iterable[Tensor]


def trained(model: nn.Module, loss_of: Callable, inputs: Inputs, reduce: Callable = lambda loss: loss) -> dict[str, Tensor]:
    """Train by a step of SGD with momentum for each input; return losses and weights, whole and by name.

    ``reduce`` makes one loss of those of all ranks.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    results = {}
    for step, x in enumerate(inputs):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        results[f"loss {step}"] = _whole(reduce(loss.detach()))
    return results | {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_trained_as_by_one_process(results: dict[str, Tensor], model: nn.Module, loss_of: Callable, inputs: Inputs) -> None:
    """Hold the results of `trained` to the rule of errors, with one process, without fastlm's modules, as plain PyTorch."""
    inputs = list(inputs)
    plain = trained(copy.deepcopy(model), loss_of, inputs)
    doubled = (x.double() if x.is_floating_point() else x for x in inputs)
    golden = trained(copy.deepcopy(model).double(), loss_of, doubled)
    assert results.keys() == plain.keys()
    for name, actual in results.items():
        assert_as_good_as_plain(actual, plain[name], golden[name], GRADIENT_FACTOR, name)
