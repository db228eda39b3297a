"""A band and what is usable of it: resource blocks, the uplink's share of the time, retransmissions; and who is in outage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedprune_cli.errors import ConfigError, require
from fedprune_cli.rng import stream
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array
from fedprune_cli.world.power import PowerControl

MAX_OUTAGES = 10**10
MAX_BITS_PER_HZ = 60.0  # no link carries so much
SUBCARRIERS = 12  # of a resource block
# 3GPP TS 38.101-1, table 5.3.2-1 (FR1): resource blocks that fit between the guard bands of a carrier, by numerology and MHz.
BLOCKS: Mapping[int, Mapping[int, int]] = {
    0: {5: 25, 10: 52, 15: 79, 20: 106, 25: 133, 30: 160, 35: 188, 40: 216, 45: 242, 50: 270},
    1: {5: 11, 10: 24, 15: 38, 20: 51, 25: 65, 30: 78, 35: 92, 40: 106, 45: 119, 50: 133, 60: 162, 70: 189, 80: 217, 90: 245, 100: 273},
    2: {10: 11, 15: 18, 20: 24, 25: 31, 30: 38, 35: 44, 40: 51, 45: 58, 50: 65, 60: 79, 70: 93, 80: 107, 90: 121, 100: 135},
}  # fmt: skip


@dataclass(frozen=True)
class Radio:
    """What of a carrier carries an uplink.

    band_hz: what can be given away, guard bands left out; block_hz: of the resource blocks that it consists of, None without a grid;
    uplink_share: of the time; block_error: the share of what is sent that is not received, and is sent again.
    """

    band_hz: float
    block_hz: float | None = None
    uplink_share: float = 1.0
    block_error: float = 0.0

    @property
    def downlink_share(self) -> float:
        """The downlink's share of the time: what the uplink leaves of it, or all of it in a band of its own."""
        return 1.0 if self.uplink_share == 1 else 1.0 - self.uplink_share

    @property
    def attempts(self) -> float:
        """How often a block is sent until it is received, on average: 1 / (1 - p), each time failing with the same probability p."""
        return 1.0 / (1.0 - self.block_error)

    def sent_bytes(self, payload_bytes: Array) -> Array:
        """Returns the bytes [K] that are sent for payloads [K], retransmissions included: whole ones, never more than the average."""
        sent: Array = np.floor(payload_bytes * self.attempts)
        return sent


PLAIN = Radio(math.inf)  # every band, all of the time, without errors


@dataclass(frozen=True)
class RadioBand:
    """The band and its outages, common to all channels; each checks them by `check_band`.

    bandwidth_hz B; noise_w_per_hz N0; bs_power_w: the base station's, for the downlink;
    outage_enter, outage_leave: Gilbert-Elliott probabilities per round of losing and of regaining a device, 0 to enter: never.
    numerology: of 5G, subcarriers of 15 kHz times 2^numerology, None without resource blocks; blocks: of the carrier, None: as many as
    3GPP's table has for 5G; uplink_share: of the time; block_error: the share of blocks that are sent again;
    p0_w, path_loss_alpha: P0 and alpha of `PowerControl`, None: every device radiates its full power; max_bits_per_hz: what a modem sends
    per second and Hz at most, None: as much as Shannon says.
    """

    name: str
    bandwidth_hz: float
    noise_w_per_hz: float
    bs_power_w: float
    outage_enter: float
    outage_leave: float
    numerology: int | None = field(default=None, kw_only=True, metadata=LATER)
    blocks: int | None = field(default=None, kw_only=True, metadata=LATER)
    uplink_share: float = field(default=1.0, kw_only=True, metadata=LATER)
    block_error: float = field(default=0.0, kw_only=True, metadata=LATER)
    p0_w: float | None = field(default=None, kw_only=True, metadata=LATER)
    path_loss_alpha: float = field(default=1.0, kw_only=True, metadata=LATER)
    max_bits_per_hz: float | None = field(default=None, kw_only=True, metadata=LATER)

    @property
    def control(self) -> PowerControl | None:
        """How devices control their power; None where they do not."""
        return None if self.p0_w is None else PowerControl(self.p0_w, self.path_loss_alpha)

    @property
    def radio(self) -> Radio:
        """What of the band carries the uplink: with a grid its blocks, of 12 subcarriers each."""
        if self.numerology is None:
            return Radio(self.bandwidth_hz, None, self.uplink_share, self.block_error)
        count = BLOCKS[self.numerology][round(self.bandwidth_hz / 1e6)] if self.blocks is None else self.blocks
        block_hz = width_hz(self.numerology)
        return Radio(count * block_hz, block_hz, self.uplink_share, self.block_error)


def width_hz(numerology: int) -> float:
    """Returns the bandwidth of a resource block: 12 subcarriers of 15 kHz times 2^numerology (3GPP TS 38.211, 4.2 and 4.4.4.1).

    >>> [width_hz(numerology) for numerology in BLOCKS]
    [180000.0, 360000.0, 720000.0]
    """
    return SUBCARRIERS * 15e3 * 2**numerology


def check_band(band: RadioBand) -> None:
    """Raises ConfigError unless the band, its outages and its grid are sound."""
    for key in ("bandwidth_hz", "noise_w_per_hz", "bs_power_w"):
        require(0 < getattr(band, key) < math.inf, key, getattr(band, key), "> 0 and finite")
    require(0 <= band.outage_enter <= 1, "outage_enter", band.outage_enter, "in [0, 1]")
    require(0 < band.outage_leave <= 1, "outage_leave", band.outage_leave, "in (0, 1]")
    share = band.uplink_share
    require(0.001 <= share <= 0.999 or share == 1, "uplink_share", share, "in [0.001, 0.999], or 1")
    require(0 <= band.block_error <= 0.99, "block_error", band.block_error, "in [0, 0.99]")
    if band.control is None:
        require(band.path_loss_alpha == 1, "path_loss_alpha", band.path_loss_alpha, "1.0, unless p0_dbm is given")
    most = band.max_bits_per_hz
    require(
        most is None or 0.001 <= most <= MAX_BITS_PER_HZ,
        "max_bits_per_hz",
        most,
        f"in [0.001, {MAX_BITS_PER_HZ:g}], or null",
    )
    number, count = band.numerology, band.blocks
    require(number is None or number in BLOCKS, "numerology", number, "0, 1 or 2 (15, 30 or 60 kHz), or null")
    if number is None:
        require(count is None, "blocks", count, "null, unless a numerology says how wide a block is")
    elif count is None:
        mhz, held = band.bandwidth_hz / 1e6, BLOCKS[number]
        near = min(held, key=lambda one: abs(one - mhz))
        carriers = f"a 5G carrier of {', '.join(map(str, held))} MHz (the nearest is {near}), or channel.blocks given"
        require(mhz in held, "bandwidth_hz", band.bandwidth_hz, carriers)
    else:
        most = math.floor(band.bandwidth_hz / width_hz(number) * (1 + 1e-12))
        require(1 <= count <= most, "blocks", count, f"in 1..{most}, what the band holds, or null")


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


def without_outage(band: RadioBand, seed: int, rounds: int, num_devices: int) -> Array:
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
