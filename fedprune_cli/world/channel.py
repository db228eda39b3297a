"""Channels: path loss, shadowing and block fading -> power gains; outages -> who is there."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from fedprune_cli.errors import ConfigError, DataError, require
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array
from fedprune_cli.world.fleet import Fleet
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

    draw: returns the uniform numbers [N] of a round; enter, leave: probabilities per round of entering and of leaving the state.
    """
    bad = np.zeros((rounds, num_devices), dtype=bool)
    bad[0] = draw(0) < enter / (enter + leave)
    for number in range(1, rounds):
        uniform = draw(number)
        bad[number] = np.where(bad[number - 1], uniform >= leave, uniform < enter)
    return bad


@dataclass(frozen=True)
class _RadioBand:
    """The band and its outages, common to all channels; each checks them by `_check_band`.

    bandwidth_hz B; noise_w_per_hz N0; bs_power_w: the base station's, for the downlink;
    outage_enter, outage_leave: Gilbert-Elliott probabilities per round of losing and of regaining a device, 0 to enter: never.
    """

    name: str
    bandwidth_hz: float
    noise_w_per_hz: float
    bs_power_w: float
    outage_enter: float
    outage_leave: float


def _check_band(band: _RadioBand) -> None:
    for key in ("bandwidth_hz", "noise_w_per_hz", "bs_power_w"):
        require(0 < getattr(band, key) < math.inf, key, getattr(band, key), "> 0 and finite")
    require(0 <= band.outage_enter <= 1, "outage_enter", band.outage_enter, "in [0, 1]")
    require(0 < band.outage_leave <= 1, "outage_leave", band.outage_leave, "in (0, 1]")


def _without_outage(band: _RadioBand, seed: int, rounds: int, num_devices: int) -> Array:
    """Returns who is in no outage, bool [rounds, N]: by Gilbert-Elliott, in outage a fraction enter / (enter + leave) of the time."""
    if band.outage_enter == 0:
        return np.broadcast_to(np.True_, (rounds, num_devices))  # one byte, however many rounds and devices
    if rounds * num_devices > MAX_OUTAGES:
        raise ConfigError(
            f"channel.outage_enter={band.outage_enter}: {rounds} rounds of {num_devices} devices are too many outages to draw: "
            f"must be at most {MAX_OUTAGES}"
        )

    def draw(number: int) -> Array:
        return stream(seed, "outage", number).random(num_devices)

    return ~gilbert_elliott(draw, rounds, num_devices, band.outage_enter, band.outage_leave)


@dataclass(frozen=True)
class _Fading(_RadioBand, ABC):
    """Path loss and log-normal shadowing, fixed for a device, times block fading, redrawn each round.

    A fleet's own `path_gain_linear` stands in for path loss and shadowing where it is given.
    """

    fading: str

    @abstractmethod
    def loss_db(self, seed: int, distance_m: Array) -> Array:
        """Returns path loss plus shadowing, dB [N]."""

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

    def available(self, seed: int, rounds: int, num_devices: int) -> Array:
        return _without_outage(self, seed, rounds, num_devices)


def _check_fading(channel: _Fading) -> None:
    require(channel.fading in ("rayleigh", "none"), "fading", channel.fading, "'rayleigh' or 'none'")


@dataclass(frozen=True)
class Urban(_Fading):
    """128.1 + 37.6 log10(d_km) dB, the field's usual urban macro cell at 2 GHz (model.md, section 5)."""

    shadowing_db: float

    def __post_init__(self) -> None:
        _check_band(self)
        _check_fading(self)
        require(0 <= self.shadowing_db <= 100, "shadowing_db", self.shadowing_db, "in [0, 100]")

    def loss_db(self, seed: int, distance_m: Array) -> Array:
        shadowing = self.shadowing_db * stream(seed, "shadowing").normal(size=len(distance_m))
        return 128.1 + 37.6 * np.log10(distance_m / 1e3) + shadowing


@dataclass(frozen=True)
class _Tr38901(_Fading, ABC):
    """A street scenario of 3GPP TR 38.901: LOS probability (table 7.4.2-1), path loss and shadowing (table 7.4.1-1).

    los_decay_m: of the LOS probability; los_shadowing_db, nlos_shadowing_db: standard deviations with and without line of sight.
    Ignored: indoor loss, blockage, spatial correlation of shadowing and of line of sight, clusters (block Rayleigh instead).
    The tables hold from 10 m to 5 km, with the base station 10 m high (UMi) or 25 m (UMa); beyond, the formulas are extended as they are.
    """

    carrier_hz: float
    bs_height_m: float
    device_height_m: float
    los_decay_m: ClassVar[float]
    los_shadowing_db: ClassVar[float]
    nlos_shadowing_db: ClassVar[float]

    def loss_db(self, seed: int, distance_m: Array) -> Array:
        line_of_sight = stream(seed, "los").random(len(distance_m)) < self.los_probability(distance_m)
        los_db, nlos_db = self.path_loss_db(distance_m)
        normal = stream(seed, "shadowing").normal(size=len(distance_m))
        return np.where(
            line_of_sight, los_db + self.los_shadowing_db * normal, nlos_db + self.nlos_shadowing_db * normal
        )

    def los_probability(self, distance_m: Array) -> Array:
        """Returns the probability of line of sight by the 2D distance (table 7.4.2-1)."""
        near: Array = 18 / np.maximum(distance_m, 18.0)
        probability: Array = near + np.exp(-distance_m / self.los_decay_m) * (1 - near)
        return probability

    @abstractmethod
    def path_loss_db(self, distance_m: Array) -> tuple[Array, Array]:
        """Returns the path loss with and without line of sight, dB [N], by the 2D distance (table 7.4.1-1)."""

    @property
    def height_m(self) -> float:
        """How far the base station is above a device."""
        return self.bs_height_m - self.device_height_m

    @property
    def breakpoint_m(self) -> float:
        """d'_BP of note 1 under table 7.4.1-1, with the effective environment height of 1 m."""
        return 4 * (self.bs_height_m - 1) * (self.device_height_m - 1) * self.carrier_hz / LIGHT_M_PER_S

    def distance_3d_m(self, distance_m: Array) -> Array:
        """Returns the 3D distances [N]; 2D distances below the model's 10 m count as 10 m."""
        distance_3d_m: Array = np.hypot(np.maximum(distance_m, 10.0), self.height_m)
        return distance_3d_m


def _check_street(channel: _Tr38901) -> None:
    _check_band(channel)
    _check_fading(channel)
    carrier, bs_height, device_height = channel.carrier_hz, channel.bs_height_m, channel.device_height_m
    require(0.5e9 <= carrier <= 100e9, "carrier_hz", carrier, "in 0.5..100 GHz, the range of TR 38.901")
    require(2 <= bs_height <= 150, "bs_height_m", bs_height, "in [2, 150]")
    require(1.5 <= device_height <= 22.5, "device_height_m", device_height, "in [1.5, 22.5] (table 7.4.1-1)")


@dataclass(frozen=True)
class Umi(_Tr38901):
    """3GPP TR 38.901 UMi, a street canyon."""

    los_decay_m: ClassVar[float] = 36.0
    los_shadowing_db: ClassVar[float] = 4.0
    nlos_shadowing_db: ClassVar[float] = 7.82

    def __post_init__(self) -> None:
        _check_street(self)

    def path_loss_db(self, distance_m: Array) -> tuple[Array, Array]:
        d3, log_f = self.distance_3d_m(distance_m), math.log10(self.carrier_hz / 1e9)
        near = 32.4 + 21 * np.log10(d3) + 20 * log_f
        far = 32.4 + 40 * np.log10(d3) + 20 * log_f - 9.5 * math.log10(self.breakpoint_m**2 + self.height_m**2)
        los = np.where(distance_m <= self.breakpoint_m, near, far)
        nlos = 35.3 * np.log10(d3) + 22.4 + 21.3 * log_f - 0.3 * (self.device_height_m - 1.5)
        return los, np.maximum(los, nlos)


@dataclass(frozen=True)
class Uma(_Tr38901):
    """3GPP TR 38.901 UMa, an urban macro cell; devices up to 13 m high."""

    los_decay_m: ClassVar[float] = 63.0
    los_shadowing_db: ClassVar[float] = 4.0
    nlos_shadowing_db: ClassVar[float] = 6.0

    def __post_init__(self) -> None:
        _check_street(self)
        require(
            self.device_height_m <= 13,
            "device_height_m",
            self.device_height_m,
            "at most 13 (above, table 7.4.2-1 adds a term that is left out)",
        )

    def path_loss_db(self, distance_m: Array) -> tuple[Array, Array]:
        d3, log_f = self.distance_3d_m(distance_m), math.log10(self.carrier_hz / 1e9)
        near = 28 + 22 * np.log10(d3) + 20 * log_f
        far = 28 + 40 * np.log10(d3) + 20 * log_f - 9 * math.log10(self.breakpoint_m**2 + self.height_m**2)
        los = np.where(distance_m <= self.breakpoint_m, near, far)
        nlos = 13.54 + 39.08 * np.log10(d3) + 20 * log_f - 0.6 * (self.device_height_m - 1.5)
        return los, np.maximum(los, nlos)


@dataclass(frozen=True)
class Trace(_RadioBand):
    """Recorded gains: a CSV file with the columns round, device, gain_db and, if known, available (1 or 0).

    It holds the devices in the rounds from 0 to its last one, and starts again after that. The gains are whole: the fleet's
    distances and fixed gains do not count. Outages of the configuration come on top of the recorded ones.
    gaps: what a round without a row for a device means. `refuse`: the file is not sound; `hold`: the device's last row still stands;
    `outage`: it cannot be reached, and its gain, should anybody ask, is its last one, or its first one before that.
    """

    file: str
    gaps: str

    def __post_init__(self) -> None:
        _check_band(self)
        require(self.gaps in ("refuse", "hold", "outage"), "gaps", self.gaps, "'refuse', 'hold' or 'outage'")

    def gain(self, seed: int, number: int, fleet: Fleet) -> Array:
        gains, _ = self._read(len(fleet.distance_m))
        row: Array = gains[number % len(gains)]
        return row

    def available(self, seed: int, rounds: int, num_devices: int) -> Array:
        _, recorded = self._read(num_devices)
        both: Array = recorded[np.arange(rounds) % len(recorded)] & _without_outage(self, seed, rounds, num_devices)
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
