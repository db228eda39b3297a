"""The meter: FLOPs and bits -> modelled seconds and joules; predictions -> accuracies. Nothing here is measured wall time.

Latency of device k (model.md, section 3): t_k = t_down + t_comp,k + t_up,k, with
    t_comp,k = cycles_per_flop_k (x_k F_k + G_k) / f_k   F, G: counted FLOPs of the round in the shared and personalized blocks,
               weighed by kind of layer, and a fixed time per step on top, where a device is known so well (section 5)
    t_up,k   = bits of the encoded payload / (1 - block_error) / (uplink_share r_k(b_k))
    t_down   = broadcast of u, and of masks that devices cannot derive, at the worst device's rate over the whole band, in the
               share of the time that is the downlink's; or, where each device is sent its own copy, what it keeps of u and its mask,
               at its rate over an equal part of the band.
Ignored: the time to sort and pack, protocol headers, what a retransmission waits for, the broadcast's own errors, the server's own time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedprune_cli.allocate.deadline import dense_deadline
from fedprune_cli.allocate.inverse import rate
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.problem import NO_LINK, Problem
from fedprune_cli.errors import require
from fedprune_cli.learn.client import Score
from fedprune_cli.learn.cost import ModelCost
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array
from fedprune_cli.wire.quantize import BITS_PER_PARAM
from fedprune_cli.world.band import PLAIN, Radio
from fedprune_cli.world.channel import Channel, radio_of
from fedprune_cli.world.fleet import Fleet, Practice


@dataclass(frozen=True)
class Meter:
    """What the latency of a round includes: `mask_overhead` of masks that devices cannot derive, and the `downlink`.

    idle: whether joules count what devices draw from the round's beginning to its end besides computing and sending, where a fleet knows
    it. kappa is of dynamic watts, so idle watts are on top of it, also while a device computes. unicast: whether each device is sent a
    copy of its own of what it keeps, as over links of their own, in place of one broadcast to all.
    """

    name: str
    mask_overhead: bool
    downlink: bool
    idle: bool = field(default=False, metadata=LATER)
    unicast: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        require(self.name in ("encoded", "paper"), "name", self.name, "'encoded' or 'paper'")
        require(
            self.downlink or not self.unicast,
            "unicast",
            self.unicast,
            "false where meter.downlink=false: nothing of it is counted",
        )


@dataclass(frozen=True)
class Load:
    """What a round asks of its devices before anything is pruned, float64 [K].

    shared_flops F, personal_flops G; fleet: the devices alone; effort: where devices are known better than by cycles per FLOP,
    the FLOPs in the shared and in the personalized blocks in those of a convolution, and the steps, [K, 3];
    radio: how they send; clock, power: what of its full clock and of its full radiated power each device uses, all where None.
    """

    shared_flops: Array
    personal_flops: Array
    fleet: Fleet
    effort: Array | None = None
    radio: Radio = PLAIN
    clock: Array | None = None
    power: Array | None = None

    def take(self, index: Array) -> Load:
        """Returns the load of some of the devices."""
        effort, clock, power = (None if of is None else of[index] for of in (self.effort, self.clock, self.power))
        shared, personal, fleet = self.shared_flops[index], self.personal_flops[index], self.fleet.take(index)
        return Load(shared, personal, fleet, effort, self.radio, clock, power)

    @property
    def shared_compute_s(self) -> Array:
        """a [K]: what of t_comp is in proportion to what is kept of u."""
        shared = self.shared_flops if self.effort is None else self.effort[:, 0]
        return self.fleet.cycles_per_flop * shared / self.fleet.cpu_hz

    def compute_s(self, kept: Array) -> Array:
        """Returns t_comp [K] when the fraction `kept` [K] of u remains."""
        full_s = self.cycles(kept) / self.fleet.cpu_hz
        return full_s if self.clock is None else full_s / self.clock

    def compute_j(self, kept: Array) -> Array:
        """Returns the joules [K] of computing when the fraction `kept` [K] of u remains: kappa f^2 per cycle."""
        full_j = self.fleet.energy_coefficient * self.fleet.cpu_hz**2 * self.cycles(kept)
        return full_j if self.clock is None else full_j * self.clock**2

    @property
    def radio_power_w(self) -> Array:
        """What the radios draw on average while an upload lasts [K]: they send in the uplink's share of the time only."""
        return self.radio.uplink_share * self.fleet.drawn_w(self.power)

    def cycles(self, kept: Array) -> Array:
        """Returns the CPU cycles [K] of the round; what a step takes besides its FLOPs counts as computing."""
        fleet = self.fleet
        if self.effort is None or fleet.practice is None:
            return fleet.cycles_per_flop * (kept * self.shared_flops + self.personal_flops)
        shared, personal, steps = self.effort.T
        return fleet.cycles_per_flop * (kept * shared + personal) + steps * fleet.practice.step_s * fleet.cpu_hz


def build_load(
    fleet: Fleet, ids: Array, schedules: Sequence[Sequence[LocalPhase]], costs: Sequence[ModelCost], radio: Radio = PLAIN
) -> Load:  # fmt: skip
    """Returns the load of the devices `ids`, device i following the phases schedules[i] on a model that costs costs[i]."""
    flops = np.zeros((len(schedules), 2))
    for row, schedule, cost in zip(flops, schedules, costs, strict=True):
        counted = cost.flops
        for phase in schedule:
            row += phase.samples * np.array(counted[phase.kind])
    return Load(flops[:, 0], flops[:, 1], fleet := fleet.take(ids), _effort(fleet.practice, schedules, costs), radio)


def _effort(
    practice: Practice | None, schedules: Sequence[Sequence[LocalPhase]], costs: Sequence[ModelCost]
) -> Array | None:
    """Returns every device's FLOPs of both parts, in those of a convolution, and its steps [K, 3]; None where nothing is known of them."""
    if practice is None:
        return None
    effort = np.zeros((len(schedules), 3))
    for at, (row, schedule, cost) in enumerate(zip(effort, schedules, costs, strict=True)):
        weighted = cost.weighted({kind: float(scale[at]) for kind, scale in practice.flop_scale.items()})
        for phase in schedule:
            row += [*(phase.samples * flops for flops in weighted[phase.kind]), phase.steps]
    return effort


def downlink_s(meter: Meter, channel: Channel, gain: Array, payload_bits: float) -> float:
    """Returns t_down: `payload_bits` broadcast with the base station's power at the rate of the worst link; 0 if not metered.

    A device without a link hears nothing, and the broadcast does not wait for it. The downlink has the uplink's usable band, and where
    the uplink has a share of the time, the rest of it.
    """
    radio, snr_hz = radio_of(channel), channel.bs_power_w * gain / channel.noise_w_per_hz
    snr_hz = snr_hz[snr_hz >= NO_LINK * radio.band_hz]
    if not meter.downlink or payload_bits == 0 or not len(snr_hz):
        return 0.0
    return float(payload_bits / (radio.downlink_share * rate(np.array(radio.band_hz), snr_hz.min())))


def unicast_s_per_bit(meter: Meter, channel: Channel, fleet: Fleet, gain: Array) -> Array:
    """Returns the seconds [K] that a bit takes to each of these devices, whose copies are on their way at once; 0 if not metered.

    The downlink's band and power are divided equally, within the least and the most that each device may use of a band. It keeps its part
    when others are done. A device without a link, which no round can have, has neither part nor seconds.
    """
    radio = radio_of(channel)
    snr_hz = channel.bs_power_w * gain / channel.noise_w_per_hz
    linked = snr_hz >= NO_LINK * radio.band_hz
    if not meter.downlink or not linked.any():
        return np.zeros(len(gain))
    part = np.clip(radio.band_hz / linked.sum(), fleet.min_bandwidth_hz, fleet.max_bandwidth_hz) / radio.band_hz
    part /= max(part[linked].sum(), 1.0)
    over_all = rate(np.full(len(gain), radio.band_hz), np.where(linked, snr_hz, snr_hz.max()))
    return np.where(linked, 1.0 / (radio.downlink_share * part * over_all), 0.0)


@dataclass(frozen=True)
class Wait:
    """What devices wait until u is there: fixed_s, whatever they keep, and shared_s for the whole shared part, in proportion to what of it
    they keep; both [K], or alike for all.
    """

    fixed_s: Array | float
    shared_s: Array | float = 0.0


@dataclass(frozen=True)
class Uplink:
    """What devices send, and over what: the channel, their power gains [K], and the number U of values of u before pruning.

    max_snr: the signal-to-noise ratio [K] that they do not exceed or make no use of, None where nothing caps it. exchange_bytes: what each
    sends besides, whatever it prunes: the keys and shares of a secure sum.
    """

    channel: Channel
    gain_linear: Array
    shared_params: int
    max_snr: Array | None = None
    exchange_bytes: int = 0

    def exchange_s(self, fleet: Fleet) -> Array:
        """Returns the seconds [K] in which all devices have sent what they exchange beside their values.

        The band is shared so that all end together, as early as can be, within the most that each may use of it. A device without a
        link, which no round can have, takes none.
        """
        if not self.exchange_bytes:
            return np.zeros(len(self.gain_linear))
        radio, ones = radio_of(self.channel), np.ones(len(self.gain_linear))
        bits = float(8 * radio.sent_bytes(np.array(float(self.exchange_bytes))) / radio.uplink_share)
        limits = Limits(0 * ones, fleet.max_bandwidth_hz, np.inf * ones, 0 * ones, 0 * ones, ones)
        problem = Problem(
            shared_compute_s=0 * ones,
            payload_bits=bits * ones,
            fixed_s=0 * ones,
            snr_hz=fleet.tx_power_w * self.gain_linear / self.channel.noise_w_per_hz,
            weight=ones,
            bandwidth_hz=radio.band_hz,
            deadline_s=np.inf,
            max_ratio=0 * ones,
            max_snr=self.max_snr,
            limits=limits if np.isfinite(fleet.max_bandwidth_hz).any() else None,
        )
        return np.where(problem.linked, dense_deadline(problem)[0], 0.0)


def build_problem(load: Load, uplink: Uplink, weight: Array, wait: Wait, max_ratio: float) -> Problem:
    """Returns the round's allocation problem with an open deadline: t_k = x_k (a_k + c_k / r_k(b_k)) + d_k, all [K] and SI.

    c is in bits that r_k would carry in the time that the upload takes: q U, more where blocks are sent again and where the uplink has
    only a share of the time; the radio then sends in this share only, and draws so much less on average. Under power control the joules
    that are planned are those of full power, which are never too few: what a device then really draws would not keep P1 concave.
    """
    fleet, channel = load.fleet, uplink.channel
    radio = radio_of(channel)
    ones, zeros = np.ones(len(weight)), np.zeros(len(weight))
    exchange_s = uplink.exchange_s(fleet)
    fixed_s, computing_j = load.compute_s(zeros) + wait.fixed_s + exchange_s, load.compute_j(zeros)
    fixed_j = computing_j + load.radio_power_w * exchange_s
    limits = Limits(
        min_bandwidth_hz=fleet.min_bandwidth_hz, max_bandwidth_hz=fleet.max_bandwidth_hz, energy_budget_j=fleet.energy_budget_j,
        shared_energy_j=load.compute_j(ones) - computing_j, fixed_energy_j=fixed_j, tx_power_w=radio.uplink_share * fleet.radio_power_w,
        fixed_compute_s=load.compute_s(zeros), circuit_w=radio.uplink_share * fleet.radio_circuit_w,
    )  # fmt: skip
    return Problem(
        shared_compute_s=load.shared_compute_s + wait.shared_s,
        payload_bits=ones * BITS_PER_PARAM * uplink.shared_params * radio.attempts / radio.uplink_share,
        fixed_s=fixed_s,
        snr_hz=fleet.tx_power_w * uplink.gain_linear / channel.noise_w_per_hz,
        weight=weight,
        bandwidth_hz=radio.band_hz,
        block_hz=radio.block_hz,
        deadline_s=np.inf,
        max_ratio=ones * max_ratio,
        limits=limits if fleet.limited else None,
        energies=limits,
        max_snr=uplink.max_snr,
    )


def compress(problem: Problem, bits: float) -> Problem:
    """Returns the problem when a value takes `bits` on the uplink."""
    return replace(problem, payload_bits=problem.payload_bits * (bits / BITS_PER_PARAM))


@dataclass(frozen=True)
class Measurement:
    """Modelled figures of one round, [K] for the devices that took part: seconds, joules, FLOPs, bytes.

    bytes_down: the broadcast's, or of all copies together; received: of each device's own copy, None where there is a broadcast.
    """

    compute_s: Array
    uplink_s: Array
    downlink_s: Array
    joules: Array
    flops: Array
    bytes_up: Array
    bytes_down: float
    received: Array | None = None

    @property
    def latency_s(self) -> Array:
        """t_k [K]; the round lasts as long as its slowest device."""
        return self.downlink_s + self.compute_s + self.uplink_s

    def cut_short(self, share: Array, radio_power_w: Array) -> Measurement:
        """Returns the figures of devices that stop after the share [K] of their seconds of computing and sending."""
        stops = share < 1
        done_s = share * (self.compute_s + self.uplink_s)
        compute_s = np.minimum(self.compute_s, done_s)
        uplink_s = done_s - compute_s
        computed = np.divide(compute_s, self.compute_s, out=np.ones(len(share)), where=self.compute_s > 0)
        sent = np.divide(uplink_s, self.uplink_s, out=np.ones(len(share)), where=self.uplink_s > 0)
        radio_j = radio_power_w * self.uplink_s
        cut = {
            "compute_s": compute_s,
            "uplink_s": uplink_s,
            "joules": computed * (self.joules - radio_j) + sent * radio_j,
            "flops": computed * self.flops,
            "bytes_up": np.floor(sent * self.bytes_up),
        }
        return replace(self, **{name: np.where(stops, value, getattr(self, name)) for name, value in cut.items()})

    def exchanging(self, seconds: Array, num_bytes: float, radio_power_w: Array) -> Measurement:
        """Returns the figures with what each device sends besides its values: so many seconds [K] and bytes, at its radio's power [K]."""
        return replace(
            self,
            uplink_s=self.uplink_s + seconds,
            joules=self.joules + radio_power_w * seconds,
            bytes_up=self.bytes_up + num_bytes,
        )

    def idling(self, idle_power_w: Array, until_s: Array) -> Measurement:
        """Returns the figures with what the devices draw besides, from the round's beginning until `until_s` [K], in their joules."""
        return replace(self, joules=self.joules + idle_power_w * until_s)

    def joined(self, other: Measurement) -> Measurement:
        """Returns the figures of these devices and of others that were served after them, whose bytes_down has these' in it."""
        arrays = ("compute_s", "uplink_s", "downlink_s", "joules", "flops", "bytes_up") + ("received",) * (
            self.received is not None
        )
        both = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in arrays}
        return Measurement(**both, bytes_down=other.bytes_down)


@dataclass(frozen=True)
class Down:
    """What devices are sent before they begin. bytes: of all together; wait_s: until each has it [K]; received: as in `Measurement`."""

    bytes: float
    wait_s: Array
    received: Array | None = None


def measure(load: Load, *, rate_bps: Array, kept: Array, payload_bytes: Array, down: Down) -> Measurement:
    """Returns what the round costs, from the fraction of u really kept [K], the payloads really encoded [K] and the wait for u.

    rate_bps: r_k(b_k) [K], while devices may send. Blocks that fail are sent again, and count as bytes, seconds and joules.
    Energy: kappa f^2 per cycle and the radio's power while it sends; receiving is ignored, and idling is counted when the round has ended.
    """
    uplink_s, bytes_up = np.zeros(len(kept)), load.radio.sent_bytes(payload_bytes)
    sends = payload_bytes > 0
    uplink_s[sends] = 8 * bytes_up[sends] / (load.radio.uplink_share * rate_bps[sends])
    return Measurement(
        compute_s=load.compute_s(kept),
        uplink_s=uplink_s,
        downlink_s=down.wait_s,
        joules=load.compute_j(kept) + load.radio_power_w * uplink_s,
        flops=kept * load.shared_flops + load.personal_flops,
        bytes_up=bytes_up,
        bytes_down=down.bytes,
        received=down.received,
    )


def accuracies(scores: Mapping[int, Score], samples: Array) -> dict[str, float]:
    """Returns the devices' accuracy averaged with weights D_k = samples[k], unweighted, and its 10th percentile over devices."""
    each = np.array([score.correct / score.total for score in scores.values()])
    weights = samples[list(scores)]
    return {
        "accuracy": float(each @ weights / weights.sum()),
        "accuracy_mean": float(each.mean()),
        "accuracy_p10": float(np.percentile(each, 10)),
    }
