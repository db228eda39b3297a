"""The figures of a recorded round computed again: sums over its devices, and what the meter gives at what they kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedprune_cli.allocate.inverse import rate
from fedprune_cli.meter import Down, Measurement, build_load, downlink_s, measure, unicast_s_per_bit
from fedprune_cli.round.bill import copies, exchanging, radiated
from fedprune_cli.round.plan import Plan
from fedprune_cli.round.roster import Roster
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.record import FaultLog, RoundRecord
from fedprune_cli.store.state import Array
from fedprune_cli.wire.masks import encode_mask
from fedprune_cli.wire.quantize import BITS_PER_PARAM, BLOCK
from fedprune_cli.world.faults import Moment
from fedprune_cli.world.power import max_snr_of

METER_TOLERANCE = 1e-9  # relative: the same formulas, in another order


def sum_failures(record: RoundRecord, before_s: float, frozen: Array, *, waits: bool) -> Iterator[str]:
    """Yields what is wrong with the sums of a round that began at `before_s`; waits: whether the server waits for late updates."""
    rows, log = record.devices, record.faults or FaultLog()
    missing = {*log.died, *log.lost, *log.delayed, *(() if waits else log.late)}
    of_device = list(zip(rows.id, rows.latency_s, strict=False))
    arrived_s = max((took for device, took in of_device if device not in missing and device not in frozen), default=0.0)
    waited_s = log.waited_s
    if record.deadline_s is not None and all(device in frozen for device in rows.id):  # nobody was admitted
        waited_s = record.deadline_s
    frozen_s = max((took for device, took in of_device if device in frozen), default=0.0)
    expected = {
        "latency_s": max(arrived_s + waited_s, frozen_s),
        "bytes_up": sum(rows.bytes_up),
        "joules": math.fsum(rows.joules),
        "simulated_s": before_s + record.latency_s,
    }
    for key, value in expected.items():
        if not math.isclose(getattr(record, key), value, rel_tol=METER_TOLERANCE):
            yield f"{key} is {getattr(record, key)!r}, its devices give {value!r}"
    for key in ("accuracy", "accuracy_mean", "accuracy_p10", "fresh_accuracy", "mean_ratio", "max_ratio"):
        share = getattr(record, key)
        if share is not None and not 0 <= share <= 1:
            yield f"{key} is {share!r}, must be in [0, 1]"


def metering_failures(setup: Setup, record: RoundRecord, roster: Roster, plan: Plan | None) -> Iterator[str]:
    """Yields what differs from the meter's figures for the recorded ratios, bandwidths and bytes.

    plan: what the record follows, None where all devices are frozen; else its devices stand first in the record.
    """
    training = 0 if plan is None else len(plan.devices)
    experiment, size, slices = setup.experiment, setup.blueprint.cost.shared_params, setup.blueprint.layout.slices
    devices = np.array(record.devices.id, dtype=int)
    if not len(devices):
        return
    stopped = np.arange(len(devices)) >= training
    moment = Moment(experiment.seed, roster.number, experiment.rounds, setup.scenario.num_devices, devices[:training])
    work = np.append(
        experiment.faults.draw(moment).work, np.ones(len(devices) - training)
    )  # below 1 for who died in mid-round
    kept = np.rint((1 - np.array(record.devices.prune_ratio)) * size)
    bits = np.full(len(devices), record.bits or BITS_PER_PARAM) if record.devices.bits is None else record.devices.bits
    coded = np.where(stopped, 0, code_bytes(kept, np.array(bits)))
    up, down = setup.blueprint.exchanged_bytes(training)
    sent = setup.radio.sent_bytes(coded) + setup.radio.sent_bytes(np.array(float(up)))
    if wrong := [*_bytes_failures(record, sent, (work < 1) | slices, at_most=slices)]:
        yield from wrong
        return
    sends_masks = setup.blueprint.sends_masks
    flags = np.arange(setup.blueprint.layout.flags(size)) % 2 == 0
    most = len(encode_mask(flags)) if sends_masks else 0
    if experiment.meter.unicast:
        yield from _copies_failures(record, 4 * kept, down / max(training, 1) * ~stopped, most, at_most=slices)
    else:
        yield from _broadcast_failures(record, 4 * size + down, len(devices) * most, at_most=slices)
    if slices or (stopped.any() and sends_masks):
        return
    if experiment.meter.unicast:
        wait_s = _copies_wait_s(setup, roster, record, stopped)
    else:
        wait_s = _broadcast_wait_s(setup, roster, record, stopped)
    schedules = [
        setup.personal_schedule(device) if still else setup.schedule(device)
        for device, still in zip(devices.tolist(), stopped, strict=True)
    ]
    costs = [setup.blueprint.cost] * len(devices)
    clock, power = (None if of is None else np.array(of) for of in (record.devices.clock, record.devices.power))
    load = build_load(setup.scenario.fleet, devices, schedules, costs, setup.radio)
    bandwidth_hz, gain = np.array(record.devices.bandwidth_hz), roster.gain_linear[devices]
    load = replace(load, clock=clock, power=radiated(setup, devices, bandwidth_hz, power))
    snr_hz = load.fleet.tx_power_w * gain / experiment.channel.noise_w_per_hz
    snr_hz = snr_hz if power is None else snr_hz * power
    caps = max_snr_of(experiment.channel, experiment.seed, setup.scenario.fleet, devices, gain)
    rate_bps = rate(bandwidth_hz, snr_hz, None if caps is None else np.log1p(caps))
    if plan is not None and plan.blocks is not None:  # which are those of the record
        rate_bps[:training] = plan.allocation.rate_bps[plan.admitted_places]
    again = measure(
        load,
        rate_bps=rate_bps,
        kept=kept / max(size, 1),
        payload_bytes=coded,  # what was sent agrees with it, or was cut short
        down=Down(0.0, wait_s),
    )
    again = exchanging(setup, again, load, devices, gain)
    again = again.cut_short(work, load.radio_power_w)
    if experiment.meter.idle:
        again = again.idling(load.fleet.idle_power_w, np.where(work < 1, again.latency_s, record.latency_s))
    yield from _meter_failures(record, again)


def _broadcast_failures(record: RoundRecord, others: float, most: int, *, at_most: bool) -> Iterator[str]:
    """Yields that more or less was broadcast than u, keys and shares, `others`, and no more than `most` bytes of masks."""
    masks = record.bytes_down - others
    if masks > most + 1 or (masks < -1 / 8 and not at_most):
        yield f"{record.bytes_down} bytes were broadcast, of which {masks:.0f} would be masks: must be in 0..{most}"


def _broadcast_wait_s(setup: Setup, roster: Roster, record: RoundRecord, stopped: Array) -> Array:
    """Returns what the devices waited for what was broadcast [K]."""
    meter = setup.experiment.meter
    listeners = {False: roster.asked, True: np.concatenate([roster.asked, roster.frozen])}
    bits = 8.0 * max(record.bytes_down, BITS_PER_PARAM // 8 * setup.blueprint.cost.shared_params)
    wait_s = {
        still: downlink_s(meter, setup.experiment.channel, roster.gain_linear[listeners[still]], bits)
        for still in {*stopped.tolist()}
    }
    return np.array([wait_s[still] for still in stopped.tolist()])


def _copies_failures(
    record: RoundRecord, values: Array, exchanged: Array, most: int, *, at_most: bool
) -> Iterator[str]:
    """Yields the first device that was sent other bytes than its values [K], its keys and shares [K], and at most so many of a mask."""
    received = np.array(record.devices.bytes_down or np.full(len(values), np.nan))
    masks = received - values - exchanged
    if (wrong := ~((masks >= (-values if at_most else 0) - 1e-6) & (masks <= most + 1e-6))).any():
        at = int(np.flatnonzero(wrong)[0])
        of = f"its ratio gives {values[at] + exchanged[at]:g} and a mask of at most {most}"
        yield f"device {record.devices.id[at]} was sent {received[at]:g} bytes, {of}"
    if record.bytes_down != int(received.sum()):
        yield f"{record.bytes_down} bytes were sent in all, the devices' are {received.sum():g}"


def _copies_wait_s(setup: Setup, roster: Roster, record: RoundRecord, stopped: Array) -> Array:
    """Returns what the devices waited for copies of their own [K], those that train first."""
    experiment, fleet, ids = setup.experiment, setup.scenario.fleet, np.array(record.devices.id)
    received = np.array(record.devices.bytes_down, dtype=float)
    places = np.searchsorted(roster.asked, ids[~stopped])
    wait_s = np.zeros(len(ids))
    for still, asked, at in ((False, roster.asked, places), (True, roster.frozen, slice(None))):
        if not (here := stopped == still).any():
            continue
        s_per_bit = unicast_s_per_bit(
            experiment.meter, experiment.channel, fleet.take(asked), roster.gain_linear[asked]
        )[at]
        wait_s[here] = copies(received[here], s_per_bit, wait_s.max()).wait_s
    return wait_s


def _bytes_failures(record: RoundRecord, coded: Array, bounded: Array, *, at_most: bool) -> Iterator[str]:
    """Yields the first device whose bytes are not those of its ratio [K], or more than them where they are only bounded, bool [K]."""
    sent = np.array(record.devices.bytes_up, dtype=float)
    wrong = (sent > coded) | (~bounded & (sent != coded))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        bound = "at most " if at_most else ""
        yield f"device {record.devices.id[at]} sent {sent[at]:.0f} bytes, its ratio gives {bound}{coded[at]:.0f}"


def _meter_failures(record: RoundRecord, again: Measurement) -> Iterator[str]:
    for key in ("compute_s", "uplink_s", "downlink_s", "latency_s", "joules", "bytes_up"):
        recorded, computed = np.array(getattr(record.devices, key), dtype=float), getattr(again, key)
        apart = ~np.isclose(recorded, computed, rtol=METER_TOLERANCE, atol=0)
        if apart.any():
            at = int(np.flatnonzero(apart)[0])
            yield f"device {record.devices.id[at]}: {key} is {recorded[at]!r}, the meter gives {computed[at]!r}"
    if not math.isclose(record.flops, again.flops.sum(), rel_tol=METER_TOLERANCE):
        yield f"flops is {record.flops!r}, the meter gives {again.flops.sum()!r}"


def code_bytes(kept: Array, bits: int | Array) -> Array:
    """Returns how many bytes the code of `kept` values [K] has: of a value that is rounded, its bits and its block's scale."""
    rounded = 4 * np.ceil(kept / BLOCK) + np.ceil(kept * bits / 8)
    return np.where(np.equal(bits, BITS_PER_PARAM), 4 * kept, rounded)
