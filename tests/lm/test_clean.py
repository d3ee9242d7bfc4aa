"""Repair, filters and windows of fastlm.lm."""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.lm.data.clean import clean, why_noise
from fastlm.lm.data.windows import windows

PROSE = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening."


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("schÃ¶n â€” oui", "schön — oui"),
        ("e\u0301te\u0301", "été"),
        ("a\x00b \x07 c\ufeff\x1f d", "ab c d"),
        ("a \t\u00a0\u3000b  \n  c\n\n\n\nd \r\n e\n", "a b\nc\n\nd\ne"),
        ("one\x0ctwo\x0bthree\n\x0cfour \x1cfive — six\x0cseven", "one two three\nfour five — six seven"),
        ("mac\rlines\u2028and others", "mac\nlines\nand others"),
        ("\x1b[31mred\x1b[0m and ﬁne", "red and fine"),
        ("他说：“你好，世界！”", "他说：“你好，世界！”"),
        ("&amp; is how HTML writes &", "&amp; is how HTML writes &"),
        ("\ud800 alone", "\ufffd alone"),
        ("", ""),
    ],
)
def test_repair(dirty, expected):
    assert clean(dirty) == expected


@given(st.text())
def test_what_cleaning_promises(text):
    cleaned = clean(text)
    assert unicodedata.is_normalized("NFC", cleaned) and cleaned == cleaned.strip()
    assert not any(unicodedata.category(c) == "Cc" and c != "\n" for c in cleaned)
    assert not any(two in cleaned for two in ("  ", " \n", "\n ", "\n\n\n"))
    cleaned.encode()  # no lone surrogates


@given(st.lists(st.text("abcéß三語", min_size=1), min_size=1))
def test_good_text_is_left_alone(words):
    assert clean(" ".join(words)) == " ".join(words)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        ("这是一个普通的句子，没有什么特别的地方，但是足够长了。", None),
        ("यह एक साधारण वाक्य है, जिसमें कुछ भी विशेष नहीं है।", None),
        ("Too short.", "too short"),
        ("| 1.0 | 2.5 | 3.7 | 4.1 | total | 99 |", "too few letters"),
        (PROSE + "\ufffd" * 3, "damaged characters"),
        ("buy now " * 100, "repetitive"),
    ],
)
def test_filters(text, reason):
    assert why_noise(text) == reason


def test_filters_have_settings():
    assert why_noise("Too short.", min_characters=5) is None
    assert why_noise("1 + 1 = 2, a table of numbers", min_letters=0.9) == "too few letters"


@given(st.text('ab .。!\n"', max_size=120), st.integers(1, 30), st.data())
def test_windows_cover_the_document_and_overlap_as_told(text, size, data):
    overlap = data.draw(st.integers(0, size // 2))
    spans = windows(text, size, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(0 <= end - start <= size for start, end in spans)
    for (start, end), (following, next_end) in zip(spans, spans[1:]):
        assert start < following <= end < next_end, "progress, without a gap"
        assert end - following <= overlap


def test_windows_end_where_sentences_do():
    text = 'One is here. Two (said "so.") Three? Four! 五在这里。六也在。Seven. Eight is the last.'
    assert [text[start:end] for start, end in windows(text, 30, 8)] == [
        'One is here. Two (said "so.") ',
        "Three? Four! 五在这里。六也在。Seven. ",
        "Seven. Eight is the last.",
    ]
    sentences = " ".join(f"Sentence {number} is here." for number in range(40))
    spans = windows(sentences, 200, 60)
    assert all(sentences[start:].startswith("Sentence") for start, _ in spans)
    assert all(sentences[:end].rstrip().endswith("here.") for _, end in spans)
    assert all(0 < end - following <= 60 for (_, end), (following, _) in zip(spans, spans[1:])), "each overlaps the next"


def test_a_sentence_longer_than_a_window_is_cut_at_a_blank():
    words = "word " * 100
    assert all(words[start:end].endswith("word ") for start, end in windows(words, 52, 10))
    assert windows("x" * 25, 10, 5) == [(0, 10), (10, 20), (20, 25)]


@pytest.mark.parametrize("run", ["!", '."', "?)", "…", "。", "! ", "\n", "é", "\x0c"])
def test_runs_of_one_mark_take_linear_time(run):
    """Four times the text takes less than ten times as long, and a mebibyte a few seconds."""

    def seconds(count):
        text, start = run * count + "x", time.process_time()
        windows(text, 1000, 200)
        clean(text)
        return time.process_time() - start

    assert seconds(1 << 20) < max(10 * seconds(1 << 18), 1)


@pytest.mark.parametrize(("size", "overlap", "name"), [(0, 0, "size"), (10, 6, "overlap"), (10, -1, "overlap")])
def test_bad_windows(size, overlap, name):
    with pytest.raises(ValueError, match=f"^{name}.*got"):
        windows("text", size, overlap)
