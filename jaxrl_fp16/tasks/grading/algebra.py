"""Equality by algebra, in worker processes alone: nothing here bounds its time or memory.

`math_verify` reads and compares. It rounds what it compares (`1/2^99` is `1/2^98` to it), so its yes is checked
here: by rational numbers, or by numbers of enough digits.
"""

import functools
import logging
from typing import Any, Callable, Sequence

from jaxrl_fp16.tasks.grading.answers import comparable

DIGITS = 400            # to which a difference of irrational numbers is followed before it counts as 0
ROUNDED = 1e-5          # relative distance to a decimal; what it must be rounded to is `math_verify`'s to say
BINARY = 1e-12          # the same where the other is whole: the error of a float alone
_POINTS = ((7, 5), (12, 11), (31, 13))  # numerators and denominators of the first variable's values


def open_verifier() -> Callable[[str, str], bool]:
    """`verify(gold, answer) -> bool` by algebra. For worker processes: nothing bounds its time or memory."""
    import math_verify
    from latex2sympy2_extended.math_normalization import NormalizationConfig

    # Its own time-outs are off: they use SIGALRM, which does not interrupt what hangs in C. It logs that.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # LaTeX alone: its other reader hands text to SymPy's `parse_expr`, which evaluates Python. Units are off: it would
    # take the variable of `5t` for one.
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]

    @functools.lru_cache(maxsize=1 << 12)
    def parse_gold(text: str):
        return parse(text)

    def parse(text: str):
        # First match: what cannot be read as a whole is not searched for parts that can.
        return math_verify.parse(f"\\boxed{{{text.strip().strip('$')}}}", latex, parsing_timeout=None,
                                 extraction_mode="first_match")

    def verify(gold: str, answer: str) -> bool:
        pair = comparable(gold, answer)
        if pair is None:
            return False
        return any(
            math_verify.verify(one, other, allow_set_relation_comp=True, timeout_seconds=None) and agree(one, other)
            for one in parse_gold(pair[0]) for other in parse(pair[1])
        )

    verify("x+1", "1+x")  # builds the parser's tables now, not within the first answer's deadline
    return verify


def agree(gold: Any, answer: Any) -> bool:
    """False where two parsed answers that `math_verify` holds for equal are shown to differ."""
    import sympy

    if isinstance(gold, str) or isinstance(answer, str) or gold == answer:
        return True
    gold, answer = _of_one_kind(gold, answer)
    if _is_relation(gold) and _is_relation(answer):
        return _relations_agree(gold, answer)
    ours, theirs = _parts(gold), _parts(answer)
    if ours is not None and theirs is not None:
        in_order = not isinstance(gold, sympy.Set) or isinstance(gold, sympy.Interval)
        return _all_agree(ours, theirs, in_order)
    if ours is not None or theirs is not None:
        (only,), other = (ours or theirs, answer) if len(ours or theirs) == 1 else ((None,), None)
        return only is None or agree(only, other if ours is not None else gold)
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _expressions_agree(gold, answer)
    return True


def _of_one_kind(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Of an equation and a value, and of an inequality and a set, what `math_verify` compared."""
    import sympy

    def value(relation):
        return getattr(relation, "_unsorted_args", (relation,))[-1].rhs

    if _is_relation(gold) != _is_relation(answer):
        one, other = (gold, answer) if _is_relation(gold) else (answer, gold)
        try:
            one = one.as_set() if isinstance(other, sympy.Set) and not _is_equation(one) else value(one)
        except Exception:  # of a relation in several variables there is no set; it has none to compare
            return gold, gold
        return (one, other) if _is_relation(gold) else (other, one)
    return gold, answer


def _is_relation(answer: Any) -> bool:
    import sympy

    parts = getattr(answer, "_unsorted_args", None) if isinstance(answer, sympy.logic.boolalg.Boolean) else None
    if parts is None and isinstance(answer, sympy.And):
        parts = answer.args
    return all(isinstance(part, sympy.core.relational.Relational) for part in parts or (answer,))


def _is_equation(answer: Any) -> bool:
    import sympy

    return all(isinstance(part, sympy.Eq) for part in getattr(answer, "_unsorted_args", (answer,)))


def _parts(answer: Any) -> Sequence[Any] | None:
    import sympy

    if isinstance(answer, sympy.MatrixBase):
        return answer.flat()
    if isinstance(answer, sympy.Interval):
        return answer.start, answer.end
    if isinstance(answer, (sympy.FiniteSet, sympy.Tuple, sympy.Union)):
        return answer.args
    return None


def _all_agree(ours: Sequence[Any], theirs: Sequence[Any], in_order: bool) -> bool:
    if len(ours) != len(theirs):
        return False
    if in_order:
        return all(agree(one, other) for one, other in zip(ours, theirs))
    left = list(theirs)
    for one in ours:
        match = next((index for index, other in enumerate(left) if _same_type(one, other) and agree(one, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_type(one: Any, other: Any) -> bool:
    return (_parts(one) is None) == (_parts(other) is None) and _is_relation(one) == _is_relation(other)


def _relations_agree(gold: Any, answer: Any) -> bool:
    """Of relations: part by part of a chain, equal right sides of one left side, or sides in one proportion."""
    chains = [getattr(side, "_unsorted_args", None) for side in (gold, answer)]
    if None not in chains and len(chains[0]) == len(chains[1]):
        return all(_relations_agree(one, other) for one, other in zip(*chains))
    if chains != [None, None]:
        return True
    if gold.lhs == answer.lhs:
        return agree(gold.rhs, answer.rhs)
    try:
        one, other = gold.lhs - gold.rhs, answer.lhs - answer.rhs
        values = [(one.xreplace(at).doit(), other.xreplace(at).doit()) for at in _points(one, other)]
        if all(_numbers_agree(a * values[0][1], values[0][0] * b) for a, b in values[1:]):
            return True
        return _solutions_agree(gold, answer)
    except Exception:  # sides that cannot be subtracted: sets, words
        return True


def _solutions_agree(gold: Any, answer: Any) -> bool:
    import sympy

    if len(gold.free_symbols) != 1 or not _is_equation(gold):
        return True
    (symbol,) = gold.free_symbols
    return _all_agree(sympy.solve(gold, symbol), sympy.solve(answer, symbol), in_order=False)


def _points(*sides: Any) -> list[dict]:
    """Values for the variables, rational and positive; one empty point where there are none."""
    import sympy

    symbols = sorted(set().union(*(side.free_symbols for side in sides)), key=str)
    if not symbols:
        return [{}]
    return [{symbol: sympy.Rational(above, below) + place for place, symbol in enumerate(symbols)}
            for above, below in _POINTS]


def _expressions_agree(gold: Any, answer: Any) -> bool:
    for at in _points(gold, answer):
        try:
            one, other = gold.xreplace(at).doit(), answer.xreplace(at).doit()
            if not _numbers_agree(one, other):
                return False
        except (TypeError, ValueError, ZeroDivisionError, AttributeError, NotImplementedError):
            continue  # what has no number shows nothing
    return True


def _numbers_agree(one: Any, other: Any) -> bool:
    """False where two numbers are shown to differ: exactly, or to the digits of a decimal where one is a decimal."""
    import sympy

    difference = one - other
    if difference.is_Rational:
        return difference == 0
    if one.has(sympy.Float) or other.has(sympy.Float):
        tolerance = BINARY if one.is_Integer or other.is_Integer else ROUNDED
        distance, size = (abs(sympy.N(number, 30)) for number in (difference, one))
        return not (distance.is_number and size.is_number) or bool(distance <= tolerance * size)
    close = difference.evalf(2, maxn=DIGITS)
    return all(not part.is_Float or part._prec == 1 or part == 0 for part in close.as_real_imag())
