"""Whether two parsed answers are the same mathematics: values, lists, tuples, sets, vectors, equations, inequalities.

    same(parse(r"2\\sqrt{3}"), parse(r"\\sqrt{12}"))  ->  True

Takes what math-verify's parser returns (sympy objects, mostly not evaluated). The answer is True, False, or None where
both could be meant: other names, another order where none was asked for, half of an equation. Nothing is rounded but
decimals that stand for what has none.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import verify
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]
from sympy.core.relational import Relational  # type: ignore[import-untyped]

from distill.verifiers.answers import rounds_to

CLOSE_ENOUGH = Fraction(1, 10**6)
"""Relative difference up to which a decimal stands for a value that has no finite decimal."""
LONGEST_LIST = 12
"""Entries of the longest list that is compared in any order."""


def same(gold: Any, given: Any) -> bool | None:
    """Whether two parsed answers are equal; None where it cannot be told. May raise."""
    if _is_relation(gold) or _is_relation(given):
        return _same_relation(gold, given)
    if any(isinstance(answer, sympy.Set | sympy.Tuple | sympy.MatrixBase) for answer in (gold, given)):
        return _same_collection(gold, given)
    if isinstance(gold, sympy.Expr) and isinstance(given, sympy.Expr):
        return _same_value(gold, given)
    return None


# --- values ---------------------------------------------------------------------------------------------------------

_POINTS = tuple(
    tuple(sympy.Rational(value) for value in row.split())
    for row in (
        "2 3 5 7 4 9", "7 4 3 2 6 5", "5/2 7/3 1/3 9/4 3/2 4/5", "1/7 3/5 11/4 2/9 8/3 5/6",
        "-3 2 -2 5 -7 4", "-5/3 -1/2 7/5 -3/4 -9/7 -2/5", "11/10 -4/3 -8/5 6/7 2/3 -7/4", "8 6 9 3 2 1",
    )
)  # fmt: skip
"""Values for up to six variables: integers for those who count, fractions and negative ones for all others."""
ENOUGH_POINTS = 2
"""Points at which two expressions with variables must be real and equal."""
_DIGITS = 40
_EQUAL = sympy.Rational(1, 10**25)
_NOTHING = sympy.Rational(1, 10**100)
"""What is left of a zero that was evaluated to `_DIGITS` digits."""


def _same_value(gold: Any, given: Any) -> bool | None:
    """Compare two expressions at a number of points: exactly where they are rational there, else to 25 digits.

    Points where both are real count; where there are none, complex values do. An answer that a reference in decimals
    may have been rounded from cannot be told.
    """
    if gold == given:
        return True
    if gold.is_infinite or given.is_infinite:
        return False
    if any(expression.has(AppliedUndef) for expression in (gold, given)):
        return _verified(gold, given)
    decimals = gold.has(sympy.Float), given.has(sympy.Float)
    tolerance = sympy.Rational(CLOSE_ENOUGH) if decimals[0] != decimals[1] else _EQUAL
    gold, given = _exact(gold), _exact(given)
    variables = sorted(gold.free_symbols | given.free_symbols, key=str)
    if len(variables) > len(_POINTS[0]):
        return None
    agreed = _agreement(gold, given, variables, tolerance)
    if agreed is False and not variables and decimals == (True, False):
        return None if _rounds_to(given, gold) else False
    if agreed is False and gold.free_symbols != given.free_symbols and _same_but_for_names(gold, given, tolerance):
        return None
    return agreed


def _agreement(gold: Any, given: Any, variables: Sequence[Any], tolerance: Any) -> bool | None:
    real: list[bool] = []
    complex_: list[bool] = []
    for one, other in _values(gold, given, variables):
        (real if one.is_real and other.is_real else complex_).append(_close(one, other, tolerance))
        if real and not real[-1]:
            return False
    if len(real) >= (ENOUGH_POINTS if variables else 1):
        return True
    return all(complex_) if complex_ else None


def _values(gold: Any, given: Any, variables: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Both values at each point where both have one."""
    for point in _POINTS if variables else _POINTS[:1]:
        values = dict(zip(variables, point))
        one, other = _value(gold, values), _value(given, values)
        if one is not None and other is not None:
            yield one, other


def _exact(expression: Any) -> Any:
    """Decimals as fractions, percent signs carried out, the letter i as the imaginary unit."""
    exact = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    exact |= {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    hundredths = {part: part.args[0] for part in expression.atoms(sympy.UnevaluatedExpr)}
    return expression.xreplace(exact | hundredths)


def _value(expression: Any, values: dict[Any, Any]) -> Any | None:
    """A number, exact if it is rational; None where there is none."""
    value = expression.xreplace(values).doit()
    if value.is_Rational:
        return value
    value = sympy.N(value, _DIGITS)
    return value if value.is_number and value.is_finite and not value.has(sympy.nan, sympy.zoo) else None


def _close(one: Any, other: Any, tolerance: Any) -> bool:
    if one.is_Rational and other.is_Rational and tolerance == _EQUAL:
        return bool(one == other)
    difference, size = abs(one - other), max(abs(one), abs(other))
    nothing = [abs(value) < _NOTHING and getattr(value, "_prec", 0) <= 1 for value in (one, other)]
    if any(nothing):  # zero, as far as could be seen
        return bool(size < _NOTHING)
    return bool(difference <= tolerance * size)


def _rounds_to(exact: Any, rounded: Any) -> bool:
    value = sympy.N(exact, _DIGITS)
    return bool(rounded.is_Rational and value.is_real) and rounds_to(Fraction(str(value)), Fraction(str(rounded)))


def _same_but_for_names(gold: Any, given: Any, tolerance: Any) -> bool:
    """Whether other names for the answer's variables make it the reference (`+ C` and `+ K`)."""
    names, others = sorted(gold.free_symbols, key=str), sorted(given.free_symbols, key=str)
    if len(names) != len(others) or len(names) > 3:
        return False
    renamed = (given.xreplace(dict(zip(others, order))) for order in itertools.permutations(names))
    return any(_agreement(gold, answer, names, tolerance) for answer in renamed)


# --- lists, tuples, sets, vectors -----------------------------------------------------------------------------------


def _same_collection(gold: Any, given: Any) -> bool | None:
    one, other = _entries(gold), _entries(given)
    if one is None or other is None:
        return _same_region(gold, given)
    if isinstance(gold, sympy.MatrixBase) and isinstance(given, sympy.MatrixBase) and gold.shape != given.shape:
        return None if _in_order(one, other) else False  # a row for a column
    if _has_order(gold) and _has_order(given):
        return _in_order(one, other)
    if _names(one) and _names(one) == _names(other):
        return _in_order(*(sorted(entries, key=lambda entry: str(entry.lhs)) for entries in (one, other)))
    if _has_order(gold) != _has_order(given) or _names(one) != _names(other):
        # a list for a tuple, or values for named ones: right in the same order, perhaps in another
        return _in_order(one, other) or (None if _in_any_order(one, other) is not False else False)
    return _in_any_order(one, other)


def _entries(answer: Any) -> list[Any] | None:
    """The parts of a list, tuple, matrix or pair; None for other sets. A single value is a list of one."""
    if isinstance(answer, sympy.FiniteSet):
        return list(getattr(answer, "_unsorted_args", answer.args))
    if isinstance(answer, sympy.Tuple):
        return list(answer.args)
    if isinstance(answer, sympy.MatrixBase):
        return list(answer)
    if _is_pair(answer):
        return [answer.start, answer.end]
    return None if isinstance(answer, sympy.Set) else [answer]


def _is_pair(answer: Any) -> bool:
    """Open intervals are written like points."""
    return (
        isinstance(answer, sympy.Interval)
        and bool(answer.left_open and answer.right_open)
        and not any(end.has(sympy.oo, -sympy.oo) for end in (answer.start, answer.end))
    )


def _has_order(answer: Any) -> bool:
    return isinstance(answer, sympy.Tuple | sympy.MatrixBase) or _is_pair(answer)


def _names(entries: Sequence[Any]) -> frozenset[str]:
    """The names that entries give to their values, where they differ: `x = 1, y = 2`."""
    names = [str(entry.lhs) for entry in entries if isinstance(entry, sympy.Eq) and _is_name(entry.lhs)]
    return frozenset(names) if 1 < len(set(names)) == len(entries) else frozenset()


def _in_order(gold: Sequence[Any], given: Sequence[Any]) -> bool | None:
    if len(gold) != len(given):
        return False
    return _all(same(one, other) for one, other in zip(gold, given))


def _in_any_order(gold: Sequence[Any], given: Sequence[Any]) -> bool | None:
    """Whether each entry of either list is in the other one."""
    if max(len(gold), len(given)) > LONGEST_LIST:
        return _in_order(gold, given) or None
    table = [[same(one, other) for other in given] for one in gold]
    rows = [True if True in row else None if None in row else False for row in table]
    columns = [True if True in column else None if None in column else False for column in zip(*table)]
    return _all([*rows, *columns])


def _all(parts: Iterable[bool | None]) -> bool | None:
    found = list(parts)
    return False if False in found else None if None in found else True


def _same_region(gold: Any, given: Any) -> bool | None:
    """Intervals, their unions, and what is left out of them."""
    if not (isinstance(gold, sympy.Set) and isinstance(given, sympy.Set)):
        return False
    if isinstance(gold, sympy.Interval) and isinstance(given, sympy.Interval):
        if (gold.left_open, gold.right_open) != (given.left_open, given.right_open):
            return False
        return _in_order([gold.start, gold.end], [given.start, given.end])
    one, other = gold.doit(), given.doit()
    if one == other or one.symmetric_difference(other).is_empty:
        return True
    if isinstance(one, sympy.Union) and isinstance(other, sympy.Union):
        return _in_any_order(one.args, other.args)
    return None if one.free_symbols or other.free_symbols else False


# --- equations and inequalities -------------------------------------------------------------------------------------


def _is_relation(answer: Any) -> bool:
    return isinstance(answer, Relational | sympy.And)


def _same_relation(gold: Any, given: Any) -> bool | None:
    """Equations by their values where a name stands on the left, else up to a factor; inequalities as sets."""
    if any(_contradicts_itself(answer) for answer in (gold, given)):
        return False
    if isinstance(gold, sympy.Eq) and isinstance(given, sympy.Eq) and not _of_one_name(gold, given):
        return _same_equation(gold, given)
    expected, found = _named_value(gold), _named_value(given)
    if expected is not None and found is not None:
        return same(expected, found)
    if expected is not None and not _is_relation(given):
        return same(expected, given)
    if found is not None and not _is_relation(gold):
        return same(gold, found)
    if _is_equation(gold) != _is_equation(given):
        return _value_of_something(gold, given)
    one, other = _region(gold), _region(given)
    if one is not None and other is not None:
        return _same_region(one, other)
    return _verified(gold, given) if _is_relation(gold) and _is_relation(given) else False


def _parts_of(answer: Any) -> list[Any]:
    """The relations of a chain like `a = b = c`."""
    return list(getattr(answer, "_unsorted_args", answer.args)) if isinstance(answer, sympy.And) else [answer]


def _is_equation(answer: Any) -> bool:
    return all(isinstance(part, sympy.Eq) for part in _parts_of(answer))


def _is_name(left: Any) -> bool:
    """Whether this is a name for a value: `x`, `f(2)`, `AB`, `(x, y)`."""
    if isinstance(left, sympy.Symbol | AppliedUndef):
        return True
    return isinstance(left, sympy.Mul | sympy.Tuple) and all(isinstance(part, sympy.Symbol) for part in left.args)


def _of_one_name(gold: Any, given: Any) -> bool:
    return _is_name(gold.lhs) and bool(gold.lhs == given.lhs)


def _named_value(answer: Any) -> Any | None:
    """What a chain of equations that starts with a name ends in, or one of numbers only."""
    if not (_is_relation(answer) and _is_equation(answer)):
        return None
    parts = _parts_of(answer)
    return parts[-1].rhs if _is_name(parts[0].lhs) or not answer.free_symbols else None


def _contradicts_itself(answer: Any) -> bool:
    """`4 = 5`, or `x = 4 = 5`."""
    if not (_is_relation(answer) and _is_equation(answer)):
        return False
    sides = [parts.lhs for parts in _parts_of(answer)[:1]] + [part.rhs for part in _parts_of(answer)]
    values = [side for side in sides if isinstance(side, sympy.Expr) and not side.has(sympy.Symbol, AppliedUndef)]
    return any(_same_value(one, other) is False for one, other in zip(values, values[1:]))


def _value_of_something(gold: Any, given: Any) -> bool | None:
    """`2x = 10` for 10 may be what was asked for or half done."""
    one, other = (_parts_of(answer)[-1].rhs if _is_relation(answer) else answer for answer in (gold, given))
    return None if _is_equation(gold if _is_relation(gold) else given) and same(one, other) is not False else False


def _same_equation(gold: Any, given: Any) -> bool | None:
    """Two equations are the same if one is a multiple of the other; of other names for the same value none knows."""
    if all(isinstance(side, sympy.Expr) for side in (gold.lhs, gold.rhs, given.lhs, given.rhs)):
        one, other = _exact(gold.lhs - gold.rhs), _exact(given.lhs - given.rhs)
        if one.free_symbols == other.free_symbols and _proportional(one, other):
            return True
    if _is_name(gold.lhs) and _is_name(given.lhs):
        return None if same(gold.rhs, given.rhs) is not False else False
    return None if _verified(gold, given) else False


def _proportional(one: Any, other: Any) -> bool:
    variables = sorted(one.free_symbols, key=str)
    if not 0 < len(variables) <= len(_POINTS[0]):
        return False
    pairs = [pair for pair in _values(one, other, variables) if pair[0].is_real and pair[1].is_real and any(pair)]
    if len(pairs) < ENOUGH_POINTS or not all(all(pair) for pair in pairs):
        return False
    ratios = [sympy.N(above / below, _DIGITS) for above, below in pairs]
    return all(_close(ratios[0], ratio, _EQUAL) for ratio in ratios)


def _region(answer: Any) -> Any | None:
    """The numbers for which a relation of one variable holds; a set is one already."""
    if isinstance(answer, sympy.Set):
        return answer
    if not _is_relation(answer) or len(answer.free_symbols) != 1:
        return None
    return sympy.And(*_parts_of(answer)).as_set()


def _verified(gold: Any, given: Any) -> bool:
    """What math-verify says."""
    _silence_math_verify()
    return bool(verify(gold, given, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True))


@cache
def _silence_math_verify() -> None:
    """math-verify warns once a process that nothing limits its time; the pool does."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
