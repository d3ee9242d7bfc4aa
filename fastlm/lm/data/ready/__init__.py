"""Ready sets of examples, for when no file is given. Nothing is downloaded.

sentiment.csv has 420 short reviews, written for fastlm by one hand, on films, food, things, places and people: pairs of a
positive and a negative line on much the same subject, so that the subject tells nothing. A pair is in one split, because else
the nearest text to train on would have the other label.
"""

from collections.abc import Iterator
from pathlib import Path

from ..problems import Problems
from ..rows import rows


def sentiment(split: str) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of the reviews of a split: "train", "validation" or "test"."""
    for _, row in rows(Path(__file__).with_name("sentiment.csv"), ("text", "label", "split"), Problems()):
        if row["split"] == split:
            yield row["text"], row["label"]
