"""The numbers that a report draws, and their text form."""

from __future__ import annotations

import math
from typing import TypeGuard

Point = tuple[float, float | None]
"""Step and value."""


def finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a number below 1e300: larger ones overflow on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def number(value: float | None) -> str:
    """Return a number as text: four significant digits, a true minus sign, "-" for None and what is not finite."""
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
