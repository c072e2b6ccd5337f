"""Where the ticks of an axis stand, and how their numbers and others are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def finite(value: object) -> TypeGuard[float]:
    """Return whether it is a number that an axis can hold: larger ones are infinite to it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def domain(values: Sequence[float]) -> tuple[float, float]:
    """Return (low, high) of a value axis: all finite values with a little air, and 0 where it is not far away.

    One value alone gets an axis around it; no value at all 0 to 1.
    """
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if max(abs(low), abs(high)) < 1e-290:  # too near to 0 for ticks between them
        return 0.0, 1.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant: rounding is no movement
        return low - 0.5 * abs(low), high + 0.5 * abs(high)
    if 0 < low < 0.4 * high:
        low = 0.0
    elif 0.4 * low < high < 0:
        high = 0.0
    air = 0.06 * high - 0.06 * low
    return (low if low == 0.0 else low - air), (high if high == 0.0 else high + air)


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Return at most `most` round numbers in [low, high], evenly spaced by 1, 2, 2.5 or 5 times a power of ten.

    whole: whole numbers only, for steps.
    """
    wide = max(high / (most - 1) - low / (most - 1), 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(wide))
    steps = [s * power for s in _STEPS if not whole or (s * power).is_integer()]
    step = next(s for s in steps if s >= wide * (1 - 1e-12))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def labels(at: Sequence[float]) -> list[str]:
    """Write the numbers of an axis, all with the same decimals, and where they are very large or small one exponent."""
    if not at:
        return []
    step = at[1] - at[0] if len(at) > 1 else abs(at[0]) or 1.0
    largest = max(abs(v) for v in at)
    plain = largest < 1e5 and step >= 1e-4
    exponent = 0 if plain else math.floor(math.log10(largest) + 1e-9)
    scaled, step = [v / 10.0**exponent for v in at], step / 10.0**exponent
    decimals = next(d for d in range(9) if d == 8 or all(abs(round(v, d) - v) <= 1e-6 * step for v in scaled))
    end = "" if plain else f"e{exponent}"
    return ["0" if abs(v) < 1e-6 * step else f"{v:.{decimals}f}{end}".replace("-", "−") for v in scaled]


def number(value: float | None) -> str:
    """Write a number for a reader: four significant digits, a true minus sign, "-" where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e5):
        return f"{round(value):,}".replace(",", " ").replace("-", "−")
    if not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
