"""The latency threshold T of a round: which one is asked for, and the smallest that is possible (model.md, sections 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from fedprune_cli.allocate.inverse import LN2, bandwidth_of, log_snr_for_log_ratio, rate, rate_slope
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.problem import LATEST, Problem, latency, required_bandwidth
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


def least_feasible(problem: Problem) -> float:
    """Returns the smallest deadline at which every device can keep its least."""
    if not problem.chooses:
        return least_deadline(problem, problem.min_kept)[0]

    def fits(deadline_s: float) -> bool:
        return bool(
            required_bandwidth(replace(problem, deadline_s=deadline_s), problem.min_kept).sum() <= problem.bandwidth_hz
        )

    return earliest(fits, least_deadline(without_budgets(problem), problem.min_kept)[0])[1]


def earliest(fits: Callable[[float], bool], low: float) -> tuple[float, float]:
    """Returns the smallest deadline from `low` on that fits, by bisection, after the largest that does not; infinite when none does."""
    if low == np.inf or not fits(np.inf):
        return np.inf, np.inf
    low = max(low * (1 - 1e-9), SMALLEST)
    high = 2 * low
    while not fits(high):
        low, high = high, 2 * high
        if high > LATEST:
            return np.inf, np.inf
    while high - low > 4e-16 * high and low < (middle := 0.5 * (low + high)) < high:
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low, high


def without_budgets(problem: Problem) -> Problem:
    """Returns the problem with as much energy as anyone likes."""
    if problem.limits is None:
        return problem
    endless_j = np.full(len(problem.weight), np.inf)
    return replace(problem, limits=replace(problem.limits, energy_budget_j=endless_j))


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
