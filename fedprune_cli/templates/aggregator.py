"""An aggregator of my own: every device counts once.

fedprune train --plugin FILE failsafe.aggregation=mine
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedprune_cli.serve.aggregate import Contribution
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Mine:
    """The mean of each entry over the devices that kept it, whatever weight they claim.

    A field that is a key of `failsafe`, such as `trim`, is configured by it; any other keeps its default.
    """

    needs: ClassVar[Literal["sum", "each"]] = "each"  # sum: weighted sums over the devices are all that it looks at

    def combine(self, old: Array, contributions: Sequence[Contribution]) -> tuple[Array, Array]:
        """Returns the new u and the mean gradient that it implies, [U] of `old`'s type; an entry that nobody kept stays as it was."""
        total, slope, count = (np.zeros(old.size) for _ in range(3))
        for one in contributions:
            total[one.mask] += one.values
            slope[one.mask] += (old[one.mask] - one.values) / one.step_size
            count[one.mask] += 1
        some = np.maximum(count, 1)
        return np.where(count > 0, total / some, old).astype(old.dtype), (slope / some).astype(old.dtype)


AGGREGATORS = {"mine": Mine}
