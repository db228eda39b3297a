"""A fleet as a value: what every device is, and what was measured of it; and what every configured fleet says of its devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.state import Array
from fedprune_cli.world.tables import MAX_DEVICES

LIMIT_FIELDS = ("min_bandwidth_hz", "max_bandwidth_hz", "energy_budget_j")


@dataclass(frozen=True)
class Practice:
    """What was measured of real devices, and what one figure per device hides, [N].

    radio_power_w: what the radio draws while it sends, of which it radiates a part; radio_circuit_w: of that, what it draws however
    little it radiates; idle_power_w: what the device draws when it does nothing; both 0 where nobody knows. step_s: what a training step
    takes besides its FLOPs; flop_scale: by kind of layer (model.md, section 5), how many times the fleet's cycles_per_flop a FLOP of it
    takes.
    """

    radio_power_w: Array
    radio_circuit_w: Array
    idle_power_w: Array
    step_s: Array
    flop_scale: Mapping[str, Array]

    def take(self, index: Array) -> Practice:
        """Returns the figures of some of the devices, in that order."""
        arrays = (field.name for field in fields(self) if field.name != "flop_scale")
        scale = {kind: values[index] for kind, values in self.flop_scale.items()}
        return replace(self, **{name: getattr(self, name)[index] for name in arrays}, flop_scale=scale)


@dataclass(frozen=True)
class Fleet:
    """The devices, one array entry each [N].

    cpu_hz; cycles_per_flop; tx_power_w; distance_m from the base station; energy_coefficient kappa (kappa f^2 joules per cycle);
    path_gain_linear: a fixed large-scale gain that replaces path loss and shadowing, NaN where the channel computes it;
    min_bandwidth_hz, max_bandwidth_hz: what the device may be given, 0 and infinite without a limit; energy_budget_j: of
    computing and sending, per round, infinite without one; names: what a table calls the devices, None where it does not;
    practice: what was measured besides, None for a fleet that is only modelled.
    """

    cpu_hz: Array
    cycles_per_flop: Array
    tx_power_w: Array
    distance_m: Array
    energy_coefficient: Array
    path_gain_linear: Array
    min_bandwidth_hz: Array
    max_bandwidth_hz: Array
    energy_budget_j: Array
    names: tuple[str, ...] | None = None
    practice: Practice | None = None

    @property
    def radio_power_w(self) -> Array:
        """What the radio draws while it sends [N]: what it radiates, where nothing else is known."""
        return self.tx_power_w if self.practice is None else self.practice.radio_power_w

    @property
    def radio_circuit_w(self) -> Array:
        """What the radio draws while it sends, however little it radiates [N]: 0 where nobody knows."""
        return np.zeros(len(self.cpu_hz)) if self.practice is None else self.practice.radio_circuit_w

    def drawn_w(self, power: Array | None) -> Array:
        """Returns what the radio draws while it sends with a share of its full radiated power [N], None: all of it."""
        if power is None:
            return self.radio_power_w
        return self.radio_circuit_w + power * (self.radio_power_w - self.radio_circuit_w)

    @property
    def idle_power_w(self) -> Array:
        """What a device draws when it does nothing [N]: 0 where nobody knows."""
        return np.zeros(len(self.cpu_hz)) if self.practice is None else self.practice.idle_power_w

    def take(self, index: Array) -> Fleet:
        """Returns some of the devices, in that order."""
        arrays = (field.name for field in fields(self) if field.name not in ("names", "practice"))
        chosen = {name: getattr(self, name)[index] for name in arrays}
        names = None if self.names is None else tuple(np.array(self.names, dtype=object)[index])
        practice = None if self.practice is None else self.practice.take(index)
        return replace(self, **chosen, names=names, practice=practice)

    @property
    def limited(self) -> bool:
        """Whether any device has a limit besides its time."""
        unlimited = np.isinf(self.max_bandwidth_hz) & np.isinf(self.energy_budget_j) & (self.min_bandwidth_hz == 0)
        return not bool(unlimited.all())


@dataclass(frozen=True)
class EveryFleet:
    """What every configured fleet says: who takes part per round, who never trains, and the limits of every device (None: none)."""

    name: str
    per_round: int | None
    fresh: int
    min_bandwidth_hz: float
    max_bandwidth_hz: float | None
    energy_budget_j: float | None

    def limits(self, size: int) -> dict[str, Array]:
        """Returns the limits of every device as columns of a Fleet [size]."""
        values = (self.min_bandwidth_hz, self.max_bandwidth_hz, self.energy_budget_j)
        most = [math.inf if value is None else value for value in values]
        return {name: np.full(size, value) for name, value in zip(LIMIT_FIELDS, most, strict=True)}


@dataclass(frozen=True)
class PlacedFleet(EveryFleet):
    """A fleet of `count` devices and `fresh` more that never train, placed uniformly in a disk with a hole."""

    count: int
    min_distance_m: float
    radius_m: float

    @property
    def num_devices(self) -> int:
        """Devices that train."""
        return self.count

    def distance_m(self, place: Array) -> Array:
        """Returns the devices' distances from the base station [N] for a uniform draw in [0, 1) each."""
        hole = self.min_distance_m**2
        return np.asarray(np.sqrt(hole + (self.radius_m**2 - hole) * place))


def check_every(fleet: EveryFleet) -> None:
    """Raises ConfigError where what every fleet says is out of range."""
    require(fleet.per_round is None or fleet.per_round >= 1, "per_round", fleet.per_round, ">= 1 or null")
    require(0 <= fleet.fresh <= MAX_DEVICES, "fresh", fleet.fresh, ">= 0")
    least, most, budget = fleet.min_bandwidth_hz, fleet.max_bandwidth_hz, fleet.energy_budget_j
    require(0 <= least < math.inf, "min_bandwidth_hz", least, ">= 0")
    allowed = "at least the minimum, or null"
    require(most is None or max(least, 1) <= most < math.inf, "max_bandwidth_hz", most, allowed)
    require(budget is None or 0 < budget < math.inf, "energy_budget_j", budget, "> 0 or null")


def check_placed(fleet: PlacedFleet) -> None:
    """Raises ConfigError where what a placed fleet says is out of range."""
    check_every(fleet)
    require(1 <= fleet.count <= MAX_DEVICES, "count", fleet.count, f"in 1..{MAX_DEVICES}")
    chosen = fleet.per_round
    require(chosen is None or chosen <= fleet.count, "per_round", chosen, f"at most count={fleet.count}")
    check_range(fleet, "min_distance_m", "radius_m", 1, 1e7)


def check_coefficient(coefficient: float) -> None:
    """Raises ConfigError where kappa is out of range."""
    require(0 <= coefficient < math.inf, "energy_coefficient", coefficient, ">= 0")


def check_range(config: object, low: str, high: str, least: float, most: float) -> None:
    """Raises ConfigError where a minimum and its maximum are out of range, or crossed."""
    minimum, maximum = getattr(config, low), getattr(config, high)
    require(least <= minimum <= most, low, minimum, f"in [{least:g}, {most:g}] (SI units)")
    require(minimum <= maximum <= most, high, maximum, f"at least its minimum and at most {most:g} (SI units)")
