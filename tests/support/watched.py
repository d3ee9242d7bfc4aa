"""Make small models whose attention `fastlm.watch` can see, and hold that no test leaves anything watched."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.ops.attention import observer
from fastlm.testing import seeded_normal

WIDTH, HEADS, LENGTH, BATCH = 16, 4, 9, 3


@pytest.fixture(autouse=True)
def nothing_is_left(widest_isa):
    """Require the C++ kernel; hold that every test leaves no open watch, and no observer on its thread's stack."""
    yield
    assert observer.open_watches == 0 and observer.stack() == []


def normals(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return seeded_normal(seed, shape, dtype)


class Attend(nn.Module):
    """Attend to the input itself, ``times`` in one forward."""

    def __init__(self, times: int = 1, **options) -> None:
        super().__init__()
        self.project, self.times, self.options = nn.Linear(WIDTH, 3 * WIDTH), times, options

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = fastlm.attention(*self.heads(x), **self.options).transpose(1, 2).flatten(2)
        return x

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, dim=-1))


class Stack(nn.Module):
    """Hold attentions one after the other."""

    def __init__(self, *layers: nn.Module, checkpointed: dict | None = None) -> None:
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(layers), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.checkpointed is None else checkpoint(layer, x, **self.checkpointed)
        return x


def encoder(layers: int = 2, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, **{"dropout": 0.0, **options})
    return nn.TransformerEncoder(layer, layers)


def on_fastlm(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    fastlm.replace(model)
    return model


def padding() -> Tensor:
    return torch.arange(LENGTH) >= torch.tensor([LENGTH, 5, 1])[:, None]  # (BATCH, LENGTH), True: padding
