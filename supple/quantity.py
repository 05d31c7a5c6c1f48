"""Quantities as people write them: `"2 ms"`, `"1.5 MB"`, `"<= 3 M"`, `"50 %"`.

Everything is held in base units: seconds, bytes, joules, watts, hertz, or a plain number.
A bare number is already in base units. Decimal prefixes are powers of 1000, binary ones
(`KiB`, `MiB`, `GiB`) powers of 1024.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from supple.errors import SettingError, nearest

__all__ = ["Bound", "bound", "quantity", "show", "unit_of"]

_PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _units() -> dict[str, tuple[float, str]]:
    """Returns what each unit stands for: a factor and the base unit."""
    units = {"%": (0.01, ""), "min": (60.0, "s"), "h": (3600.0, "s"), "Wh": (3600.0, "J")}
    units["kWh"] = (3.6e6, "J")
    for prefix, factor in _PREFIXES.items():
        for base in ("s", "J", "W", "Hz"):
            units[prefix + base] = (factor, base)
        if factor >= 1.0:
            units[prefix + "B"] = (factor, "B")
            for word in ("", "MACs", "FLOPs", "params"):
                units[prefix + word] = (factor, "")
    for power, prefix in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1):
        units[prefix + "B"] = (1024.0**power, "B")
    units |= {"K": (1e3, ""), "KB": (1e3, "B"), "B": (1.0, "B")}
    units |= {"µs": units["us"], "μs": units["us"], "µJ": units["uJ"], "μJ": units["uJ"]}
    return units


_UNITS = _units()
_BASES = {"s": "a time", "B": "bytes", "J": "an energy", "W": "a power", "Hz": "a frequency"}
_NUMBER = re.compile(r"\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S.*?)?\s*")


def quantity(text: str | float, unit: str | None = None) -> float:
    """Reads a quantity with a unit, or a bare number in base units.

    Args:
        text: Such as `"2 ms"`, `"1.5MB"`, `"3 M"`, `"50 %"`, or a number.
        unit: The base unit that is expected: `"s"`, `"B"`, `"J"`, `"W"`, `"Hz"`, or `""` for
            a plain number. None accepts any.

    Returns:
        The value in the base unit.

    Raises:
        SettingError: The text is no quantity, or one of another kind than expected.

    Example:
        >>> quantity("2 ms"), quantity("1.5 MB"), quantity("3 M"), quantity("50 %")
        (0.002, 1500000.0, 3000000.0, 0.5)
    """
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        raise SettingError(f"a quantity must be a number or text like '2 ms', got {text!r}")
    if not isinstance(text, str):
        return _finite(float(text), text)
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise SettingError(f"a quantity must be a number and a unit like '2 ms', got {text!r}")
    number, name = float(found[1]), found[2]
    if name is None:
        return _finite(number, text)
    if name not in _UNITS:
        raise SettingError(f"unknown unit {name!r} in {text!r}{_unit_hint(name)}")
    factor, base = _UNITS[name]
    if unit is not None and base != unit:
        wanted = _BASES.get(unit, "a plain number")
        raise SettingError(f"{text!r} should be {wanted} but is {_BASES.get(base, 'a number')}")
    return _finite(_scaled(number, factor), text)


def _scaled(number: float, factor: float) -> float:
    # Dividing by a power of ten rounds once: 2 ms is 0.002, not 0.0020000000000000005.
    return number * factor if factor >= 1.0 else number / round(1.0 / factor)


def _finite(value: float, text: object) -> float:
    if not math.isfinite(value):
        raise SettingError(f"a quantity must be finite, got {text!r}")
    return value


def _unit_hint(name: str) -> str:
    exact_but_for_case = [unit for unit in _UNITS if unit.lower() == name.lower()]
    if exact_but_for_case:
        return f", did you mean '{exact_but_for_case[-1]}'?"
    return nearest(name, _UNITS) or "; use ms, s, kB, MB, GB, k, M, G, %, mJ, J"


def show(value: float, unit: str = "", digits: int = 3) -> str:
    """Writes a value in base units the way people do.

    Args:
        value: In the base unit.
        unit: `"s"`, `"B"`, `"J"`, `"W"`, `"Hz"`, or `""` for a plain number.
        digits: Significant digits kept.

    Returns:
        Text that `quantity` reads back, equal up to the digits kept.

    Example:
        >>> show(0.00213, "s"), show(1.5e6, "B"), show(272474), show(0.9137)
        ('2.13 ms', '1.5 MB', '272 k', '0.914')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".rstrip()
    prefix = _prefix_for(value, unit, digits)
    number = _plainly(value / _PREFIXES[prefix], digits)
    return f"{number} {prefix}{unit}".rstrip()


def _prefix_for(value: float, unit: str, digits: int) -> str:
    rounded = abs(float(f"{value:.{digits - 1}e}"))
    # Plain numbers and bytes have no prefix below one.
    fitting = [
        p for p, f in _PREFIXES.items() if f <= rounded and (unit not in ("", "B") or f >= 1)
    ]
    if fitting:
        return fitting[-1]
    return "" if unit in ("", "B") else "n"


def _plainly(number: float, digits: int) -> str:
    text = f"{number:.{digits}g}"
    if "e" in text and abs(number) >= 1:
        return str(round(float(text)))
    return text


_UNIT_BY_NAME = {"latency": "s", "seconds": "s", "memory": "B", "energy": "J", "power": "W"}


def unit_of(name: str) -> str:
    """Returns the base unit of an objective from its name.

    Args:
        name: Such as `"latency[batch=1]"`, `"weight_bytes"` or `"accuracy"`.

    Returns:
        `"s"`, `"B"`, `"J"`, `"W"`, or `""` for a plain number.

    Example:
        >>> unit_of("latency[batch=1,threads=1]"), unit_of("weight_bytes"), unit_of("macs")
        ('s', 'B', '')
    """
    stem = name.partition("[")[0]
    if stem.endswith("bytes"):
        return "B"
    if stem.endswith("_seconds"):
        return "s"
    return _UNIT_BY_NAME.get(stem, "")


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Bound:
    """A limit on a value.

    Args:
        comparison: `<=`, `>=`, `<` or `>`.
        limit: In base units.
    """

    comparison: str
    limit: float

    def holds(self, value: float) -> bool:
        """Says whether a value in base units meets the bound; NaN never does."""
        return _COMPARISONS[self.comparison](value, self.limit)

    def excess(self, value: float) -> float:
        """Returns how far a value is beyond the bound, relative to it: 0 where it holds.

        A value just on a strict bound counts as beyond it by the least positive number.
        """
        if self.holds(value):
            return 0.0
        if math.isnan(value):
            return math.inf
        scale = abs(self.limit) or 1.0
        return max(abs(value - self.limit) / scale, math.ulp(0.0))


def bound(text: str, unit: str | None = None) -> Bound:
    """Reads a bound such as `"<= 2 ms"`.

    Args:
        text: A comparison (`<=`, `>=`, `<`, `>`) and a quantity.
        unit: The base unit that is expected; None accepts any.

    Returns:
        The bound.

    Raises:
        SettingError: The text is no bound, or its quantity is of another kind.

    Example:
        >>> bound("<= 2 ms", "s").holds(0.0019)
        True
    """
    found = re.fullmatch(r"\s*(<=|>=|<|>)\s*(.+)", text) if isinstance(text, str) else None
    if found is None:
        raise SettingError(
            f"a bound must be a comparison and a quantity, '<= 2 ms', got {text!r}"
        )
    return Bound(found[1], quantity(found[2], unit))
