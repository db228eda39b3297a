"""A partition of my own: samples are dealt one by one, so that devices have as many each.

fedprune train --plugin FILE partition=mine
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.store.state import Array
from fedprune_cli.world.partition import Cover


@dataclass(frozen=True)
class Mine(Cover):
    """Deals the samples in a random order. `Cover` keeps groups together, fills up who has too few, and splits off the test samples."""

    min_samples: int = 4  # that every device has at least

    def assign(self, labels: Array, num_devices: int, rng: np.random.Generator) -> Array:
        """Returns the owner of every sample, int64 [N] in 0..num_devices-1; randomness comes from `rng` alone."""
        return rng.permutation(np.arange(len(labels)) % num_devices)


PARTITIONS = {"mine": Mine}
