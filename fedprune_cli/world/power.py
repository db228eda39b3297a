"""How much a device radiates: 3GPP's open-loop uplink power control, and the cap that it puts on a signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.state import Array
from fedprune_cli.world.band import width_hz

P0_HZ = width_hz(0)  # what P0 is the power of, whatever the numerology: 2^mu M counts blocks of this width


@dataclass(frozen=True)
class PowerControl:
    """P = min(P_max, P0 + 10 log10(2^mu M) + alpha PL) dBm on M blocks (3GPP TS 38.213, 7.1.1; with mu = 0 TS 36.213, 5.1.1.1).

    p0_w: P0, what of 180 kHz would be received where alpha is 1; alpha: the share of the path loss PL, in dB, that is made up for.
    Since 2^mu M blocks are b / 180 kHz, this is a cap on what is radiated per hertz, the same on every bandwidth b.
    Ignored: the closed loop, the offset by transport format, and that a device knows PL from the downlink only.
    """

    p0_w: float
    alpha: float

    def __post_init__(self) -> None:
        require(10**-23.2 <= self.p0_w <= 10**-0.6, "p0_w", self.p0_w, "in -202..24 dBm (3GPP TS 38.331)")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")

    def density_w_per_hz(self, path_gain: Array) -> Array:
        """Returns the most that a device may radiate per hertz [N], by its power gain without fading, 1 / PL [N]."""
        density: Array = self.p0_w / P0_HZ * path_gain**-self.alpha
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
