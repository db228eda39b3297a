"""A fleet as a value: what every device is, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.state import Array

LIMIT_FIELDS = ("min_bandwidth_hz", "max_bandwidth_hz", "energy_budget_j")
LIMIT_COLUMNS = ("min_bandwidth_mhz", "max_bandwidth_mhz", "energy_budget_j")


@dataclass(frozen=True)
class Practice:
    """What was measured of real devices, and what one figure per device hides, [N].

    radio_power_w: what the radio draws while it sends, of which it radiates a part; step_s: what a training step takes besides its
    FLOPs; flop_scale: by kind of layer (model.md, section 5), how many times the fleet's cycles_per_flop a FLOP of it takes.
    """

    radio_power_w: Array
    step_s: Array
    flop_scale: Mapping[str, Array]

    def take(self, index: Array) -> Practice:
        """Returns the figures of some of the devices, in that order."""
        scale = {kind: values[index] for kind, values in self.flop_scale.items()}
        return Practice(self.radio_power_w[index], self.step_s[index], scale)


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


def check_range(config: object, low: str, high: str, least: float, most: float) -> None:
    minimum, maximum = getattr(config, low), getattr(config, high)
    require(least <= minimum <= most, low, minimum, f"in [{least:g}, {most:g}] (SI units)")
    require(minimum <= maximum <= most, high, maximum, f"at least its minimum and at most {most:g} (SI units)")
