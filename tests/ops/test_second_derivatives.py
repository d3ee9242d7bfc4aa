"""Test that asking for a second derivative changes no first one, and that the reference has second derivatives."""

import pytest
import torch
from torch.autograd import gradgradcheck

import fastlm
from fastlm.testing import seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernels, because these tests are about the ops."""


SHAPE = 1, 2, 3, 4
KEY, VALUE = seeded_normal(1, SHAPE, torch.float64), seeded_normal(2, SHAPE, torch.float64)


def attention(x, backend="cpu"):
    return fastlm.attention(x, KEY.to(x.dtype), VALUE.to(x.dtype), backend=backend)


def latent(x, backend="cpu"):
    return torch.cat([t.flatten() for t in fastlm.reparameterize_with_kl(x, x, seed=1, backend=backend)])


over_ops = pytest.mark.parametrize("op", [attention, latent])


def example(dtype=torch.float32):
    return seeded_normal(0, SHAPE, dtype)


@over_ops
def test_a_graph_that_is_asked_for_changes_nothing_in_the_first_derivative(op):
    x = example().requires_grad_()
    (plain,) = torch.autograd.grad(op(x).sum(), x)
    (with_graph,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
    assert torch.equal(plain, with_graph)


@over_ops
def test_the_second_derivative_of_what_is_beside_it_is_there(op):
    x, beside = example().requires_grad_(), torch.tensor(3.0, requires_grad=True)
    _, gradient = torch.autograd.grad(op(x).sum() + beside**3, (x, beside), create_graph=True)
    assert torch.autograd.grad(gradient, beside)[0] == 18


@over_ops
def test_the_reference_has_second_derivatives(op):
    assert gradgradcheck(lambda x: op(x, backend="reference"), example(torch.float64).requires_grad_())
