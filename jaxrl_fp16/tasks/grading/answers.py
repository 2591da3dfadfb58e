"""Whether two mathematical answers are the same.

What reads as plain text or as a number is settled here in microseconds. The rest goes to `math_verify`, which
can freeze its process on one answer (`9^{387420489}`) and therefore runs in workers alone.
"""

import ast
from fractions import Fraction
import functools
import re
from typing import Callable
import warnings

# The longest gold answer of MATH, AIME, AMC and Minerva has 159. Longer ones are wrong without a look.
MAX_ANSWER_CHARS = 1000
MAX_NUMBER_CHARS = 100
MAX_EXPONENT = 400
# Two numbers of which one is a rounded decimal are the same within this relative distance.
RELATIVE_TOLERANCE = Fraction(1, 10**6)

_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\!|\\(?:left|right)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])", ""),
    (r"\{,\}", ","),
    # Spaces go, save between two digits, and where a list would become a number: `1 2`, `1, 234`.
    (r"(?<![\d,])\s+|(?<=,)\s+(?!\d{3}(?!\d))|\s+(?![\d\s])", ""),
)]

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"([+-]?)({_INTEGER}?(?:\.\d*)?)(?:[eE]([+-]?\d+))?")
_SCIENTIFIC = re.compile(r"(.*?)(?:\\times|\\cdot|\*)?10\^(?:\{([+-]?\d+)\}|(\d))")
_FRACTION = re.compile(rf"([+-]?)(?:\\frac\{{([+-]?{_INTEGER})\}}\{{({_INTEGER})\}}"
                       rf"|({_INTEGER})/({_INTEGER}))")


def gold_answers(answer: str) -> tuple[str, ...]:
    """The accepted texts of a gold answer, which may be the text of a Python list of them."""
    if answer.startswith(("['", '["')):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `\c` in a quoted text is no concern of the caller
                texts = ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            texts = None
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return tuple(text.strip() for text in texts)
    return (answer.strip(),)


def settle(gold: str, answer: str) -> bool | None:
    """Whether the answers are the same, where text or numbers decide it; None where algebra must."""
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return False
    gold, answer = normalise(gold), normalise(answer)
    bare_gold, bare_answer = _without_marks(gold), _without_marks(answer)
    if bare_gold == bare_answer:
        return True
    # A percent sign may mean a factor of 100: numbers settle nothing then.
    numbers = (as_number(gold), as_number(answer))
    return None if None in numbers else _same_number(*numbers)


@functools.lru_cache(maxsize=1 << 14)
def normalise(answer: str) -> str:
    """An answer without what is looks alone: spacing, sizes of brackets, fonts, dollar signs, degrees."""
    answer = answer.strip().removeprefix("\\(").removesuffix("\\)").strip("$ \n\t")
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer.rstrip(".")


def _without_marks(answer: str) -> str:
    return re.sub(r"\\?[%$]", "", answer)


def as_number(text: str) -> tuple[Fraction, bool] | None:
    """The value of a normalised text that is a number, and whether it is exact; None for other texts.

    Reads `12`, `1,234`, `-0.5`, `3e11`, `3.3\\times10^{12}`, `10^5`, `3/4` and `\\frac{3}{4}`.
    """
    if len(text) > MAX_NUMBER_CHARS or not text.isascii():
        return None
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        above, below = (int(part.replace(",", "")) for part in parts if part)
        return (Fraction(-above if sign == "-" else above, below), True) if below else None
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
    if exact and also_exact:
        return value == expected
    return abs(value - expected) <= RELATIVE_TOLERANCE * abs(expected)


def open_verifier() -> Callable[[str, str], bool]:
    """`verify(gold, answer) -> bool` by algebra. For worker processes: nothing bounds its time or memory."""
    import logging

    import math_verify

    # Its own time-outs are off: they use SIGALRM, which does not interrupt what hangs in C. It logs that.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # LaTeX alone: its other reader hands text to SymPy's `parse_expr`, which evaluates Python.
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    @functools.lru_cache(maxsize=1 << 12)
    def parse_gold(text: str):
        return parse(text)

    def parse(text: str):
        # First match: what cannot be read as a whole is not searched for parts that can.
        return math_verify.parse(f"\\boxed{{{text.strip().strip('$')}}}", latex, parsing_timeout=None,
                                 extraction_mode="first_match")

    def verify(gold: str, answer: str) -> bool:
        return bool(math_verify.verify(parse_gold(gold), parse(answer), timeout_seconds=None))

    verify("x+1", "1+x")  # builds the parser's tables now, not within the first answer's deadline
    return verify
