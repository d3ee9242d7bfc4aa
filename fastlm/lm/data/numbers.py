"""Pairs to translate, for when no file is given: numbers below 10,000 in words, in English and French.

French counts by twenties from 60 on ("quatre-vingt-douze", four twenties and twelve, is 92), so that the words do not go one by
one. The French is that of before the spelling reform of 1990, with hyphens below one hundred alone.
"""

NUMBERS = range(0, 10_000, 3)  # all digits occur in each place
WHAT = "every third number below 10,000 in words, from English to French"

_ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_ENGLISH += ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_ENGLISH_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_FRENCH = ["zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix"]
_FRENCH += ["onze", "douze", "treize", "quatorze", "quinze", "seize", "dix-sept", "dix-huit", "dix-neuf"]
_FRENCH_TENS = ["vingt", "trente", "quarante", "cinquante", "soixante", "soixante", "quatre-vingt", "quatre-vingt"]


def number_pairs() -> list[tuple[str, str]]:
    """Return (English, French) of each of NUMBERS."""
    return [(english(number), french(number)) for number in NUMBERS]


def english(number: int) -> str:
    """Return a number from 0 to 9,999 in English: "nine thousand three hundred and forty-two"."""
    thousands, rest = divmod(number, 1000)
    hundreds, last = divmod(rest, 100)
    words = [f"{_ENGLISH[thousands]} thousand"] * bool(thousands) + [f"{_ENGLISH[hundreds]} hundred"] * bool(hundreds)
    if last or not words:
        words += ["and"] * bool(words) + [_english_tens(last)]
    return " ".join(words)


def _english_tens(number: int) -> str:
    if number < 20:
        return _ENGLISH[number]
    tens, ones = divmod(number, 10)
    return _ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH[ones]}" if ones else "")


def french(number: int) -> str:
    """Return a number from 0 to 9,999 in French: "neuf mille trois cent quarante-deux"."""
    thousands, rest = divmod(number, 1000)
    hundreds, last = divmod(rest, 100)
    words = [_FRENCH[thousands]] * (thousands > 1) + ["mille"] * bool(thousands) + [_FRENCH[hundreds]] * (hundreds > 1)
    words += ["cents" if hundreds > 1 and not last else "cent"] * bool(hundreds)
    if last or not words:
        words.append(_french_tens(last))
    return " ".join(words)


def _french_tens(number: int) -> str:
    if number < 20:
        return _FRENCH[number]
    tens, ones = divmod(number, 10)
    name = _FRENCH_TENS[tens - 2]
    if tens in (7, 9):
        ones += 10  # soixante-douze, quatre-vingt-douze
    if not ones:
        return "quatre-vingts" if tens == 8 else name
    return f"{name} et {_FRENCH[ones]}" if ones % 10 == 1 and tens < 8 else f"{name}-{_FRENCH[ones]}"
