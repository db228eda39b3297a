"""A dataset of my own: points on three rings.

fedprune train --plugin FILE data=mine data.samples=600
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.world.datasets.dataset import Dataset, number_dataset


@dataclass(frozen=True)
class Mine:
    """Points in the plane, whose class is the ring that they lie on. Its fields are its keys: `data.samples=600`."""

    name: str
    samples: int = 900
    noise: float = 0.2  # standard deviation of a point's distance from its ring

    def __post_init__(self) -> None:
        require(30 <= self.samples <= 10**6, "samples", self.samples, "in 30..1000000")
        require(0 <= self.noise <= 10, "noise", self.noise, "in [0, 10]")

    def load(self) -> Dataset:
        """Returns the data, the same each time; raises errors.DataError, saying how to get them, where files are missing.

        Inputs are float32 [N, C, H, W], of a table [N, columns, 1, 1], labels int64 [N]. `image_dataset` takes uint8 images, and
        `Source` says whose a sample is (partition=natural), which are for testing, and which are near-duplicates.
        """
        rng = np.random.Generator(np.random.PCG64(0))
        labels = np.arange(self.samples) % 3
        angle = rng.uniform(0, 2 * np.pi, self.samples)
        radius = 1 + labels + self.noise * rng.normal(size=self.samples)
        points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return number_dataset(self.name, points[:, :, None, None], labels, num_classes=3)


DATASETS = {"mine": Mine}
