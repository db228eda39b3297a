"""What the server does about faults: whose update it takes, how it combines them, and what it remembers of whom.

Every round has a log: kind -> devices, ascending.
    died, lost, delayed, poisoned   what befell them, which the server cannot see
    late       not there after wait_factor deadlines
    refused    an update that is not finite, or not of the kept entries' number
    stale      an update of an earlier round, taken; expired: one that is too old, or whose sender is in quarantine
    clipped    an update shortened to clip_norm median norms; outliers: beyond outlier_norm median norms
    safe       planned with more time than estimated
    quarantined   taking no part
`waited_s` is how long the round lasted beyond the last update that it took.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedprune_cli.allocate.problem import Problem
from fedprune_cli.errors import require
from fedprune_cli.learn.client import Unit, Update
from fedprune_cli.learn.prune import Masks
from fedprune_cli.serve.aggregate import aggregate, change_norms, clip, trimmed_mean
from fedprune_cli.store.state import Array, State
from fedprune_cli.world.faults import Fates, Faults

SLACK = 0.01  # of the deadline within which it counts as met: kept entries are whole, and headers are sent with them
MAX_MAGNITUDE = 1e9  # a value beyond it is as good as infinite
RECOVERY = 0.99  # the most by which a device's margin shrinks in a round
MAX_CAUTION = 100.0
FOREVER = int(np.iinfo(np.int64).max)

KINDS = (
    "died", "lost", "delayed", "poisoned", "late", "refused", "stale", "expired", "clipped", "outliers", "safe", "quarantined",
)  # fmt: skip
Log = dict[str, Any]


@dataclass(frozen=True)
class Failsafe:
    """What the server does about faults. Updates that are not finite, or have a wrong number of values, are always refused.

    late: of an update after the deadline, `wait` for it, `drop` it or `defer` it to the next round. wait_factor: deadlines after which an
    update is late, and for which the server waits for those that never come. max_staleness: rounds by which an update may be old,
    where it counts 1 / (1 + age). aggregation: `mean`, `median` or `trimmed_mean` (without the share `trim` at either end), of which
    the latter two count each device once. clip_norm: the median norms to which a longer change is shortened before, None: never.
    safe_ratio: plan a device that missed its deadline with the time that it took, so that it prunes more. quarantine_after: offences
    (refused, or beyond outlier_norm median norms) in successive rounds of its own after which a device takes no part for
    quarantine_rounds; None: never, and for good.
    """

    late: str
    wait_factor: float
    max_staleness: int
    aggregation: str
    trim: float
    clip_norm: float | None
    safe_ratio: bool
    quarantine_after: int | None
    quarantine_rounds: int | None
    outlier_norm: float

    def __post_init__(self) -> None:
        require(self.late in ("wait", "drop", "defer"), "late", self.late, "'wait', 'drop' or 'defer'")
        require(1 <= self.wait_factor < math.inf, "wait_factor", self.wait_factor, ">= 1 and finite")
        require(0 <= self.max_staleness <= 10**6, "max_staleness", self.max_staleness, "in 0..1000000")
        kinds = ("mean", "median", "trimmed_mean")
        require(self.aggregation in kinds, "aggregation", self.aggregation, f"one of {', '.join(kinds)}")
        require(0 <= self.trim < 0.5, "trim", self.trim, "in [0, 0.5)")
        norm = self.clip_norm
        require(norm is None or 0 < norm < math.inf, "clip_norm", norm, "> 0 and finite, or null")
        require(0 < self.outlier_norm < math.inf, "outlier_norm", self.outlier_norm, "> 0 and finite")
        for key in ("quarantine_after", "quarantine_rounds"):
            value = getattr(self, key)
            require(value is None or 1 <= value <= 10**6, key, value, "in 1..1000000 or null")

    @property
    def none(self) -> bool:
        """Whether a run without faults is the same with and without it."""
        plain = self.late == "wait" and self.aggregation == "mean" and self.clip_norm is None
        return plain and not self.safe_ratio and self.quarantine_after is None

    def slots(self, faults: Faults, num_devices: int, shared_params: int) -> dict[str, Array]:
        """Returns what is remembered before round 1.

        Of the updates under way, P: `way_device`, `way_sent` and `way_due` (rounds) int64 [P], `way_mask` bits [P], `way_change` of
        u float32 [P, U]. `caution` float64 [N]: what a device's time is planned with, over its estimate. `offences`, and
        `quarantined_until` (the round in which it is back), int64 [N].
        """
        slots: dict[str, Array] = {}
        if faults.stale or self.late == "defer":
            slots |= {f"way_{name}": np.zeros(0, dtype=np.int64) for name in ("device", "sent", "due")}
            slots["way_mask"] = np.zeros((0, math.ceil(shared_params / 8)), dtype=np.uint8)
            slots["way_change"] = np.zeros((0, shared_params), dtype=np.float32)
        if self.safe_ratio:
            slots["caution"] = np.ones(num_devices)
        if self.quarantine_after is not None:
            slots |= {name: np.zeros(num_devices, dtype=np.int64) for name in ("offences", "quarantined_until")}
        return slots

    def next_slots(
        self, slots: Mapping[str, Array], number: int, ids: Array, latency_s: Array, deadline_s: float, log: Log
    ) -> dict[str, Array]:
        """Returns what is remembered of the devices `ids` [K], which took latency_s [K], after round `number`: all from its record."""
        new: dict[str, Array] = {}
        seen = ~np.isin(ids, [*log["died"], *log["lost"], *log["delayed"]])
        if self.safe_ratio:
            new["caution"] = caution = slots["caution"].copy()
            slowness = latency_s[seen] / max(deadline_s, 1e-300)
            slowness = np.where(slowness > 1 + SLACK, slowness, np.clip(slowness, RECOVERY, 1.0))
            caution[ids[seen]] = np.clip(caution[ids[seen]] * slowness, 1.0, MAX_CAUTION)
        if self.quarantine_after is not None:
            offences, until = slots["offences"].copy(), slots["quarantined_until"].copy()
            offended = [*log["refused"], *log["outliers"]]
            offences[np.setdiff1d(ids[seen], offended)] = 0
            offences[offended] += 1
            caught, rounds = offences >= self.quarantine_after, self.quarantine_rounds
            until[caught], offences[caught] = FOREVER if rounds is None else number + 1 + rounds, 0
            new |= {"offences": offences, "quarantined_until": until}
        return new

    def combine(
        self, old: Array, arrivals: Sequence[Arrival], samples: Array, step_sizes: Sequence[float]
    ) -> tuple[Array, Array]:
        """Returns the new u [U] and the gradient that the arrivals imply [U]; samples D_k and step sizes are in their order."""
        masks, values = [arrival.mask for arrival in arrivals], [arrival.values for arrival in arrivals]
        if self.aggregation in ("median", "trimmed_mean"):
            return trimmed_mean(old, masks, values, step_sizes, 0.5 if self.aggregation == "median" else self.trim)
        weights = [float(count) / (1 + arrival.age) for count, arrival in zip(samples, arrivals, strict=True)]
        return aggregate(old, masks, values, weights, step_sizes)


@dataclass(frozen=True)
class Arrival:
    """An update that the server takes: the kept entries `values` of a device's `mask` [U], `age` rounds old."""

    device: int
    mask: Array
    values: Array
    age: int = 0


@dataclass(frozen=True)
class Delivery:
    """What reached the server of a round: the arrivals, when it stopped waiting, the updates under way, and the log."""

    arrivals: list[Arrival]
    latency_s: float
    slots: dict[str, Array]
    log: Log


def quarantined(slots: Mapping[str, Array], number: int) -> Array:
    """Returns the devices that take no part in round `number`."""
    if "quarantined_until" not in slots:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(slots["quarantined_until"] > number)


def cautious(problem: Problem, slots: Mapping[str, Array]) -> Problem:
    """Returns the problem with the time of each device multiplied by its caution, where there is any."""
    if "caution" not in slots:
        return problem
    caution = slots["caution"][problem.names]
    return replace(
        problem,
        shared_compute_s=problem.shared_compute_s * caution,
        payload_bits=problem.payload_bits * caution,
        fixed_s=problem.fixed_s * caution,
    )


def undone(update: Update, unit: Unit) -> Update:
    """Returns the update of a device that keeps nothing of what it trained: its personal part is the old one."""
    return replace(update, personal=unit.personal, train_loss=None, rounding_error=None)


def diverged(update: Update) -> bool:
    """Whether what a device trained is not finite."""
    return not (np.isfinite(update.personal).all() and np.isfinite(update.shared).all())


def deliver(
    faults: Faults, failsafe: Failsafe, seed: int, state: State, masks: Masks, updates: Sequence[Update], fates: Fates,
    latency_s: Array, deadline_s: float,
) -> Delivery:  # fmt: skip
    """Returns what reaches the server of the updates [K] that take latency_s [K], and of those that were under way."""
    number, old = state.round, state.shared
    log: Log = {kind: [] for kind in KINDS}
    cutoff_s = failsafe.wait_factor * deadline_s
    gone = fates.died | fates.lost
    late = ~gone & (latency_s > cutoff_s * (1 + SLACK))
    delay = np.where(late, failsafe.late == "defer", fates.delay)
    missing = gone | (delay > 0) | (late & (failsafe.late == "drop"))
    arrivals, leaving = [], []
    for at, update in enumerate(updates):
        mask, device = masks[update.device], update.device
        if fates.died[at]:
            log["died"].append(device)
        elif fates.lost[at]:
            log["lost"].append(device)
        elif late[at]:
            log["late"].append(device)
        elif delay[at]:
            log["delayed"].append(device)
        if gone[at] or (missing[at] and not delay[at]):
            continue
        kind = str(fates.sends[at])
        values = (
            update.shared if kind == "honest" else faults.sent(kind, update.shared, old[mask], seed, number, device)
        )
        if kind == "poisoned":
            log["poisoned"].append(device)
        if not _sound(values, len(update.shared)):
            log["refused"].append(device)
        elif delay[at]:
            leaving.append((device, int(delay[at]), mask, values))
        else:
            arrivals.append(Arrival(device, mask, values))
    slots, old_ones = _under_way(failsafe, state, leaving, log)
    arrivals = _within_norms(failsafe, old, arrivals + old_ones, log)
    arrived_s = float(latency_s[~missing].max(initial=0.0))
    ends_s = max(arrived_s, cutoff_s) if missing.any() else arrived_s
    if "caution" in state.slots:
        log["safe"] = [update.device for update in updates if state.slots["caution"][update.device] > 1]
    log["quarantined"] = quarantined(state.slots, number).tolist()
    return Delivery(arrivals, ends_s, slots, log | {"waited_s": ends_s - arrived_s})


def _sound(values: Array, wanted: int) -> bool:
    """Whether an update may be combined with others; NaN compares false."""
    return len(values) == wanted and bool((np.abs(values) <= MAX_MAGNITUDE).all())


def _under_way(
    failsafe: Failsafe, state: State, leaving: Sequence[tuple[int, int, Array, Array]], log: Log
) -> tuple[dict[str, Array], list[Arrival]]:
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
    new = {
        "way_device": np.array([device for device, _, _, _ in leaving], dtype=np.int64),
        "way_sent": np.full(len(leaving), number, dtype=np.int64),
        "way_due": np.array([number + delay for _, delay, _, _ in leaving], dtype=np.int64),
        "way_mask": np.packbits(
            np.array([mask for _, _, mask, _ in leaving], dtype=bool).reshape(len(leaving), old.size), axis=1
        ),
        "way_change": changes,
    }
    return {name: np.concatenate([slots[name][~due], value]) for name, value in new.items()}, arrivals


def _within_norms(failsafe: Failsafe, old: Array, arrivals: list[Arrival], log: Log) -> list[Arrival]:
    """Returns the arrivals, shortened where clip_norm says so, and logs those that are far longer than the others."""
    clips, judges = failsafe.clip_norm, failsafe.quarantine_after is not None
    if not arrivals or not (clips or judges):
        return arrivals
    norms = change_norms(old, [arrival.mask for arrival in arrivals], [arrival.values for arrival in arrivals])
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
    return [
        replace(arrival, values=clip(old, arrival.mask, arrival.values, norm, bound))
        for arrival, norm in zip(arrivals, norms.tolist(), strict=True)
    ]
