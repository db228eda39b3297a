"""How many devices keep an entry: an entry of one device is that device's own value, whatever adds up the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_cli.store.state import Array


def fewest_keepers(counts: Sequence[int]) -> int:
    """Returns how many devices keep the entry that fewest of them do, of those entries that anybody keeps; 0 where nobody keeps any.

    counts: how many entries each keeps, in rank order the first ones.

    >>> fewest_keepers([7, 9, 9, 4]), fewest_keepers([0, 0])
    (2, 0)
    """
    most = max(counts, default=0)
    return sum(count == most for count in counts) if most else 0


def capped(ratios: Array, least: int) -> Array:
    """Returns the pruning ratios [K] with the lowest raised to the `least`-th lowest, so that every entry has as many keepers.

    With fewer devices there is none that could be kept by so many: nothing is changed, and nobody will send.

    >>> capped(np.array([0.0, 0.2, 0.5, 0.9]), 3).tolist()
    [0.5, 0.5, 0.5, 0.9]
    """
    return ratios if len(ratios) < least else np.maximum(ratios, np.sort(ratios)[least - 1])


def keepers_by_rank(counts: Sequence[int]) -> Array:
    """Returns how many devices keep each entry that anybody does, in rank order, int64 [most of the counts].

    >>> keepers_by_rank([3, 1]).tolist()
    [2, 1, 1]
    """
    starts = np.bincount(counts, minlength=1) if len(counts) else np.zeros(1, dtype=np.int64)
    return len(counts) - np.cumsum(starts)[:-1]
