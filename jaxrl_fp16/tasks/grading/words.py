"""Whole numbers in English words: `twelve`, `minus twenty-one`, `one hundred and five`."""

import re

_SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
          "seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {**{word: value for value, word in enumerate(_SMALL)},
           **{word: 10 * ten for ten, word in enumerate(_TENS, 2)}}
_THOUSANDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def number_of_words(text: str) -> int | None:
    """The number that a text is in words alone; None for any other text."""
    sign, _, rest = text.strip().casefold().partition(" ")
    negative = sign in ("minus", "negative")
    words = re.split(r"\s+|(?<=y)-(?=[a-z])", rest.strip() if negative else text.strip().casefold())
    total, limit = 0, None  # of what comes next: a million is not followed by a million
    while words:
        at = next((place for place, word in enumerate(words) if word in _THOUSANDS), None)
        factor = 1 if at is None else _THOUSANDS[words[at]]
        part = _below_thousand(words if at is None else words[:at])
        if part is None or limit is not None and factor >= limit:
            return None
        total, limit = total + part * factor, factor
        words = [] if at is None else words[at + 1:]
        words = words[1:] if words[:1] == ["and"] and len(words) > 1 else words
    return -total if negative else total


def _below_thousand(words: list[str]) -> int | None:
    hundreds = 0
    if words[1:2] == ["hundred"] and _VALUES.get(words[0], 0) in range(1, 10):
        hundreds, words = 100 * _VALUES[words[0]], words[2:]
        if not words:
            return hundreds
        words = words[1:] if words[0] == "and" else words
    values = [_VALUES.get(word) for word in words]
    if len(values) == 2 and None not in values and values[0] >= 20 and 0 < values[1] < 10:
        return hundreds + sum(values)
    if len(values) == 1 and values[0] is not None and not (hundreds and values == [0]):
        return hundreds + values[0]
    return None
