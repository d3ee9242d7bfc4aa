"""transformers' models on fastlm give what they give on eager: values and gradients, in training and in eval.

Golden is eager in float64 with the same weights, plain is eager in the dtype, and the rule is that of tests/support/oracle.py.
"""

import pytest
import torch
from support.transformers_models import ARCHITECTURES, assert_as_good_as_eager, count_calls, inputs_of, results_of

import fastlm.integrations.transformers  # noqa: F401


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients(name, dtype, padding, monkeypatch):
    architecture = ARCHITECTURES[name]
    model = architecture.build().train()
    calls = count_calls(monkeypatch)
    assert_as_good_as_eager(model, dtype, padding, gradients=True)
    assert calls() == architecture.attentions


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_in_eval(name, monkeypatch):
    architecture = ARCHITECTURES[name]
    calls = count_calls(monkeypatch)
    with torch.no_grad():
        assert_as_good_as_eager(architecture.build(), torch.float32, "right", gradients=False)
    assert calls() == architecture.attentions


@pytest.mark.parametrize("name, parameter", [("T5", "relative_attention_bias"), ("GPT-OSS", "sinks")])
def test_biases_and_sinks_get_gradients(name, parameter):
    """Assert that these gradients are among those that the comparisons above hold to eager's."""
    model = ARCHITECTURES[name].build("fastlm")
    results = results_of(model, inputs_of(model), gradients=True)
    found = [gradient for what, gradient in results.items() if parameter in what]
    assert len(found) == 2 and all(gradient.abs().max() > 0 for gradient in found)
