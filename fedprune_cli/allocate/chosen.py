"""P1 where devices choose clock and power: the share that each keeps at a price of bandwidth, and the price (model.md, section 4).

A device takes the share x that maximises w x - price b(x). With b convex, b'(x) = w / price, of which the logarithm is
    F = ln b + ln(d ln b / d ln x) - ln x = ln(w / price),
F increasing in x, with a step where b has its kink: there x stays the same over a range of prices. The unknown is z of `Curve`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fedprune_cli.allocate.curve import Choice, Curve
from fedprune_cli.allocate.inverse import BLOCK
from fedprune_cli.allocate.problem import SAMPLE, Problem, curve_of, rate
from fedprune_cli.allocate.roots import increasing_roots
from fedprune_cli.store.state import Array

SAME = 1e-9  # of z: a device within it of an end or a kink is there
DIGITS = 1e-12  # of ln b: nearer than that a bandwidth does not tell shares apart


@dataclass(frozen=True)
class Conditions:
    """How far an answer is from the conditions of optimality [n], as shares of the price.

    more: by how much another hertz is worth more than its price; less: by how much the last one is worth less; full, empty: whether
    a device takes all that it may, and no more than it must, so that only one of them counts.
    """

    more: Array
    less: Array
    full: Array
    empty: Array

    @property
    def residuals(self) -> tuple[float, float]:
        """The largest error where no bound holds, and the largest on the wrong side of a bound."""
        inner = ~self.full & ~self.empty
        stationarity = float(np.maximum(self.more, self.less)[inner].max(initial=0.0))
        below, above = self.empty & ~self.full, self.full & ~self.empty
        return stationarity, max(float(self.more[below].max(initial=0.0)), float(self.less[above].max(initial=0.0)))


@dataclass(frozen=True)
class Shares:
    """What devices take at a price [n]: z, the bandwidths b, about how z and ln b move with ln(1 / price), and the split of their time."""

    z: Array
    bandwidth_hz: Array
    moves: Array
    widens: Array
    split: Array


@dataclass(frozen=True)
class ChosenCurves:
    """The devices that compete for bandwidth, and what a share costs them [n].

    index: the device; low, high: the least and the most z; narrow_hz, wide_hz: the bandwidths there; kink: z of the kink, at `high`
    where none is between them; late: whether energy is short above it rather than below;
    bottom, before, after, top: F at low, on both sides of the kink, and at high.
    """

    index: Array
    curve: Curve
    log_weight: Array
    low: Array
    high: Array
    narrow_hz: Array
    wide_hz: Array
    kink: Array
    late: Array
    bottom: Array
    before: Array
    after: Array
    top: Array

    @property
    def counts(self) -> Array:
        """Which devices [n] are worth anything."""
        return np.isfinite(self.log_weight)

    def worth(self, kept: Array) -> Array:
        """Returns what x [K] is worth, per weight: x."""
        return kept

    def ends(self) -> tuple[Array, Array]:
        """Returns the most and the least bandwidth of each device [n]."""
        return self.wide_hz, self.narrow_hz

    def dearest(self) -> float:
        """Returns the least price at which nobody takes more than its least."""
        return float(np.exp((self.log_weight - self.bottom)[self.counts].max(initial=-np.inf)))

    def per_device(self, values: Array, count: int) -> Array:
        """Returns `values` [n] at the devices' places [count]."""
        return np.bincount(self.index, values, count)

    def fill(self, budget_hz: float) -> tuple[Array, float]:
        """Returns the bandwidth [n] and the price at which the devices use the budget up."""
        return _fill(self, budget_hz)

    def response(self, price_per_hz: float) -> Array:
        """Returns the bandwidth [n] that is best at a price, each device on its own."""
        return self.at(float(np.log(price_per_hz)), *self.start()).bandwidth_hz

    def start(self) -> tuple[Array, Array]:
        """Returns z and splits [n] to begin a search with."""
        z = np.maximum(0.5 * (self.low + self.high), np.minimum(self.high, 1.0) - 1.0)
        return z, np.full(len(z), np.nan)

    def conditions(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Conditions:
        """Returns how far b [K] is from the conditions of optimality, on both sides of a kink, at what the devices can keep on it.

        F may rise steeply where another limit takes over: what a hertz is worth counts just above and just below b, by its last digits.
        """
        b, snr_hz = bandwidth_hz[self.index], problem.snr_hz[self.index]
        z = np.clip(self.curve.kept(b, rate(b, snr_hz)), self.low, self.high)
        above, below = (self.kink < self.high) & (z >= self.kink - SAME), z <= self.kink + SAME
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            # a hertz is worth w / b'(x) = w x / (b elasticity)
            aim = self.log_weight - np.log(price_per_hz)
            apart = DIGITS * (1 + np.exp(z)) / self.curve.at(z).elasticity
            near = (np.minimum(z + apart, self.high), np.maximum(z - apart, self.low))
            more, less = (
                np.expm1(np.minimum(aim - steepness(self.curve, self.curve.at(at, side == self.late), at), 700.0))
                for at, side in zip(near, (above, ~below), strict=True)
            )
        return Conditions(more, -less, z >= self.high - SAME, z <= self.low + SAME)

    def take(self, index: Array | slice) -> ChosenCurves:
        """Returns the curves of some of the devices."""
        rest = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "curve"}
        return ChosenCurves(curve=self.curve.take(index), **rest)

    def at(self, log_price: float, start: Array, split: Array) -> Shares:
        """Returns what each device takes at a price, searched from z = `start` and the splits there [n]."""
        parts = [slice(at, at + BLOCK) for at in range(0, len(self.low), BLOCK)] or [slice(0)]
        found = [self.take(part)._at(log_price, start[part], split[part]) for part in parts]
        return Shares(*(np.concatenate([getattr(one, field.name) for one in found]) for field in fields(Shares)))

    def _at(self, log_price: float, start: Array, split: Array) -> Shares:
        goal = self.log_weight - log_price
        least, most, above = goal <= self.bottom, goal >= self.top, goal > self.after
        held = least | most | ((goal >= self.before) & ~above & (self.kink < self.high))
        low, high = np.where(above, self.kink, self.low), np.where(above, self.high, self.kink)
        short = above == self.late
        z = np.where(least, self.low, np.where(most, self.high, self.kink))
        inner = np.flatnonzero(~held)
        curve, side, aim, near = self.curve.take(inner), short[inner], goal[inner], split[inner]

        def values(index: Array, at: Array) -> tuple[Array, Array]:
            some = curve if len(index) == len(inner) else curve.take(index)
            choice = some.at(at, side[index], near[index])
            near[index] = choice.split
            return steepness(some, choice, at) - aim[index], growth(choice) / (1 + np.exp(at))

        z[inner] = increasing_roots(values, low[inner], high[inner], start[inner], exact=False)
        split = split.copy()
        split[inner] = near
        b, moves, widens = np.where(least, self.narrow_hz, self.wide_hz), np.zeros(len(z)), np.zeros(len(z))
        between = np.flatnonzero(~(least | most))
        choice = self.curve.take(between).at(z[between], short[between], split[between])
        b[between], split[between] = choice.bandwidth_hz, choice.split
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            grown, still = growth(choice), held[between]
            moves[between] = np.where(still, 0.0, (1 + np.exp(z[between])) / grown)
            widens[between] = np.where(still, 0.0, choice.elasticity / grown)
        return Shares(z, b, moves, widens, split)


def steepness(curve: Curve, choice: Choice, z: Array) -> Array:
    """Returns F [n], ln(b'(x))."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(choice.bandwidth_hz) + np.log(choice.elasticity) - np.log(curve.share(z))


def growth(choice: Choice) -> Array:
    """Returns about how F grows with ln x [n]."""
    with np.errstate(invalid="ignore"):
        return choice.elasticity + choice.bend / choice.elasticity - 1


def chosen_curves(problem: Problem) -> ChosenCurves:
    """Returns the curves of the devices that compete."""
    curve = curve_of(problem)
    index = np.flatnonzero((problem.payload_bits > 0) & (problem.snr_hz > 0) & (curve.most > 0))
    curve, snr_hz, least_hz = curve.take(index), problem.snr_hz[index], problem.least_hz[index]
    # no device can have more than the whole band; twice that never binds, so the price stays that of the budget
    allowed_hz = np.inf if problem.limits is None else problem.limits.max_bandwidth_hz[index]
    wide_hz = np.minimum(np.full(len(index), 2 * problem.bandwidth_hz), allowed_hz)
    high = np.minimum(curve.kept(wide_hz, rate(wide_hz, snr_hz)), curve.place(np.ones(len(index))))
    low = np.maximum(curve.kept(least_hz, rate(least_hz, snr_hz)), curve.place(problem.min_kept[index]))
    low = np.minimum(low, high)
    kink = curve.kink
    inside = (kink > low + SAME) & (kink < high - SAME)
    kink = np.where(inside, kink, high)
    late = np.where(inside, curve.late, ~curve.short(0.5 * (low + high)))
    first, last = curve.at(low, ~late), curve.at(high, np.where(inside, late, ~late))
    bottom, top = steepness(curve, first, low), steepness(curve, last, high)
    before, after, two = top.copy(), np.full(len(index), np.inf), np.flatnonzero(inside)
    of_two = curve.take(two)
    for column, side in ((before, ~late), (after, late)):
        column[two] = steepness(of_two, of_two.at(kink[two], side[two]), kink[two])
    narrow_hz = np.minimum(np.maximum(first.bandwidth_hz, least_hz), wide_hz)
    with np.errstate(divide="ignore"):
        log_weight = np.log(problem.weight[index])
    wide_hz = np.clip(last.bandwidth_hz, narrow_hz, wide_hz)
    return ChosenCurves(
        index, curve, log_weight, low, high, narrow_hz, wide_hz, kink, late, bottom, before, after, top,
    )  # fmt: skip


def _fill(curves: ChosenCurves, budget_hz: float) -> tuple[Array, float]:
    """Returns the bandwidth [n] and the price at which the devices use the budget up: the secant on ln(sum b) in ln(price), guarded."""
    count, worth = len(curves.index), curves.counts
    low = float((curves.log_weight - curves.top)[worth].min())
    high = float((curves.log_weight - curves.bottom)[worth].max())
    log_price = 0.5 * (low + high)
    if count > 2 * SAMPLE:  # what a sample of the devices would pay is a good place to start
        sample = curves.take(slice(None, None, min(count // SAMPLE, 16)))
        share_hz = budget_hz * len(sample.index) / count
        if sample.narrow_hz.sum() < share_hz < sample.wide_hz.sum() and np.isfinite(sample.log_weight).any():
            log_price = float(np.clip(np.log(_fill(sample, share_hz)[1]), low, high))
    start, split = curves.start()
    before = (np.nan, np.nan)
    for _ in range(200):
        shares = curves.at(log_price, start, split)
        b = shares.bandwidth_hz
        excess = float(np.log(b.sum() / budget_hz))
        if abs(excess) <= 1e-13 or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        low, high = (log_price, high) if excess > 0 else (low, log_price)
        slope = (excess - before[1]) / (log_price - before[0]) if log_price != before[0] else np.nan
        if not slope < 0:
            slope = -float((b * shares.widens).sum() / b.sum())
        before = (log_price, excess)
        step = log_price - excess / slope if slope < 0 else np.nan
        step = step if low < step < high else 0.5 * (low + high)
        start, split = shares.z - shares.moves * (step - log_price), shares.split
        log_price = step
    return b, float(np.exp(log_price))
