"""P1 solved exactly by water-filling on the price of bandwidth, and its certificate.

P1 (model.md, section 4): maximise sum w_k x_k subject to t_k <= T, sum b_k <= B, 1 - rho_max <= x_k <= 1.
At the optimum x_k = min(1, phi_k(b_k)), and w_k phi_k'(b_k) = price wherever no bound holds. In L = ln(1 + s/b),

    w phi' = m h(L) / (1 + A g(L))^2,   m = w (T - d) / (c ln 2),   A = a R / c,   h(L) = L - (1 - e^-L),

which increases with L, so each device's L follows from the price by a one-dimensional root, and the price from the budget by another.
With another worth of x, of slope w x^-alpha, it is m h(L) / ((1 + A g(L))^(2 - alpha) g(L)^alpha), which increases with L too.
Where an energy budget binds too, x_k = min(1, phi_k, psi_k) with psi of phi's form: two stretches of bandwidth, each with its m and A.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

from fedprune_cli.allocate.chosen import ChosenCurves, Conditions, chosen_curves
from fedprune_cli.allocate.inverse import (
    BLOCK,
    LN2,
    MAX_LOG_SNR,
    bandwidth_of,
    log_ratio_slope,
    log_snr_for_rate,
    rate_slope,
)
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.problem import (
    SAMPLE,
    TIGHT,
    Certificate,
    Problem,
    kept_fraction,
    most_kept,
    possible,
    required_rate,
    resources,
)
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Curves:
    """The stretches of bandwidth over which devices compete, and their marginal value as a function of L.

    A device has one, or two where its energy budget takes over from its deadline or the other way round: the first runs from
    its least bandwidth to the crossing, the second on from there. Both share the device's L.
    index: the device, log_m, A: [n]; wide, narrow: L at the most and at the least bandwidth of the stretch;
    base_hz: what the stretches before it hold; log_bottom, log_top: ln(w x') at wide and narrow; alpha: 0 for w x, 1 for w ln x,
    2 for -w / x, of which m has the constants.
    """

    index: Array
    snr_hz: Array
    log_m: Array
    A: Array
    wide: Array
    narrow: Array
    base_hz: Array
    log_bottom: Array
    log_top: Array
    alpha: float = field(default=0.0, kw_only=True)

    def bandwidth(self, L: Array) -> Array:
        """Returns the bandwidth [n] that each stretch adds to its device."""
        return bandwidth_of(L, self.snr_hz) - self.base_hz

    def worth(self, kept: Array) -> Array:
        """Returns what x [K] is worth, per weight: x, or ln x, which begins at that of SMALLEST."""
        return np.log(np.maximum(kept, SMALLEST)) if self.alpha else kept

    def per_device(self, values: Array, count: int) -> Array:
        """Returns the sum of `values` [n] over each device's stretches [count]."""
        return np.bincount(self.index, values, count)

    def value_and_slope(self, L: Array, part: slice = slice(None)) -> tuple[Array, Array]:
        """Returns ln(w phi'), increasing in L, and its derivative, for the devices of `part`."""
        log_m, A = self.log_m[part], self.A[part]
        tail, q = np.exp(-L), -np.expm1(-L)  # e^-L and 1 - e^-L
        h = L - q
        with np.errstate(divide="ignore", invalid="ignore"):
            bend = 1 / q - 1 / L
            if (small := L < 0.02).any():  # where the differences above lose their digits
                h = np.where(small, rate_slope(L), h)
                bend = np.where(small, log_ratio_slope(L), bend)
            Ag, steep = A * L * tail / q, 2 - self.alpha
            value, slope = log_m + np.log(h) - steep * np.log1p(Ag), q / h + steep * Ag / (1 + Ag) * bend
            if self.alpha:  # bend is -d ln g / dL
                value, slope = value - self.alpha * np.log(L * tail / q), slope + self.alpha * bend
            return value, slope

    def log_value(self, L: Array) -> Array:
        """Returns ln(w phi') [n]."""
        return self.value_and_slope(L)[0]

    def log_snr_at(self, log_price: float, start: Array) -> Array:
        """Returns L [n] at which each device's marginal value is the price, within its bounds.

        Newton in ln L, in which the curve is nearly straight; bisection of ln L where a step leaves the bracket or gets nowhere.
        """
        parts = [slice(at, at + BLOCK) for at in range(0, len(start), BLOCK)]
        return np.concatenate([self._log_snr_at(log_price, start[part], part) for part in parts])

    def _log_snr_at(self, log_price: float, start: Array, part: slice) -> Array:
        low, high = self.wide[part], self.narrow[part]
        widest, narrowest = low, high
        tops = self.log_top[part] <= log_price
        bottoms = self.log_bottom[part] >= log_price
        bound = tops | bottoms
        L = np.clip(start, low, high)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for turn in range(200):
                value, slope = self.value_and_slope(L, part)
                error = value - log_price
                open_ = ~(bound | (np.abs(error) <= 1e-13))
                if not open_.any():
                    break
                if turn < 6:  # mostly that is all it takes
                    L = np.clip(L * np.exp(-error / (L * slope)), low, high)
                    continue
                low, high = np.where(error < 0, L, low), np.where(error > 0, L, high)
                step = L * np.exp(-error / (L * slope))
                halve = (step <= low) | (step >= high) | ((turn % 3 == 2) & (np.abs(error) > 0.1))
                if halve.any():
                    step = np.where(halve, np.sqrt(low * high), step)
                L = np.where(open_, step, L)
        return np.where(tops, narrowest, np.where(bottoms, widest, L))

    @property
    def counts(self) -> Array:
        """Which stretches [n] are worth anything."""
        return np.isfinite(self.log_m)

    def ends(self) -> tuple[Array, Array]:
        """Returns the most and the least bandwidth of each stretch [n]."""
        return self.bandwidth(self.wide), self.bandwidth(self.narrow)

    def dearest(self) -> float:
        """Returns the least price at which nobody takes more than its least."""
        return float(np.exp(min(self.log_top[self.counts].max(initial=-np.inf), MAX_LOG_SNR)))

    def fill(self, budget_hz: float) -> tuple[Array, float]:
        """Returns the bandwidth [n] and the price at which the stretches use the budget up."""
        return _fill(self, budget_hz)

    def response(self, price_per_hz: float) -> Array:
        """Returns the bandwidth [n] that is best at a price, each device on its own."""
        return self.bandwidth(self.log_snr_at(float(np.log(price_per_hz)), np.sqrt(self.wide * self.narrow)))

    def conditions(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Conditions:
        """Returns how far x = `kept` [K] on b [K] are from the conditions of optimality."""
        return self.conditions_at(bandwidth_hz, price_per_hz, _ends(problem, self, kept[self.index]))

    def conditions_at(self, bandwidth_hz: Array, price_per_hz: float, ends: tuple[Array, Array]) -> Conditions:
        """Returns the same; ends: which stretches [n] are used up, and which are not begun."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            L = np.log1p(self.snr_hz / bandwidth_hz[self.index])
            L = np.clip(L, self.wide, np.minimum(self.narrow, MAX_LOG_SNR))
            log_ratio = self.log_value(L) - np.log(price_per_hz)
        error = np.where(self.counts, np.expm1(np.minimum(log_ratio, 700.0)), -1.0)
        return Conditions(error, -error, *ends)

    def take(self, index: Array | slice) -> Curves:
        """Returns the curves of some of the devices."""
        return replace(self, **{name: getattr(self, name)[index] for name in ARRAYS})

    def ended(self) -> Curves:
        """Returns the curves with the marginal values at their ends."""
        return replace(self, log_bottom=self.log_value(self.wide), log_top=self.log_value(self.narrow))


ARRAYS = tuple(one.name for one in fields(Curves) if one.name != "alpha")


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
    wide = np.where(dense_bps < R, np.maximum(log_snr_for_rate(dense_bps, p.snr_hz), everything), everything)
    narrow = np.maximum(np.where(least_bps < R, log_snr_for_rate(least_bps, p.snr_hz), everything), wide)
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
                finite & (crossing_bps > 0) & (crossing_bps < R), log_snr_for_rate(crossing_bps, p.snr_hz), 0.0
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
    return curves.ended()


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


def _fill(curves: Curves, budget_hz: float) -> tuple[Array, float]:
    """Returns the bandwidth [n] and the price at which the stretches use the budget up: Newton on ln(sum b) in ln(price), guarded.

    The budget closes to 1e-13. Scaling the rest away would be worse: where floors take nearly the whole band, it is large for the others.
    """
    count = len(curves.index)
    worth = curves.counts
    low, high = float(curves.log_bottom[worth].min()), float(curves.log_top[worth].max())
    L = np.clip(np.log1p(curves.snr_hz * count / budget_hz), curves.wide, curves.narrow)
    log_price = np.median(curves.log_value(L)[worth])
    if count > 2 * SAMPLE:  # what a sample of the devices would pay is a good place to start
        sample = curves.take(slice(None, None, count // SAMPLE))
        share_hz = budget_hz * len(sample.index) / count
        least_hz, most_hz = (float(sample.bandwidth(end).sum()) for end in (sample.narrow, sample.wide))
        if least_hz < share_hz < most_hz and np.isfinite(sample.log_m).any():
            log_price = np.log(_fill(sample, share_hz)[1])
    log_price = float(np.clip(log_price, low, high))
    for _ in range(200):
        L = curves.log_snr_at(log_price, L)
        b = curves.bandwidth(L)
        excess = float(b.sum()) / budget_hz - 1
        if abs(excess) <= 1e-13 or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        low, high = (log_price, high) if excess > 0 else (low, log_price)
        free = (curves.wide < L) & (curves.narrow > L)
        # d ln b / dL = -1 / (1 - e^-L)
        steepness = curves.value_and_slope(L)[1]
        slope = -float(((b + curves.base_hz) / -np.expm1(-L) / steepness)[free].sum()) / b.sum()
        step = log_price - np.log1p(excess) / slope if slope < 0 and excess > -1 else np.nan
        step = step if low < step < high else 0.5 * (low + high)
        L = np.where(free, L + (step - log_price) / steepness, L)  # where each device is about to be
        log_price = step
    return b, float(np.exp(log_price))


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


def _ends(problem: Problem, curves: Curves, kept: Array) -> tuple[Array, Array]:
    """Returns which stretches [n] are used up and which are not begun, for the devices' x = `kept` [n]."""
    most, least = np.ones(len(kept)), problem.min_kept[curves.index]
    if problem.limits is not None and len(kept):
        p = problem.take(curves.index)
        most, least = (
            np.clip(kept_fraction(p, bandwidth_of(end, p.snr_hz)), p.min_kept, 1.0)
            for end in (curves.wide, curves.narrow)
        )
    return kept >= most - TIGHT, kept <= least + TIGHT


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
