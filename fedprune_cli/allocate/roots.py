"""Roots of many increasing functions at once: Newton or the secant, guarded by bisection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedprune_cli.store.state import Array

TURNS = 200
NEAR = 1e-12  # nearer than where a slope may still change at once
SMOOTH = 1e-7  # where no slope does: a step of Newton's squares the error
Values = Callable[
    [Array, Array], tuple[Array, Array]
]  # of devices [m] at points [m]: values, which increase, and their derivatives


def increasing_roots(
    values: Values, low: Array, high: Array, start: Array, *, exact: bool = True, near: float = NEAR
) -> Array:
    """Returns where each function [n] is 0 within its bounds, or the bound beyond which it would be, by Newton from `start` [n].

    values(index [m], points [m]) gives values and derivatives of some of the functions; where these are not exact, they are taken
    for the first step only, and from the last two points after that; near: the value from which the next step is the last. A step that leaves the bracket ends at a bound that was not tried
    yet, or is replaced by bisection, and where Newton has had its time every other one is.
    """
    low, high, at = low.copy(), high.copy(), np.clip(start, low, high)
    index = np.flatnonzero(low < high)
    before, before_value = np.full(len(at), np.nan), np.full(len(at), np.nan)
    low_tried, high_tried = np.zeros(len(at), dtype=bool), np.zeros(len(at), dtype=bool)
    for turn in range(TURNS):
        if not len(index):
            break
        x = at[index]
        value, slope = values(index, x)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if not exact:
                secant = (value - before_value[index]) / (x - before[index])
                slope = np.where(secant > 0, secant, slope)
                before[index], before_value[index] = x, value
            step = np.where(value == -np.inf, np.inf, x - value / slope)
        under = value < 0
        low[index], high[index] = bottom, top = np.where(under, x, low[index]), np.where(under, high[index], x)
        low_tried[index] |= under
        high_tried[index] |= ~under
        inside = (step > bottom) & (step < top) & ((turn < 12) | (turn % 2 == 0))
        to_low, to_high = (step <= bottom) & ~low_tried[index], (step >= top) & ~high_tried[index]
        close = np.abs(value) <= near
        middle = np.where(to_low, bottom, np.where(to_high, top, 0.5 * (bottom + top)))
        ahead = np.clip(step, bottom, top) if exact else np.where(close, x, step)  # so close the secant is noise
        at[index] = np.where(inside | close, ahead, middle)
        index = index[~(close | (top - bottom <= 4e-16 * np.maximum(np.abs(x), 1.0)))]
    return at
