"""The server's half of a round: average what the devices sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_cli.state import Array


def aggregate(old: Array, masks: Sequence[Array], values: Sequence[Array], weights: Sequence[float]) -> Array:
    """Returns the mean of each entry over the devices that kept it, float [U] of `old`'s type (model.md, section 2, step 4).

    masks[i]: bool [U]; values[i]: the kept entries of device i; weights[i]: D_k. Sums are float64 in the given order;
    an entry that nobody kept stays what it was in `old`.
    """
    total, weight = np.zeros(old.size), np.zeros(old.size)
    for mask, value, w in zip(masks, values, weights, strict=True):
        if value.size == old.size:  # all of it, without picking entries: several times faster
            total += w * value.astype(np.float64)
            weight += w
        else:
            total[mask] += w * value.astype(np.float64)
            weight[mask] += w
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), old).astype(old.dtype)
