"""The bill of a round: modelled seconds, joules and bytes of what was really kept and encoded, at the true clocks and gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.learn.prune import Masks
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.meter import Down, Load, Measurement, Uplink, build_load, downlink_s, measure, unicast_s_per_bit
from fedprune_cli.round.plan import Plan
from fedprune_cli.round.roster import Roster
from fedprune_cli.round.setup import Setup
from fedprune_cli.round.work import Results, Work
from fedprune_cli.store.state import Array
from fedprune_cli.wire.masks import encode_mask
from fedprune_cli.wire.quantize import BITS_PER_PARAM
from fedprune_cli.world.power import max_snr_of, power_share_of


@dataclass(frozen=True)
class Bill:
    """What a round costs: those that trained u, `training` [A], and the frozen, `personal`, None where nobody is.

    Those that train u are served first: a broadcast goes on until the last listener has u and the frozen ones their masks, and copies for
    the frozen ones are on their way once those that train have theirs.
    """

    training: Measurement
    personal: Measurement | None

    @property
    def all(self) -> Measurement:
        """Of those that trained u and then of the frozen."""
        return self.training if self.personal is None else self.training.joined(self.personal)

    @property
    def personal_s(self) -> float:
        """When the last frozen device is done."""
        return 0.0 if self.personal is None else float(self.personal.latency_s.max())


def charge(setup: Setup, roster: Roster, plan: Plan, work: Work, results: Results) -> Bill:
    """Returns the bill; a device that died in mid-round is charged up to that moment."""
    training = _charge_training(setup, roster, plan, work, results)
    drawn_w = setup.scenario.fleet.take(plan.devices).drawn_w(_power(setup, plan))
    training = training.cut_short(work.fates.work, setup.radio.uplink_share * drawn_w)
    if not results.personal_updates:
        return Bill(training, None)
    listeners_gain = roster.gain_linear[np.concatenate([roster.asked, roster.frozen])]
    return Bill(training, charge_frozen(setup, work.masks, roster.frozen, listeners_gain, training))


def charge_idle(setup: Setup, roster: Roster, work: Work, bill: Bill, waited_s: float) -> Bill:
    """Returns the bill with what the devices drew besides until the round ended; as it is where that is not metered.

    waited_s: when the server stopped waiting. A device that died in mid-round draws nothing from then on.
    """
    if not setup.experiment.meter.idle:
        return bill
    watts, ends_s = setup.scenario.fleet.idle_power_w, max(waited_s, bill.personal_s)
    until_s = np.where(work.fates.work < 1, bill.training.latency_s, ends_s)
    training = bill.training.idling(watts[work.moment.ids], until_s)
    personal = (
        bill.personal.idling(watts[roster.frozen], np.full(len(roster.frozen), ends_s)) if bill.personal else None
    )
    return Bill(training, personal)


def _charge_training(setup: Setup, roster: Roster, plan: Plan, work: Work, results: Results) -> Measurement:
    """Returns the cost of the admitted devices before fate cuts it short; what of it is broadcast is for all that were asked."""
    devices = plan.devices
    heard, gain_linear = roster.gain_linear[roster.asked], roster.gain_linear[devices]
    exchanged = setup.blueprint.exchanged_bytes(len(devices))[1]
    if setup.experiment.meter.unicast:
        s_per_bit = _s_per_bit(setup, roster.asked, heard)[plan.admitted_places]
        down = copies(_copy_bytes(setup, work.masks, devices) + exchanged / max(len(devices), 1), s_per_bit)
    else:
        bits = _broadcast_bits(setup, work.masks, devices) if len(devices) else 0.0
        down = _broadcast(setup, bits + 8 * exchanged, heard, len(devices))
    load, share = _load(setup, work.masks, devices, [task.schedule for task in work.tasks])
    load = replace(load, clock=plan.chosen.get("clock"), power=_power(setup, plan))
    measured = measure(
        load,
        rate_bps=plan.allocation.rate_bps[plan.admitted_places],
        kept=share,
        payload_bytes=np.array([update.sent_bytes for update in results.updates], dtype=float),
        down=down,
    )
    return exchanging(setup, measured, load, devices, gain_linear)


def exchanging(setup: Setup, measured: Measurement, load: Load, devices: Array, gain_linear: Array) -> Measurement:
    """Returns the figures of the devices of a round with the keys and shares that they exchange where sums are secure."""
    up, _ = setup.blueprint.exchanged_bytes(len(gain_linear))
    if not up:
        return measured
    channel, scenario = setup.experiment.channel, setup.scenario
    caps = max_snr_of(channel, scenario.seed, scenario.fleet, devices, gain_linear)
    uplink = Uplink(channel, gain_linear, setup.blueprint.cost.shared_params, caps, up)
    num_bytes = float(load.radio.sent_bytes(np.array(float(up))))
    return measured.exchanging(uplink.exchange_s(load.fleet), num_bytes, load.radio_power_w)


def _power(setup: Setup, plan: Plan) -> Array | None:
    bandwidth_hz = plan.allocation.bandwidth_hz[plan.admitted_places]
    return radiated(setup, plan.devices, bandwidth_hz, plan.chosen.get("power"))


def radiated(setup: Setup, devices: Array, bandwidth_hz: Array, chosen: Array | None) -> Array | None:
    """Returns what of its full power each device radiates on b [K]: as it chose, and no more than power control says; None: all of it."""
    scenario = setup.scenario
    controlled = power_share_of(scenario.channel, scenario.seed, scenario.fleet, devices, bandwidth_hz)
    return chosen if controlled is None else controlled if chosen is None else np.minimum(chosen, controlled)


def charge_frozen(
    setup: Setup, masks: Masks, frozen: Array, listeners_gain: Array, before: Measurement | None = None
) -> Measurement:
    """Returns the cost of frozen devices, which send nothing; listeners_gain: of all that listen; before: who was served first."""
    bytes_before, size = 0.0 if before is None else before.bytes_down, setup.blueprint.cost.shared_params
    if setup.experiment.meter.unicast:
        s_per_bit = _s_per_bit(setup, frozen, listeners_gain[-len(frozen) :])
        begin_s = 0.0 if before is None else float(before.downlink_s.max(initial=0.0))
        down = copies(_copy_bytes(setup, masks, frozen), s_per_bit, begin_s, bytes_before)
    else:
        own_masks = _broadcast_bits(setup, masks, frozen) - BITS_PER_PARAM * size
        bits = max(8 * bytes_before, BITS_PER_PARAM * size) + own_masks
        down = _broadcast(setup, bits, listeners_gain, len(frozen))
    load, share = _load(setup, masks, frozen, [setup.personal_schedule(device) for device in frozen.tolist()])
    return measure(
        load,
        rate_bps=np.zeros(len(frozen)),
        kept=share,
        payload_bytes=np.zeros(len(frozen)),
        down=down,
    )


def _broadcast(setup: Setup, bits: float, listeners_gain: Array, count: int) -> Down:
    """Returns what so many devices wait for bits that all hear at once."""
    wait_s = downlink_s(setup.experiment.meter, setup.experiment.channel, listeners_gain, bits)
    return Down(bits / 8, np.full(count, wait_s))


def _broadcast_bits(setup: Setup, masks: Masks, devices: Array) -> float:
    """Returns the bits of u, and of the devices' masks where the server has to send them."""
    return float(BITS_PER_PARAM * setup.blueprint.cost.shared_params + 8 * _mask_bytes(setup, masks, devices).sum())


def copies(received: Array, s_per_bit: Array, begin_s: float = 0.0, bytes_before: float = 0.0) -> Down:
    """Returns what devices wait for copies of their own of so many bytes [K], sent from begin_s on; bytes_before: sent by then."""
    return Down(bytes_before + float(received.sum()), begin_s + 8 * received * s_per_bit, received)


def _copy_bytes(setup: Setup, masks: Masks, devices: Array) -> Array:
    """Returns the bytes [K] of what each device keeps of u, and of its mask."""
    kept = np.array([np.count_nonzero(masks[device]) for device in devices.tolist()], dtype=float)
    return BITS_PER_PARAM // 8 * kept + _mask_bytes(setup, masks, devices)


def _mask_bytes(setup: Setup, masks: Masks, devices: Array) -> Array:
    """Returns the bytes [K] of the devices' masks; none where the server does not have to send them."""
    if not setup.blueprint.sends_masks:
        return np.zeros(len(devices))
    return np.array([len(encode_mask(masks.sent(device))) for device in devices.tolist()], dtype=float)


def _s_per_bit(setup: Setup, devices: Array, gain: Array) -> Array:
    fleet = setup.scenario.fleet.take(devices)
    return unicast_s_per_bit(setup.experiment.meter, setup.experiment.channel, fleet, gain)


def _load(setup: Setup, masks: Masks, devices: Array, schedules: Sequence[Sequence[LocalPhase]]) -> tuple[Load, Array]:
    """Returns what the devices compute, and which share of its shared part's work counts [K]."""
    costs, share = masks.costs(setup.blueprint.layout, setup.blueprint.cost, devices)
    return build_load(setup.scenario.fleet, devices, schedules, costs, setup.radio), share
