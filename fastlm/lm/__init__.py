"""The language model of the tutorial, from text files to generated text: an extra, ``pip install 'fastlm[lm]'``."""

from importlib.util import find_spec

_missing = [
    library
    for library in (
        "accelerate",
        "ftfy",
        "matplotlib",
        "peft",
        "sacrebleu",
        "safetensors",
        "sklearn",
        "tokenizers",
        "tqdm",
        "transformers",
    )
    if find_spec(library) is None
]
if _missing:
    raise ImportError(f"fastlm.lm needs {', '.join(_missing)}: pip install 'fastlm[lm]'")
