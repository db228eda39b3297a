"""P1 solved exactly by water-filling on the price of bandwidth, its certificate, and the problems built on it.

P1 (model.md, section 4): maximise sum w_k x_k subject to t_k <= T, sum b_k <= B, 1 - rho_max <= x_k <= 1.
At the optimum x_k = min(1, phi_k(b_k)), and w_k phi_k'(b_k) = price wherever no bound holds. In L = ln(1 + s/b),

    w phi' = m h(L) / (1 + A g(L))^2,   m = w (T - d) / (c ln 2),   A = a R / c,   h(L) = L - (1 - e^-L),

which increases with L, so each device's L follows from the price by a one-dimensional root, and the price from the budget by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from fedprune_cli.allocate.problem import (
    BLOCK,
    LN2,
    MAX_LOG_SNR,
    Allocation,
    Certificate,
    Problem,
    Status,
    bandwidth_of,
    dense_deadline,
    kept_fraction,
    latency,
    least_deadline,
    log_ratio_slope,
    log_snr_for_rate,
    rate,
    rate_slope,
    required_bandwidth,
    required_rate,
)  # fmt: skip
from fedprune_cli.errors import CertificateError, InfeasibleError
from fedprune_cli.state import Array

TOLERANCE = 1e-9  # of a certificate: largest relative KKT residual and relative duality gap
SAMPLE = 4_096  # devices that guess the price for a much larger number
TIGHT = 1e-12  # relative slack within which a budget counts as met
Policy = Literal["stretch", "drop", "fail"]


@dataclass(frozen=True)
class _Curves:
    """The devices that compete for bandwidth, and their marginal value as a function of L.

    log_m, A: [n]; wide, narrow: L at the most and at the least bandwidth that make sense for the device;
    log_bottom, log_top: ln(w phi') there.
    """

    index: Array
    snr_hz: Array
    log_m: Array
    A: Array
    wide: Array
    narrow: Array
    log_bottom: Array
    log_top: Array

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
            Ag = A * L * tail / q
            return log_m + np.log(h) - 2 * np.log1p(Ag), q / h + 2 * Ag / (1 + Ag) * bend

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

    def take(self, index: Array | slice) -> _Curves:
        """Returns the curves of some of the devices."""
        return _Curves(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def _curves(problem: Problem) -> _Curves:
    index = np.flatnonzero((problem.payload_bits > 0) & (problem.snr_hz > 0) & (problem.deadline_s > problem.fixed_s))
    p = problem.take(index) if len(index) else None
    if p is None:
        return _Curves(index, *[np.zeros(0)] * 7)
    R = p.snr_hz / LN2
    dense_bps, least_bps = required_rate(p, np.ones(len(index))), required_rate(p, p.min_kept)
    # no device can have more than the whole band; twice that never binds, so the price stays that of the budget
    everything = np.log1p(p.snr_hz / (2 * p.bandwidth_hz))
    wide = np.where(dense_bps < R, np.maximum(log_snr_for_rate(dense_bps, p.snr_hz), everything), everything)
    narrow = np.where(least_bps < R, log_snr_for_rate(least_bps, p.snr_hz), everything)
    with np.errstate(divide="ignore"):
        log_m = np.log(p.weight) + np.log(p.deadline_s - p.fixed_s) - np.log(p.payload_bits * LN2)
    ends = wide, np.maximum(narrow, wide)
    curves = _Curves(index, p.snr_hz, log_m, p.shared_compute_s * R / p.payload_bits, *ends, *ends)
    return replace(curves, log_bottom=curves.log_value(ends[0]), log_top=curves.log_value(ends[1]))


def solve_p1(problem: Problem) -> tuple[Array, float]:
    """Returns the optimal bandwidth [K] and the price per Hz of a feasible P1.

    Where everybody can stay dense the price is 0 and the bandwidth that is left is shared in proportion.
    """
    curves = _curves(problem)
    bandwidth_hz = np.zeros(len(problem.weight))
    if not len(curves.index):
        return bandwidth_hz, 0.0
    widest, narrowest = bandwidth_of(curves.wide, curves.snr_hz), bandwidth_of(curves.narrow, curves.snr_hz)
    worth = problem.weight[curves.index] > 0
    demand = np.where(worth, widest, narrowest)
    if demand.sum() <= problem.bandwidth_hz:
        bandwidth_hz[curves.index] = demand * (problem.bandwidth_hz / demand.sum() if demand.any() else 0.0)
        return bandwidth_hz, 0.0

    if narrowest.sum() >= problem.bandwidth_hz:  # exactly tight: everybody gets its least, to the budget's last digit
        bandwidth_hz[curves.index] = narrowest * (problem.bandwidth_hz / narrowest.sum())
        return bandwidth_hz, float(np.exp(curves.log_top[worth].max(initial=-np.inf)))
    b, price = _fill(curves, problem.bandwidth_hz)
    bandwidth_hz[curves.index] = b
    return bandwidth_hz, price


def _fill(curves: _Curves, budget_hz: float) -> tuple[Array, float]:
    """Returns the bandwidth [n] and the price at which the devices use the budget up: Newton on ln(sum b) in ln(price), guarded.

    The budget closes to 1e-13. Scaling the rest away would be worse: where floors take nearly the whole band, it is large for the others.
    """
    count = len(curves.index)
    worth = np.isfinite(curves.log_m)
    low, high = float(curves.log_bottom[worth].min()), float(curves.log_top[worth].max())
    L = np.clip(np.log1p(curves.snr_hz * count / budget_hz), curves.wide, curves.narrow)
    log_price = np.median(curves.log_value(L)[worth])
    if count > 2 * SAMPLE:  # what a sample of the devices would pay is a good place to start
        sample = curves.take(slice(None, None, count // SAMPLE))
        share_hz = budget_hz * len(sample.index) / count
        least_hz, most_hz = (float(bandwidth_of(end, sample.snr_hz).sum()) for end in (sample.narrow, sample.wide))
        if least_hz < share_hz < most_hz and np.isfinite(sample.log_m).any():
            log_price = np.log(_fill(sample, share_hz)[1])
    log_price = float(np.clip(log_price, low, high))
    for _ in range(200):
        L = curves.log_snr_at(log_price, L)
        b = bandwidth_of(L, curves.snr_hz)
        excess = float(b.sum()) / budget_hz - 1
        if abs(excess) <= 1e-13 or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        low, high = (log_price, high) if excess > 0 else (low, log_price)
        free = (curves.wide < L) & (curves.narrow > L)
        # d ln b / dL = -1 / (1 - e^-L)
        steepness = curves.value_and_slope(L)[1]
        slope = -float((b / -np.expm1(-L) / steepness)[free].sum()) / b.sum()
        step = log_price - np.log1p(excess) / slope if slope < 0 and excess > -1 else np.nan
        step = step if low < step < high else 0.5 * (low + high)
        L = np.where(free, L + (step - log_price) / steepness, L)  # where each device is about to be
        log_price = step
    return b, float(np.exp(log_price))


def certify(problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
    """Returns the certificate of x = `kept` [K], b [K] and a price for P1, from the definitions alone."""
    total_weight = max(float(problem.weight.sum()), np.finfo(float).tiny)
    floor = problem.min_kept
    # t <= T as x <= phi(b): relative to the whole model, so that a device that keeps nearly nothing is judged like the rest
    late = kept - np.where(
        problem.deadline_s >= problem.fixed_s, kept_fraction(problem, rate(bandwidth_hz, problem.snr_hz)), -1.0
    )
    primal = max(
        bandwidth_hz.sum() / problem.bandwidth_hz - 1,
        float(late.max()),
        float((kept - 1).max()),
        float((floor - kept).max()),
        float(-bandwidth_hz.min()),
        0.0,
    )
    curves = _curves(problem)
    stationarity = dual = 0.0
    x, b = kept[curves.index], bandwidth_hz[curves.index]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        L = np.minimum(np.log1p(curves.snr_hz / b), MAX_LOG_SNR)
        log_ratio = curves.log_value(L) - np.log(price_per_hz)
    error = np.where(problem.weight[curves.index] > 0, np.expm1(np.minimum(log_ratio, 700.0)), -1.0)
    dense, least = x >= 1 - TIGHT, x <= floor[curves.index] + TIGHT
    if price_per_hz > 0:
        inner = ~dense & ~least
        stationarity = float(np.abs(error[inner]).max(initial=0.0))
        dual = max(float(error[least & ~dense].max(initial=0.0)), float(-error[dense & ~least].min(initial=0.0)), 0.0)
    else:
        # at no price everybody takes what there is to gain
        stationarity = float(
            np.max((_most(problem)[curves.index] - x) * (problem.weight[curves.index] > 0), initial=0.0)
        )
    # the dual function is a difference of sums as large as these: its gap is relative to them
    scale = total_weight + price_per_hz * problem.bandwidth_hz
    slackness = price_per_hz * max(problem.bandwidth_hz - bandwidth_hz.sum(), 0.0) / scale
    best, used = _best_response(problem, curves, price_per_hz)
    bound = float(problem.weight @ best) + price_per_hz * (problem.bandwidth_hz - used)
    gap = (bound - float(problem.weight @ kept)) / scale
    return Certificate(primal, stationarity, dual, slackness, gap)


def _most(problem: Problem) -> Array:
    """The most each device could keep with the whole band to itself [K]."""
    everything = np.where(problem.payload_bits > 0, problem.bandwidth_hz, 0.0)
    return np.minimum(1.0, kept_fraction(problem, rate(everything, problem.snr_hz)))


def _best_response(problem: Problem, curves: _Curves, price_per_hz: float) -> tuple[Array, float]:
    """Returns x [K] and the total bandwidth that maximise sum w x - price sum b, each device on its own: the dual function's argument."""
    best = _most(problem)
    if price_per_hz == 0 or not len(curves.index):
        return best, 0.0
    L = curves.log_snr_at(float(np.log(price_per_hz)), np.sqrt(curves.wide * curves.narrow))
    b = bandwidth_of(L, curves.snr_hz)
    best[curves.index] = np.minimum(1.0, kept_fraction(problem.take(curves.index), rate(b, curves.snr_hz)))
    return best, float(b.sum())


# --- infeasible rounds ----------------------------------------------------------------------------------------------

Solve = Callable[[Problem], tuple[Array, float]]  # bandwidth [K] and price of a feasible problem
Least = Callable[[Problem], float]  # the smallest deadline at which Solve can work


def least_feasible(problem: Problem) -> float:
    """Returns the smallest deadline at which every device can keep its least."""
    return least_deadline(problem, problem.min_kept)[0]


def has_room(problem: Problem) -> bool:
    """Whether the devices' least bandwidths fit with room to spare: cheaper to know than the smallest feasible deadline."""
    return bool(required_bandwidth(problem, problem.min_kept).sum() <= problem.bandwidth_hz * (1 - TOLERANCE))


def settle(problem: Problem, policy: Policy, least: Least) -> tuple[Problem, Array, Status, str]:
    """Returns a feasible problem, the admitted devices (bool [K]), the status and a message, by the policy for infeasible rounds.

    `drop` admits devices in the order of least bandwidth per weight as long as they fit; the message bounds what a better set could
    add (the fractional knapsack's bound). `stretch` moves the deadline to the smallest feasible one. `fail` raises InfeasibleError.
    """
    everyone = np.ones(len(problem.weight), dtype=bool)
    if least is least_feasible and has_room(problem):
        return problem, everyone, "feasible", ""
    feasible_s = least(problem)
    if feasible_s <= problem.deadline_s * (1 + TIGHT):
        return problem, everyone, "feasible", ""
    floor_hz = required_bandwidth(problem, problem.min_kept)
    missing_hz = floor_hz.sum() - problem.bandwidth_hz
    missing = f"the deadline of {problem.deadline_s:.6g} s is {feasible_s - problem.deadline_s:.6g} s too early"
    if np.isfinite(missing_hz):
        missing += f" (or {missing_hz / 1e6:.6g} MHz are missing)"
    if policy == "fail" or (policy == "stretch" and not np.isfinite(feasible_s)):
        hopeless = np.flatnonzero(~np.isfinite(floor_hz))
        names = f"; no bandwidth helps devices {_listed(problem.names[hopeless])}" if hopeless.size else ""
        raise InfeasibleError(
            f"{missing} for devices that may drop {problem.max_ratio.max():.3g} of the shared part{names}: "
            "raise the deadline, pruner.max_ratio or channel.bandwidth_mhz, or choose allocator.on_infeasible=stretch or drop"
        )
    if policy == "stretch":
        return (
            replace(problem, deadline_s=feasible_s),
            everyone,
            "stretched",
            f"{missing}: stretched to {feasible_s:.6g} s",
        )

    with np.errstate(divide="ignore", invalid="ignore"):
        cost = floor_hz / problem.weight
    order = np.argsort(np.where(np.isnan(cost), 0.0, cost), kind="stable")
    fits, too_many = 0, len(order)  # the longest prefix that fits, by bisection: one more device never makes room
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        if least(problem.take(order[:count])) <= problem.deadline_s * (1 + TIGHT):
            fits = count
        else:
            too_many = count
    admitted = np.zeros(len(order), dtype=bool)
    admitted[order[:fits]] = True
    next_one = order[fits]
    room_hz = problem.bandwidth_hz - floor_hz[admitted].sum()
    more = (
        problem.weight[next_one] * min(room_hz / floor_hz[next_one], 1.0)
        if np.isfinite(floor_hz[next_one]) and floor_hz[next_one] > 0
        else 0.0
    )
    message = (
        f"{missing}: dropped devices {_listed(problem.names[~admitted])} with {problem.weight[~admitted].sum():.3g} of the weight; "
        f"no other choice admits more than {max(more, 0.0):.3g} more"
    )
    return problem.take(np.flatnonzero(admitted)) if fits else problem, admitted, "dropped", message


def _listed(devices: Array) -> str:
    return ", ".join(map(str, devices[:10])) + (f" and {len(devices) - 10} more" if len(devices) > 10 else "")


def allocate(problem: Problem, policy: Policy, solve: Solve, least: Least, *, exact: bool) -> Allocation:
    """Returns the allocation that `solve` finds, under the policy; an `exact` one carries its certificate.

    Every device keeps all that its bandwidth allows. Raises CertificateError when an exact solution is not what it claims.
    """
    feasible, admitted, status, message = settle(problem, policy, least)
    if not admitted.any():
        return build_allocation(problem, np.zeros(0), np.zeros(0), admitted, 0.0, None, status, message)
    bandwidth_hz, price = solve(feasible)
    kept = np.clip(kept_fraction(feasible, rate(bandwidth_hz, feasible.snr_hz)), feasible.min_kept, 1.0)
    certificate = certify(feasible, kept, bandwidth_hz, price) if exact else None
    if certificate and not max(certificate.residual, abs(certificate.gap)) <= TOLERANCE:
        raise CertificateError(
            f"the allocation's KKT residual is {certificate.residual:.3g} and its gap {certificate.gap:.3g}, above {TOLERANCE:g}"
        )
    if exact and status == "feasible":
        status = "optimal"
    return build_allocation(
        replace(problem, deadline_s=feasible.deadline_s),
        kept,
        bandwidth_hz,
        admitted,
        price,
        certificate,
        status,
        message,
    )


def build_allocation(
    problem: Problem, kept: Array, bandwidth_hz: Array, admitted: Array, price: float,
    certificate: Certificate | None, status: Status, message: str,
) -> Allocation:  # fmt: skip
    """Returns the allocation of all K devices from the figures of the admitted ones."""
    x, b = np.zeros(len(admitted)), np.zeros(len(admitted))
    x[admitted], b[admitted] = kept, bandwidth_hz
    binds = np.full(len(admitted), "deadline", dtype=object)
    binds[problem.payload_bits == 0] = "compute"
    binds[x <= problem.min_kept + TIGHT] = "max_ratio"
    binds[x >= 1 - TIGHT] = "dense"
    binds[~admitted] = "dropped"
    return Allocation(
        prune_ratio=np.where(admitted, 1.0 - x, 1.0),
        bandwidth_hz=b,
        rate_bps=rate(b, problem.snr_hz),
        latency_s=np.where(admitted, latency(problem, x, b), 0.0),
        deadline_s=float(problem.deadline_s),
        admitted=admitted,
        binds=tuple(binds),
        price_per_hz=price,
        objective=float(problem.weight @ x),
        certificate=certificate,
        status=status,
        message=message,
    )


# --- the other problems of model.md, section 4 ----------------------------------------------------------------------


def min_max(problem: Problem) -> tuple[Array, float]:
    """Returns the bandwidth [K] that makes the largest ratio as small as possible, and no price (0)."""

    def needs(common: float) -> Array:
        return required_bandwidth(problem, np.minimum(np.maximum(problem.min_kept, common), _most(problem)))

    low, high = 0.0, 1.0
    if needs(1.0).sum() > problem.bandwidth_hz:
        while high - low > 1e-15:
            middle = 0.5 * (low + high)
            low, high = (middle, high) if needs(middle).sum() <= problem.bandwidth_hz else (low, middle)
            if middle in (low, high) and high - low <= np.spacing(high):
                break
    else:
        low = 1.0
    bandwidth_hz = needs(low)
    return bandwidth_hz * min(problem.bandwidth_hz / max(bandwidth_hz.sum(), 1e-300), 1 / TIGHT), 0.0


def min_latency(problem: Problem, budget: float) -> float:
    """Returns P2's deadline: the smallest T at which the weighted mean ratio of P1 is at most `budget`."""
    total = problem.weight.sum()
    low, high = least_feasible(problem), dense_deadline(problem)[0]

    def mean_ratio(deadline_s: float) -> float:
        at = replace(problem, deadline_s=deadline_s)
        b, _ = solve_p1(at)
        kept = np.clip(kept_fraction(at, rate(b, at.snr_hz)), at.min_kept, 1.0)
        return float(at.weight @ (1 - kept)) / total if total else 0.0

    if mean_ratio(low) <= budget:
        return low
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if mean_ratio(middle) <= budget else (middle, high)
    return high


def frontier(problem: Problem, fractions: Sequence[float]) -> tuple[Array, Array]:
    """Returns P3: deadlines in seconds, given as fractions of the dense optimum, and the least mean ratio; NaN where infeasible."""
    dense_s = dense_deadline(problem)[0]
    deadlines = np.array([fraction * dense_s for fraction in fractions])
    ratios = np.full(len(deadlines), np.nan)
    for i, deadline_s in enumerate(deadlines):
        at = replace(problem, deadline_s=float(deadline_s))
        if least_feasible(at) <= deadline_s * (1 + TIGHT):
            ratios[i] = 1 - allocate(at, "fail", solve_p1, least_feasible, exact=True).objective / problem.weight.sum()
    return deadlines, ratios
