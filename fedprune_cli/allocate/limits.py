"""What each device may use besides its time, and which figures the equations can be computed with."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

SMALLEST, LARGEST = 1e-40, 1e40  # of a figure that is not 0: no product or square that follows from it overflows
IN_RANGE = f"(0, or {SMALLEST:g} to {LARGEST:g})"


def in_range(values: Array) -> Array:
    """Whether figures are 0 or of a size that the equations can be computed with; False for NaN."""
    return (values == 0) | ((values >= SMALLEST) & (values <= LARGEST))


def refuse_first(name: str, values: Array, good: Array, allowed: str, names: Array) -> None:
    """Raises ConfigError naming the first device whose value is not `good`, if any, and what is `allowed`."""
    if good.shape != names.shape:
        raise ConfigError(f"{name}: {good.shape} entries for {len(names)} devices")
    if not good.all():
        at = int(np.flatnonzero(~good)[0])
        raise ConfigError(f"device {names[at]}, {name}={values[at]}: must be {allowed}")


@dataclass(frozen=True)
class Limits:
    """What each device may use besides its time, float64 [K] and SI.

    min_bandwidth_hz, max_bandwidth_hz: 0 and infinite where there is none. energy_budget_j E, infinite where there is none, bounds
    the joules of a round, x_k (shared_energy_j + tx_power_w c_k / r_k(b_k)) + fixed_energy_j (computing and sending; not listening);
    tx_power_w is what sending draws, of which a radio radiates a part.
    All of them keep P1 convex: what the energy allows, psi = (E - fixed) r / (shared_energy r + tx_power c), has phi's form.
    For devices that choose their clock or power (`Problem.freedom`): fixed_compute_s, what of the problem's fixed_s is computing at full
    clock, where it is 0 fixed_energy_j is not computing either; circuit_w, what of tx_power_w is drawn whatever is radiated; None is 0.
    Raises ConfigError naming the first bad entry.
    """

    min_bandwidth_hz: Array
    max_bandwidth_hz: Array
    energy_budget_j: Array
    shared_energy_j: Array
    fixed_energy_j: Array
    tx_power_w: Array
    fixed_compute_s: Array | None = None
    circuit_w: Array | None = None

    def __post_init__(self) -> None:
        devices, endless, amount = np.arange(len(self.tx_power_w)), np.isinf, f"finite and >= 0 {IN_RANGE}"
        for name, allowed, good in (
            ("min_bandwidth_hz", amount, in_range(self.min_bandwidth_hz)),
            ("max_bandwidth_hz", "> 0 and at least the minimum",
             ((self.max_bandwidth_hz >= SMALLEST) & (self.max_bandwidth_hz <= LARGEST) | endless(self.max_bandwidth_hz))
             & (self.max_bandwidth_hz >= self.min_bandwidth_hz)),
            ("energy_budget_j", f">= 0 {IN_RANGE}",
             in_range(self.energy_budget_j) | (endless(self.energy_budget_j) & (self.energy_budget_j > 0))),
            ("shared_energy_j", amount, in_range(self.shared_energy_j)),
            ("fixed_energy_j", amount, in_range(self.fixed_energy_j)),
            ("tx_power_w", "finite and > 0", in_range(self.tx_power_w) & (self.tx_power_w > 0)),
        ):  # fmt: skip
            refuse_first(name, getattr(self, name), good, allowed, devices)
        if self.fixed_compute_s is not None:
            refuse_first("fixed_compute_s", self.fixed_compute_s, in_range(self.fixed_compute_s), amount, devices)
        if self.circuit_w is not None:
            good = in_range(self.circuit_w) & (self.circuit_w <= self.tx_power_w)
            refuse_first("circuit_w", self.circuit_w, good, ">= 0 and at most tx_power_w", devices)

    def take(self, index: Array) -> Limits:
        """Returns the limits of some of the devices."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Limits(**{name: values[index] for name, values in given.items() if values is not None})
