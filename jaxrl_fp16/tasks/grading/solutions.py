"""Solutions, regions and ratios in one writing: `x=1 or x=2` is `1, 2`, `x<-1 or x>1` a union of intervals."""

import re

from jaxrl_fp16.tasks.grading.rewrites import plain_fonts

INFINITY = "\\infty"
_OR = r"\\(?:lor|vee)(?![A-Za-z])|(?<![A-Za-z\\])or(?![A-Za-z])"
_LISTED = re.compile(rf"(?:,(?!\d{{3}}(?!\d))|;|{_OR}|(?<![A-Za-z\\])and(?![A-Za-z]))|[(\[{{]|[)\]}}]")
_EITHER = re.compile(rf"(?:{_OR}|\\cup(?![A-Za-z]))|[(\[{{]|[)\]}}]")

_BOTH = re.compile(r"\\(?:land|wedge)(?![A-Za-z])|(?<![A-Za-z\\])and(?![A-Za-z])|[(\[{]|[)\]}]")

_RELATION = re.compile(r"=|<|>|\\(?:[lg]eq?|neq?|[lg]t|[lg]eqslant)(?![A-Za-z])")
_VALUE_OF = re.compile(r"((?:[A-Za-z]|\\[a-z]+|\([A-Za-z](?:,[A-Za-z])+\))(?:_(?:\w|\{\w+\}))?)=(.+)", re.DOTALL)
_INDEX = re.compile(r"_(?:\w|\{\w+\})")
_BOUND = r"[^<>=]+"
_BOUNDED = re.compile(rf"(?:({_BOUND})(<=?|>=?))?([A-Za-z])(?:(<=?|>=?)({_BOUND}))?")
_POINT = re.compile(r"([A-Za-z])=([^<>=,]+)")
_INTERVAL = re.compile(r"(?:[A-Za-z]\\in)?((?:\\left)?[(\[].+,.+[)\]])", re.DOTALL)
_SIGNS = [(re.compile(pattern), sign) for pattern, sign in (
    (r"\\leq?(?:slant)?(?![A-Za-z])", "<="), (r"\\geq?(?:slant)?(?![A-Za-z])", ">="),
    (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
)]

_TERM = re.compile(r"\s*(?:\d|\\(?:sqrt|frac|pi)(?![A-Za-z]))[^=<>|]*")
_GAPS = re.compile(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])")  # not that of `\pi x`
_TO = re.compile(r"(?<=\d)\s+to\s+(?=\d)")


def lists_alike(gold: str, answer: str) -> tuple[str, str]:
    """Two tidied answers, `x=1 or x=2` in them as `1, 2` where the other is values too, and `1\\pm\\sqrt2` as both of
    its values where the other lists them."""
    gold, answer = _both_signs(gold, answer), _both_signs(answer, gold)
    return _alike(gold, answer, (_values(gold), _values(answer)), lambda other, _: not _RELATION.search(other))


def regions_alike(gold: str, answer: str) -> tuple[str, str]:
    """Two tidied answers, `x<-1 or x>1` in them as a union of intervals where the other is one too."""
    return _alike(gold, answer, (_region(gold), _region(answer)),
                  lambda other, name: "\\cup" in other or name and _INTERVAL.fullmatch(other))


def ratios_alike(gold: str, answer: str) -> tuple[str, str] | None:
    """Two tidied answers, `7 to 1` beside a ratio as `7:1`. None for a ratio beside a number: `7:1` is no 7."""
    ratios = _is_ratio(gold), _is_ratio(answer)
    if ratios[0] == ratios[1]:
        return gold, answer
    other = plain_fonts(answer if ratios[0] else gold, " ").strip()
    if _TO.search(other):
        other = _TO.sub(":", other)
    elif "/" not in other and "\\frac" not in other:
        return None
    return (gold, other) if ratios[0] else (other, answer)


def _alike(gold, answer, found, reads):
    """Both as `found` has them where they are of one variable, or one of them beside another that `reads` allows."""
    if None not in found:
        names = {name for name, _ in found if name}
        return (found[0][1], found[1][1]) if len(names) < 2 else (gold, answer)
    if found[0] and reads(answer, found[0][0]):
        return found[0][1], answer
    if found[1] and reads(gold, found[1][0]):
        return gold, found[1][1]
    return gold, answer


def _parts(text: str, marks: re.Pattern) -> list[str]:
    """What stands between the separators of `marks` that lie in no bracket."""
    parts, depth, at = [], 0, 0
    for mark in marks.finditer(text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[at:mark.start()])
            at = mark.end()
    return [part for part in (_GAPS.sub("", part) for part in [*parts, text[at:]]) if part]


def _values(text: str) -> tuple[str, str] | None:
    """The variable and the values of `x=1, x=2` or `x=1 or 2`; None for other texts, one value, several variables."""
    if "=" not in text:
        return None
    parts = _parts(plain_fonts(text, " "), _LISTED)
    named = [_VALUE_OF.fullmatch(part) for part in parts]
    names = {_INDEX.sub("", found[1]) for found in named if found}
    values = [found[2] if found else part for found, part in zip(named, parts)]
    if len(parts) < 2 or not named[0] or len(names) > 1 or any(_RELATION.search(value) for value in values):
        return None
    return names.pop(), ", ".join(values)


def _both_signs(text: str, other: str) -> str:
    if text.count("\\pm") != 1 or text.lstrip().startswith("\\pm") or "\\pm" in other:
        return text
    if [len(_parts(plain_fonts(each, " "), _LISTED)) for each in (text, other)] != [1, 2]:
        return text
    return ", ".join(re.sub(r"\\pm(?![A-Za-z])", sign, text) for sign in "+-")


def _region(text: str) -> tuple[str, str] | None:
    """The variable ("" where none is named) and the union of `x<-1 or x>1`, or the interval of `x>1 and x<3`; None for
    other texts."""
    text = plain_fonts(text, " ")
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    parts = _parts(text, _EITHER)
    if len(parts) == 1:
        return _between(_parts(text, _BOTH))
    pieces = [_interval(part) for part in parts]
    if not parts or None in pieces:
        return None
    names = {name for name, _ in pieces if name}
    return (names.pop() if names else "", "\\cup".join(piece for _, piece in pieces)) if len(names) < 2 else None


def _between(parts: list[str]) -> tuple[str, str] | None:
    """The variable and the interval of two parts, one of which bounds it from below and one from above."""
    bounds = [_bounds(part) for part in parts]
    if len(bounds) != 2 or None in bounds or bounds[0][0] != bounds[1][0]:
        return None
    sides = [[bound[side] for bound in bounds if bound[side]] for side in (1, 2)]
    return (bounds[0][0], ",".join(low_high[0] for low_high in sides)) if list(map(len, sides)) == [1, 1] else None


def _interval(part: str) -> tuple[str, str] | None:
    if found := _INTERVAL.fullmatch(part):
        return "", found[1]
    if found := _POINT.fullmatch(part):
        return found[1], f"\\{{{found[2]}\\}}"
    if bounds := _bounds(part):
        name, low, high = bounds
        return name, f"{low or '(-' + INFINITY},{high or INFINITY + ')'}"
    return None


def _bounds(part: str) -> tuple[str, str, str] | None:
    """The variable and its bounds, as `[2` and `3)`, "" for none; None for what is no such inequality."""
    found = _BOUNDED.fullmatch(part)
    if not found or not (found[2] or found[4]) or found[2] and found[4] and found[2][0] != found[4][0]:
        return None
    low = high = ""
    for sign, value, below in ((found[2], found[1], "<"), (found[4], found[5], ">")):
        if sign and sign[0] == below:
            low = f"{'[' if '=' in sign else '('}{value}"
        elif sign:
            high = f"{value}{']' if '=' in sign else ')'}"
    return found[3], low, high


def _is_ratio(text: str) -> bool:
    parts = plain_fonts(text, " ").replace("\\!", "").replace("\\colon", ":").split(":")
    return len(parts) > 1 and all(_TERM.fullmatch(part) for part in parts)
