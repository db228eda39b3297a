"""What devices choose beside the ratio, and what they have at their disposal (model.md, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Freedom:
    """What devices choose beside the ratio: the clock, the radiated power; a device's own limits are the tops of both."""

    clock: bool = False
    power: bool = False

    def __bool__(self) -> bool:
        return self.clock or self.power


FIXED = Freedom()


@dataclass(frozen=True)
class Means:
    """What devices that choose have at their disposal [n], in SI.

    compute_s a, fixed_compute_s c0: seconds at the full clock; time_s T'; compute_j e, fixed_j e0: joules at the full clock; budget_j E;
    circuit_w: what the radio draws whatever it radiates, amplifier_w: what it draws beside that at full power; bits c; snr_hz s at full
    power; slows: whether the clock is chosen, bool; dims: whether the power is, bool.
    """

    compute_s: Array
    fixed_compute_s: Array
    time_s: Array
    compute_j: Array
    fixed_j: Array
    budget_j: Array
    circuit_w: Array
    amplifier_w: Array
    bits: Array
    snr_hz: Array
    slows: Array
    dims: Array

    def take(self, index: Array | slice) -> Means:
        """Returns the means of some of the devices."""
        return Means(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def drawn_w(self) -> Array:
        """What the radio draws at full power [n]."""
        return self.circuit_w + self.amplifier_w

    @property
    def scale_s(self) -> Array:
        """What the time of sending is measured against [n]: all the time where the rest is for computing, else more than there can be."""
        return np.where(self.slows, self.time_s, 2 * self.time_s)

    @property
    def most(self) -> Array:
        """The share [n] with which neither time nor energy is left to send; -1 where not even nothing can be kept."""
        a, c0, e, e0, E = self.compute_s, self.fixed_compute_s, self.compute_j, self.fixed_j, self.budget_j
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            least_j = np.where(self.slows & (c0 < self.time_s), e0 * (c0 / self.time_s) ** 2, e0)
            by_time = np.where(a > 0, (self.time_s - c0) / a, np.inf)
            by_energy = np.where(e > 0, (E - e0) / e, np.inf)
            if self.slows.any():
                by_energy = np.where(self.slows, self._most_slowed(), by_energy)
        begins = (self.time_s >= c0) & (least_j <= E)
        return np.where(begins, np.minimum(by_time, by_energy), -1.0)

    def _most_slowed(self) -> Array:
        """The share [n] whose computing takes all time and energy: (e x + e0) ((a x + c0) / T')^2 = E, by Newton from above."""
        a, c0, e, e0, E = (
            self.compute_s / self.time_s,
            self.fixed_compute_s / self.time_s,
            self.compute_j,
            self.fixed_j,
            self.budget_j,
        )
        # each term of the product by itself bounds x, and the least bound is not far from the root
        bounds = (np.cbrt(E / e) / np.cbrt(a) ** 2, np.sqrt(E / e0) / a, E / e / c0**2)
        x = np.fmin.reduce([np.where(np.isnan(bound), np.inf, bound) for bound in bounds])
        for _ in range(60):
            A, J = a * x + c0, e * x + e0
            step = (J * A - E / A) / (e * A + 2 * a * J)
            x, before = np.where(step > 0, np.maximum(x - step, 0.0), x), x
            if not (before - x > 1e-16 * before).any():
                break
        return x
