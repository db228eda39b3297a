"""The rate and its inverse: which bandwidth a rate needs (model.md, section 4).

Everything is written in L = ln(1 + s/b), which is well scaled from a flood of bandwidth (L -> 0) to a trickle (L ~ 700):
    b = s / (e^L - 1),   r = R g(L),   R = s / ln 2,   g(L) = L / (e^L - 1).
Where the signal-to-noise ratio is at most S, r = b log2(1 + min(S, s/b)): beyond L = C = ln(1 + S) it is g(L) = C / (e^L - 1) instead.
`log_cap` is C, infinite for a device without a cap, None where there is none at all.
"""

from __future__ import annotations

import numpy as np

from fedprune_cli.store.state import Array

LN2 = float(np.log(2.0))
BLOCK = 16_384  # devices worked on at a time: what fits a processor's cache
MAX_LOG_SNR = 700.0  # e^L stays finite; a device at this end has no bandwidth to speak of


def rate(bandwidth_hz: Array, snr_hz: Array, log_cap: Array | None = None) -> Array:
    """Returns r = b log2(1 + min(S, s/b)), bits/s; 0 for b = 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = snr_hz / bandwidth_hz
        bits = np.where(
            ratio > 1e300,
            bandwidth_hz * (np.log2(snr_hz) - np.log2(bandwidth_hz)),
            bandwidth_hz * np.log1p(ratio) / LN2,
        )
        if log_cap is not None:
            bits = np.minimum(bits, bandwidth_hz * log_cap / LN2)
    return np.where((bandwidth_hz > 0) & (snr_hz > 0), bits, 0.0)


def log_snr_for_rate(rate_bps: Array, snr_hz: Array, log_cap: Array | None = None) -> Array:
    """Returns L with R g(L) = rate: 0 where the rate is the limit R = s / ln 2 or beyond it, MAX_LOG_SNR where it is 0.

    This is the root that model.md writes with the Lambert W function: e^L - 1 = -W_{-1}(-eta e^-eta) / eta - 1, eta = rate / R.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        target = np.log(snr_hz / LN2) - np.log(rate_bps)
    return np.where(rate_bps > 0, log_snr_for_log_ratio(np.where(np.isnan(target), 0.0, target), log_cap), MAX_LOG_SNR)


def log_snr_for_log_ratio(target: Array, log_cap: Array | None = None) -> Array:
    """Returns L with -ln g(L) = target, by Newton: the curve is convex and loses no digits near 0, where W has its branch point."""
    L = np.concatenate([_log_snr_block(target[at : at + BLOCK]) for at in range(0, len(target), BLOCK)] or [target])
    if log_cap is None:
        return L
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(log_cap < L, np.minimum(np.log1p(log_cap * np.exp(target)), MAX_LOG_SNR), L)


def _log_snr_block(target: Array) -> Array:
    target = np.clip(target, 0.0, MAX_LOG_SNR - 10.0)
    L = np.minimum(2 * target, target + np.log1p(target) + 1.0)  # right of the root, from where Newton is monotone
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(8):
            step = (_log_ratio(L) - target) / log_ratio_slope(L)
            L = np.where(L > 0, np.maximum(L - step, 0.0), 0.0)
            if (np.abs(step) <= 1e-9 * L).all():  # the next one would be below the last digit
                break
    return L


def log_snr_fast(target: Array) -> Array:
    """Returns the root of log_snr_for_log_ratio to its last digits but one, in a third of the time: three steps of Halley's method.

    They begin at t + ln(1 + t), which is within 3 % of the root for every target t.
    """
    t = np.clip(target, 0.0, MAX_LOG_SNR - 10.0)
    L = t + np.log1p(t)
    for _ in range(3):
        q = -np.expm1(-L)
        slope = 1 / q - 1 / L
        step = (L + np.log(q / L) - t) / slope
        L = L - step / (1 - 0.5 * step / slope * (1 / L**2 - (1 - q) / q**2))
    if (small := t < 0.01).any():
        few = t[small]
        series = few * (2 - few * (1 / 3 - few * (1 / 9 - few * 19 / 540)))
        L[small] = series - (series * (0.5 + series * (1 / 24 - series**2 / 2880)) - few) / (0.5 + series / 12)
    return L


def bandwidth_of(log_snr: Array, snr_hz: Array) -> Array:
    """Returns b = s / (e^L - 1); 0 at MAX_LOG_SNR, infinite at 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(log_snr >= MAX_LOG_SNR, 0.0, snr_hz / np.expm1(log_snr))


def _log_ratio(L: Array) -> Array:
    """ln((e^L - 1) / L) = -ln g(L)."""
    small = L < 0.02
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = L + np.log(-np.expm1(-L) / L)
    return np.where(small, L * (0.5 + L * (1 / 24 - L**2 / 2880)), exact) if small.any() else exact


def log_ratio_slope(L: Array) -> Array:
    """d ln((e^L - 1) / L) / dL, between 1/2 and 1."""
    small = L < 0.02
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(small, 0.5 + L / 12 - L**3 / 720, -1 / np.expm1(-L) - 1 / L)


def rate_slope(L: Array, log_cap: Array | None = None) -> Array:
    """h(L) = L - (1 - e^-L) = r'(b) ln 2; C beyond it."""
    small = L < 0.02
    series = L**2 * (0.5 - L * (1 / 6 - L * (1 / 24 - L * (1 / 120 - L / 720))))
    slope = np.where(small, series, L + np.expm1(-L))
    return slope if log_cap is None else np.where(log_cap < L, log_cap, slope)
