"""Channels: path loss, shadowing and block fading -> power gains; outages -> who is there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.rng import stream
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array
from fedprune_cli.world.band import Radio, RadioBand, check_band, without_outage
from fedprune_cli.world.fleet import Fleet
from fedprune_cli.world.recorded import Trace, UplinkTrace
from fedprune_cli.world.selective import block_fading

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


@runtime_checkable
class Gridded(Protocol):
    """A channel that says what of its band carries an uplink; one from outside need not."""

    @property
    def radio(self) -> Radio: ...


def radio_of(channel: Channel) -> Radio:
    """Returns what of a channel carries an uplink: all of its band, in any portions, where it does not say."""
    return channel.radio if isinstance(channel, Gridded) else Radio(channel.bandwidth_hz)


@runtime_checkable
class Selective(Protocol):
    """A channel whose blocks may have gains of their own."""

    def block_gain(self, seed: int, number: int, num_devices: int) -> Array | None:
        """Returns the gain of every device in each block in round `number` relative to `gain` [N, blocks]; None where all are alike."""


def block_gain_of(channel: Channel, seed: int, number: int, num_devices: int) -> Array | None:
    """Returns a channel's gains by block relative to the devices' own [N, blocks]; None where all blocks are alike."""
    return channel.block_gain(seed, number, num_devices) if isinstance(channel, Selective) else None


@dataclass(frozen=True)
class _Fading(RadioBand, ABC):
    """Path loss and log-normal shadowing, fixed for a device, times block fading, redrawn each round.

    A fleet's own `path_gain_linear` stands in for path loss and shadowing where it is given. coherence_hz: the bandwidth over which the
    correlation of two blocks' gains falls to 1/2, None where all blocks fade alike; a device's own gain is then its mean over the blocks.
    """

    fading: str
    coherence_hz: float | None = field(default=None, kw_only=True, metadata=LATER)

    @abstractmethod
    def loss_db(self, seed: int, distance_m: Array) -> Array:
        """Returns path loss plus shadowing, dB [N]."""

    def path_gain(self, seed: int, fleet: Fleet) -> Array:
        """Returns the power gain without fading, linear [N]: the inverse of the path loss that a device measures over many rounds."""
        with np.errstate(invalid="ignore"):
            return np.where(
                np.isnan(fleet.path_gain_linear),
                10 ** (-self.loss_db(seed, fleet.distance_m) / 10),
                fleet.path_gain_linear,
            )

    def gain(self, seed: int, number: int, fleet: Fleet) -> Array:
        path_gain = self.path_gain(seed, fleet)
        if self.fading == "none":
            return path_gain
        if self.coherence_hz is not None:
            mean: Array = self._fading_of_blocks(seed, number, len(path_gain)).mean(1)
            return path_gain * mean
        return path_gain * stream(seed, "fading", number).exponential(size=len(path_gain))

    def block_gain(self, seed: int, number: int, num_devices: int) -> Array | None:
        """Returns the gain of every device in each block relative to its own [N, blocks]; None where all blocks fade alike."""
        if self.coherence_hz is None:
            return None
        gain = self._fading_of_blocks(seed, number, num_devices)
        return gain / gain.mean(1)[:, None]

    def _fading_of_blocks(self, seed: int, number: int, num_devices: int) -> Array:
        radio = self.radio
        block_hz = radio.block_hz or radio.band_hz
        blocks = round(radio.band_hz / block_hz)
        return block_fading(seed, number, (num_devices, blocks), (self.coherence_hz or math.inf) / block_hz)

    def available(self, seed: int, rounds: int, num_devices: int) -> Array:
        return without_outage(self, seed, rounds, num_devices)


def _check_fading(channel: _Fading) -> None:
    require(channel.fading in ("rayleigh", "none"), "fading", channel.fading, "'rayleigh' or 'none'")
    coherence_hz = channel.coherence_hz
    require(
        coherence_hz is None or 0 < coherence_hz < math.inf, "coherence_hz", coherence_hz, "> 0 and finite, or null"
    )
    fades = channel.numerology is not None and channel.fading == "rayleigh"
    require(
        coherence_hz is None or fades,
        "coherence_hz",
        coherence_hz,
        "null, unless channel.numerology says how wide a block is and channel.fading=rayleigh",
    )


@dataclass(frozen=True)
class Urban(_Fading):
    """128.1 + 37.6 log10(d_km) dB, the field's usual urban macro cell at 2 GHz (model.md, section 5).

    loss_1km_db: what is lost over a kilometre; 120.9 at 900 MHz (3GPP TR 25.814, table A.2.1.1-3).
    """

    shadowing_db: float
    loss_1km_db: float = field(default=128.1, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        check_band(self)
        _check_fading(self)
        require(0 <= self.shadowing_db <= 100, "shadowing_db", self.shadowing_db, "in [0, 100]")
        require(0 <= self.loss_1km_db <= 250, "loss_1km_db", self.loss_1km_db, "in [0, 250]")

    def loss_db(self, seed: int, distance_m: Array) -> Array:
        shadowing = self.shadowing_db * stream(seed, "shadowing").normal(size=len(distance_m))
        return self.loss_1km_db + 37.6 * np.log10(distance_m / 1e3) + shadowing


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
    check_band(channel)
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


CHANNELS: dict[str, type[Channel]] = {
    "urban": Urban,
    "umi": Umi,
    "uma": Uma,
    "trace": Trace,
    "uplink": UplinkTrace,
    "lte": Urban,
    "lte_m": Urban,
    "nb_iot": Urban,
    "nr": Umi,
}
