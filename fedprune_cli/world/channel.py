"""Channels: path loss, shadowing and block fading -> power gains; outages -> who is there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from fedprune_cli.errors import ConfigError, DataError, require
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array
from fedprune_cli.world.devices import Fleet
from fedprune_cli.world.tables import read_table

MAX_OUTAGES = 10**10
MAX_FILLED = 2 * 10**7  # gains of a trace with gaps; without gaps its bytes are the bound
LIGHT_M_PER_S = 299_792_458.0


class Channel(Protocol):
    """A channel plug-in: a frozen dataclass whose fields are its configuration."""

    @property
    def name(self) -> str: ...

    @property
    def bandwidth_hz(self) -> float: ...

    @property
    def noise_w_per_hz(self) -> float: ...

    @property
    def bs_power_w(self) -> float: ...

    def gain(self, seed: int, number: int, fleet: Fleet) -> Array:
        """Returns the power gain of every device in round `number`, linear [N]."""

    def available(self, seed: int, rounds: int, num_devices: int) -> Array:
        """Returns who can be reached, bool [rounds, N]; more rounds or devices change no earlier entry."""


def gilbert_elliott(draw: Callable[[int], Array], rounds: int, num_devices: int, enter: float, leave: float) -> Array:
    """Returns who is in the bad state, bool [rounds, N], from the stationary distribution on.

    draw: uniform numbers [N] of a round; enter, leave: probabilities a round of entering and leaving the state.
    """
    bad = np.zeros((rounds, num_devices), dtype=bool)
    bad[0] = draw(0) < enter / (enter + leave)
    for number in range(1, rounds):
        uniform = draw(number)
        bad[number] = np.where(bad[number - 1], uniform >= leave, uniform < enter)
    return bad


@dataclass(frozen=True)
class Radio:
    """The band and its outages, common to all channels.

    bandwidth_hz B; noise_w_per_hz N0; bs_power_w: the base station's, for the downlink;
    outage_enter, outage_leave: Gilbert-Elliott probabilities a round of losing and of regaining a device, 0 to enter: never.
    """

    name: str
    bandwidth_hz: float
    noise_w_per_hz: float
    bs_power_w: float
    outage_enter: float
    outage_leave: float

    def __post_init__(self) -> None:
        for key in ("bandwidth_hz", "noise_w_per_hz", "bs_power_w"):
            require(0 < getattr(self, key) < math.inf, key, getattr(self, key), "> 0 and finite")
        require(0 <= self.outage_enter <= 1, "outage_enter", self.outage_enter, "in [0, 1]")
        require(0 < self.outage_leave <= 1, "outage_leave", self.outage_leave, "in (0, 1]")

    def available(self, seed: int, rounds: int, num_devices: int) -> Array:
        """Gilbert-Elliott, in outage a fraction enter / (enter + leave) of the time."""
        if self.outage_enter == 0:
            return np.broadcast_to(np.True_, (rounds, num_devices))  # one byte, however many rounds and devices
        if rounds * num_devices > MAX_OUTAGES:
            raise ConfigError(
                f"channel.outage_enter={self.outage_enter}: {rounds} rounds of {num_devices} devices are too many outages to draw: "
                f"must be at most {MAX_OUTAGES}"
            )

        def draw(number: int) -> Array:
            return stream(seed, "outage", number).random(num_devices)

        return ~gilbert_elliott(draw, rounds, num_devices, self.outage_enter, self.outage_leave)


@dataclass(frozen=True)
class Faded(Radio):
    """Path loss and log-normal shadowing, fixed for a device, times block fading, redrawn each round.

    A fleet's own `path_gain_linear` stands in for path loss and shadowing where it is given.
    """

    fading: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.fading in ("rayleigh", "none"), "fading", self.fading, "'rayleigh' or 'none'")

    def loss_db(self, seed: int, distance_m: Array) -> Array:
        """Returns path loss plus shadowing, dB [N]."""
        raise NotImplementedError

    def gain(self, seed: int, number: int, fleet: Fleet) -> Array:
        size = len(fleet.distance_m)
        with np.errstate(invalid="ignore"):
            large_scale = np.where(
                np.isnan(fleet.path_gain_linear),
                10 ** (-self.loss_db(seed, fleet.distance_m) / 10),
                fleet.path_gain_linear,
            )
        if self.fading == "none":
            return large_scale
        return large_scale * stream(seed, "fading", number).exponential(size=size)


@dataclass(frozen=True)
class Urban(Faded):
    """128.1 + 37.6 log10(d_km) dB, the field's usual urban macro cell at 2 GHz (model.md, section 5)."""

    shadowing_db: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.shadowing_db <= 100, "shadowing_db", self.shadowing_db, "in [0, 100]")

    def loss_db(self, seed: int, distance_m: Array) -> Array:
        shadowing = self.shadowing_db * stream(seed, "shadowing").normal(size=len(distance_m))
        return 128.1 + 37.6 * np.log10(distance_m / 1e3) + shadowing


@dataclass(frozen=True)
class Umi(Faded):
    """3GPP TR 38.901 UMi street canyon: LOS probability (table 7.4.2-1), path loss and shadowing (table 7.4.1-1).

    Ignored: indoor loss, blockage, spatial correlation of shadowing and of line of sight, clusters (block Rayleigh instead).
    The tables hold from 10 m to 5 km, with the base station 10 m high (UMi) or 25 m (UMa); beyond, the formulas are extended as they are.
    """

    carrier_hz: float
    bs_height_m: float
    device_height_m: float
    los_decay_m: ClassVar[float] = 36.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0.5e9 <= self.carrier_hz <= 100e9, "carrier_hz", self.carrier_hz, "in 0.5..100 GHz, the range of TR 38.901"
        )
        require(2 <= self.bs_height_m <= 150, "bs_height_m", self.bs_height_m, "in [2, 150]")
        require(
            1.5 <= self.device_height_m <= 22.5,
            "device_height_m",
            self.device_height_m,
            "in [1.5, 22.5] (table 7.4.1-1)",
        )

    def loss_db(self, seed: int, distance_m: Array) -> Array:
        line_of_sight = stream(seed, "los").random(len(distance_m)) < self.los_probability(distance_m)
        los_db, nlos_db = self.path_loss_db(distance_m)
        los_sigma, nlos_sigma = self.shadowing_sigma_db()
        normal = stream(seed, "shadowing").normal(size=len(distance_m))
        return np.where(line_of_sight, los_db + los_sigma * normal, nlos_db + nlos_sigma * normal)

    def los_probability(self, distance_m: Array) -> Array:
        """Returns the probability of line of sight by the 2D distance (table 7.4.2-1)."""
        near: Array = 18 / np.maximum(distance_m, 18.0)
        probability: Array = near + np.exp(-distance_m / self.los_decay_m) * (1 - near)
        return probability

    def shadowing_sigma_db(self) -> tuple[float, float]:
        """Returns the standard deviations of shadowing with and without line of sight (table 7.4.1-1)."""
        return 4.0, 7.82

    def path_loss_db(self, distance_m: Array) -> tuple[Array, Array]:
        """Returns the path loss with and without line of sight, dB [N], by the 2D distance (table 7.4.1-1)."""
        d3, log_f = self._distance_3d(distance_m), math.log10(self.carrier_hz / 1e9)
        near = 32.4 + 21 * np.log10(d3) + 20 * log_f
        breakpoint_m = self._breakpoint_m()
        height = self.bs_height_m - self.device_height_m
        far = 32.4 + 40 * np.log10(d3) + 20 * log_f - 9.5 * math.log10(breakpoint_m**2 + height**2)
        los = np.where(distance_m <= breakpoint_m, near, far)
        nlos = 35.3 * np.log10(d3) + 22.4 + 21.3 * log_f - 0.3 * (self.device_height_m - 1.5)
        return los, np.maximum(los, nlos)

    def _distance_3d(self, distance_m: Array) -> Array:
        """2D distances below the model's 10 m count as 10 m."""
        distance_3d_m: Array = np.hypot(np.maximum(distance_m, 10.0), self.bs_height_m - self.device_height_m)
        return distance_3d_m

    def _breakpoint_m(self) -> float:
        """Returns d'_BP of note 1 under table 7.4.1-1, with the effective environment height of 1 m."""
        return 4 * (self.bs_height_m - 1) * (self.device_height_m - 1) * self.carrier_hz / LIGHT_M_PER_S


@dataclass(frozen=True)
class Uma(Umi):
    """3GPP TR 38.901 UMa: like UMi with its own LOS probability, path loss and shadowing; devices up to 13 m high."""

    los_decay_m: ClassVar[float] = 63.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.device_height_m <= 13,
            "device_height_m",
            self.device_height_m,
            "at most 13 (above, table 7.4.2-1 adds a term that is left out)",
        )

    def shadowing_sigma_db(self) -> tuple[float, float]:
        return 4.0, 6.0

    def path_loss_db(self, distance_m: Array) -> tuple[Array, Array]:
        d3, log_f = self._distance_3d(distance_m), math.log10(self.carrier_hz / 1e9)
        near = 28 + 22 * np.log10(d3) + 20 * log_f
        breakpoint_m = self._breakpoint_m()
        height = self.bs_height_m - self.device_height_m
        far = 28 + 40 * np.log10(d3) + 20 * log_f - 9 * math.log10(breakpoint_m**2 + height**2)
        los = np.where(distance_m <= breakpoint_m, near, far)
        nlos = 13.54 + 39.08 * np.log10(d3) + 20 * log_f - 0.6 * (self.device_height_m - 1.5)
        return los, np.maximum(los, nlos)


@dataclass(frozen=True)
class Trace(Radio):
    """Recorded gains: a CSV file with the columns round, device, gain_db and, if known, available (1 or 0).

    It holds the devices in the rounds from 0 to its last one, and starts again after that. The gains are whole: the fleet's
    distances and fixed gains do not count. Outages of the configuration come on top of the recorded ones.
    gaps: what a round without a row for a device means. `refuse`: the file is not sound; `hold`: the device's last row still stands;
    `outage`: it cannot be reached, and its gain, should anybody ask, is its last one, or its first one before that.
    """

    file: str
    gaps: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gaps in ("refuse", "hold", "outage"), "gaps", self.gaps, "'refuse', 'hold' or 'outage'")

    def gain(self, seed: int, number: int, fleet: Fleet) -> Array:
        gains, _ = self._read(len(fleet.distance_m))
        row: Array = gains[number % len(gains)]
        return row

    def available(self, seed: int, rounds: int, num_devices: int) -> Array:
        _, recorded = self._read(num_devices)
        both: Array = recorded[np.arange(rounds) % len(recorded)] & super().available(seed, rounds, num_devices)
        return both

    def _read(self, num_devices: int) -> tuple[Array, Array]:
        path = Path(self.file)
        found = path.stat() if path.is_file() else None
        version = (found.st_ino, found.st_size, found.st_mtime_ns) if found else ()
        return _read_trace(self.file, num_devices, self.gaps, (path.resolve(), *version))


@functools.lru_cache(maxsize=2)
def _read_trace(file: str, num_devices: int, gaps: str, _version: tuple[object, ...]) -> tuple[Array, Array]:
    """Returns linear gains and availability [rounds, devices]; raises DataError. The version tells the cache of another file."""
    rows = read_table(file, ("round", "device", "gain_db"), optional=("available",))
    wanted = np.flatnonzero(rows["device"] < num_devices)
    keys = (rows["round"][wanted] * num_devices + rows["device"][wanted]).astype(np.int64)
    order = np.argsort(keys, kind="stable")
    keys, wanted = keys[order], wanted[order]
    if (twice := np.flatnonzero(keys[1:] == keys[:-1])).size:
        number, device = divmod(int(keys[twice[0]]), num_devices)
        lines = rows.lines[wanted[twice[0] : twice[0] + 2]]
        raise DataError(
            f"{file}, line {lines[1]}: round {number}, device {device} stands there twice, on line {lines[0]} too"
        )
    shape = (int(rows["round"].max()) + 1, num_devices)
    held, known = _fill(file, keys, shape, gaps)
    gains = 10 ** (rows["gain_db"][wanted] / 10)
    available = rows["available"][wanted] == 1 if "available" in rows else np.ones(len(wanted), dtype=bool)
    return gains[held].reshape(shape), (available[held] & known).reshape(shape)


def _fill(file: str, keys: Array, shape: tuple[int, int], gaps: str) -> tuple[Array, Array]:
    """Returns which row stands for each device in each round, and whether the device can be reached, int and bool [rounds * devices].

    keys: round * devices + device of every row, ascending and each once.
    """
    rounds, num_devices = shape
    size = rounds * num_devices
    where = f"rounds 0..{rounds - 1} must all have the devices 0..{num_devices - 1}"
    if len(keys) == size:
        return np.arange(size), np.ones(size, dtype=bool)
    if gaps == "refuse":
        number, device = divmod(int(np.append(np.flatnonzero(keys != np.arange(len(keys))), len(keys))[0]), num_devices)
        raise DataError(
            f"{file}: round {number}, device {device} is missing; {where}, or channel.gaps=hold or outage says what a gap is"
        )
    if size > MAX_FILLED:
        raise DataError(
            f"{file}: {rounds} rounds of {num_devices} devices, at most {MAX_FILLED} gains have their gaps filled"
        )
    row_of = np.full(size, -1)
    row_of[keys] = np.arange(len(keys))
    row_of = row_of.reshape(shape)
    known = row_of >= 0
    begun = known[0] if gaps == "hold" else known.any(axis=0)
    if not begun.all():
        device = int(np.flatnonzero(~begun)[0])
        lacks = "no row in round 0, and so nothing to hold" if gaps == "hold" else "no row at all"
        raise DataError(f"{file}: device {device} has {lacks}")
    standing = np.maximum.accumulate(np.where(known, np.arange(rounds)[:, None], 0), axis=0)
    standing = np.maximum(standing, known.argmax(axis=0))
    held = np.take_along_axis(row_of, standing, axis=0)
    return held.ravel(), (known if gaps == "outage" else np.ones(shape, dtype=bool)).ravel()


CHANNELS: dict[str, type[Channel]] = {"urban": Urban, "umi": Umi, "uma": Uma, "trace": Trace}
