"""A corpus of a few dozen short texts for the tests of the language model, prepared once for all of them."""

import random
from pathlib import Path

from fastlm.lm.data.prepare import prepare

NOUNS, VERBS = ["cat", "dog", "bird", "fish", "house", "tree", "river", "stone"], ["sees", "hears", "likes", "finds", "is"]
WORDS = ["the", "a", "red", "old", "small", "quick", "under", "near", "above", *NOUNS, *VERBS]


def texts(count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(6, 24))) + "." for _ in range(count)]


def small_corpus(folder: Path, count: int = 96) -> Path:
    """The folder of a prepared corpus: training, validation and test texts."""
    source = folder / "texts.txt"
    source.write_text("\n\n".join(texts(count)), "utf-8")
    prepare([source], folder / "corpus", validation=0.15, test=0.15, vocab_size=290, similarity=1.0)
    return folder / "corpus"
