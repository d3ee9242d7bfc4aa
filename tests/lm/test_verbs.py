"""The functions that `fastlm.lm` offers by their names alone."""

import pytest
from support.processes import printed

from fastlm import lm
from fastlm.lm.model.generate import TextGenerator
from fastlm.lm.model.presets import build


@pytest.mark.parametrize("name", lm.__all__)
def test_each_verb_is_the_function_of_its_module(name):
    function = getattr(lm, name)
    assert function.__name__ == name and function.__module__ == f"fastlm.lm.{lm._MODULES[name]}"
    assert name in dir(lm)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastlm.lm' has no attribute 'fly'"):
        _ = lm.fly


def test_one_verb_does_not_bring_the_libraries_of_the_others():
    """Only transformers comes along, because its Auto classes load a TextVAE after ``import fastlm.lm``."""
    others = {"peft", "sklearn", "sacrebleu", "onnx", "jiwer"}
    assert printed(f"import sys; from fastlm.lm import prepare; print({others} & sys.modules.keys())") == "set()"


def test_generate_gives_the_texts_of_a_text_generator(tokenizer):
    model = build("decoder", "tiny", tokenizer)
    expected = TextGenerator(model, tokenizer).sample(2, prompt="the cat", seed=3, max_new_tokens=5)
    assert lm.generate(model, tokenizer, 2, prompt="the cat", seed=3, max_new_tokens=5) == expected
