r"""Amounts with units: `18 \text{ hours and } 48 \text{ minutes}`, `5 feet 11 inches`, `3 million`, `15\text{ cm}^2`.

Only what is wholly made of numbers and units known here, all of one kind, is read; everything else is None, and units
are ignored elsewhere. Nothing is rounded: conversions are exact fractions.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from distill.records import Outcome
from distill.verifiers.answers import LONGEST_NUMBER_TEXT, numbers_in, plain, whole_number


class Unit(NamedTuple):
    """What one of a unit is in the base unit of its kind."""

    kind: str
    size: Fraction


class Quantity(NamedTuple):
    """An amount in base units, and the sizes of the units it is written in."""

    kind: str
    amount: Fraction
    sizes: tuple[Fraction, ...]


COUNT = "count"
"""The kind of scale words: three million are three million of whatever is counted."""


def _units(kind: str, **sizes: str) -> dict[str, Unit]:
    """Units by each of their names; names are joined by underscores."""
    return {name: Unit(kind, Fraction(size)) for names, size in sizes.items() for name in names.split("_")}


UNITS = {
    **_units("time", second_sec="1", minute_min="60", hour_hr="3600", day="86400", week="604800"),
    **_units("long time", month="1", year_yr="12", decade="120", century_centurie="1200"),
    **_units("length", mm_millimeter_millimetre="1/1000", cm_centimeter_centimetre="1/100", m_meter_metre="1"),
    **_units("length", km_kilometer_kilometre="1000", inch_inche="0.0254", ft_foot_feet="0.3048", yd_yard="0.9144"),
    **_units("length", mile="1609.344"),
    **_units("mass", mg_milligram="1/1000", g_gram="1", kg_kilogram="1000", oz_ounce="28.349523125"),
    **_units("mass", lb_pound="453.59237"),
    **_units("volume", ml_milliliter_millilitre="1/1000", liter_litre_L="1"),
    **_units("money", cent="1/100", dollar="1"),
    **_units(COUNT, dozen="12", hundred="100", thousand="1000", million="1000000", billion="1000000000"),
    **_units(COUNT, trillion="1000000000000"),
}

_AMOUNT = re.compile(
    r"\s*(?:(square|sq|cubic|cu)\.?\s)?\s*([A-Za-z]+)\.?\s*(?:\^?\s?\{?\s?([23])\s?\}?)?\s*(?:[,;&]?\s*(?:and\b)?\s*)"
)
_DOLLARS = re.compile(r"\s*\\\$\s*(-?[\d.,]*\d)\s*")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def quantity(text: str) -> Quantity | None:
    """The amount that a text is; None where anything in it is no number, no known unit, or of another kind."""
    if len(text) > LONGEST_NUMBER_TEXT or not re.search("[A-Za-z²³$]", text):
        return None
    if dollars := _DOLLARS.fullmatch(text):
        text = f"{dollars[1]} dollars"
    text = plain(text).strip().rstrip(".")
    numbers = numbers_in(text)
    if not numbers or text[: numbers[0].start].strip():
        return None
    ends = [number.start for number in numbers[1:]] + [len(text)]
    units = [_unit(text[number.end : end]) for number, end in zip(numbers, ends)]
    known = [unit for unit in units if unit is not None]
    if len(known) != len(units) or len({unit.kind for unit in known}) > 1 or any(n.percent for n in numbers):
        return None
    amount = sum((number.value * unit.size for number, unit in zip(numbers, known)), Fraction(0))
    return Quantity(known[0].kind, amount, tuple(unit.size for unit in known))


def _unit(text: str) -> Unit | None:
    """The unit that stands between two numbers."""
    match = _AMOUNT.fullmatch(text + " ")
    if match is None:
        return None
    prefix, name, exponent = match.groups()
    unit = UNITS.get(name) or UNITS.get(name.lower()) or UNITS.get(name.lower().removesuffix("s"))
    power = _POWERS.get(prefix or "", int(exponent or 1))
    if unit is None or power == 1:
        return unit
    return Unit(f"{unit.kind}^{power}", unit.size**power)


def compare_quantities(gold: str, given: str) -> Outcome | None:
    """What units say of two answers; None where they say nothing.

    Where both name units of one kind, the amounts decide. Where the reference is a bare number, an answer in units that
    equals it in a unit of its own is correct; one that equals it only after a conversion could be right or wrong,
    since the reference does not say what it counts. Scale words are part of the number: `3 million` is 3000000.
    """
    found = quantity(given)
    if found is None:
        return None
    expected = quantity(gold)
    if expected is not None:
        if expected.kind != found.kind:
            return None
        return "correct" if expected.amount == found.amount else "wrong"
    number = whole_number(gold)
    if number is None or number.percent:
        return None
    own = (Fraction(1),) if found.kind == COUNT else found.sizes
    if any(number.value * size == found.amount for size in own):
        return "correct"
    return "unverifiable" if _in_another_unit(number.value, found) else None


def _in_another_unit(value: Fraction, found: Quantity) -> bool:
    kind, _, power = found.kind.partition("^")
    return any(
        value * unit.size ** int(power or 1) == found.amount and found.amount
        for unit in UNITS.values()
        if unit.kind == kind
    )
