"""Repair and normalisation of text, and the filters that tell language from noise. For any language."""

import re
import unicodedata
import zlib
from collections import Counter

import ftfy

# What changes the meaning or the look of well-formed text is off: Chinese needs its full-width punctuation, quotes stay curly,
# and "&amp;" may be what a text about HTML is about.
_REPAIR = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_character_width=False, normalization=None)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_BLANK = re.compile(r"[^\S\n]+")
_AROUND_LINE_END = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")

MIN_PACKED = 200  # bytes from which compression tells repetition
REPETITIVE = 0.12  # compressed size, of the size in UTF-8; prose is at 0.3 to 0.6
ODD = 0.01  # share of replacement characters, private-use and unassigned ones from which a text is damaged


def clean(text: str) -> str:
    """Text with wrong decodings repaired (ftfy), in NFC, without control characters, with single blanks.

    A run of white space becomes one blank, or one line end if it holds one, or one empty line if it holds more.
    """
    text = ftfy.fix_text(text.replace("\r\n", "\n"), _REPAIR)
    text = _BLANK.sub(" ", _CONTROL.sub("", text))
    text = _EMPTY_LINES.sub("\n\n", _AROUND_LINE_END.sub("\n", text))
    return unicodedata.normalize("NFC", text.strip())


def why_noise(text: str, *, min_characters: int = 20, min_letters: float = 0.6) -> str | None:
    """Why a cleaned text is not worth learning from, or None.

    Args:
        min_characters: fewer are too short.
        min_letters: the least share of letters (of any script, with their marks) among characters that are not white space.
    """
    if len(text) < min_characters:
        return "too short"
    kinds = Counter(map(unicodedata.category, text))
    white = sum(map(str.isspace, text))
    letters = sum(count for kind, count in kinds.items() if kind[0] in "LM")
    if letters < min_letters * (len(text) - white):
        return "too few letters"
    if kinds["Co"] + kinds["Cn"] + text.count("\ufffd") > ODD * len(text):
        return "damaged characters"
    raw = text.encode()
    if len(raw) >= MIN_PACKED and len(zlib.compress(raw, 1)) < REPETITIVE * len(raw):
        return "repetitive"
    return None
