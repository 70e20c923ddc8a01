"""Axes of charts: which numbers stand there, and where each value lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def fits(value: float, log: bool) -> bool:
    """Whether an axis has a place for it; beyond these bounds differences and logarithms would overflow."""
    return math.isfinite(value) and abs(value) < 1e100 and (value > 1e-100 if log else True)


def axis(
    values: Sequence[float], log: bool, start: float, end: float, widen: bool
) -> tuple[list[float], Callable[[float], float]]:
    """Round numbers for ticks, and where a value lies between ``start`` and ``end``; ``widen`` ends on ticks."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
    ticks = []
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            ticks = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
            if len(ticks) > 2:
                break
        ticks = ticks[:: len(ticks) // 7 + 1]
    if len(ticks) < 2:
        power = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * 4.0001 >= high - low)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = [number * step for number in range(first, last + 1) if number > 0 or not log]
        if widen and not log:
            low, high = first * step, last * step
        ticks = [tick for tick in ticks if low <= tick <= high]
    scale = math.log10 if log else float
    bottom, extent = scale(low), scale(high) - scale(low)
    return ticks, lambda value: start + (scale(value) - bottom) / extent * (end - start)


def shown(tick: float) -> str:
    """A tick's label."""
    return f"{tick:.1e}" if tick and not 1e-4 <= abs(tick) < 1e7 else f"{tick:,.10g}"
