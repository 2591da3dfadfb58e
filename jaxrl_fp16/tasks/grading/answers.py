"""Whether two mathematical answers are the same.

What reads as plain text or as a number is settled here in microseconds. The rest goes to `math_verify`, which
can freeze its process on one answer (`9^{387420489}`) and therefore runs in workers alone: `algebra.py`.
"""

import ast
from fractions import Fraction
import functools
import re
import warnings

from jaxrl_fp16.tasks.grading.rewrites import FONTS, plain_fonts, tidy
from jaxrl_fp16.tasks.grading.solutions import lists_alike, ratios_alike, regions_alike
from jaxrl_fp16.tasks.grading.units import agree, split_unit
from jaxrl_fp16.tasks.grading.words import number_of_words

# The longest gold answer of MATH, AIME, AMC and Minerva has 159. Longer ones are wrong without a look.
MAX_ANSWER_CHARS = 1000
MAX_NUMBER_CHARS = 100
MAX_EXPONENT = 400
# Two numbers of which one is a rounded decimal are the same within this relative distance.
RELATIVE_TOLERANCE = Fraction(1, 10**6)

_LOOKS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\!|\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])", ""),
    (r"\\(?:le|leqslant)(?![A-Za-z])", r"\\leq"),
    (r"\\(?:ge|geqslant)(?![A-Za-z])", r"\\geq"),
    (r"(?i)^\s*(\d{1,2}(?::\d\d){0,2})\s*([ap])\.?\s?m\.?\s*$", lambda time: f"{time[1]}{time[2].lower()}m"),
    # Spaces go, save between two digits, and where a list would become a number: `1 2`, `1, 234`.
    (r"(?<![\d,])\s+|(?<=,)\s+(?!\d{3}(?!\d))|\s+(?![\d\s])", ""),
)]

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"([+-]?)({_INTEGER}?(?:\.\d*)?)(?:[eE]([+-]?\d+))?")
_SCIENTIFIC = re.compile(r"(.*?)(?:\\times|\\cdot|\*)?10\^(?:\{([+-]?\d+)\}|(\d))")
_FRACTION = re.compile(rf"([+-]?)(?:(\d+)?\\frac\{{([+-]?{_INTEGER})\}}\{{({_INTEGER})\}}"
                       rf"|({_INTEGER})/({_INTEGER}))")
_BASED = re.compile(r"([+-]?)\(?([0-9][0-9A-F]*|[A-F][0-9A-F]+)\)?"
                    r"(?:_(?:\{([a-z]+|\d+)\}|(\d))|\(?base-?([a-z]+|\d+)\)?)")
_BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
               "eleven": 11, "twelve": 12, "sixteen": 16}

_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)(\d{1,3}(?:,\d{3})+)(?!\d|,\d)")
_NAMED = re.compile(r"(?:[A-Za-z]+|\\[a-z]+(?![a-z]))(?:_(?:\w|\{\w+\}))?'*(?:\([^()=]*\))?"
                    r"\s*(?:=(?!=)|\\approx(?![a-z]))(.*)", re.DOTALL)
_LABEL = re.compile(r"(?:(?:option|choice|answer)\s*)?(?:\(([A-Za-z])\)|([A-Z])(?:[).:]|(?=\s*$)))\s*(.*)",
                    re.DOTALL | re.IGNORECASE)
_OTHER_LABEL = re.compile(r"(?<![A-Za-z\\])(?:[A-J](?![A-Za-z])|or|and)(?![A-Za-z])|^\s*[,;/&+=*^_-]")


def gold_answers(answer: str) -> tuple[str, ...]:
    """The accepted texts of a gold answer, which may be the text of a Python list of them, or a solution of GSM8K,
    whose answer follows `####`."""
    if answer.startswith(("['", '["')):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `\c` in a quoted text is no concern of the caller
                texts = ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            texts = None
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return tuple(text.strip() for text in texts)
    return (answer.rpartition("####")[2].strip(),)


@functools.lru_cache(maxsize=1 << 14)
def settle(gold: str, answer: str) -> bool | None:
    """Whether the answers are the same, where text or numbers decide it; None where algebra must."""
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return False
    if normalise(gold) == normalise(answer):
        return True
    pair = comparable(gold, answer)
    if pair is None:
        return False
    (gold, answer), as_word = pair, _is_word(tidy(gold))
    values = normalise(gold), normalise(answer)
    texts = [_without_marks(value) for value in values]
    if texts[0] == texts[1] or texts[0] == _without_marks(normalise(_THOUSANDS.sub(_without_commas, answer))):
        return True
    if all(text.isalpha() and len(text) > 1 for text in texts):
        same = texts[0].casefold() == texts[1].casefold()
        return same if same or as_word else None
    if (same := _in_bases(*values)) is not None:
        return same
    numbers = [as_number(text) for text in texts]
    if None in numbers:
        return None
    if _same_number(*numbers):
        return True
    # One percent sign may mean a factor of 100.
    percent = ["%" in value for value in values]
    return percent[0] != percent[1] and _same_number(*(
        (value / 100 if marked else value, exact) for (value, exact), marked in zip(numbers, percent)))


def comparable(gold: str, answer: str) -> tuple[str, str] | None:
    """The two tidied, without what one names and the other need not: `x=`, a unit, the letter of a choice.

    None where both name a unit, or a choice, and not the same, and for a ratio beside a number.
    """
    gold, answer = tidy(gold), tidy(answer)
    choices = _choices(gold, answer)
    if choices is not None:
        gold, answer = choices
    gold, answer = regions_alike(*lists_alike(gold, answer))
    named = [_NAMED.fullmatch(text) or _NAMED.fullmatch(plain_fonts(text).strip()) for text in (gold, answer)]
    if named[1] and "=" not in gold + named[1][1]:
        answer = tidy(named[1][1])
    elif named[0] and not re.search(r"=|<|>|\\[lg]eq?(?![a-z])|\\neq?(?![a-z])", answer + named[0][1]):
        gold = tidy(named[0][1])
    elif named[1] and normalise(named[1][1]) == normalise(gold):
        answer = gold
    pair = ratios_alike(gold, answer)
    if pair is None:
        return None
    gold, answer = pair
    (gold_value, gold_unit), (value, unit) = split_unit(gold), split_unit(answer, letters=True)
    if not agree(gold_unit, unit):
        return None
    return _in_digits(gold_value, value), _in_digits(value, gold_value)


def _in_digits(text: str, other: str) -> str:
    """A number in words as digits, beside a number in digits."""
    number = number_of_words(plain_fonts(text))
    return text if number is None or as_number(_without_marks(normalise(other))) is None else str(number)


def _choices(gold: str, answer: str) -> tuple[str, str] | None:
    """What is compared where one of the two begins with the letter of a choice: letters, or what follows them."""
    (letter, rest), (chosen, said) = _label(gold), _label(answer)
    if letter and chosen:
        return letter, chosen
    if chosen and said and chosen <= "E":
        return gold, said
    if letter and rest and letter <= "E":
        return rest, answer
    return None


def _label(text: str) -> tuple[str, str]:
    """The letter of a choice and what follows it; "" and the text where there is none, or more than one."""
    plain = re.sub(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " ", plain_fonts(text)).strip()
    found = _LABEL.fullmatch(plain)
    if not found or _OTHER_LABEL.search(found[3]) or (found[2] or "A").islower():
        return "", text
    return (found[1] or found[2]).upper(), found[3].strip()


def _is_word(text: str) -> bool:
    """Whether letters are a word, whose order counts, and no product of variables."""
    plain = plain_fonts(text).strip()
    return bool(re.search(FONTS, text)) or " " in plain or len(plain) > 2 and sorted(plain) != list(plain)


def _in_bases(gold: str, answer: str) -> bool | None:
    """Of numbers of which one names its base; None for others.

    The other may be the digits alone, or the number in base 10.
    """
    based = [_as_based(text) for text in (gold, answer)]
    if based == [None, None]:
        return None
    if None not in based:
        return based[0] == based[1]
    (digits, base), other = (based[0], answer) if based[0] else (based[1], gold)
    if other == digits:
        return True
    number = as_number(other)
    return None if number is None else number[0] == int(digits, base)


def _as_based(text: str) -> tuple[str, int] | None:
    found = _BASED.fullmatch(text) if len(text) <= MAX_NUMBER_CHARS else None
    if not found:
        return None
    name = found[3] or found[4] or found[5]
    base = _BASE_NAMES.get(name, 0) if name.isalpha() else int(name)
    digits = found[2].lstrip("0") or "0"
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return found[1].replace("+", "") + digits, base


def _without_commas(found: re.Match) -> str:
    return found[0].replace(",", "")


@functools.lru_cache(maxsize=1 << 14)
def normalise(answer: str) -> str:
    """An answer without what is looks alone: spacing, sizes of brackets, fonts, dollar signs, degrees."""
    answer = plain_fonts(tidy(answer))
    for pattern, replacement in _LOOKS:
        answer = pattern.sub(replacement, answer)
    return answer.rstrip(".")


def _without_marks(answer: str) -> str:
    return re.sub(r"\\?[%$]", "", answer)


def as_number(text: str) -> tuple[Fraction, bool] | None:
    """The value of a normalised text that is a number, and whether it is exact; None for other texts.

    Reads `12`, `1,234`, `-0.5`, `3e11`, `3.3\\times10^{12}`, `10^5`, `3/4`, `\\frac{3}{4}` and `2\\frac{1}{3}`.
    """
    if len(text) > MAX_NUMBER_CHARS or not text.isascii():
        return None
    if match := _FRACTION.fullmatch(text):
        sign, whole, *parts = match.groups()
        above, below = (int(part.replace(",", "")) for part in parts if part)
        if not below or whole and not 0 < above < below:
            return None
        value = int(whole or 0) + Fraction(above, below)
        return (-value if sign == "-" else value), True
    exponent = 0
    if match := _SCIENTIFIC.fullmatch(text):
        text, exponent = match[1] or "1", int(match[2] or match[3])
    match = _DECIMAL.fullmatch(text)
    if not match or not any(character.isdigit() for character in match[2]):
        return None
    exponent += int(match[3] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    value = Fraction(match[1] + match[2].replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    return value, "." not in match[2]


def _same_number(gold: tuple[Fraction, bool], answer: tuple[Fraction, bool]) -> bool:
    (expected, exact), (value, also_exact) = gold, answer
    # A number that is whole was not rounded.
    if exact and also_exact or exact and expected.denominator == 1 or also_exact and value.denominator == 1:
        return value == expected
    return abs(value - expected) <= RELATIVE_TOLERANCE * abs(expected)
