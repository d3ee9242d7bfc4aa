"""Prepare a corpus of a few dozen short texts, for the tests of the language model."""

import random
from pathlib import Path

from fastlm.lm.data.prepare import prepare

NOUNS, VERBS = ["cat", "dog", "bird", "fish", "house", "tree", "river", "stone"], ["sees", "hears", "likes", "finds", "is"]
WORDS = ["the", "a", "red", "old", "small", "quick", "under", "near", "above", *NOUNS, *VERBS]


def texts(count: int, seed: int = 0) -> list[str]:
    """Return ``count`` sentences of random words."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(6, 24))) + "." for _ in range(count)]


def small_corpus(folder: Path, count: int = 96) -> Path:
    """Prepare a corpus in ``folder`` with training, validation and test texts; return its folder."""
    source = folder / "texts.txt"
    source.write_text("\n\n".join(texts(count)), "utf-8")
    prepare([source], folder / "corpus", validation=0.15, test=0.15, vocab_size=290, similarity=1.0)
    return folder / "corpus"
