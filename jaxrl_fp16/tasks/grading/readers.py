"""Where the answer is in a response: one function a reader, from a text to the answer in it, "" where there is none."""

import re
from typing import Callable

THINK, END_OF_THINK = "<think>", "</think>"

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)(?![A-Za-z])|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"\s*((?:\{[^{}]*\}|[^\s${}])+)")  # what follows `\boxed` without a brace

# The answer after words such as `The answer is`, in an answer of a sentence.
LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|and|finally)[,:]?\s+)*"
    r"(?:(?:the|my|our|your)\s+)?(?:(?:final|correct|right|numerical)\s+)*"
    r"(?:answer|result|solution|value)\s*(?:is|are|equals|would be|will be|:|=)[\s:]*",
    re.IGNORECASE,
)
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z{])")
WORDS_OF_A_SENTENCE = 4

_DIGITS = r"[0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3})+(?![0-9])|[0-9]+"
_GROUP_MARKS = re.compile(r",|\{,\}|\\,")
# A sign belongs to a number unless what it is taken from stands before it: `3-7` is a range or a difference.
_SIGN = r"(?:(?<![0-9A-Za-z)\]}.,])[-+])?"
_UNSIGNED = rf"(?:(?:{_DIGITS})(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
_LATEX_PART = rf"(?:\{{\s*-?(?:{_DIGITS})\s*\}}|[0-9])"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?P<whole>[0-9]+\s*)?\\[dtc]?frac\s*(?P<above>{_LATEX_PART})\s*(?P<below>{_LATEX_PART})"
    rf"|(?P<mixed>{_SIGN}[0-9]+\s+[0-9]+\s*/\s*[0-9]+)(?![0-9]*\s*/|[.,]?[0-9])"
    rf"|(?P<ratio>{_SIGN}(?:{_DIGITS})\s*/\s*(?:{_DIGITS}))(?![0-9]*\s*/|\.?[0-9])"
    rf"|(?P<scientific>{_SIGN}{_UNSIGNED}(?:[eE][-+]?[0-9]+(?![0-9A-Za-z])"
    r"|\s*(?:\\times|\\cdot|[x*·])\s*10\s*(?:\^|\*\*)\s*(?:\{\s*[-+]?[0-9]+\s*\}|[-+]?[0-9]+)))"
    rf"|(?P<plain>{_SIGN}{_UNSIGNED})"
)
_TIMES_TEN = re.compile(r"\s*(?:\\times|\\cdot|[x*·])\s*10\s*(?:\^|\*\*)\s*\{?\s*([-+]?[0-9]+)\s*\}?")
_CHAIN = re.compile(r"(?<![0-9])[0-9]+(?:\s*/\s*[0-9]+){2,}")  # a date, not a fraction
_SAME_SIGNS = str.maketrans({"−": "-", "–": "-", "‑": "-", "×": "x", "\u00a0": " ", "\u2009": " ", "\u202f": " "})


def finished_thoughts(text: str) -> str:
    """A response without the thoughts that it began with `<think>` and did not end."""
    before, begun, after = text.rpartition(THINK)
    return before if begun and END_OF_THINK not in after else text


def last_boxed(text: str) -> str:
    """The content of the last `\\boxed{}` whose braces close, or of a last `\\boxed 5`; escaped braces do not count."""
    boxed, best, stack = "", -1, []
    for token in _BOX_TOKEN.finditer(text):
        mark = token.group()
        if mark.endswith("{") and mark != "\\{":
            stack.append(token)
        elif mark == "}" and stack:
            opened = stack.pop()
            if len(opened.group()) > 1 and opened.start() > best:
                best, boxed = opened.start(), text[opened.end():token.start()]
        elif mark.startswith(("\\boxed", "\\fbox")) and token.start() > best:
            if bare := _BARE.match(text, token.end()):
                best, boxed = token.start(), bare[1].rstrip(".,;:")
    return boxed


def boxed(text: str) -> str:
    """The last box; one in thoughts that have no end does not count."""
    return last_boxed(finished_thoughts(text))


def boxed_after_think(text: str) -> str:
    """The last box after the end of the thoughts; thoughts without an end hold no answer."""
    return last_boxed(text.partition(END_OF_THINK)[2])


def answer_tag(text: str) -> str:
    """What the last closed `<answer>` holds: its last box where it has one, the last number of a sentence."""
    body, closed, _ = finished_thoughts(text).rpartition("</answer>")
    _, opened, inside = body.rpartition("<answer>")
    if not (closed and opened):
        return ""
    return last_boxed(inside) if "\\boxed" in inside else _of_sentence(inside.strip())


def _of_sentence(text: str) -> str:
    led = LEAD.match(text)
    rest = text[led.end():].strip() if led else text
    words = _PLAIN_WORD.findall(rest)
    if len(words) >= WORDS_OF_A_SENTENCE and (number := last_number(rest)):
        return number
    return rest.removesuffix(".") if led else rest


def last_number(text: str) -> str:
    """The last number of a text, as `-1234.5`, `3/4`, `2 1/3` or `6.02e23`: without thousands separators."""
    text = _CHAIN.sub(lambda chain: chain.group().replace("/", " ; "), finished_thoughts(text).translate(_SAME_SIGNS))
    last = None
    for last in _NUMBER.finditer(text):
        pass
    if last is None:
        return ""
    if last["above"]:
        return _of_fraction(last)
    number = _GROUP_MARKS.sub("", last.group())
    if last["mixed"] or last["ratio"]:
        return _proper(re.sub(r"\s*/\s*", "/", " ".join(number.split())))
    return _TIMES_TEN.sub(r"e\1", number)


def _of_fraction(match: re.Match) -> str:
    above, below = (_GROUP_MARKS.sub("", match[part]).strip("{} ") for part in ("above", "below"))
    signs = (match["sign"] + above[:1] + below[:1]).count("-")
    whole = f"{match['whole'].strip()} " if match["whole"] else ""
    return _proper(f"{'-' if signs % 2 else ''}{whole}{above.lstrip('-')}/{below.lstrip('-')}")


def _proper(fraction: str) -> str:
    """`2 1/3` as it is, and `7/3` of `2 7/3`, which is no mixed number."""
    whole, mixed, ratio = fraction.rpartition(" ")
    above, below = (part.lstrip("-").lstrip("0") for part in ratio.split("/"))
    return fraction if not mixed or (len(above), above) < (len(below), below) else ratio


READERS: dict[str, Callable[[str], str]] = {
    "boxed": boxed,
    "boxed_after_think": boxed_after_think,
    "answer_tag": answer_tag,
    "last_number": last_number,
    "text": lambda text: text,
}
