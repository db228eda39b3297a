"""The least energy at given shares x_k, under a deadline or at a price of time (model.md, section 4).

Computing costs what x_k says, so bandwidth decides the rest: e_k(b) = p_k x_k c_k / r_k(b), convex and falling in b, on no less than
what the deadline and the limits need. The price search of `kkt` carries over, with

    -e' = (p x c ln 2 / s^2) h(L) / g(L)^2

The weighted sum adds theta T and chooses T as well: E*(T), the least energy, is convex, and by its multipliers falls by
sum_k max(price - (-e_k'), 0) |d b_k^min / dT| per second, which is theta at the optimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.allocate.certificate import TOLERANCE, Certificate
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.inverse import LN2, MAX_LOG_SNR
from fedprune_cli.allocate.kkt import primal_residual, share_out
from fedprune_cli.allocate.limits import SMALLEST, Limits
from fedprune_cli.allocate.policy import settle
from fedprune_cli.allocate.problem import (
    Problem,
    energy,
    latency,
    required_bandwidth,
    required_rate,
    resources,
    upload_s,
)
from fedprune_cli.allocate.stretches import Curves
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

CLOSED = 1e-11  # relative: how far from the band the bandwidths at a price may be


def spends_of(problem: Problem) -> Limits:
    """Returns what computing and sending cost; raises ConfigError where a table says nothing of it."""
    if problem.spends is None:
        raise ConfigError(
            "allocator.name: an objective with joules needs what they are: give the table the columns energy_budget_j (empty: no "
            "budget), shared_energy_j and tx_power_w"
        )
    return problem.spends


def joules(problem: Problem, kept: Array, bandwidth_hz: Array) -> Array:
    """Returns the joules [K] of computing and sending x = `kept` [K] on b [K]."""
    return energy(spends_of(problem), kept, upload_s(problem, kept, bandwidth_hz))


def sending(problem: Problem, kept: Array, bandwidth_hz: Array) -> float:
    """Returns the joules of all devices for sending x = `kept` [K] on b [K]."""
    return float((spends_of(problem).tx_power_w * upload_s(problem, kept, bandwidth_hz)).sum())


def energy_curves(problem: Problem, kept: Array) -> Curves:
    """Returns for each device that sends what a hertz saves, from the least bandwidth that x = `kept` [K] needs to the most there is."""
    floor_hz, bits = required_bandwidth(problem, kept), kept * problem.payload_bits
    index = np.flatnonzero((bits > 0) & (problem.snr_hz > 0))
    snr_hz, nothing = problem.snr_hz[index], np.zeros(len(index))
    most_hz = np.full(len(index), 2 * problem.bandwidth_hz)  # which never binds
    if problem.limits is not None:
        most_hz = np.minimum(most_hz, problem.limits.max_bandwidth_hz[index])
    with np.errstate(divide="ignore"):
        narrow = np.minimum(np.log1p(snr_hz / floor_hz[index]), MAX_LOG_SNR)
    wide = np.minimum(np.log1p(snr_hz / most_hz), narrow)
    log_m = np.log(spends_of(problem).tx_power_w[index]) + np.log(bits[index] * LN2) - 2 * np.log(snr_hz)
    curves = Curves(index, snr_hz, log_m, nothing, wide, narrow, nothing, log_m, log_m, alpha=2.0)
    return curves.capped(problem.log_cap).ended()


def solve_energy(problem: Problem, kept: Array) -> tuple[Array, float]:
    """Returns the bandwidth [K] on which x = `kept` [K] costs least, and the price: joules that one more hertz saves.

    The bandwidths that x needs must fit the band.
    """
    return share_out(problem, energy_curves(problem, kept))


def least_joules(problem: Problem, ratio: float) -> float:
    """Returns the fewest joules of all devices, each dropping `ratio` or what it may; NaN where that misses the deadline."""
    kept = np.maximum(1 - ratio, problem.min_kept)
    if not required_bandwidth(problem, kept).sum() <= problem.bandwidth_hz * (1 + TOLERANCE):
        return np.nan
    return float(joules(problem, kept, solve_energy(problem, kept)[0]).sum())


def certify_energy(problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
    """Returns the certificate of b [K] and a price for the least energy at x = `kept` [K], from the definitions alone.

    Its gap is relative to the joules of sending and the price of the band.
    """
    curves = energy_curves(problem, kept)
    bound = _best_joules(problem, kept, curves, price_per_hz)
    return _certificate(problem, (kept, bandwidth_hz, price_per_hz), curves, (bound, 0.0))


def _response(problem: Problem, curves: Curves, price_per_hz: float) -> Array:
    """Returns the bandwidth [K] that is best for each device by itself at a price."""
    bandwidth_hz = problem.least_hz.copy()
    if len(curves.index):
        log_price = float(np.log(max(price_per_hz, np.finfo(float).tiny)))
        L = curves.log_snr_at(log_price, np.sqrt(curves.wide * curves.narrow))
        bandwidth_hz[curves.index] = 0.0
        bandwidth_hz += curves.per_device(curves.bandwidth(L), len(bandwidth_hz))
    return bandwidth_hz


def _best_joules(problem: Problem, kept: Array, curves: Curves, price_per_hz: float) -> float:
    """Returns the dual function, min over b of sum e + price (sum b - B), each device on its own: no bandwidths cost less."""
    bandwidth_hz = _response(problem, curves, price_per_hz)
    cost = float(joules(problem, kept, bandwidth_hz).sum())
    return cost + price_per_hz * (float(bandwidth_hz.sum()) - problem.bandwidth_hz)


def _certificate(
    problem: Problem, answer: tuple[Array, Array, float], curves: Curves, proof: tuple[float, float]
) -> Certificate:
    """Returns the certificate of an answer (x [K], b [K], price) by a lower bound of its cost; proof: the bound, and what time costs."""
    kept, bandwidth_hz, price = answer
    bound, time_j = proof
    scale = max(sending(problem, kept, bandwidth_hz) + time_j + price * problem.bandwidth_hz, SMALLEST)
    stationarity, dual = curves.conditions_at(bandwidth_hz, price, _ends(curves, bandwidth_hz)).residuals
    slackness = price * max(problem.bandwidth_hz - float(bandwidth_hz.sum()), 0.0) / scale
    cost = float(joules(problem, kept, bandwidth_hz).sum()) + time_j
    primal = primal_residual(problem, kept, bandwidth_hz)
    return Certificate(primal, stationarity, dual, slackness, (cost - bound) / scale)


def _ends(curves: Curves, bandwidth_hz: Array) -> tuple[Array, Array]:
    """Returns which stretches are used up, and which are not begun [n]."""
    most_hz, least_hz = (end + curves.base_hz for end in curves.ends())
    b = bandwidth_hz[curves.index]
    return b >= most_hz * (1 - TOLERANCE), b <= least_hz * (1 + TOLERANCE)


@dataclass(frozen=True)
class Timed:
    """Keeping the least that a problem allows, which every energy is least with, at a price of time: theta joules per second."""

    problem: Problem
    theta: float

    @property
    def least_s(self) -> float:
        """The least deadline that can be met."""
        return settle(self.at(least_feasible(self.problem)), "stretch", least_feasible).feasible.deadline_s

    def at(self, deadline_s: float) -> Problem:
        """Returns the problem with that deadline."""
        return replace(self.problem, deadline_s=deadline_s)

    def saved(self, deadline_s: float, price_per_hz: float) -> float:
        """Returns the joules that a later deadline saves per second at a price of bandwidth."""
        curves, slope = self._floors(deadline_s)
        with np.errstate(over="ignore"):
            return float((np.maximum(price_per_hz - np.exp(curves.log_top), 0.0) * slope).sum())

    def price_at(self, deadline_s: float) -> float:
        """Returns the price at which a second later saves theta: of convex pieces, which sum up in the order of what a hertz saves."""
        curves, slope = self._floors(deadline_s)
        binds = np.flatnonzero(slope > 0)
        order = binds[np.argsort(curves.log_top[binds])]
        with np.errstate(over="ignore"):
            own = np.exp(curves.log_top[order]) * slope[order]
        return float(((self.theta + np.cumsum(own)) / np.cumsum(slope[order])).min(initial=np.inf))

    def _floors(self, deadline_s: float) -> tuple[Curves, Array]:
        """Returns the curves at a deadline, and how fast its least bandwidths fall with it, Hz per second [n]; 0 where others hold them."""
        problem = self.at(deadline_s)
        curves = energy_curves(problem, self.problem.min_kept)
        time, everything_bps = resources(problem)[0], required_rate(problem, self.problem.min_kept)
        needed_bps = time.rate(self.problem.min_kept)
        with np.errstate(divide="ignore", invalid="ignore"):
            faster = needed_bps / (time.left - self.problem.min_kept * time.work)  # bits per second and second
        held = (needed_bps == everything_bps) & (required_bandwidth(problem, self.problem.min_kept) > problem.least_hz)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            slope = faster[curves.index] * LN2 / curves.rate_slope(curves.narrow)
        begins = held[curves.index] & (curves.base_hz == 0)
        return curves, np.where(begins & np.isfinite(slope), slope, 0.0)


def solve_timed(timed: Timed) -> tuple[float, Array, float]:
    """Returns the deadline, the bandwidths [K] and the price per Hz of the least theta T + sum e, at any deadline that can be met.

    Where every device has its least or its most, many prices are right for the bandwidths, and theta says which one is; also where
    those that have not share the last digits of the band.
    """
    low = timed.least_s
    latest, _ = solve_energy(timed.at(np.inf), timed.problem.min_kept)
    high = float(latency(timed.problem, timed.problem.min_kept, latest).max())  # later than that saves nothing

    def excess(deadline_s: float) -> float:
        return timed.saved(deadline_s, solve_energy(timed.at(deadline_s), timed.problem.min_kept)[1]) - timed.theta

    bandwidth_hz, price = solve_energy(timed.at(low), timed.problem.min_kept)
    deadline_s = low
    if high > low and timed.saved(low, price) > timed.theta:
        deadline_s = falling_root(excess, low, high)
        bandwidth_hz, price = solve_energy(timed.at(deadline_s), timed.problem.min_kept)
    return deadline_s, *_priced(timed.at(deadline_s), bandwidth_hz, price, timed.price_at(deadline_s))


def _priced(problem: Problem, bandwidth_hz: Array, price_per_hz: float, by_time: float) -> tuple[Array, float]:
    """Returns the answer on the price that theta names where it fills the band as well: the band may not know which price is right."""
    if not 0 < by_time < np.inf:
        return bandwidth_hz, price_per_hz
    other_hz = _response(problem, energy_curves(problem, problem.min_kept), by_time)
    fills = abs(float(other_hz.sum()) / problem.bandwidth_hz - 1) <= CLOSED
    return (other_hz, by_time) if fills else (bandwidth_hz, price_per_hz)


def falling_root(f: Callable[[float], float], low: float, high: float) -> float:
    """Returns where a falling function crosses 0 between `low` and `high`, to the last digits: regula falsi, halved where that is slow."""
    at_low, at_high = f(low), f(high)
    for turn in range(400):
        if at_low <= 0 or high - low <= 4e-16 * high:
            return low
        if at_high >= 0:
            return high
        middle = 0.5 * (low + high) if high < 4 * low else (low * high) ** 0.5
        if turn % 3:
            middle = min(max(low + (high - low) * at_low / (at_low - at_high), low), high)
            nudge = 1e-3 * (high - low)  # past the root, so that both ends come nearer
            middle = middle + nudge if middle - low < high - middle else middle - nudge
        value = f(middle)
        low, at_low, high, at_high = (middle, value, high, at_high) if value > 0 else (low, at_low, middle, value)
    return low


def certify_timed(timed: Timed, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
    """Returns the certificate of the problem's own deadline, b [K] and a price for the least theta T + sum e.

    The bound is the least over all deadlines that the band allows, by the price alone.
    """
    problem, kept = timed.problem, timed.problem.min_kept
    curves = energy_curves(problem, kept)

    def excess(deadline_s: float) -> float:
        return timed.saved(deadline_s, price_per_hz) - timed.theta

    low = min(timed.least_s, problem.deadline_s)
    high = problem.deadline_s
    while excess(high) > 0:
        high *= 2
    best_s = low if excess(low) <= 0 else falling_root(excess, low, high)
    at = timed.at(best_s)
    bound = _best_joules(at, kept, energy_curves(at, kept), price_per_hz) + timed.theta * best_s
    return _certificate(problem, (kept, bandwidth_hz, price_per_hz), curves, (bound, timed.theta * problem.deadline_s))
