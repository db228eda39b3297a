"""What the server does about faults: how long it waits, how it combines updates, whom it plans with care and whom it shuts out."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from fedprune_cli.allocate.problem import Problem
from fedprune_cli.errors import require
from fedprune_cli.plugins import Parts
from fedprune_cli.sections import part_of
from fedprune_cli.serve.aggregate import AGGREGATORS, Aggregator
from fedprune_cli.store.memory import Outcome, Sizes, Slots
from fedprune_cli.store.state import Array

SLACK = 0.01  # of the deadline within which it counts as met: kept entries are whole, and headers are sent with them
RECOVERY = 0.99  # the most by which a device's margin shrinks in a round
MAX_CAUTION = 100.0
FOREVER = int(np.iinfo(np.int64).max)


class LatePolicy(Protocol):
    """What becomes of an update that is late. defers: whether it may arrive in a later round; waits: whether the server waits for it."""

    defers: ClassVar[bool]
    waits: ClassVar[bool]

    def decide(self, late: Array, delay: Array) -> tuple[Array, Array]:
        """Returns after how many rounds each update arrives, int [K], and which never do, bool [K]; late: bool [K]; delay: by itself."""


@dataclass(frozen=True)
class Wait:
    """The server waits for it."""

    defers: ClassVar[bool] = False
    waits: ClassVar[bool] = True

    def decide(self, late: Array, delay: Array) -> tuple[Array, Array]:
        return np.where(late, 0, delay), np.zeros(len(late), dtype=bool)


@dataclass(frozen=True)
class Drop:
    """It is dropped."""

    defers: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    def decide(self, late: Array, delay: Array) -> tuple[Array, Array]:
        return np.where(late, 0, delay), late


@dataclass(frozen=True)
class Defer:
    """It counts in the next round."""

    defers: ClassVar[bool] = True
    waits: ClassVar[bool] = False

    def decide(self, late: Array, delay: Array) -> tuple[Array, Array]:
        return np.where(late, 1, delay), np.zeros(len(late), dtype=bool)


LATE_POLICIES: dict[str, type[LatePolicy]] = {"wait": Wait, "drop": Drop, "defer": Defer}
LATE: Parts[LatePolicy] = Parts("late_policies", LATE_POLICIES, LatePolicy)
AGGREGATION: Parts[Aggregator] = Parts("aggregators", AGGREGATORS, Aggregator)


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
        require(self.late in LATE, "late", self.late, f"one of {', '.join(LATE)}")
        require(1 <= self.wait_factor < math.inf, "wait_factor", self.wait_factor, ">= 1 and finite")
        require(0 <= self.max_staleness <= 10**6, "max_staleness", self.max_staleness, "in 0..1000000")
        require(self.aggregation in AGGREGATION, "aggregation", self.aggregation, f"one of {', '.join(AGGREGATION)}")
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

    @property
    def policy(self) -> LatePolicy:
        """What becomes of late updates."""
        return LATE[self.late]()

    @functools.cached_property
    def aggregator(self) -> Aggregator:
        """How updates are combined, configured by the keys that it names."""
        return part_of(self, AGGREGATION[self.aggregation])

    def slots(self, sizes: Sizes) -> Slots:
        """Returns what is remembered before round 1.

        `caution` float64 [N]: what a device's time is planned with, over its estimate. `offences`, and `quarantined_until` (the round
        in which it is back), int64 [N].
        """
        slots: dict[str, Array] = {}
        if self.safe_ratio:
            slots["caution"] = np.ones(sizes.num_devices)
        if self.quarantine_after is not None:
            slots |= {name: np.zeros(sizes.num_devices, dtype=np.int64) for name in ("offences", "quarantined_until")}
        return slots

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        """Returns what is remembered of the devices that trained in a round."""
        new: dict[str, Array] = {}
        ids, log = outcome.devices, outcome.log
        seen = ~np.isin(ids, [*log.died, *log.lost, *log.delayed])
        if self.safe_ratio:
            new["caution"] = caution = slots["caution"].copy()
            slowness = outcome.latency_s[seen] / max(outcome.deadline_s, 1e-300)
            slowness = np.where(slowness > 1 + SLACK, slowness, np.clip(slowness, RECOVERY, 1.0))
            caution[ids[seen]] = np.clip(caution[ids[seen]] * slowness, 1.0, MAX_CAUTION)
        if self.quarantine_after is not None:
            offences, until = slots["offences"].copy(), slots["quarantined_until"].copy()
            offended = [*log.refused, *log.outliers]
            offences[np.setdiff1d(ids[seen], offended)] = 0
            offences[offended] += 1
            caught, rounds = offences >= self.quarantine_after, self.quarantine_rounds
            until[caught], offences[caught] = FOREVER if rounds is None else outcome.number + 1 + rounds, 0
            new |= {"offences": offences, "quarantined_until": until}
        return new


def quarantined(slots: Slots, number: int) -> Array:
    """Returns the devices that take no part in round `number`."""
    if "quarantined_until" not in slots:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(slots["quarantined_until"] > number)


def with_margins(problem: Problem, slots: Slots) -> Problem:
    """Returns the problem with the time of each device multiplied by its caution, where there is any."""
    if "caution" not in slots:
        return problem
    caution, limits = slots["caution"][problem.names], problem.limits
    if limits is not None and limits.fixed_compute_s is not None:
        limits = replace(limits, fixed_compute_s=limits.fixed_compute_s * caution)
    return replace(
        problem,
        limits=limits,
        shared_compute_s=problem.shared_compute_s * caution,
        payload_bits=problem.payload_bits * caution,
        fixed_s=problem.fixed_s * caution,
    )
