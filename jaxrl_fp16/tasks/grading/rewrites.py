"""One writing for the many of an answer: what looks different and means the same, before anything is compared."""

from fractions import Fraction
import functools
import re
import unicodedata

from jaxrl_fp16.tasks.grading.readers import LEAD, last_boxed

FONTS = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|operatorname\*?)\s*\{"
_BRACES = re.compile(FONTS + r"|\\.|[{}]", re.DOTALL)
_MAX_DIGITS = 60       # of a repeating decimal
_MAX_PASSES = 4        # of wrapping inside wrapping: `**\(\boxed{5}\)**`

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_CHARACTERS = str.maketrans({
    **dict.fromkeys("‐‑‒–—−﹣", "-"), **dict.fromkeys("º˚°", "^\\circ "), **dict.fromkeys("·⋅∙", "\\cdot "),
    **dict.fromkeys("’‘′", "'"), **dict.fromkeys("“”", '"'), **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2061", ""),
    "×": "\\times ", "÷": "/", "∕": "/", "⁄": "/", "π": "\\pi ", "∞": "\\infty ", "≤": "\\leq ", "≥": "\\geq ",
    "≠": "\\neq ", "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "≈": "\\approx ",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "θ": "\\theta ", "λ": "\\lambda ", "φ": "\\phi ",
    "ω": "\\omega ", "σ": "\\sigma ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "…": "\\ldots ",
})

# Each pair of marks that may stand around a whole answer.
_WRAPPED = re.compile(r"(\*{1,3}|_{2}|`{1,3})(?=[^\s*_`])(.+?)\1[.,;:]*", re.DOTALL)
_BRACKETS = re.compile(r"(?<!\\)\\[()\[\]]|\$\$|\\(?:begin|end)\{(?:align|equation|gather)(?:ed)?\*?\}")
_DOLLAR = re.compile(r"(?<!\\)\$")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TRAILING = " \n\t.,;:。"

_FACTORS = {"dozen": "12", "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}",
            "trillion": "10^{12}"}
_LATEX = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})(?:\s|\\[,;:!])*(\d)", r"\1{\2}"),
    (r"\\(?:displaystyle|textstyle|limits|thinspace)(?![A-Za-z])", " "),
    (r"\\(?:text)?(?:degrees?|°)(?![A-Za-z])", r"^\\circ"),
    (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\infin(?![A-Za-z])", r"\\infty"),
    (r"&(?:nbsp|thinsp);", " "),
    # Groups of three digits: by braces or thin spaces anywhere, by plain spaces and marks where groups alone stand.
    (r"(?<=\d)(?<!\d{4})(?:\{,\}|\s*,\s*\\!\s*|\\[!,:; ]|(?<=\d)')(?=\d{3}(?!\d))", ""),
    (r"(?<![\d.,])(?<!\d )([1-9]\d{0,2}(?: \d{3})+)(?![\d/]|[ ]\d|\s*/)", lambda found: found[1].replace(" ", "")),
    # Mixed numbers: the fraction is a proper one.
    (r"(?<![\d.,])(\d+)\s+(\d{1,4})/(\d{1,4})(?![\d/])",
     lambda found: f"{found[1]}\\frac{{{found[2]}}}{{{found[3]}}}" if int(found[2]) < int(found[3]) else found[0]),
    (r"(?<=\d)(?:\s|\\[,; ])*(\\(?:text|mathrm|mbox)\s*\{)?\s*(hundred|thousand|million|billion|trillion|dozen)"
     r"(?![A-Za-z])", lambda found: f"\\cdot {_FACTORS[found[2]]}{found[1] or ''}"),
    (r"\\(?:text|mathrm|mbox)\s*\{\s*\}", ""),
    (r"(?<=[\d}])\s*(?:\\%|%|(?:\\text\s*\{)?\s*per\s?cent(?:age)?\s*\}?|pct)(?=[\s.,;:]*$)", r"\\%"),
)]
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?"
    r"|\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?|\((\d+)\)(?![\d^]))"
)
_ELLIPSIS = re.compile(r"(?<![\d.])(\d*)\.(\d+)\s*(?:\.{3}|\\[lcd]?dots?)(?![A-Za-z])")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_VULGAR = re.compile(r"(\d*)\s*([¼-¾⅐-⅞])")
_COMBINING_BAR = re.compile("((?:\\d[\u0304\u0305])+)")


@functools.lru_cache(maxsize=1 << 14)
def tidy(answer: str) -> str:
    """An answer in plain LaTeX: without display marks, leading words, closing punctuation; numbers in one writing."""
    answer = _from_unicode(answer)
    for _ in range(_MAX_PASSES):
        before, answer = answer, _unwrap(answer)
        if answer == before:
            break
    for pattern, replacement in _LATEX:
        answer = pattern.sub(replacement, answer)
    return _ELLIPSIS.sub(_of_ellipsis, _REPEATING.sub(_of_repeating, answer)).strip(" \n\t")


def plain_fonts(text: str, around: str = "") -> str:
    """The text without commands of fonts, `around` on both sides of what they held."""
    marks, opened = {}, []  # the new text of marks by their places
    for mark in _BRACES.finditer(text):
        token = mark[0]
        if token.endswith("{") and token != "\\{":
            opened.append(mark)
        elif token == "}" and opened and len((begun := opened.pop())[0]) > 1:
            marks[begun.start()] = (begun.end(), around)
            marks[mark.start()] = (mark.end(), around)
    plain, at = [], 0
    for start, (end, new) in sorted(marks.items()):
        plain += [text[at:start], new]
        at = end
    return "".join([*plain, text[at:]])


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _COMBINING_BAR.sub(lambda run: f"\\overline{{{re.sub('[^0-9]', '', run[1])}}}", text)
    text = _SUPERSCRIPT_RUN.sub(lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: f"_{{{run[0].translate(_SUBSCRIPTS)}}}", text)
    text = _VULGAR.sub(lambda part: "{}\\frac{{{}}}{{{}}}".format(
        part[1], *unicodedata.normalize("NFKC", part[2]).split("⁄")), text)
    return unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)


def _unwrap(text: str) -> str:
    text = text.strip()
    if "####" in text:
        text = text.rpartition("####")[2]
    if "\\boxed" in text or "\\fbox" in text:
        text = last_boxed(text) or text
    text = _BRACKETS.sub(" ", text)
    if len(_DOLLAR.findall(text)) % 2 == 0:  # else one of them is money
        text = _DOLLAR.sub("", text)
    text = text.strip(" \n\t")
    if _is_braced(text):
        text = text[1:-1].strip()
    if text.endswith(tuple(_TRAILING)) and not text.endswith(("...", "\\,", "\\;", "\\:")):
        text = text.rstrip(_TRAILING)
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[2]
    for bare in (text.lstrip("*_ "), plain_fonts(text)):
        if led := LEAD.match(bare):
            text = bare[led.end():].strip("*_ ")
            break
    return re.sub(r"^\s*(?:=|\\approx(?![A-Za-z])|\\implies|\\Rightarrow)\s*", "", text)


def _is_braced(text: str) -> bool:
    """Whether one pair of bare braces stands around the whole."""
    depth = 0
    for mark in _BRACE.finditer(text) if text.startswith("{") else ():
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.end() == len(text)
    return False


def _fraction(whole: str, fixed: str, block: str) -> str | None:
    """`whole.fixed` and `block` for ever, as a fraction."""
    if len(whole + fixed + block) > _MAX_DIGITS or not block:
        return None
    ends = 10 ** len(fixed) * (10 ** len(block) - 1)
    value = Fraction(int(whole + fixed + block) - int(whole + fixed or 0), ends)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)


def _of_repeating(found: re.Match) -> str:
    whole, fixed = found[1], found[2]
    block = found[6] or found[7] or f"{found[3]}{found[4]}{found[5]}"
    return _fraction(whole, fixed, block) or found[0]


def _of_ellipsis(found: re.Match) -> str:
    """`0.1666...`: the shortest block that ends the digits three times, or twice where it has two digits or more."""
    digits = found[2]
    for size in range(1, len(digits) // 2 + 1):
        block, times = digits[-size:], 3 if size == 1 else 2
        if digits.endswith(block * times):
            fixed = digits[:-size * times]
            return _fraction(found[1], fixed, block) or found[0]
    return found[0]
