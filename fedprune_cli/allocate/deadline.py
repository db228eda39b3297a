"""The latency threshold T of a round: which one is asked for, and the smallest that is possible (model.md, sections 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol

import numpy as np

from fedprune_cli.allocate.certificate import TOLERANCE
from fedprune_cli.allocate.inverse import LN2, bandwidth_of, log_snr_for_log_ratio, rate, rate_slope
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.problem import LATEST, TIGHT, Problem, kept_on, latency, required_bandwidth
from fedprune_cli.errors import ConfigError, InfeasibleError, require
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Deadline:
    """The round's latency threshold T: a fraction of its latency-optimal dense time, seconds, or a share of a total budget.

    last_fraction: where the fraction ends, in a straight line over the rounds; None keeps it.
    seconds takes the place of the fraction, and total_seconds, the simulated time for the whole run, of both.
    """

    fraction: float | None
    last_fraction: float | None
    seconds: float | None
    total_seconds: float | None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        require(
            bool({*given} - {"last_fraction"}),
            "fraction",
            self.fraction,
            "a number when seconds and total_seconds are null",
        )
        require(
            self.last_fraction is None or self.fraction is not None,
            "last_fraction",
            self.last_fraction,
            "null without a fraction",
        )
        for name in given:
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "> 0")

    def at(self, number: int, rounds: int, elapsed_s: float, dense_s: float) -> float:
        """Returns T of round `number` (from 0) of `rounds`, `elapsed_s` into the run, whose dense optimum takes `dense_s`.

        A total budget gives each round an equal share of what is left; once it is spent T is 0 and the policy for
        infeasible rounds decides.
        """
        if self.total_seconds is not None:
            return max(self.total_seconds - elapsed_s, 0.0) / (rounds - number)
        if self.seconds is not None:
            return self.seconds
        if self.fraction is None:
            raise ConfigError("must be a number when seconds and total_seconds are null", key="fraction")
        last = self.fraction if self.last_fraction is None else self.last_fraction
        return dense_s * (self.fraction + (last - self.fraction) * number / max(rounds - 1, 1))


@dataclass(frozen=True)
class _Senders:
    """The devices that send, and what decides the bandwidth at which each ends at a common time: [n].

    limit_s: the upload on infinite bandwidth; floor_hz, most_hz: what their limits allow; latest_s: before it not all can end,
    behind_s: how much earlier than that each could.
    The unknown is the time beyond latest_s, not the deadline itself: near the limit T - limit has no digits left.
    """

    bits: Array
    snr_hz: Array
    limit_s: Array
    behind_s: Array
    latest_s: float
    floor_hz: Array
    most_hz: Array
    limited: bool
    log_cap: Array | None

    def used(self, beyond_s: float) -> tuple[float, float, Array]:
        """Returns the total bandwidth of devices that end `beyond_s` later than latest_s, its derivative, and the bandwidths [n]."""
        late_s = beyond_s + self.behind_s
        L = log_snr_for_log_ratio(np.log1p(late_s / self.limit_s), self.log_cap)
        b = bandwidth_of(L, self.snr_hz)
        # db/dT = (dr/dT) / r'(b), dr/dT = -r / time, r'(b) = h(L) / ln 2
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = -self.bits * LN2 / ((late_s + self.limit_s) ** 2 * rate_slope(L, self.log_cap))
        if self.limited:
            slope = np.where((b > self.floor_hz) & (b < self.most_hz), slope, 0.0)
            b = np.clip(b, self.floor_hz, self.most_hz)
        return float(b.sum()), float(slope.sum()), b

    def end_together(self, budget_hz: float, first_hz: Array) -> tuple[float, Array]:
        """Returns the least `beyond_s` that the budget allows and its bandwidths [n]: Newton from those of `first_hz`, guarded."""
        low, high = (
            0.0,
            float(np.max(self.bits / rate(first_hz, self.snr_hz, self.log_cap) - self.limit_s - self.behind_s)),
        )
        beyond_s = high = max(high, np.finfo(float).tiny)
        if self.limited and self.used(0.0)[0] <= budget_hz:  # limits, not the band, make the slowest device
            beyond_s = high = 0.0
        for _ in range(100):
            total, slope, b = self.used(beyond_s)
            excess = total / budget_hz - 1
            if abs(excess) <= 1e-13 or high - low <= 4e-16 * high:
                break
            low, high = (beyond_s, high) if excess > 0 else (low, beyond_s)
            # 1 / total is nearly straight in T: Newton on it
            step = beyond_s - total * excess / slope if np.isfinite(slope) and slope < 0 else np.nan
            beyond_s = step if low < step < high else 0.5 * (low + high)
        return beyond_s, b


def least_deadline(problem: Problem, kept: Array) -> tuple[float, Array]:
    """Returns the smallest deadline at which all devices can keep `kept` [K], and the bandwidths [K] that reach it.

    All devices that send end at that deadline together, apart from those whose limits speed them up or slow them down:
    sum b_k(T) = B, solved for T by Newton with bisection as its guard.
    Infinite, with equal bandwidths, when no deadline is late enough: no signal, or limits that cannot be met.
    """
    bits, work_s = kept * problem.payload_bits, problem.fixed_s + kept * problem.shared_compute_s
    sends = bits > 0
    share = np.where(sends, problem.bandwidth_hz / max(int(sends.sum()), 1), 0.0)
    if (sends & (problem.snr_hz == 0)).any():
        return np.inf, share
    floor_hz, most_hz = np.zeros(len(kept)), np.full(len(kept), np.inf)
    if problem.limits is not None:
        floor_hz = required_bandwidth(replace(problem, deadline_s=np.inf), kept)
        most_hz = problem.limits.max_bandwidth_hz
        room_hz = problem.bandwidth_hz - floor_hz.sum()
        if not room_hz >= 0 or (room_hz == 0 and (sends & (floor_hz == 0)).any()):
            return np.inf, share
        share = np.where(sends, np.minimum(floor_hz + room_hz / max(int(sends.sum()), 1), most_hz), floor_hz)
    if not sends.any():
        return float(work_s.max()), share
    budget_hz = problem.bandwidth_hz - floor_hz[~sends].sum()
    senders = _senders(problem.take(np.flatnonzero(sends)), kept[sends], floor_hz[sends], most_hz[sends])
    beyond_s, b = senders.end_together(budget_hz, share[sends])
    last_s = float(work_s.max()) - senders.latest_s
    if last_s > beyond_s:  # a device that sends nothing is the slowest: the others may take their time
        b = senders.used(last_s)[2]
    if not np.isfinite(b.sum()):
        raise InfeasibleError("the devices' figures are too far apart for any bandwidths to be computed")
    bandwidth_hz = np.where(sends, 0.0, share) if problem.limits is not None else np.zeros(len(kept))
    bandwidth_hz[sends] = np.minimum(b * (budget_hz / b.sum()), most_hz[sends])
    return float(latency(problem, kept, bandwidth_hz).max()), bandwidth_hz


def _senders(problem: Problem, kept: Array, floor_hz: Array, most_hz: Array) -> _Senders:
    """Returns the senders of a problem whose devices all send."""
    bits, work_s = kept * problem.payload_bits, problem.fixed_s + kept * problem.shared_compute_s
    limit_s = bits * LN2 / problem.snr_hz
    soonest_s = work_s + limit_s
    latest_s = float(soonest_s.max())
    if np.isfinite(most_hz).any():
        fastest_bps = rate(np.minimum(most_hz, 1e300), problem.snr_hz, problem.log_cap)
        latest_s = max(latest_s, float((work_s + bits / fastest_bps).max()))
    limited = problem.limits is not None
    return _Senders(
        bits, problem.snr_hz, limit_s, latest_s - soonest_s, latest_s, floor_hz, most_hz, limited, problem.log_cap
    )


class Least(Protocol):
    """The smallest deadline at which every device can keep its least, in the portions in which an allocator hands out the band.

    counts_hz: whether the devices' least bandwidths say what a round lacks, and what room another choice of devices had.
    """

    counts_hz: ClassVar[bool]

    def __call__(self, problem: Problem) -> float:
        """Returns that deadline in seconds; infinite when none is late enough."""

    def has_room(self, problem: Problem) -> bool:
        """Whether the problem's deadline is late enough, where that is cheaper to know than the smallest one; else False."""

    def holds(self, problem: Problem) -> bool:
        """Whether a deadline that is late enough in theory is so in digits, too."""

    def alone(self, problem: Problem, floor_hz: Array) -> Array:
        """Returns whether each device could take part if it were the only one, bool [K]; floor_hz: the least bandwidths [K]."""

    def most(self, share: float) -> float:
        """Returns how many more like the next device to be dropped may fit, where `share` of its least bandwidth is left."""


@dataclass(frozen=True)
class LeastOnAny:
    """The smallest deadline where any bandwidth may be given."""

    counts_hz: ClassVar[bool] = True

    def __call__(self, problem: Problem) -> float:
        if not problem.chooses:
            return least_deadline(problem, problem.min_kept)[0]

        def fits(deadline_s: float) -> bool:
            return bool(
                required_bandwidth(replace(problem, deadline_s=deadline_s), problem.min_kept).sum()
                <= problem.bandwidth_hz
            )

        return earliest(fits, least_deadline(without_budgets(problem), problem.min_kept)[0])[1]

    def has_room(self, problem: Problem) -> bool:
        """Whether the devices' least bandwidths fit with room to spare."""
        return bool(required_bandwidth(problem, problem.min_kept).sum() <= problem.bandwidth_hz * (1 - TOLERANCE))

    def holds(self, problem: Problem) -> bool:
        """Whether the devices really keep their least, to a certificate's tolerance, on bandwidths that fit.

        Where a deadline is many times what a device's upload may take of it, its last digit decides how much bandwidth that needs.
        """
        if problem.deadline_s == np.inf:
            return True
        if not np.isfinite(required_bandwidth(problem, problem.min_kept).sum()):
            return False
        if self.has_room(problem):
            return True
        bandwidth_hz, price = solve_p1(problem)
        return certify(problem, kept_on(problem, bandwidth_hz), bandwidth_hz, price).holds

    def alone(self, problem: Problem, floor_hz: Array) -> Array:
        """Whether the least bandwidths [K] are no more than may be given, bool [K]."""
        return floor_hz <= problem.most_hz

    def most(self, share: float) -> float:
        """Returns the share: the next device alone is too much."""
        return min(share, 1.0)


least_feasible = LeastOnAny()


def earliest(fits: Callable[[float], bool], low: float, close: float = 4e-16) -> tuple[float, float]:
    """Returns the smallest deadline from `low` on that fits, by bisection, after the largest that does not; infinite when none does.

    close: how near to each other they are at the end, relative.
    """
    if low == np.inf or not fits(np.inf):
        return np.inf, np.inf
    low = max(low * (1 - 1e-9), SMALLEST)
    high = 2 * low
    while not fits(high):
        low, high = high, 2 * high
        if high > LATEST:
            return np.inf, np.inf
    while high - low > close * high and low < (middle := 0.5 * (low + high)) < high:
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low, high


def without_budgets(problem: Problem) -> Problem:
    """Returns the problem with as much energy as anyone likes."""
    if problem.limits is None:
        return problem
    endless_j = np.full(len(problem.weight), np.inf)
    return replace(problem, limits=replace(problem.limits, energy_budget_j=endless_j))


def equal_share(problem: Problem) -> Array:
    """Returns B / K for every device, or what its limits make of it [K]."""
    return np.clip(problem.bandwidth_hz / len(problem.weight), problem.least_hz, problem.most_hz)


@dataclass(frozen=True)
class LeastOnEqual:
    """The smallest deadline where every device has an equal share; infinite when its limits forbid it."""

    counts_hz: ClassVar[bool] = True

    def __call__(self, problem: Problem) -> float:
        share = equal_share(problem)
        always = required_bandwidth(replace(problem, deadline_s=np.inf), problem.min_kept)
        if problem.limits is not None and (
            share.sum() > problem.bandwidth_hz * (1 + TIGHT) or (always > share * (1 + TIGHT)).any()
        ):
            return np.inf
        soonest_s = float(latency(without_budgets(problem), problem.min_kept, share).max())
        if not problem.chooses:
            return soonest_s

        def fits(deadline_s: float) -> bool:
            return bool(
                (
                    required_bandwidth(replace(problem, deadline_s=deadline_s), problem.min_kept) <= share * (1 + TIGHT)
                ).all()
            )

        return earliest(fits, soonest_s)[1]

    def has_room(self, problem: Problem) -> bool:
        """Returns False: the smallest deadline is as cheap to know."""
        return False

    def holds(self, problem: Problem) -> bool:
        """Returns True: no bandwidth depends on the deadline's last digit."""
        return True

    def alone(self, problem: Problem, floor_hz: Array) -> Array:
        """Whether the least bandwidths [K] are no more than may be given, bool [K]."""
        return floor_hz <= problem.most_hz

    def most(self, share: float) -> float:
        """Returns the share."""
        return share


least_equal = LeastOnEqual()


def dense_deadline(problem: Problem) -> tuple[float, Array]:
    """Returns the latency of the latency-optimal round without pruning, and its bandwidths [K] (model.md, section 4).

    It is the unit of deadlines, and therefore finite: devices without a link are left out of it (0 when no device is left), energy
    budgets, which may forbid a dense round at any deadline, do not count in it, nor do least bandwidths that exceed the band together.
    """
    linked = problem.linked
    if not linked.all():
        deadline_s, bandwidth_hz = 0.0, np.zeros(len(linked))
        if linked.any():
            deadline_s, bandwidth_hz[linked] = dense_deadline(problem.take(np.flatnonzero(linked)))
        return deadline_s, bandwidth_hz
    everything = np.ones(len(problem.weight))
    if problem.limits is None:
        return least_deadline(problem, everything)
    problem = without_budgets(problem)
    deadline_s, bandwidth_hz = least_deadline(problem, everything)
    if deadline_s == np.inf and problem.limits is not None:
        limits = replace(problem.limits, min_bandwidth_hz=np.zeros(len(everything)))
        deadline_s, bandwidth_hz = least_deadline(replace(problem, limits=limits), everything)
    return deadline_s, bandwidth_hz


def equal_dense_latency(problem: Problem) -> float:
    """Returns the latency, in seconds, of the round without pruning on equal shares of the band: the naive baseline's.

    Devices without a link are left out of it, as of the dense optimum; 0 when no device is left.
    """
    linked = problem.linked
    if not linked.all():
        return equal_dense_latency(problem.take(np.flatnonzero(linked))) if linked.any() else 0.0
    count = len(problem.weight)
    return float(latency(problem, np.ones(count), np.full(count, problem.bandwidth_hz / count)).max())
