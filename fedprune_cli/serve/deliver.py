"""Delivery: which updates of a round reach the server, when it stops waiting, and what is still under way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.learn.client import Update
from fedprune_cli.learn.prune import Masks
from fedprune_cli.serve.failsafe import SLACK, Failsafe, quarantined
from fedprune_cli.store.memory import Outcome, Sizes, Slots
from fedprune_cli.store.record import KINDS, FaultLog, PrivacyLog
from fedprune_cli.store.state import Array, State
from fedprune_cli.world.faults import Fates, Moment

MAX_MAGNITUDE = 1e9  # a value beyond it is as good as infinite
Log = dict[str, list[int]]


@dataclass(frozen=True)
class Expected:
    """What a round's sum is made with where nothing may tell who took part: the same, whoever came.

    order: the entry of each rank, int64 [U]; keepers: how many devices keep each entry, on average over the draws, in rank order,
    float64 [the most that any device keeps]; step_size: the sum of a device's steps' sizes, on average over those that might have come.
    """

    order: Array
    keepers: Array
    step_size: float


@dataclass(frozen=True)
class Sent:
    """What the devices of a round sent: updates [K], masks, what befalls them at this moment, their latency_s [K], and the deadline.

    expected: what their sum is made with where who they are is a secret. total_of: what makes the sum of values that nodes handed in under
    masks, None where values are as they are.
    """

    updates: Sequence[Update]
    masks: Masks
    fates: Fates
    moment: Moment
    latency_s: Array
    deadline_s: float
    expected: Expected | None = None
    total_of: Callable[[Mapping[int, Array]], Array] | None = None


@dataclass(frozen=True)
class Arrival:
    """An update that the server takes: the kept entries `values` of a device's `mask` [U], `age` rounds old."""

    device: int
    mask: Array
    values: Array
    age: int = 0


@dataclass(frozen=True)
class Delivery:
    """What reached the server of a round: the arrivals, when it stopped waiting, the slots of updates under way, and the log.

    privacy: of the sum that it has in their place, where changes are protected.
    """

    arrivals: Sequence[Arrival]
    latency_s: float
    under_way: Slots
    log: FaultLog
    privacy: PrivacyLog | None = None


@dataclass(frozen=True)
class UnderWay:
    """The memory of updates that are sent and not there yet. remembers: whether there can be any."""

    remembers: bool

    def slots(self, sizes: Sizes) -> Slots:
        """Returns no updates: of P, `way_device`, `way_sent` and `way_due` (rounds) int64 [P], `way_mask` bits [P], `way_change` [P, U]."""
        if not self.remembers:
            return {}
        slots = {f"way_{name}": np.zeros(0, dtype=np.int64) for name in ("device", "sent", "due")}
        slots["way_mask"] = np.zeros((0, math.ceil(sizes.shared_params / 8)), dtype=np.uint8)
        slots["way_change"] = np.zeros((0, sizes.shared_params), dtype=np.float32)
        return slots

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        """Returns what the round's delivery left under way; no record holds it."""
        return outcome.under_way or {}


def deliver(failsafe: Failsafe, state: State, sent: Sent) -> Delivery:
    """Returns what reaches the server of what was sent, and of what was under way before."""
    number, old = state.round, state.shared
    died = np.array([update.died for update in sent.updates], dtype=bool)
    fates = replace(sent.fates, died=sent.fates.died | died)
    log: Log = {kind: [] for kind in KINDS}
    cutoff_s = failsafe.wait_factor * sent.deadline_s
    gone = fates.died | fates.lost
    late = ~gone & _late(sent, cutoff_s)
    delay, dropped = failsafe.policy.decide(late, fates.delay)
    missing = gone | (delay > 0) | dropped
    arrivals, leaving = [], []
    for at, update in enumerate(sent.updates):
        mask, device = sent.masks[update.device], update.device
        if befallen := _befallen(at, fates, late, delay):
            log[befallen].append(device)
        if gone[at] or (missing[at] and not delay[at]):
            continue
        values, forger = update.shared, fates.forgers[at]
        if forger is not None:
            values = forger.forge(update.shared, old[mask], sent.moment, device)
            if forger.poisons:
                log["poisoned"].append(device)
        if sent.total_of is None and not sound(values, len(update.shared)):  # under masks there is nothing to see
            log["refused"].append(device)
        elif delay[at]:
            leaving.append((device, int(delay[at]), mask, values))
        else:
            arrivals.append(Arrival(device, mask, values))
    slots, old_ones = _under_way(failsafe, state, leaving, log)
    arrivals = _within_norms(failsafe, old, arrivals + old_ones, log)
    arrived_s = float(sent.latency_s[~missing].max(initial=0.0))
    ends_s = max(arrived_s, cutoff_s) if missing.any() else arrived_s
    if not sent.updates:  # nobody was admitted: a round of no time would draw a new channel for nothing
        ends_s = sent.deadline_s
    if "caution" in state.slots:
        log["safe"] = [update.device for update in sent.updates if state.slots["caution"][update.device] > 1]
    log["quarantined"] = quarantined(state.slots, number).tolist()
    return Delivery(arrivals, ends_s, slots, FaultLog(**log, waited_s=ends_s - arrived_s))


def _late(sent: Sent, cutoff_s: float) -> Array:
    """Returns whose updates come after the cutoff, bool [K]: by a clock where one was looked at, else by the modelled seconds."""
    modelled = sent.latency_s > cutoff_s * (1 + SLACK)
    seen = [update.late for update in sent.updates]
    return np.array([so if by is None else by for by, so in zip(seen, modelled, strict=True)], dtype=bool)


def _befallen(at: int, fates: Fates, late: Array, delay: Array) -> str:
    """Returns the kind of what befell an update on its way, nothing where it came in time."""
    kinds = {"died": fates.died[at], "lost": fates.lost[at], "late": late[at], "delayed": delay[at] > 0}
    return next((kind for kind, so in kinds.items() if so), "")


def sound(values: Array, wanted: int) -> bool:
    """Whether an update may be combined with others; NaN compares false."""
    return len(values) == wanted and bool((np.abs(values) <= MAX_MAGNITUDE).all())


def _under_way(
    failsafe: Failsafe, state: State, leaving: Sequence[tuple[int, int, Array, Array]], log: Log
) -> tuple[Slots, list[Arrival]]:
    """Returns the updates that are under way after the round and those that arrive in it.

    leaving: device, delay, mask and kept entries of new ones. What travels is the change of u, to be added to what u is by then.
    """
    if "way_due" not in state.slots:
        return {}, []
    slots, number, old = state.slots, state.round, state.shared
    due = slots["way_due"] <= number
    away = set(quarantined(slots, number).tolist())
    arrivals = []
    for at in np.flatnonzero(due).tolist():
        device, age = int(slots["way_device"][at]), number - int(slots["way_sent"][at])
        taken = age <= failsafe.max_staleness and device not in away
        log["stale" if taken else "expired"].append(device)
        if taken:
            mask = np.unpackbits(slots["way_mask"][at], count=old.size).astype(bool)
            arrivals.append(Arrival(device, mask, (old + slots["way_change"][at])[mask], age))
    changes = np.zeros((len(leaving), old.size), dtype=old.dtype)
    for row, (_, _, mask, values) in zip(changes, leaving, strict=True):
        row[mask] = values - old[mask]
    masks = np.array([mask for _, _, mask, _ in leaving], dtype=bool).reshape(len(leaving), old.size)
    new = {
        "way_device": np.array([device for device, _, _, _ in leaving], dtype=np.int64),
        "way_sent": np.full(len(leaving), number, dtype=np.int64),
        "way_due": np.array([number + delay for _, delay, _, _ in leaving], dtype=np.int64),
        "way_mask": np.packbits(masks, axis=1),
        "way_change": changes,
    }
    return {name: np.concatenate([slots[name][~due], value]) for name, value in new.items()}, arrivals


def _within_norms(failsafe: Failsafe, old: Array, arrivals: list[Arrival], log: Log) -> list[Arrival]:
    """Returns the arrivals, shortened where clip_norm says so, and logs those that are far longer than the others."""
    clips, judges = failsafe.clip_norm, failsafe.quarantine_after is not None
    if not arrivals or not (clips or judges):
        return arrivals
    norms = np.array([_change_norm(old, arrival) for arrival in arrivals])
    middle = float(np.median(norms))
    if middle == 0:  # most moved nothing, which says nothing about the others
        return arrivals
    ids = np.array([arrival.device for arrival in arrivals])
    if judges:
        log["outliers"] = sorted(ids[norms > failsafe.outlier_norm * middle].tolist())
    if clips is None:
        return arrivals
    bound = clips * middle
    log["clipped"] = sorted(ids[norms > bound].tolist())
    return [_clipped(old, arrival, norm, bound) for arrival, norm in zip(arrivals, norms.tolist(), strict=True)]


def _change_norm(old: Array, arrival: Arrival) -> float:
    """Returns how far a device moved what it kept, the norm of its values minus `old`."""
    return float(np.sqrt(np.square(arrival.values - old[arrival.mask], dtype=np.float64).sum()))


def _clipped(old: Array, arrival: Arrival, norm: float, bound: float) -> Arrival:
    """Returns the arrival with its change, of this `norm`, shortened to the bound where it is longer."""
    if norm <= bound:
        return arrival
    before = old[arrival.mask]
    return replace(arrival, values=before + old.dtype.type(bound / norm) * (arrival.values - before))
