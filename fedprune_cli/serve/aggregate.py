"""Aggregators: how the server makes the new u of what the devices sent. Each is one class and one entry of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from fedprune_cli.store.state import Array

COLUMNS_AT_A_TIME = 65_536  # entries sorted at a time, to bound memory


@dataclass(frozen=True)
class Contribution:
    """What one device adds to a round: its mask [U], the kept entries, what it counts, and the sum of its steps' sizes."""

    mask: Array
    values: Array
    weight: float
    step_size: float


class Aggregator(Protocol):
    """An aggregator plug-in: a frozen dataclass whose fields are keys of `failsafe`.

    needs: `sum` when sums over the devices suffice, `each` when it has to see every contribution (what secure sums would hide).
    """

    needs: ClassVar[Literal["sum", "each"]]

    def combine(self, old: Array, contributions: Sequence[Contribution]) -> tuple[Array, Array]:
        """Returns the new u and the mean gradient that it implies, [U] of `old`'s type.

        An entry that nobody kept stays what it was in `old`, with a gradient of 0 (model.md, section 2, step 4).
        """


@dataclass(frozen=True)
class Mean:
    """The mean of each entry over the devices that kept it, with their weights; float64 sums in device order.

    >>> one = Contribution(np.array([True, True, False]), np.array([1, 2], np.float32), weight=3, step_size=0.1)
    >>> other = Contribution(np.array([True, False, False]), np.array([5], np.float32), weight=1, step_size=0.1)
    >>> Mean().combine(np.zeros(3, np.float32), [one, other])[0].tolist()
    [2.0, 2.0, 0.0]
    """

    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def combine(self, old: Array, contributions: Sequence[Contribution]) -> tuple[Array, Array]:
        total, weight, slope, pull = (np.zeros(old.size) for _ in range(4))
        buffer = np.empty(old.size)  # one for all devices: new memory would cost more than the arithmetic
        for one in contributions:
            where = slice(None) if one.values.size == old.size else one.mask
            part = buffer[: one.values.size]
            for sum_, of_weights, factor in ((total, weight, one.weight), (slope, pull, one.weight / one.step_size)):
                sum_[where] += np.multiply(one.values, factor, out=part, dtype=np.float64)
                of_weights[where] += factor
        kept = weight > 0
        count = np.where(kept, weight, 1.0)
        mean = np.where(kept, total / count, old).astype(old.dtype)
        return mean, ((pull * old - slope) / count).astype(old.dtype)


@dataclass(frozen=True)
class TrimmedMean:
    """Of each entry the mean without the `trim` largest and smallest shares.

    Devices count once each, whatever they claim to have: of n values floor(trim n) go at either end, as long as one or two are left.
    """

    trim: float
    needs: ClassVar[Literal["sum", "each"]] = "each"

    def combine(self, old: Array, contributions: Sequence[Contribution]) -> tuple[Array, Array]:
        if not contributions:
            return old.copy(), np.zeros_like(old)
        kept = np.stack([one.mask for one in contributions])
        dense = np.full(kept.shape, np.inf, dtype=old.dtype)
        pull = dense.copy()
        for row, back, one in zip(dense, pull, contributions, strict=True):
            row[one.mask] = one.values
            back[one.mask] = (old[one.mask] - one.values) / old.dtype.type(one.step_size)
        count = kept.sum(0)
        mean, gradient = (_trimmed(each, count, self.trim) for each in (dense, pull))
        return np.where(count > 0, mean, old).astype(old.dtype), gradient.astype(old.dtype)


@dataclass(frozen=True)
class Median:
    """The median of each entry over the devices that kept it, each of which counts once: a mean with half trimmed at either end."""

    needs: ClassVar[Literal["sum", "each"]] = "each"

    def combine(self, old: Array, contributions: Sequence[Contribution]) -> tuple[Array, Array]:
        return TrimmedMean(0.5).combine(old, contributions)


AGGREGATORS: dict[str, type[Aggregator]] = {"mean": Mean, "median": Median, "trimmed_mean": TrimmedMean}


def _trimmed(values: Array, count: Array, trim: float) -> Array:
    """Returns the trimmed mean of the finite entries of each column, `count` [U] of them, float64 [U]; 0 where there are none."""
    cut = np.maximum(np.minimum(np.floor(trim * count + 1e-9), (count - 1) // 2), 0)
    mean, place = np.zeros(values.shape[1]), np.arange(len(values))[:, None]
    for start in range(0, values.shape[1], COLUMNS_AT_A_TIME):
        part = slice(start, start + COLUMNS_AT_A_TIME)
        inside = (place >= cut[part]) & (place < (count - cut)[part])
        total = np.where(inside, np.sort(values[:, part], axis=0), 0).sum(0, dtype=np.float64)
        mean[part] = total / np.maximum(inside.sum(0), 1)
    return mean
