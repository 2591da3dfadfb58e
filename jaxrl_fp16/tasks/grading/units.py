"""The unit behind a number, in one writing: `5\\text{ feet}`, `5 ft`, `$18`, `9 m/s^2`."""

import re

from jaxrl_fp16.tasks.grading.rewrites import FONTS, plain_fonts

Unit = tuple[tuple[str, int], ...]  # words and their powers, sorted; () where none is named

_NAMES = """
m meter meters metre metres
cm centimeter centimeters centimetre centimetres
mm millimeter millimeters millimetre millimetres
km kilometer kilometers kilometre kilometres
nm nanometer nanometers
um micrometer micrometers micron microns
in inch inches
ft foot feet
yd yard yards
mi mile miles
ly lightyear lightyears
pc parsec parsecs
kpc kiloparsec kiloparsecs
mpc megaparsec megaparsecs
au
angstrom angstroms
g gram grams gm gms gramme grammes
kg kilogram kilograms kgs
mg milligram milligrams
lb lbs pound pounds
oz ounce ounces
ton tons
s sec secs second seconds
ms millisecond milliseconds
min mins minute minutes
h hr hrs hour hours
day days
week weeks wk wks
month months
year years yr yrs
l liter liters litre litres
ml milliliter milliliters millilitre millilitres
gal gallon gallons
qt quart quarts
pt pint pints
cup cups
dollar dollars usd
cent cents
euro euros eur
penny pennies pence
rupee rupees rs
degree degrees deg
rad radian radians
celsius
fahrenheit
n newton newtons
j joule joules
kj kilojoule kilojoules
ev
kev
w watt watts
kw kilowatt kilowatts
v volt volts
k kelvin kelvins
c coulomb coulombs
hz hertz
pa pascal pascals
mol mole moles
cal calorie calories
kcal kilocalorie kilocalories
erg ergs
ohm ohms
acre acres
hectare hectares
"""
_CANONICAL = {name: line.split()[0] for line in _NAMES.strip().splitlines() for name in line.split()}
_WHOLE = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "kmph": "km/hour", "fps": "feet/second"}
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_FILLERS = {"unit", "units", "the", "of", "total", "altogether", "long", "old", "tall", "wide", "away"}
_PER = {"/", "per", "a", "an", "each", "every"}
# Words behind a number that are no unit of it: the answer says something else.
_NOT_UNITS = {"or", "and", "if", "when", "where", "not", "is", "are", "mod", "pm", "am", "to", "times", "plus", "minus",
              "sin", "cos", "tan", "log", "ln", "exp", "pi", "sqrt", "choose", "for", "with", "over", "base", "out",
              "but", "than", "only", "more", "less", "divided", "by", "alpha", "beta", "gamma", "theta",
              "lambda", "phi", "omega", "sigma", "mu"}
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_ASIDE = re.compile(r"(?<=\d)\s+\(([A-Za-z][A-Za-z ]{2,})\)\s*$")  # `12 (cookies)`
_IN_ALL = re.compile(r"\s+in\s+(?:all|total)\s*$")
_LETTERS = {"m", "s", "g", "h", "L"}  # a unit without a font, in an answer: `5 m`
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_VALUE_END = r"(?:(?<=[\d})!])|(?<=\\pi)(?=\s))"
_WORDS = r"[A-Za-z][A-Za-z.]*"
_EXPONENT = r"(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(
    rf"{_VALUE_END}(?P<gap>\s*)(?P<unit>{_WORDS}{_EXPONENT}(?:(?:\s+|\s*[/*]\s*){_WORDS}{_EXPONENT}){{0,5}})\s*$"
)
_DEGREES = re.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:([CF])\s*)?$")
_MONEY = re.compile(r"^\s*([-+]?)\s*(\\?\$|€|£|\\(?:pounds|euro)(?![A-Za-z]))\s*(?=[\d.(\\-])")
_PERCENT = re.compile(r"\\?%\s*$")
_POWER = re.compile(rf"({_WORDS})(?:\^\{{?(-?\d)\}}?)?")
_RATIO = re.compile(rf"\\frac\s*\{{\s*{FONTS}([^{{}}]*)\}}\s*\}}\s*\{{\s*{FONTS}([^{{}}]*)\}}\s*\}}")
_SPACES = re.compile(r"(?<!\\)\\[,;: !]|\\(?:q?quad|cdot)(?![A-Za-z])|~")


def split_unit(text: str, letters: bool = False) -> tuple[str, Unit]:
    """A tidied answer as its value and the unit that it names; a variable, as in `5t`, is part of the value.

    letters: whether a letter alone, behind a space, is the unit that it can be: `5 m`.
    """
    text = _RATIO.sub(r"\\text{ \1/\2 }", text)
    if _PERCENT.search(text):
        return text, (("%", 1),)
    if money := _MONEY.match(text):
        name = {"€": "euro", "\\euro": "euro", "£": "pound", "\\pounds": "pound"}.get(money[2], "dollar")
        value, unit = split_unit(money[1] + text[money.end():], letters)
        return value, _unit([(name, 1)]) if not unit else unit
    degrees = _DEGREES.search(plain_fonts(text))
    if degrees and not _TRIGONOMETRY.search(text):
        name = {"C": "celsius", "F": "fahrenheit"}.get(degrees[1], "degree")
        return plain_fonts(text)[:degrees.start()], ((name, 1),)
    spaced = _SPACES.sub(" ", plain_fonts(text, " "))
    spaced = _ASIDE.sub(r" \1", _IN_ALL.sub("", re.sub(r"\s+(?=\^)", "", spaced).rstrip(" .")))
    found = _UNIT.search(spaced)
    if not found or not re.search(r"\d|\\pi", spaced[:found.start()]):
        return text, ()
    variables = _VARIABLE.search(spaced[:found.start()])
    alone = re.search(FONTS, text) or letters and not variables and found["unit"] in _LETTERS
    unit = _read(found["unit"], 3 if not found["gap"] else 1 if alone else 2)
    return (text, ()) if unit is None else (spaced[:found.start()].strip(), unit)


def agree(one: Unit, other: Unit) -> bool:
    """Whether two answers may have these units: equal ones, or one that is not named. Words of no table may differ
    in number of words: `5 apples` and `5 red apples`."""
    if not one or not other or one == other:
        return True
    known = {*_CANONICAL.values(), "%"}
    words = [{name for name, _ in unit} for unit in (one, other)]
    return bool(words[0] & words[1]) and not (words[0] | words[1]) & known


def _unit(parts: list[tuple[str, int]]) -> Unit:
    powers: dict[str, int] = {}
    for name, power in parts:
        powers[name] = powers.get(name, 0) + power
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def _read(text: str, least: int) -> Unit | None:
    """The unit of words; None where they are none: letters of a product, or a sentence that goes on.

    least: letters of a word of the table that is one; 3 stands for 2 where no space tells it from variables, and
    words that the table lacks are none there.
    """
    parts, sign, following, seen = [], 1, 1, []
    text = re.sub(r"([A-Za-z])\.", r"\1", text)
    text = " ".join(_WHOLE.get(word.lower(), word) for word in text.split()).replace("/", " / ")
    for token in text.split():
        if token.lower() in _PER:
            sign = -1 if parts else 1
            continue
        match = _POWER.fullmatch(token.strip("*"))
        if match is None:
            return None
        word, power = match[1].lower(), int(match[2] or 1)
        if word in _NOT_UNITS:
            return None
        if word in _POWERS:
            if word in ("squared", "cubed") and parts:
                name, before = parts[-1]
                parts[-1] = (name, before * _POWERS[word])
            else:
                following = _POWERS[word]
            continue
        seen.append(word)
        if word not in _FILLERS:
            parts.append((_CANONICAL.get(word) or _singular(word), sign * power * following))
            following = 1
    unknown = [word for word in seen if word not in _CANONICAL and word not in _FILLERS]
    if least == 3 and unknown or any(len(word) < 3 for word in unknown):
        return None
    if any(len(word) < min(least, 2) for word in seen):
        return None
    return _unit(parts) if seen else None


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
