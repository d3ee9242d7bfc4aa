"""Count the fused functions that modules call."""

import pytest

import fastlm
from fastlm.nn import multi_head_call, multihead_attention


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
