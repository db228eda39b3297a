"""Recorded channels: gains, or uplinks as they were measured, from a CSV file."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array
from fedprune_cli.world.band import MAX_BITS_PER_HZ, RadioBand, check_band, without_outage
from fedprune_cli.world.fleet import Fleet
from fedprune_cli.world.tables import read_table

MAX_FILLED = 2 * 10**7  # gains of a trace with gaps; without gaps its bytes are the bound
COLUMNS: Mapping[str, Callable[[Array], Array]] = {  # to SI units
    "gain_db": lambda gain_db: 10 ** (gain_db / 10),
    "uplink_mbps": lambda uplink_mbps: uplink_mbps * 1e6,
}


@dataclass(frozen=True)
class _Recorded(RadioBand, ABC):
    """A CSV file with the columns round, device, what was recorded and, if known, available (1 or 0).

    It holds the devices in the rounds from 0 to its last one, and starts again after that. What it says is whole: the fleet's
    distances and fixed gains do not count. Outages of the configuration come on top of the recorded ones.
    gaps: what a round without a row for a device means. `refuse`: the file is not sound; `hold`: the device's last row still stands;
    `outage`: it cannot be reached, and its gain, should anybody ask, is its last one, or its first one before that.
    """

    file: str
    gaps: str = field(default="refuse", kw_only=True, metadata=LATER)
    column: ClassVar[str]

    @abstractmethod
    def as_gain(self, recorded: Array, fleet: Fleet) -> Array:
        """Returns the power gains that the column's values [..., N] mean, linear and of their shape."""

    def path_gain(self, seed: int, fleet: Fleet) -> Array:
        """Returns the power gain of every device averaged over the recorded rounds, linear [N]: what is left when fading averages out."""
        mean: Array = self.as_gain(self._rounds(len(fleet.distance_m))[0], fleet).mean(axis=0)
        return mean

    def gain(self, seed: int, number: int, fleet: Fleet) -> Array:
        recorded, _ = self._rounds(len(fleet.distance_m))
        return self.as_gain(recorded[number % len(recorded)], fleet)

    def available(self, seed: int, rounds: int, num_devices: int) -> Array:
        _, recorded = self._rounds(num_devices)
        both: Array = recorded[np.arange(rounds) % len(recorded)] & without_outage(self, seed, rounds, num_devices)
        return both

    def _rounds(self, num_devices: int) -> tuple[Array, Array]:
        path = Path(self.file)
        found = path.stat() if path.is_file() else None
        version = (found.st_ino, found.st_size, found.st_mtime_ns) if found else ()
        return _read(self.file, self.column, num_devices, self.gaps, (path.resolve(), *version))


def _check_recorded(channel: _Recorded) -> None:
    check_band(channel)
    require(channel.gaps in ("refuse", "hold", "outage"), "gaps", channel.gaps, "'refuse', 'hold' or 'outage'")


@dataclass(frozen=True)
class Trace(_Recorded):
    """Recorded gains, gain_db."""

    column: ClassVar[str] = "gain_db"

    def __post_init__(self) -> None:
        _check_recorded(self)

    def as_gain(self, recorded: Array, fleet: Fleet) -> Array:
        return recorded


@dataclass(frozen=True)
class UplinkTrace(_Recorded):
    """Uplinks as they were measured, uplink_mbps: the rate of one device that has the whole carrier of the measurement.

    A rate R over the bandwidth W becomes the gain h at which the model's device has it, with its own power p, in the uplink's share of
    the time and with retransmissions: share (1 - block_error) W log2(1 + p h / (N0 W)) = R. What keeps a modem from Shannon's rate, and
    interference, become part of h. Ignored: that a power-controlled device may radiate less than p; so its power is not controlled again.
    measured_hz: W; None: the channel's own usable band.
    """

    measured_hz: float | None
    column: ClassVar[str] = "uplink_mbps"

    def __post_init__(self) -> None:
        _check_recorded(self)
        require(self.p0_w is None, "p0_w", self.p0_w, "null: what was measured has the power control in it")
        measured = self.measured_hz
        require(measured is None or 1 <= measured < np.inf, "measured_hz", measured, "at least 1e-6 MHz, or null")

    def as_gain(self, recorded: Array, fleet: Fleet) -> Array:
        measured_hz = self.radio.band_hz if self.measured_hz is None else self.measured_hz
        bits_per_hz = recorded * self.radio.attempts / (self.radio.uplink_share * measured_hz)
        allowed = (
            MAX_BITS_PER_HZ if self.max_bits_per_hz is None else self.max_bits_per_hz
        )  # beyond, a gain would have no meaning
        if (most := float(bits_per_hz.max())) > allowed:
            raise DataError(
                f"{self.file}: uplink_mbps={float(recorded.max()) / 1e6:.9g} over {measured_hz / 1e6:.9g} MHz are {most:.4g} bits per "
                f"second and Hz: must be at most {allowed:g}; channel.measured_mhz is the band of the measurement"
            )
        gain: Array = np.expm1(bits_per_hz * np.log(2)) * measured_hz * self.noise_w_per_hz / fleet.tx_power_w
        return gain


@functools.lru_cache(maxsize=2)
def _read(file: str, column: str, num_devices: int, gaps: str, _version: tuple[object, ...]) -> tuple[Array, Array]:
    """Returns the column's values and availability [rounds, devices]; raises DataError. The version tells the cache of another file."""
    rows = read_table(file, ("round", "device", column), optional=("available",))
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
    values = COLUMNS[column](rows[column][wanted])
    available = rows["available"][wanted] == 1 if "available" in rows else np.ones(len(wanted), dtype=bool)
    return values[held].reshape(shape), (available[held] & known).reshape(shape)


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
