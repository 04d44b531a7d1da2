"""The search space of a sweep: what the YAML says of each key, for Optuna and for the command line."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Point = dict[str, Any]
"""A value for each key; lists and mappings stand as JSON text."""

_RANGES = ("range", "log_range", "int_range", "int_log_range")
_LISTS = ("grid", "choices")
_ENDLESS = math.inf


@dataclass(frozen=True)
class Dimension:
    """The values one config key may take.

    Attributes:
        key: dotted config key, as it stands on the command line of `fit`.
        kind: "grid" (every value is worked through), "choices" (values to draw from), "range", "log_range",
            "int_range" or "int_log_range" (both ends included).
        values: the list, or the two ends of the range.
        step: distance of neighbouring values of "range" and "int_range"; None: any number, every integer.
    """

    key: str
    kind: str
    values: tuple[Any, ...]
    step: float | None = None

    @property
    def logarithmic(self) -> bool:
        """Whether the values are drawn evenly in their logarithm."""
        return self.kind in ("log_range", "int_log_range")

    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind in _LISTS:
            return CategoricalDistribution(self.values)
        low, high = self.values
        if self.kind.startswith("int"):
            return IntDistribution(low, high, log=self.logarithmic, step=int(self.step or 1))
        return FloatDistribution(low, high, log=self.logarithmic, step=self.step)

    def all_values(self) -> Sequence[Any] | None:
        """Every value in order; None if there are endlessly many."""
        if self.kind in _LISTS:
            return self.values
        low, high = self.values
        if self.kind.startswith("int"):
            return range(low, high + 1, int(self.step or 1))
        if self.step is None:
            return (low,) if low == high else None
        # decimal, as Optuna reckons the end: 0.1 + 6 * 0.1 is above 0.7 in binary
        first, last, step = (Decimal(str(number)) for number in (low, high, self.step))
        return [float(first + i * step) for i in range(int((last - first) / step) + 1)]

    def samples(self) -> list[Any]:
        """Values to try on the parser: each of a list, the ends of a range."""
        return list(self.values)


def read_dimension(key: str, given: Any, where: str) -> Dimension:
    """One entry of ``space``: a list (the same as ``grid``) or a mapping with one kind and perhaps ``step``.

    Raises:
        UserError: an unknown kind, an empty list, a value twice, ends that are no numbers or out of order.
    """
    place = f"{where}: space: {key}"
    if isinstance(given, list):
        given = {"grid": given}
    if not isinstance(given, dict):
        raise UserError(f"{place} is {given!r}; write e.g. {{log_range: [1.0e-5, 1.0e-3]}}")
    kinds = [name for name in given if name in (*_RANGES, *_LISTS)]
    strange = [str(name) for name in given if name not in (*_RANGES, *_LISTS, "step")]
    if len(kinds) != 1 or strange:
        what = f"unknown {', '.join(strange)}; " if strange else ""
        raise UserError(f"{place}: {what}give exactly one of {', '.join((*_LISTS, *_RANGES))} (and step)")
    kind, values, step = kinds[0], given[kinds[0]], given.get("step")
    if not isinstance(values, list) or not values:
        raise UserError(f"{place}: {kind} is {values!r}; it must be a list that is not empty")
    if kind in _LISTS:
        if step is not None:
            raise UserError(f"{place}: step is for range and int_range")
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise UserError(f"{place}: {kind} is {values}; its numbers must be finite")
        plain = tuple(value if _is_scalar(value) else json.dumps(value) for value in values)
        if len(set(plain)) < len(plain):  # Optuna can't tell 1 from 1.0 and true either
            raise UserError(f"{place}: {kind} holds the same value twice: {values}")
        return Dimension(key, kind, plain)
    return Dimension(key, kind, _ends(kind, values, place), _step(kind, step, place))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _number(value: Any, place: str) -> float:
    """A YAML number; PyYAML reads 1e-4 (without a dot) as text."""
    try:
        number = float("nan") if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise UserError(f"{place}: {value!r} is not a number")
    return number


def _ends(kind: str, values: list[Any], place: str) -> tuple[Any, ...]:
    if len(values) != 2:
        raise UserError(f"{place}: {kind} is {values}; it takes the lowest and the highest value")
    ends = [_number(value, place) for value in values]
    if ends[0] > ends[1]:
        raise UserError(f"{place}: {kind} is {values}; the lowest value comes first")
    if "log" in kind and ends[0] <= 0:
        raise UserError(f"{place}: {kind} is {values}; logarithms take values above 0")
    if kind.startswith("int"):
        if any(end != int(end) for end in ends):
            raise UserError(f"{place}: {kind} is {values}; its ends must be whole numbers")
        return int(ends[0]), int(ends[1])
    return ends[0], ends[1]


def _step(kind: str, step: Any, place: str) -> float | None:
    if step is None:
        return None
    number = _number(step, place)
    if kind not in ("range", "int_range") or number <= 0 or (kind == "int_range" and number != int(number)):
        raise UserError(
            f"{place}: step is {step!r}; it is a positive number (whole for int_range) for ranges"
        )
    return number


@dataclass(frozen=True)
class Space:
    """All dimensions of a sweep, in the order of the YAML."""

    dimensions: tuple[Dimension, ...]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Key to Optuna's distribution."""
        return {dimension.key: dimension.distribution() for dimension in self.dimensions}

    def size(self) -> float:
        """The number of different points; infinite with a continuous range."""
        counts = [dimension.all_values() for dimension in self.dimensions]
        return math.prod(_ENDLESS if values is None else len(values) for values in counts)

    def cells(self) -> list[Point]:
        """Every combination of the ``grid`` keys; one empty combination if there is none."""
        grids = [dimension for dimension in self.dimensions if dimension.kind == "grid"]
        products = itertools.product(*(dimension.values for dimension in grids))
        return [dict(zip((grid.key for grid in grids), values)) for values in products]

    def points(self) -> list[Point]:
        """Every point of a finite (and small) space.

        Raises:
            ValueError: the space is endless.
        """
        lists = [dimension.all_values() for dimension in self.dimensions]
        if any(values is None for values in lists):
            raise ValueError("a continuous range has endlessly many points")
        keys = [dimension.key for dimension in self.dimensions]
        return [dict(zip(keys, values)) for values in itertools.product(*(v for v in lists if v is not None))]


def option(key: str, value: Any) -> str:
    """``--key=value`` as `fit` reads it: numbers in full precision, the rest as JSON, text as it is."""
    if isinstance(value, str):
        return f"--{key}={value}"
    return f"--{key}={json.dumps(value)}"


def same(a: Point, b: Point) -> bool:
    """Whether two points are one: the same keys and values (1 and 1.0 are equal, 1 and true are not).

    Numbers that differ by rounding alone (0.3 and 0.1 + 0.2) are equal, too.
    """
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-12)
    return bool(a == b)
