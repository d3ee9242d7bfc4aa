"""Score texts by the words and characters that they share with the texts that were wanted, by sacrebleu."""

import re
from collections.abc import Iterable, Sequence

from sacrebleu.metrics import BLEU, CHRF

# Scripts without blanks between words. sacrebleu's tokenizer for Chinese splits no kana, and that for Japanese needs MeCab.
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_OTHERS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff]")  # Thai, Lao, Burmese, Khmer, kana


def scores(targets: Sequence[str], found: Sequence[str]) -> dict[str, float | str]:
    """Return ``bleu``, ``chrf``, their signatures and ``exact`` of the outputs ``found``."""
    bleu, chrf = BLEU(tokenize=bleu_tokenizer(targets)), CHRF()
    by_words, by_characters = (metric.corpus_score(list(found), [list(targets)]).score for metric in (bleu, chrf))
    signatures = {"signature": str(bleu.get_signature()), "chrf_signature": str(chrf.get_signature())}
    exact = sum(map(str.__eq__, targets, found)) / len(targets)
    return {"bleu": by_words, "chrf": by_characters, **signatures, "exact": exact}


def bleu_tokenizer(targets: Iterable[str]) -> str:
    """Return the name of sacrebleu's tokenizer for the targets' language, by its script.

    "13a" splits words and punctuation marks, "zh" Chinese characters, too, and "char" all characters, for the other languages
    that put no blanks between words.
    """
    text = "".join(targets)
    han, others = (len(script.findall(text)) for script in (_HAN, _OTHERS))
    if 10 * (han + others) < len(text):  # some foreign names
        return "13a"
    return "char" if 10 * others > han + others else "zh"
