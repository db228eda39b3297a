"""Fleets of real devices, by what others measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedprune_cli.errors import ConfigError, require, unknown
from fedprune_cli.rng import stream
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array
from fedprune_cli.world.fleet import Fleet, PlacedFleet, Practice, check_placed

SCALED = ("dense", "depthwise", "recurrent")  # kinds of layers whose FLOPs are weighed; a convolution's count once


@dataclass(frozen=True)
class MeasuredClass:
    """A kind of real device. source: who measured what, when it was read, and what is assumed.

    cycles_per_flop: of a convolution in float32 training; dense_scale, depthwise_scale, recurrent_scale: how many times that a FLOP of
    such a layer takes; energy_coefficient kappa: fitted as dynamic watts / f^3; tx_power_w: radiated; radio_power_w: drawn meanwhile;
    radio_circuit_w: of that, what is drawn however little it radiates; idle_power_w: drawn when nothing is done, None where nobody said.
    """

    name: str
    source: str
    cpu_hz: float
    cycles_per_flop: float
    dense_scale: float
    depthwise_scale: float
    recurrent_scale: float
    step_s: float
    energy_coefficient: float
    tx_power_w: float
    radio_power_w: float
    max_bandwidth_hz: float | None
    radio_circuit_w: float = field(default=0.0, metadata=LATER)
    idle_power_w: float | None = field(default=None, metadata=LATER)


RANGES = {
    "cpu_hz": (1e3, 1e15), "cycles_per_flop": (1e-6, 1e6), "dense_scale": (1e-3, 1e3), "depthwise_scale": (1e-3, 1e3),
    "recurrent_scale": (1e-3, 1e3), "step_s": (0, 1e3), "energy_coefficient": (0, 1e-15), "tx_power_w": (1e-13, 1e7),
    "radio_power_w": (1e-13, 1e7), "radio_circuit_w": (0, 1e7), "idle_power_w": (0, 1e7),
}  # fmt: skip


def check_classes(classes: Sequence[MeasuredClass]) -> None:
    """Raises ConfigError naming the class and the key of the first figure that is out of range, or the name that two classes have."""
    for at, entry in enumerate(classes):
        if entry.name in (other.name for other in classes[:at]):
            raise ConfigError(f"classes: two classes are called {entry.name!r}: each must have a name of its own")
        for key, (least, most) in RANGES.items():
            value = getattr(entry, key)
            if value is not None and not least <= value <= most:
                allowed = f"must be in [{least:g}, {most:g}] (SI units)"
                raise ConfigError(f"classes: class {entry.name} has {key}={value:g}: {allowed}")
        if entry.radio_circuit_w > entry.radio_power_w:
            allowed = f"must be at most radio_power_w={entry.radio_power_w:g}, of which it is a part"
            raise ConfigError(f"classes: class {entry.name} has radio_circuit_w={entry.radio_circuit_w:g}: {allowed}")


def figures(chosen: Sequence[MeasuredClass], of: Array, missing: float) -> dict[str, Array]:
    """Returns each figure of RANGES for devices of the classes chosen[of] [N], in SI units; what a class does not say is `missing`."""
    values = {key: [getattr(entry, key) for entry in chosen] for key in RANGES}
    return {
        key: np.array([missing if value is None else value for value in column], dtype=float)[of]
        for key, column in values.items()
    }


def most_hz(chosen: Sequence[MeasuredClass], of: Array) -> Array:
    """Returns the most bandwidth that the radios of devices of the classes chosen[of] can use [N], infinite without a limit."""
    values = [np.inf if entry.max_bandwidth_hz is None else entry.max_bandwidth_hz for entry in chosen]
    return np.array(values, dtype=float)[of]


def practice_of(known: dict[str, Array]) -> Practice:
    """Returns what was measured of devices, from each figure of RANGES [N]."""
    ones = np.ones(len(known["cpu_hz"]))
    return Practice(
        radio_power_w=known["radio_power_w"],
        radio_circuit_w=known["radio_circuit_w"],
        idle_power_w=known["idle_power_w"],
        step_s=known["step_s"],
        flop_scale={kind: known[f"{kind}_scale"] for kind in SCALED} | {"conv": ones, "elementwise": ones},
    )


@dataclass(frozen=True)
class MeasuredFleet(PlacedFleet):
    """A mix of classes of real devices, from their published figures.

    mix: the classes of the fleet; shares: of each of them, in any unit.
    """

    mix: tuple[str, ...]
    shares: tuple[float, ...]
    classes: tuple[MeasuredClass, ...]

    def __post_init__(self) -> None:
        check_placed(self)
        for name in self.mix:
            if name not in self.by_name:
                raise unknown("class of devices", name, self.by_name, key="mix")
        require(0 < len(self.mix) == len({*self.mix}), "mix", self.mix, "a list of different classes")
        fit = len(self.shares) == len(self.mix) and all(0 < share <= 1e9 for share in self.shares)
        require(fit, "shares", self.shares, f"{len(self.mix)} numbers > 0, one for each class of devices.mix")
        check_classes(self.classes)

    @property
    def by_name(self) -> dict[str, MeasuredClass]:
        """The classes by their names."""
        return {entry.name: entry for entry in self.classes}

    @property
    def energy_coefficient(self) -> float:
        """kappa of the first class of the mix: what a table's devices are given that name none."""
        return self.by_name[self.mix[0]].energy_coefficient

    def draw(self, seed: int) -> Fleet:
        """Returns the training devices and then the fresh ones; more devices change no earlier one."""
        size = self.count + self.fresh
        first, _, place = stream(seed, "fleet").random((size, 3)).T
        share = np.array(self.shares)
        of = np.searchsorted((np.cumsum(share) / share.sum())[:-1], first, side="right")
        chosen = [self.by_name[name] for name in self.mix]
        known, limits = figures(chosen, of, missing=0.0), self.limits(size)
        most = np.minimum(limits["max_bandwidth_hz"], most_hz(chosen, of))
        limits["max_bandwidth_hz"] = np.maximum(most, limits["min_bandwidth_hz"])
        return Fleet(
            cpu_hz=known["cpu_hz"],
            cycles_per_flop=known["cycles_per_flop"],
            tx_power_w=known["tx_power_w"],
            distance_m=self.distance_m(place),
            energy_coefficient=known["energy_coefficient"],
            path_gain_linear=np.full(size, np.nan),
            names=None,
            practice=practice_of(known),
            **limits,
        )
