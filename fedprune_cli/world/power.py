"""What caps a signal-to-noise ratio: 3GPP's open-loop uplink power control, and the most that a modem makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.state import Array
from fedprune_cli.world.fleet import Fleet

P0_HZ = 180e3  # a block at mu = 0, what P0 is the power of, whatever the numerology: 2^mu M counts blocks of this width


@dataclass(frozen=True)
class PowerControl:
    """P = min(P_max, P0 + 10 log10(2^mu M) + alpha PL) dBm on M blocks (3GPP TS 38.213, 7.1.1; with mu = 0 TS 36.213, 5.1.1.1).

    p0_w: P0, what of 180 kHz would be received where alpha is 1; path_loss_alpha: alpha, the share of the path loss PL, in dB, that is
    made up for.
    Since 2^mu M blocks are b / 180 kHz, this is a cap on what is radiated per hertz, the same on every bandwidth b.
    Ignored: the closed loop, the offset by transport format, and that a device knows PL from the downlink only.
    """

    p0_w: float
    path_loss_alpha: float

    def __post_init__(self) -> None:
        require(10**-23.2 <= self.p0_w <= 10**-0.6, "p0_w", self.p0_w, "in -202..24 dBm (3GPP TS 38.331)")
        require(0 <= self.path_loss_alpha <= 1, "path_loss_alpha", self.path_loss_alpha, "in [0, 1]")

    def density_w_per_hz(self, path_gain: Array) -> Array:
        """Returns the most that a device may radiate per hertz [N], by its power gain without fading, 1 / PL [N]."""
        density: Array = self.p0_w / P0_HZ * path_gain**-self.path_loss_alpha
        return density

    def radiated_w(self, path_gain: Array, bandwidth_hz: Array, most_w: Array) -> Array:
        """Returns what devices radiate on bandwidths b [N], of `most_w` P_max [N] at most."""
        return np.minimum(most_w, self.density_w_per_hz(path_gain) * bandwidth_hz)

    def max_snr(self, path_gain: Array, gain: Array, noise_w_per_hz: float) -> Array:
        """Returns the signal-to-noise ratio [N] that no bandwidth exceeds, linear, by the gain h with fading [N].

        r(b) = b log2(1 + min(max_snr, s / b)) is then the rate of the device, with s = P_max h / N0.
        """
        return self.density_w_per_hz(path_gain) * gain / noise_w_per_hz


def snr_of(bits_per_hz: float) -> float:
    """Returns the signal-to-noise ratio beyond which a modem that sends at most so many bits per second and Hz gains nothing.

    >>> snr_of(1.0)
    1.0
    """
    return 2.0**bits_per_hz - 1.0


@runtime_checkable
class Capped(Protocol):
    """A channel that says what caps a signal-to-noise ratio; one from outside need not."""

    @property
    def noise_w_per_hz(self) -> float: ...

    @property
    def max_bits_per_hz(self) -> float | None: ...

    @property
    def control(self) -> PowerControl | None: ...

    def path_gain(self, seed: int, fleet: Fleet) -> Array:
        """Returns the power gain of every device without fading, linear [N]."""


def max_snr_of(channel: object, seed: int, fleet: Fleet, ids: Array, gain: Array) -> Array | None:
    """Returns the signal-to-noise ratio [K] that the devices `ids` of a fleet do not exceed or make no use of, by their gains h [K].

    The lower one of power control's and the modem's; infinite for a device without a gain, None where the channel has neither.
    """
    if not isinstance(channel, Capped) or (channel.control is None and channel.max_bits_per_hz is None):
        return None
    modem = np.inf if channel.max_bits_per_hz is None else snr_of(channel.max_bits_per_hz)
    if channel.control is None:
        return np.full(len(ids), modem)
    controlled = channel.control.max_snr(channel.path_gain(seed, fleet)[ids], gain, channel.noise_w_per_hz)
    return np.where(gain > 0, np.minimum(controlled, modem), np.inf)


def power_share_of(channel: object, seed: int, fleet: Fleet, ids: Array, bandwidth_hz: Array) -> Array | None:
    """Returns what of its full power each of the devices `ids` of a fleet radiates on b [K]; None where there is no power control."""
    if not isinstance(channel, Capped) or channel.control is None:
        return None
    most_w = fleet.tx_power_w[ids]
    return channel.control.radiated_w(channel.path_gain(seed, fleet)[ids], bandwidth_hz, most_w) / most_w
