"""P1 solved exactly by water-filling on the price of bandwidth, and its certificate.

P1 (model.md, section 4): maximise sum w_k x_k subject to t_k <= T, sum b_k <= B, 1 - rho_max <= x_k <= 1.
At the optimum x_k = min(1, phi_k(b_k)), and w_k phi_k'(b_k) = price wherever no bound holds. In L = ln(1 + s/b),

    w phi' = m h(L) / (1 + A g(L))^2,   m = w (T - d) / (c ln 2),   A = a R / c,   h(L) = L - (1 - e^-L),

which increases with L, so each device's L follows from the price by a one-dimensional root, and the price from the budget by another.
With another worth of x, of slope w x^-alpha, it is m h(L) / ((1 + A g(L))^(2 - alpha) g(L)^alpha), which increases with L too.
Where an energy budget binds too, x_k = min(1, phi_k, psi_k) with psi of phi's form: two stretches of bandwidth, each with its m and A.
Where the signal-to-noise ratio is capped, a stretch has two parts, as `stretches` says.
"""

from __future__ import annotations

import numpy as np

from fedprune_cli.allocate.certificate import Certificate
from fedprune_cli.allocate.chosen import ChosenCurves, chosen_curves
from fedprune_cli.allocate.inverse import LN2, bandwidth_of, log_snr_for_rate
from fedprune_cli.allocate.problem import Problem, kept_fraction, most_kept, possible, required_rate, resources
from fedprune_cli.allocate.stretches import ARRAYS, Curves
from fedprune_cli.store.state import Array


def curves_of(problem: Problem) -> Curves:
    """Returns the stretches of bandwidth over which devices compete, at their full clocks and powers."""
    competes = (problem.payload_bits > 0) & (problem.snr_hz > 0)
    for resource in resources(problem):
        competes &= resource.left > 0
    index = np.flatnonzero(competes)
    p = problem.take(index) if len(index) else None
    if p is None:
        return Curves(index, *[np.zeros(0)] * 8)
    R = p.snr_hz / LN2
    dense_bps, least_bps = required_rate(p, np.ones(len(index))), required_rate(p, p.min_kept)
    # no device can have more than the whole band; twice that never binds, so the price stays that of the budget
    with np.errstate(divide="ignore"):
        everything = np.log1p(p.snr_hz / (2 * p.bandwidth_hz if p.limits is None else p.limits.max_bandwidth_hz))
        everything = np.maximum(everything, np.log1p(p.snr_hz / (2 * p.bandwidth_hz)))
    wide = np.where(dense_bps < R, np.maximum(log_snr_for_rate(dense_bps, p.snr_hz, p.log_cap), everything), everything)
    narrow = np.maximum(np.where(least_bps < R, log_snr_for_rate(least_bps, p.snr_hz, p.log_cap), everything), wide)
    if p.limits is not None:
        with np.errstate(divide="ignore"):
            narrow = np.minimum(narrow, np.log1p(p.snr_hz / p.limits.min_bandwidth_hz))
        wide = np.minimum(wide, narrow)
    time, *others = resources(p)
    with np.errstate(divide="ignore"):
        log_m = np.log(p.weight) + np.log(time.left) - np.log(time.transfer * LN2)
    A = time.work * R / time.transfer
    if others:
        energy = others[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_m_energy = np.log(p.weight) + np.log(energy.left) - np.log(energy.transfer * LN2)
            A_energy = energy.work * R / energy.transfer
            energy_first = energy.left / energy.transfer < time.left / time.transfer  # binds at little bandwidth
            crossing_bps = (time.left * energy.transfer - energy.left * time.transfer) / (
                energy.left * time.work - time.left * energy.work
            )
            finite = np.isfinite(energy.left)
            L = np.where(
                finite & (crossing_bps > 0) & (crossing_bps < R),
                log_snr_for_rate(crossing_bps, p.snr_hz, p.log_cap),
                0.0,
            )
        crossing = np.clip(L, wide, narrow)
        first = _pick(energy_first & finite, (log_m_energy, A_energy), (log_m, A))
        second = _pick(energy_first | ~finite, (log_m, A), (log_m_energy, A_energy))
        two = np.flatnonzero((crossing > wide) & (L > 0))
        stretches = (
            Curves(index, p.snr_hz, *first, np.where(L > 0, crossing, wide), narrow, np.zeros(len(index)), log_m, log_m),
            Curves(index[two], p.snr_hz[two], second[0][two], second[1][two], wide[two], crossing[two],
                    bandwidth_of(crossing[two], p.snr_hz[two]), log_m[two], log_m[two]),
        )  # fmt: skip
        curves = Curves(*(np.concatenate([getattr(stretch, name) for stretch in stretches]) for name in ARRAYS))
    else:
        curves = Curves(index, p.snr_hz, log_m, A, wide, narrow, np.zeros(len(index)), log_m, log_m)
    return curves.capped(problem.log_cap).ended()


def _pick(which: Array, yes: tuple[Array, Array], no: tuple[Array, Array]) -> tuple[Array, Array]:
    return np.where(which, yes[0], no[0]), np.where(which, yes[1], no[1])


def p1_curves(problem: Problem) -> Curves | ChosenCurves:
    """Returns the curves of P1: those of `chosen` where devices choose clock or power."""
    return chosen_curves(problem) if problem.chooses else curves_of(problem)


def solve_p1(problem: Problem) -> tuple[Array, float]:
    """Returns the optimal bandwidth [K] and the price per Hz of a feasible P1.

    Where everybody can stay dense the price is 0 and the bandwidth that is left is shared in proportion.
    """
    return share_out(problem, p1_curves(problem))


def share_out(problem: Problem, curves: Curves | ChosenCurves) -> tuple[Array, float]:
    """Returns the bandwidth [K] at which the marginal values of the curves are one price, and that price per Hz."""
    bandwidth_hz = problem.least_hz.copy()  # of those that do not compete
    if not len(curves.index):
        return bandwidth_hz, 0.0
    count = len(bandwidth_hz)
    bandwidth_hz[curves.index] = 0.0
    budget_hz = problem.bandwidth_hz - bandwidth_hz.sum()
    widest, narrowest = curves.ends()
    demand = np.where(curves.counts, widest, narrowest)
    if demand.sum() <= budget_hz:
        shares = curves.per_device(demand, count) * (budget_hz / demand.sum() if demand.any() else 0.0)
        return np.minimum(bandwidth_hz + shares, problem.most_hz), 0.0

    if narrowest.sum() >= budget_hz:  # exactly tight: everybody gets its least, to the budget's last digit
        bandwidth_hz += curves.per_device(narrowest, count) * (budget_hz / narrowest.sum())
        return bandwidth_hz, curves.dearest()
    b, price = curves.fill(budget_hz)
    return bandwidth_hz + curves.per_device(b, count), price


def certify(problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
    """Returns the certificate of x = `kept` [K], b [K] and a price for P1, from the definitions alone."""
    return certify_on(p1_curves(problem), problem, kept, bandwidth_hz, price_per_hz)


def primal_residual(problem: Problem, kept: Array, bandwidth_hz: Array) -> float:
    """Returns by how much x = `kept` [K] on b [K] breaks the band, the deadline, a limit or a bound, relative; 0 where it does not."""
    # t <= T as x <= phi(b): relative to the whole model, so that a device that keeps nearly nothing is judged like the rest
    late = kept - np.where(possible(problem), kept_fraction(problem, bandwidth_hz), -1.0)
    return max(
        bandwidth_hz.sum() / problem.bandwidth_hz - 1,
        float((bandwidth_hz / problem.most_hz).max()) - 1,
        float(
            (1 - np.divide(bandwidth_hz, problem.least_hz, out=np.ones(len(kept)), where=problem.least_hz > 0)).max()
        ),
        float(late.max()),
        float((kept - 1).max()),
        float((problem.min_kept - kept).max()),
        float(-bandwidth_hz.min()),
        0.0,
    )


def certify_on(
    curves: Curves | ChosenCurves, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float
) -> Certificate:
    """Returns the certificate of x = `kept` [K], b [K] and a price, for the worth of x that the curves of the problem have."""
    total_weight = max(float(problem.weight.sum()), np.finfo(float).tiny)
    stationarity = dual = 0.0
    if price_per_hz > 0:
        stationarity, dual = curves.conditions(problem, kept, bandwidth_hz, price_per_hz).residuals
    else:
        # at no price everybody takes what there is to gain
        gain = (most_kept(problem) - kept) * (problem.weight > 0)
        stationarity = float(np.max(gain[curves.index], initial=0.0))
    # the dual function is a difference of sums as large as these: its gap is relative to them
    scale = total_weight + price_per_hz * problem.bandwidth_hz
    slackness = price_per_hz * max(problem.bandwidth_hz - bandwidth_hz.sum(), 0.0) / scale
    best, used_hz = best_response(problem, curves, price_per_hz)
    bound = float(problem.weight @ curves.worth(best)) + price_per_hz * (problem.bandwidth_hz - float(used_hz.sum()))
    gap = (bound - float(problem.weight @ curves.worth(kept))) / scale
    primal = primal_residual(problem, kept, bandwidth_hz)
    return Certificate(primal, stationarity, dual, slackness, gap)


def best_response(problem: Problem, curves: Curves | ChosenCurves, price_per_hz: float) -> tuple[Array, Array]:
    """Returns x [K] and b [K] that maximise sum w x - price sum b, each device on its own: the dual function's argument.

    At a price of 0 it is no matter how much bandwidth that takes, and b is 0.
    """
    best, least_hz = most_kept(problem), problem.least_hz.copy()
    if price_per_hz == 0 or not len(curves.index):
        return best, np.zeros(len(best))
    response_hz = curves.response(price_per_hz)
    least_hz[curves.index] = 0.0
    b = least_hz + curves.per_device(response_hz, len(best))
    best[curves.index] = np.minimum(1.0, kept_fraction(problem, b))[curves.index]
    return best, b
