"""Repair and normalisation of text, and filters that tell language from noise, for any language."""

import re
import unicodedata
import zlib
from collections import Counter

import ftfy

# The repairs that change the meaning or the look of well-formed text are off: Chinese needs its full-width punctuation, quotes
# stay curly, and a text about HTML may be about "&amp;".
_REPAIR = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_character_width=False, normalization=None)
_SEPARATOR = re.compile(r"[\x0b\x0c\x1c-\x1f]")  # vertical tabs, form feeds and the like are white space
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_BLANK = re.compile(r" [^\S\n]+|[^\S\n ][^\S\n]*")  # what is not one blank already
_AROUND_LINE_END = re.compile(r" \n ?|\n ")
_EMPTY_LINES = re.compile(r"\n{3,}")

MIN_PACKED = 200  # bytes; compression says nothing of the repetition in a shorter text
REPETITIVE = 0.12  # compressed size / size in UTF-8, below which a text is repetitive; prose has 0.3 to 0.6
ODD = 0.01  # share of replacement, private-use and unassigned characters, above which a text is damaged


def clean(text: str) -> str:
    """Repair wrong decodings (ftfy), remove control characters, shrink white space, and normalise a text to NFC.

    A run of white space becomes one blank, or one line end if it contains one, or one empty line if it contains more.
    """
    text = _SEPARATOR.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    if not text.isascii() or _CONTROL.search(text):  # ASCII has no wrong decodings
        text = _CONTROL.sub("", ftfy.fix_text(text, _REPAIR))
    text = _BLANK.sub(" ", text)
    text = _EMPTY_LINES.sub("\n\n", _AROUND_LINE_END.sub("\n", text))
    return unicodedata.normalize("NFC", text.strip())


def why_noise(text: str, *, min_characters: int = 20, min_letters: float = 0.6) -> str | None:
    """Return why a cleaned text is not worth learning from, or None.

    Args:
        min_characters: a text with fewer characters is too short.
        min_letters: the least share of letters (of any script, with their marks) among the characters that are not white space.
    """
    if len(text) < min_characters:
        return "too short"
    kinds, white = Counter(), 0
    for character, count in Counter(text).items():
        kinds[unicodedata.category(character)] += count
        white += count * character.isspace()
    letters = sum(count for kind, count in kinds.items() if kind[0] in "LM")
    if letters < min_letters * (len(text) - white):
        return "too few letters"
    if kinds["Co"] + kinds["Cn"] + text.count("\ufffd") > ODD * len(text):
        return "damaged characters"
    raw = text.encode()
    if len(raw) >= MIN_PACKED and len(zlib.compress(raw, 1)) < REPETITIVE * len(raw):
        return "repetitive"
    return None
