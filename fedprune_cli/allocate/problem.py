"""The allocation problem, its equations, and what an answer consists of (model.md, sections 3 and 4).

    t_k = x_k (a_k + c_k / r_k(b_k)) + d_k        x_k = 1 - rho_k
    r_k(b) = b log2(1 + s_k / b)

Everything is written in L = ln(1 + s/b), which is well scaled from a flood of bandwidth (L -> 0) to a trickle (L ~ 700):
    b = s / (e^L - 1),   r = R g(L),   R = s / ln 2,   g(L) = L / (e^L - 1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from fedprune_cli.errors import ConfigError, InfeasibleError
from fedprune_cli.store.state import Array

LN2 = float(np.log(2.0))
BLOCK = 16_384  # devices worked on at a time: what fits a processor's cache
MAX_LOG_SNR = 700.0  # e^L stays finite; a device at this end has no bandwidth to speak of
TIGHT = 1e-12  # relative slack within which a bound counts as met


@dataclass(frozen=True)
class Limits:
    """What each device may use besides its time, float64 [K] and SI.

    min_bandwidth_hz, max_bandwidth_hz: 0 and infinite where there is none. energy_budget_j E, infinite where there is none, bounds
    the joules of a round, x_k (shared_energy_j + tx_power_w c_k / r_k(b_k)) + fixed_energy_j (computing and sending; not listening).
    All of them keep P1 convex: what the energy allows, psi = (E - fixed) r / (shared_energy r + tx_power c), has phi's form.
    Not offered because they would not: a clock or a transmit power chosen together with the ratio, and bandwidth in whole blocks.
    Raises ConfigError naming the first bad entry.
    """

    min_bandwidth_hz: Array
    max_bandwidth_hz: Array
    energy_budget_j: Array
    shared_energy_j: Array
    fixed_energy_j: Array
    tx_power_w: Array

    def __post_init__(self) -> None:
        size = len(self.tx_power_w)
        for name, allowed, good in (
            ("min_bandwidth_hz", "finite and >= 0", np.isfinite(self.min_bandwidth_hz) & (self.min_bandwidth_hz >= 0)),
            ("max_bandwidth_hz", "> 0 and at least the minimum",
             (self.max_bandwidth_hz > 0) & (self.max_bandwidth_hz >= self.min_bandwidth_hz)),
            ("energy_budget_j", ">= 0", self.energy_budget_j >= 0),
            ("shared_energy_j", "finite and >= 0", np.isfinite(self.shared_energy_j) & (self.shared_energy_j >= 0)),
            ("fixed_energy_j", "finite and >= 0", np.isfinite(self.fixed_energy_j) & (self.fixed_energy_j >= 0)),
            ("tx_power_w", "finite and > 0", np.isfinite(self.tx_power_w) & (self.tx_power_w > 0)),
        ):  # fmt: skip
            if good.shape != (size,):
                raise ConfigError(f"{name}: {good.shape} entries for {size} devices")
            if not good.all():
                at = int(np.flatnonzero(~good)[0])
                raise ConfigError(f"device {at}, {name}={getattr(self, name)[at]}: must be {allowed}")

    def take(self, index: Array) -> Limits:
        """Returns the limits of some of the devices."""
        return Limits(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True)
class Problem:
    """One round's problem, float64 [K] and SI.

    shared_compute_s a: compute time of the whole shared part; payload_bits c: bits of the whole shared part;
    fixed_s d: time that pruning does not touch; snr_hz s = p h / N0; weight w; max_ratio rho_max, the cap of each device;
    bandwidth_hz B; deadline_s T, infinite when open; ids: the devices' names in messages, int [K], their positions when None;
    limits: None when there are none. Raises ConfigError naming the first bad entry.
    """

    shared_compute_s: Array
    payload_bits: Array
    fixed_s: Array
    snr_hz: Array
    weight: Array
    max_ratio: Array
    bandwidth_hz: float
    deadline_s: float
    ids: Array | None = None
    limits: Limits | None = None

    def __post_init__(self) -> None:
        size = len(self.weight)
        if size == 0:
            raise ConfigError("an allocation problem needs at least one device")
        if self.limits is not None and len(self.limits.tx_power_w) != size:
            raise ConfigError(f"limits: {len(self.limits.tx_power_w)} entries for {size} devices")
        for field in fields(self)[:-2]:
            values = np.atleast_1d(getattr(self, field.name))
            if field.name not in ("bandwidth_hz", "deadline_s") and values.shape != (size,):
                raise ConfigError(f"{field.name}: {values.shape} entries for {size} devices")
            top = 1.0 if field.name == "max_ratio" else np.inf
            good = (values >= 0) & (values <= top) & (np.isfinite(values) | (field.name == "deadline_s"))
            if not good.all():
                at = int(np.flatnonzero(~good)[0])
                where = (
                    f"device {at}, " if len(values) == size and field.name not in ("bandwidth_hz", "deadline_s") else ""
                )
                allowed = "in [0, 1]" if top == 1.0 else "finite and >= 0"
                raise ConfigError(f"{where}{field.name}={values[at]}: must be {allowed}")
        if self.bandwidth_hz == 0:
            raise ConfigError("bandwidth_hz=0: must be > 0")

    @property
    def min_kept(self) -> Array:
        """The least fraction each device may keep, 1 - rho_max [K]."""
        return 1.0 - self.max_ratio

    def take(self, index: Array) -> Problem:
        """Returns the problem of some of the devices, in that order."""
        arrays = (f.name for f in fields(self) if f.name not in ("bandwidth_hz", "deadline_s", "ids", "limits"))
        limits = None if self.limits is None else self.limits.take(index)
        chosen = {name: getattr(self, name)[index] for name in arrays}
        return replace(self, ids=self.names[index], limits=limits, **chosen)

    @property
    def names(self) -> Array:
        """What the devices are called in messages, int [K]."""
        return np.arange(len(self.weight)) if self.ids is None else self.ids

    @property
    def most_hz(self) -> Array:
        """The most bandwidth each device may be given [K]."""
        everything = np.full(len(self.weight), self.bandwidth_hz)
        return everything if self.limits is None else np.minimum(everything, self.limits.max_bandwidth_hz)

    @property
    def least_hz(self) -> Array:
        """The least bandwidth each device must be given, whatever it does with it [K]."""
        return np.zeros(len(self.weight)) if self.limits is None else self.limits.min_bandwidth_hz


@dataclass(frozen=True)
class Certificate:
    """How far an allocation is from the KKT conditions of P1, each as its largest relative residual.

    primal: the budget, the deadline and the bounds; stationarity: w phi' = price where neither bound holds;
    dual: the price's sign, and w phi' on the right side of it where a bound holds; slackness: price times unused bandwidth;
    gap: (g(price) - sum w x) / (sum w + price B), the distance from an upper bound that follows from the price alone.
    """

    primal: float
    stationarity: float
    dual: float
    slackness: float
    gap: float

    @property
    def residual(self) -> float:
        """The largest of the four residuals."""
        return max(self.primal, self.stationarity, self.dual, self.slackness)


Status = Literal["optimal", "feasible", "stretched", "dropped"]


@dataclass(frozen=True)
class Allocation:
    """Who gets what.

    prune_ratio rho, bandwidth_hz b, rate_bps r, latency_s t: [K], of no meaning where not `admitted`;
    deadline_s: the deadline that holds, later than asked when status is `stretched`;
    binds: for each device `deadline`, `energy`, `dense` (nothing pruned), `max_ratio` (pruned to its cap), `compute` or `dropped`;
    price_per_hz: what one more hertz adds to sum w x, 0 for allocators without a price;
    objective: sum w x over the admitted; certificate: None for allocators that claim no optimality;
    message: who was dropped, what was missing and which knob helps, or empty.
    """

    prune_ratio: Array
    bandwidth_hz: Array
    rate_bps: Array
    latency_s: Array
    deadline_s: float
    admitted: Array
    binds: tuple[str, ...]
    price_per_hz: float
    objective: float
    certificate: Certificate | None
    status: Status
    message: str


def rate(bandwidth_hz: Array, snr_hz: Array) -> Array:
    """Returns r = b log2(1 + s/b), bits/s; 0 for b = 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = snr_hz / bandwidth_hz
        bits = np.where(
            ratio > 1e300,
            bandwidth_hz * (np.log2(snr_hz) - np.log2(bandwidth_hz)),
            bandwidth_hz * np.log1p(ratio) / LN2,
        )
    return np.where((bandwidth_hz > 0) & (snr_hz > 0), bits, 0.0)


def latency(problem: Problem, kept: Array, bandwidth_hz: Array) -> Array:
    """Returns t [K], seconds; infinite where a device must send and has no rate. A device that keeps nothing sends nothing."""
    bits = kept * problem.payload_bits
    with np.errstate(divide="ignore"):
        upload_s = np.where(bits > 0, bits / np.where(bits > 0, rate(bandwidth_hz, problem.snr_hz), 1.0), 0.0)
    return kept * problem.shared_compute_s + upload_s + problem.fixed_s


def energy(problem: Problem, kept: Array, bandwidth_hz: Array) -> Array:
    """Returns the joules [K] of a round of a problem with limits; infinite where a device must send and has no rate."""
    assert problem.limits is not None
    limits, bits = problem.limits, kept * problem.payload_bits
    with np.errstate(divide="ignore"):
        upload_s = np.where(bits > 0, bits / np.where(bits > 0, rate(bandwidth_hz, problem.snr_hz), 1.0), 0.0)
    return kept * limits.shared_energy_j + limits.tx_power_w * upload_s + limits.fixed_energy_j


@dataclass(frozen=True)
class Resource:
    """A budget that a device's kept fraction x spends [K]: x (work + transfer / r) + fixed <= budget. `left` is budget - fixed."""

    left: Array
    work: Array
    transfer: Array

    def kept(self, rate_bps: Array) -> Array:
        """Returns the most a device can keep, left r / (work r + transfer), not capped at 1; 0 when nothing is left."""
        free = self.transfer == 0
        left = np.maximum(self.left, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            most = np.where(free, left / self.work, left * rate_bps / (self.work * rate_bps + self.transfer))
        return np.where(np.isnan(most), np.where(free, 1.0, 0.0), most)

    def rate(self, kept: Array) -> Array:
        """Returns the rate [K] at which a device that keeps `kept` spends all it may; infinite where no rate suffices."""
        left, transfer = self.left - kept * self.work, kept * self.transfer
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = np.where(left > 0, transfer / left, np.inf)
        return np.where((transfer == 0) & (left >= 0), 0.0, needed)


def resources(problem: Problem) -> tuple[Resource, ...]:
    """Returns time, and energy where the problem limits it."""
    time = Resource(problem.deadline_s - problem.fixed_s, problem.shared_compute_s, problem.payload_bits)
    limits = problem.limits
    if limits is None or not np.isfinite(limits.energy_budget_j).any():
        return (time,)
    joules = limits.energy_budget_j - limits.fixed_energy_j
    return time, Resource(joules, limits.shared_energy_j, limits.tx_power_w * problem.payload_bits)


def kept_fraction(problem: Problem, rate_bps: Array) -> Array:
    """Returns min(phi, psi): the most a device can keep within the deadline and its energy, not capped at 1; 0 when T < d."""
    return np.minimum.reduce([resource.kept(rate_bps) for resource in resources(problem)])


def log_snr_for_rate(rate_bps: Array, snr_hz: Array) -> Array:
    """Returns L with R g(L) = rate: 0 where the rate is the limit R = s / ln 2 or beyond it, MAX_LOG_SNR where it is 0.

    This is the root that model.md writes with the Lambert W function: e^L - 1 = -W_{-1}(-eta e^-eta) / eta - 1, eta = rate / R.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        target = np.log(snr_hz / LN2) - np.log(rate_bps)
    return np.where(rate_bps > 0, _log_snr(np.where(np.isnan(target), 0.0, target)), MAX_LOG_SNR)


def _log_snr(target: Array) -> Array:
    """Returns L with -ln g(L) = target, by Newton: the curve is convex and loses no digits near 0, where W has its branch point."""
    return np.concatenate([_log_snr_block(target[at : at + BLOCK]) for at in range(0, len(target), BLOCK)] or [target])


def _log_snr_block(target: Array) -> Array:
    target = np.clip(target, 0.0, MAX_LOG_SNR - 10.0)
    L = np.minimum(2 * target, target + np.log1p(target) + 1.0)  # right of the root, from where Newton is monotone
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(8):
            step = (_log_ratio(L) - target) / log_ratio_slope(L)
            L = np.where(L > 0, np.maximum(L - step, 0.0), 0.0)
            if (np.abs(step) <= 1e-9 * L).all():  # the next one would be below the last digit
                break
    return L


def bandwidth_of(log_snr: Array, snr_hz: Array) -> Array:
    """Returns b = s / (e^L - 1); 0 at MAX_LOG_SNR, infinite at 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(log_snr >= MAX_LOG_SNR, 0.0, snr_hz / np.expm1(log_snr))


def _log_ratio(L: Array) -> Array:
    """ln((e^L - 1) / L) = -ln g(L)."""
    small = L < 0.02
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = L + np.log(-np.expm1(-L) / L)
    return np.where(small, L * (0.5 + L * (1 / 24 - L**2 / 2880)), exact) if small.any() else exact


def log_ratio_slope(L: Array) -> Array:
    """d ln((e^L - 1) / L) / dL, between 1/2 and 1."""
    small = L < 0.02
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(small, 0.5 + L / 12 - L**3 / 720, -1 / np.expm1(-L) - 1 / L)


def required_rate(problem: Problem, kept: Array) -> Array:
    """Returns the least rate [K] at which a device that keeps `kept` meets the deadline and its energy budget; infinite if none."""
    return np.maximum.reduce([resource.rate(kept) for resource in resources(problem)])


def required_bandwidth(problem: Problem, kept: Array) -> Array:
    """Returns the least bandwidth [K] at which a device can keep `kept`; infinite where none suffices."""
    needed = required_rate(problem, kept)
    reachable = needed < problem.snr_hz / LN2
    bandwidth_hz = bandwidth_of(log_snr_for_rate(needed, problem.snr_hz), problem.snr_hz)
    silent = (needed == 0) & ((kept * problem.payload_bits == 0) | (problem.snr_hz > 0))
    bandwidth_hz = np.where(silent, 0.0, np.where(reachable, bandwidth_hz, np.inf))
    if problem.limits is None:
        return bandwidth_hz
    beyond = bandwidth_hz > problem.limits.max_bandwidth_hz * (1 + TIGHT)
    return np.where(beyond, np.inf, np.clip(bandwidth_hz, problem.least_hz, problem.limits.max_bandwidth_hz))


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
    limited = problem.limits is not None
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
    floor_hz, most_hz, snr_hz = floor_hz[sends], most_hz[sends], problem.snr_hz[sends]
    limit_s = bits[sends] * LN2 / snr_hz  # the upload on infinite bandwidth
    soonest_s = work_s[sends] + limit_s
    latest_s = float(soonest_s.max())
    if np.isfinite(most_hz).any():
        latest_s = max(latest_s, float((work_s[sends] + bits[sends] / rate(np.minimum(most_hz, 1e300), snr_hz)).max()))
    # The unknown is the time beyond the latest of these limits, not T itself: near the limit T - limit has no digits left.
    behind_s = latest_s - soonest_s

    def used(beyond_s: float) -> tuple[float, float, Array]:
        """Total bandwidth, its derivative, and the bandwidths [n]."""
        late_s = beyond_s + behind_s
        L = _log_snr(np.log1p(late_s / limit_s))
        b = bandwidth_of(L, snr_hz)
        # db/dT = (dr/dT) / r'(b), dr/dT = -r / time, r'(b) = h(L) / ln 2
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = -bits[sends] * LN2 / ((late_s + limit_s) ** 2 * rate_slope(L))
        if limited:
            slope = np.where((b > floor_hz) & (b < most_hz), slope, 0.0)
            b = np.clip(b, floor_hz, most_hz)
        return float(b.sum()), float(slope.sum()), b

    low, high = 0.0, float(np.max(bits[sends] / rate(share[sends], snr_hz) - limit_s - behind_s))
    beyond_s = high = max(high, np.finfo(float).tiny)
    if limited and used(0.0)[0] <= budget_hz:  # limits, not the band, make the slowest device
        beyond_s = high = 0.0
    for _ in range(100):
        total, slope, b = used(beyond_s)
        excess = total / budget_hz - 1
        if abs(excess) <= 1e-13 or high - low <= 4e-16 * high:
            break
        low, high = (beyond_s, high) if excess > 0 else (low, beyond_s)
        # 1 / total is nearly straight in T: Newton on it
        step = beyond_s - total * excess / slope if np.isfinite(slope) and slope < 0 else np.nan
        beyond_s = step if low < step < high else 0.5 * (low + high)
    last_s = float(work_s.max()) - latest_s
    if last_s > beyond_s:  # a device that sends nothing is the slowest: the others may take their time
        b = used(last_s)[2]
    if not np.isfinite(b.sum()):
        raise InfeasibleError("the devices' figures are too far apart for any bandwidths to be computed")
    bandwidth_hz = np.where(sends, 0.0, share) if limited else np.zeros(len(kept))
    bandwidth_hz[sends] = np.minimum(b * (budget_hz / b.sum()), most_hz)
    return float(latency(problem, kept, bandwidth_hz).max()), bandwidth_hz


def rate_slope(L: Array) -> Array:
    """h(L) = L - (1 - e^-L) = r'(b) ln 2."""
    small = L < 0.02
    series = L**2 * (0.5 - L * (1 / 6 - L * (1 / 24 - L * (1 / 120 - L / 720))))
    return np.where(small, series, L + np.expm1(-L))


def dense_deadline(problem: Problem) -> tuple[float, Array]:
    """Returns the latency of the latency-optimal round without pruning, and its bandwidths [K] (model.md, section 4).

    It is the unit of deadlines, so energy budgets, which may forbid a dense round at any deadline, do not count in it.
    """
    if problem.limits is not None:
        unbounded = np.full(len(problem.weight), np.inf)
        problem = replace(problem, limits=replace(problem.limits, energy_budget_j=unbounded))
    return least_deadline(problem, np.ones(len(problem.weight)))
