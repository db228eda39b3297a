"""The server's half of a round: average what the devices sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_cli.state import Array


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
