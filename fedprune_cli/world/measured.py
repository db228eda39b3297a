"""Fleets of real devices, by what others measured of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import ConfigError, require, unknown
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array
from fedprune_cli.world.fleet import LIMIT_FIELDS, Fleet, Practice, check_range
from fedprune_cli.world.tables import MAX_DEVICES


@dataclass(frozen=True)
class MeasuredClass:
    """A kind of real device. source: who measured what, when it was read, and what is assumed.

    cycles_per_flop: of a convolution in float32 training; dense_scale, depthwise_scale, recurrent_scale: how many times that a FLOP of
    such a layer takes; energy_coefficient kappa: fitted as dynamic watts / f^3; tx_power_w: radiated; radio_power_w: drawn meanwhile.
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


@dataclass(frozen=True)
class MeasuredFleet:
    """A mix of classes of real devices, from their published figures.

    mix: the classes of the fleet; shares: of each of them, in any unit.
    """

    name: str
    per_round: int | None
    fresh: int
    count: int
    mix: tuple[str, ...]
    shares: tuple[float, ...]
    classes: tuple[MeasuredClass, ...]
    min_distance_m: float
    radius_m: float
    energy_budget_j: float | None
    min_bandwidth_hz: float
    max_bandwidth_hz: float | None

    def __post_init__(self) -> None:
        most, chosen, budget = self.max_bandwidth_hz, self.per_round, self.energy_budget_j
        require(1 <= self.count <= MAX_DEVICES, "count", self.count, f"in 1..{MAX_DEVICES}")
        require(0 <= self.fresh <= MAX_DEVICES, "fresh", self.fresh, ">= 0")
        require(chosen is None or chosen >= 1, "per_round", chosen, ">= 1 or null")
        require(chosen is None or chosen <= self.count, "per_round", chosen, f"at most count={self.count}")
        require(0 <= self.min_bandwidth_hz < math.inf, "min_bandwidth_hz", self.min_bandwidth_hz, ">= 0")
        require(
            most is None or self.min_bandwidth_hz <= most < math.inf,
            "max_bandwidth_hz",
            most,
            "at least the minimum, or null",
        )
        require(budget is None or 0 < budget < math.inf, "energy_budget_j", budget, "> 0 or null")
        check_range(self, "min_distance_m", "radius_m", 1, 1e7)
        for name in self.mix:
            if name not in self.by_name:
                raise unknown("class of devices", name, self.by_name, key="mix")
        require(0 < len(self.mix) == len({*self.mix}), "mix", self.mix, "a list of different classes")
        fit = len(self.shares) == len(self.mix) and all(0 < share <= 1e9 for share in self.shares)
        require(fit, "shares", self.shares, f"{len(self.mix)} numbers > 0, one for each class of devices.mix")
        for entry in self.classes:
            for key, least, most in (
                ("cpu_hz", 1e3, 1e15), ("cycles_per_flop", 1e-6, 1e6), ("dense_scale", 1e-3, 1e3), ("depthwise_scale", 1e-3, 1e3),
                ("recurrent_scale", 1e-3, 1e3), ("step_s", 0, 1e3), ("energy_coefficient", 0, 1e-15), ("tx_power_w", 1e-13, 1e7),
                ("radio_power_w", 1e-13, 1e7),
            ):  # fmt: skip
                value = getattr(entry, key)
                if not least <= value <= most:
                    allowed = f"must be in [{least:g}, {most:g}] (SI units)"
                    raise ConfigError(f"classes: class {entry.name} has {key}={value:g}: {allowed}")

    @property
    def by_name(self) -> dict[str, MeasuredClass]:
        """The classes by their names."""
        return {entry.name: entry for entry in self.classes}

    @property
    def num_devices(self) -> int:
        """Devices that train."""
        return self.count

    @property
    def energy_coefficient(self) -> float:
        """kappa of the first class of the mix: what a table's devices are given that name none."""
        return self.by_name[self.mix[0]].energy_coefficient

    def limits(self, size: int) -> dict[str, Array]:
        """Returns the limits of every device as columns of a Fleet [size], apart from those of their classes."""
        values = (self.min_bandwidth_hz, self.max_bandwidth_hz, self.energy_budget_j)
        most = [math.inf if value is None else value for value in values]
        return {name: np.full(size, value) for name, value in zip(LIMIT_FIELDS, most, strict=True)}

    def draw(self, seed: int) -> Fleet:
        """Returns the training devices and then the fresh ones; more devices change no earlier one."""
        size = self.count + self.fresh
        first, _, place = stream(seed, "fleet").random((size, 3)).T
        share = np.array(self.shares)
        of = np.searchsorted((np.cumsum(share) / share.sum())[:-1], first, side="right")
        chosen = [self.by_name[name] for name in self.mix]

        def column(key: str) -> Array:
            return np.array([getattr(entry, key) for entry in chosen], dtype=float)[of]

        limits = self.limits(size)
        most_hz = [math.inf if entry.max_bandwidth_hz is None else entry.max_bandwidth_hz for entry in chosen]
        limits["max_bandwidth_hz"] = np.maximum(
            np.minimum(limits["max_bandwidth_hz"], np.array(most_hz)[of]), limits["min_bandwidth_hz"]
        )
        scale = {kind: column(f"{kind}_scale") for kind in ("dense", "depthwise", "recurrent")}
        return Fleet(
            cpu_hz=column("cpu_hz"),
            cycles_per_flop=column("cycles_per_flop"),
            tx_power_w=column("tx_power_w"),
            distance_m=np.sqrt(self.min_distance_m**2 + (self.radius_m**2 - self.min_distance_m**2) * place),
            energy_coefficient=column("energy_coefficient"),
            path_gain_linear=np.full(size, np.nan),
            names=None,
            practice=Practice(
                column("radio_power_w"), column("step_s"), scale | {"conv": np.ones(size), "elementwise": np.ones(size)}
            ),
            **limits,
        )
