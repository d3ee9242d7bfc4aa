"""Opacus treats replaced modules as it treats torch's."""

import copy

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPMultiheadAttention
from opacus.validators import ModuleValidator
from torch import nn

import fastlm
import fastlm.integrations.opacus  # noqa: F401
from fastlm.nn import Linear, MultiheadAttention


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


@pytest.fixture
def models(monkeypatch):
    """Return a model, and a copy after replace."""
    monkeypatch.setattr("fastlm.nn.linear.gains", lambda weight: True)
    torch.manual_seed(0)
    model = Attending()
    swapped = copy.deepcopy(model)
    fastlm.replace(swapped)
    assert type(swapped.attention) is MultiheadAttention and type(swapped.out) is Linear
    return model, swapped


def test_a_replaced_attention_is_found_and_fixed(models):
    errors = [[str(error) for error in ModuleValidator.validate(model)] for model in models]
    assert errors[0] == errors[1] and "DPMultiheadAttention" in errors[1][0]
    fixed = [ModuleValidator.fix(model) for model in models]
    assert all(type(model.attention) is DPMultiheadAttention for model in fixed)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(fixed[1](x), fixed[0](x))


def test_a_replaced_linear_has_gradients_of_each_example(models):
    gradients = []
    for model in models:
        private = GradSampleModule(ModuleValidator.fix(model))
        torch.manual_seed(1)
        private(torch.randn(4, 5, 16)).square().sum().backward()
        gradients.append(private._module.out.weight.grad_sample)
    assert gradients[0].shape == (4, 3, 16)
    torch.testing.assert_close(gradients[1], gradients[0])
