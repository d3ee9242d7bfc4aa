"""Count the fused functions that modules call, and make tensors for attention."""

import pytest
import torch

import fastlm
from fastlm.nn import multi_head_call, multihead_attention
from fastlm.testing import seeded_normal


@pytest.fixture
def fused(monkeypatch):
    """Return a list that grows with the name of every fused function that a module calls."""
    calls = []

    def counted(name):
        def call(*args, **options):
            calls.append(name)
            return getattr(fastlm, name)(*args, **options)

        return call

    monkeypatch.setattr(multi_head_call, "attention", counted("attention"))
    monkeypatch.setattr(multihead_attention, "varlen_attention", counted("varlen_attention"))
    return calls


@pytest.fixture
def qkv():
    """Return query, key and value (2, 3, 7, 8) that require gradients."""
    return [seeded_normal(i, (2, 3, 7, 8), torch.float32).requires_grad_() for i in range(3)]
