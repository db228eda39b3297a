"""The server's half of a round: average what the devices sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_cli.store.state import Array

COLUMNS = 65_536  # entries sorted at a time, to bound memory


def aggregate(
    old: Array, masks: Sequence[Array], values: Sequence[Array], weights: Sequence[float], step_sizes: Sequence[float]
) -> tuple[Array, Array]:
    """Returns the mean of each entry over the devices that kept it, and the mean gradient that it implies, [U] of `old`'s type.

    masks[i]: bool [U]; values[i]: the kept entries of device i; weights[i]: D_k; step_sizes[i]: the sum of its steps' sizes. Sums are
    float64 in the given order. An entry that nobody kept stays what it was in `old`, with a gradient of 0 (model.md, section 2, step 4).
    """
    total, weight, slope, pull = (np.zeros(old.size) for _ in range(4))
    buffer = np.empty(old.size)  # one for all devices: new memory would cost more than the arithmetic
    for mask, value, w, size in zip(masks, values, weights, step_sizes, strict=True):
        where = slice(None) if value.size == old.size else mask
        part = buffer[: value.size]
        for sum_, of_weights, factor in ((total, weight, w), (slope, pull, w / size)):
            sum_[where] += np.multiply(value, factor, out=part, dtype=np.float64)
            of_weights[where] += factor
    kept = weight > 0
    count = np.where(kept, weight, 1.0)
    mean = np.where(kept, total / count, old).astype(old.dtype)
    return mean, ((pull * old - slope) / count).astype(old.dtype)


def trimmed_mean(
    old: Array, masks: Sequence[Array], values: Sequence[Array], step_sizes: Sequence[float], trim: float
) -> tuple[Array, Array]:
    """Returns what `aggregate` does, but of each entry the mean without the `trim` largest and smallest shares; 0.5: the median.

    Devices count once each, whatever they claim to have: of n values floor(trim n) go at either end, as long as one or two are left.
    """
    if not values:
        return old.copy(), np.zeros_like(old)
    kept = np.stack(masks)
    dense = np.full(kept.shape, np.inf, dtype=old.dtype)
    pull = dense.copy()
    for row, back, mask, value, size in zip(dense, pull, masks, values, step_sizes, strict=True):
        row[mask] = value
        back[mask] = (old[mask] - value) / old.dtype.type(size)
    count = kept.sum(0)
    mean, gradient = (_trimmed(each, count, trim) for each in (dense, pull))
    return np.where(count > 0, mean, old).astype(old.dtype), gradient.astype(old.dtype)


def _trimmed(values: Array, count: Array, trim: float) -> Array:
    """Returns the trimmed mean of the finite entries of each column, `count` [U] of them, float64 [U]; 0 where there are none."""
    cut = np.maximum(np.minimum(np.floor(trim * count + 1e-9), (count - 1) // 2), 0)
    mean, place = np.zeros(values.shape[1]), np.arange(len(values))[:, None]
    for start in range(0, values.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        inside = (place >= cut[part]) & (place < (count - cut)[part])
        total = np.where(inside, np.sort(values[:, part], axis=0), 0).sum(0, dtype=np.float64)
        mean[part] = total / np.maximum(inside.sum(0), 1)
    return mean


def change_norms(old: Array, masks: Sequence[Array], values: Sequence[Array]) -> Array:
    """Returns how far each device moved what it kept, the norm of values[i] - old, float64 [K]."""
    changes = (value - old[mask] for mask, value in zip(masks, values, strict=True))
    return np.array([np.sqrt(np.square(change, dtype=np.float64).sum()) for change in changes])


def clip(old: Array, mask: Array, value: Array, norm: float, bound: float) -> Array:
    """Returns the kept entries of a device whose change, of this `norm`, is shortened to the bound where it is longer."""
    if norm <= bound:
        return value
    before = old[mask]
    return before + old.dtype.type(bound / norm) * (value - before)
