"""Means over seeds with their intervals, and the quantities that are estimated so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (Student's t); no interval from one seed."""

    mean: float
    half_width: float | None
    count: int


Estimates = Mapping[str, Estimate | None]  # quantity -> its estimate, None where it is missing on a seed


def mean_over_seeds(values: Sequence[float | None]) -> Estimate | None:
    """Returns the mean and interval of one value a seed, or None when any of them is missing."""
    numbers = np.array([value for value in values if value is not None], dtype=float)
    if not values or len(numbers) < len(values):
        return None
    if len(numbers) == 1:
        return Estimate(float(numbers[0]), None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return Estimate(float(numbers.mean()), half, len(numbers))


def band(curves: Sequence[Array]) -> tuple[Array, Array | None]:
    """Returns the curves' mean and half the width of its 95 % interval at each point, float64 [points] both."""
    points = [point for values in np.stack(curves, axis=1).tolist() if (point := mean_over_seeds(values))]
    mean = np.array([point.mean for point in points])
    return mean, np.array([point.half_width for point in points]) if len(curves) > 1 else None


def known(estimates: Estimates, key: str) -> Estimate:
    """Returns an estimate that cannot be missing; raises LookupError naming it when it is."""
    if (found := estimates[key]) is None:
        raise LookupError(f"no estimate of {key}")
    return found


def csv_cells(estimate: Estimate | None) -> tuple[float | None, float | None, int | None]:
    """Returns an estimate's mean, half width and count, for a CSV file."""
    return (None, None, None) if estimate is None else (estimate.mean, estimate.half_width, estimate.count)


@dataclass(frozen=True)
class Quantity:
    """What is estimated: its key in files and JSON, its title in tables, and how a value is shown, `scale` times it in `form`."""

    key: str
    title: str
    form: str
    scale: float = 1.0

    def show(self, value: float) -> str:
        """Returns one value as text."""
        return format(self.scale * value, self.form)

    def cell(self, estimate: Estimate | None) -> str:
        """Returns a table's cell: the mean, and half the interval's width where there is one; a dash where it is missing."""
        if estimate is None:
            return "-"
        half = "" if estimate.half_width is None else f" ± {self.show(estimate.half_width)}"
        return self.show(estimate.mean) + half


ACCURACY = Quantity("accuracy", "accuracy %", ".2f", 100)
BELOW_BEST = Quantity("below_best", "points below the best", ".2f", 100)
SIMULATED = Quantity("simulated_s", "simulated seconds", ".4g")
QUANTITIES = (
    Quantity("latency_s", "seconds per round", ".4g"),
    Quantity("time_to_target_s", "seconds to target", ".4g"),
    ACCURACY,
    Quantity("accuracy_p10", "10th percentile %", ".2f", 100),
    Quantity("least_rounds", "rounds of the device with the fewest", ".1f"),
    Quantity("fresh_accuracy", "fresh device %", ".2f", 100),
    Quantity("accuracy_gain", "accuracy, points above", ".2f", 100),
    Quantity("p10_gain", "10th percentile, points above", ".2f", 100),
    Quantity("mean_ratio", "mean pruning ratio", ".3f"),
    Quantity("megabytes_up", "MB sent", ".4g"),
    Quantity("joules", "joules", ".4g"),
    Quantity("latency_reduction", "less per round %", ".1f", 100),
    Quantity("time_reduction", "less to target %", ".1f", 100),
    Quantity("time_reduction_equal", "less to target than on equal bandwidth %", ".1f", 100),
    Quantity("bandwidth_share", "off equal bandwidth: by bandwidth %", ".1f", 100),
    Quantity("pruning_share", "off equal bandwidth: by pruning %", ".1f", 100),
)
BY_KEY = {quantity.key: quantity for quantity in (*QUANTITIES, SIMULATED)}
