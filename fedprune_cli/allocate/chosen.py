"""P1 where devices choose clock and power: the share that each keeps at a price of bandwidth, and the price (model.md, section 4).

A device takes the share x that maximises w x - price b(x). With b convex, w / price = b'(x), so in X = ln x it solves
    F(X) = ln b + ln(d ln b / d ln x) - X = ln(w / price),
F increasing, with a step where b has its kink: there x stays the same over a range of prices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fedprune_cli.allocate.freedom import LEAST, Choice, Means
from fedprune_cli.allocate.inverse import BLOCK
from fedprune_cli.allocate.problem import SAMPLE, TIGHT, Problem, means_of, rate
from fedprune_cli.allocate.roots import increasing_roots
from fedprune_cli.store.state import Array


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


@dataclass(frozen=True)
class Shares:
    """What devices keep at a price [n]: X = ln x, the bandwidths b(x), and about how X and ln b move with ln(1 / price)."""

    X: Array
    bandwidth_hz: Array
    moves: Array
    widens: Array


@dataclass(frozen=True)
class ChosenCurves:
    """The devices that compete for bandwidth, and what a share costs them [n].

    index: the device; low, high: the least and the most X = ln x; narrow_hz, wide_hz: the bandwidths there; kink: X of the kink, at `high`
    where none is between them; late: whether energy is short above it rather than below;
    bottom, before, after, top: F at low, on both sides of the kink, and at high.
    """

    index: Array
    means: Means
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

    def ends(self) -> tuple[Array, Array]:
        """Returns the most and the least bandwidth of each device [n]."""
        return self.wide_hz, self.narrow_hz

    def dearest(self) -> float:
        """Returns the least price at which nobody takes more than its least."""
        worth = np.isfinite(self.log_weight)
        return float(np.exp((self.log_weight - self.bottom)[worth].max(initial=-np.inf)))

    def fill(self, budget_hz: float) -> tuple[Array, float]:
        """Returns the bandwidth [n] and the price at which the devices use the budget up."""
        return _fill(self, budget_hz)

    def response(self, price_per_hz: float) -> Array:
        """Returns the bandwidth [n] that is best at a price, each device on its own."""
        return self.at(float(np.log(price_per_hz)), self.start()).bandwidth_hz

    def start(self) -> Array:
        """Returns an X [n] to begin a search with."""
        return np.maximum(0.5 * (self.low + self.high), self.high - 1.0)

    def conditions(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Conditions:
        """Returns how far x = `kept` [K] on b [K] are from the conditions of optimality, from both sides of a kink."""
        x = np.maximum(kept[self.index], LEAST)
        X, kink = np.log(x), np.exp(self.kink)
        with np.errstate(divide="ignore"):
            goal = self.log_weight + X - np.log(bandwidth_hz[self.index]) - np.log(price_per_hz)
        above, below = ((self.kink < self.high) & (x >= kink - TIGHT)), x <= kink + TIGHT
        # a hertz is worth w / b'(x) = w x / (b elasticity)
        right, left = (self.means.at(x, up == self.late) for up in (above, ~below))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            more, less = (np.expm1(np.minimum(goal - np.log(side.elasticity), 700.0)) for side in (right, left))
        full, empty = x >= np.exp(self.high) - TIGHT, x <= np.exp(self.low) + TIGHT
        return Conditions(more, -less, full, empty)

    def per_device(self, values: Array, count: int) -> Array:
        """Returns `values` [n] at the devices' places [count]."""
        return np.bincount(self.index, values, count)

    def take(self, index: Array | slice) -> ChosenCurves:
        """Returns the curves of some of the devices."""
        rest = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "means"}
        return ChosenCurves(means=self.means.take(index), **rest)

    def at(self, log_price: float, start: Array) -> Shares:
        """Returns what each device keeps at a price, searched from X = `start` [n]."""
        parts = [slice(at, at + BLOCK) for at in range(0, len(self.low), BLOCK)] or [slice(0)]
        found = [self.take(part)._at(log_price, start[part]) for part in parts]
        return Shares(*(np.concatenate([getattr(one, field.name) for one in found]) for field in fields(Shares)))

    def _at(self, log_price: float, start: Array) -> Shares:
        goal = self.log_weight - log_price
        least, most, above = goal <= self.bottom, goal >= self.top, goal > self.after
        held = least | most | ((goal >= self.before) & ~above & (self.kink < self.high))
        low, high = np.where(above, self.kink, self.low), np.where(above, self.high, self.kink)
        short = above == self.late
        X = np.where(least, self.low, np.where(most, self.high, self.kink))
        inner = np.flatnonzero(~held)
        means, side, aim = self.means.take(inner), short[inner], goal[inner]

        def values(index: Array, at: Array) -> tuple[Array, Array]:
            every = len(index) == len(inner)
            choice = means.at(np.exp(at), side) if every else means.take(index).at(np.exp(at), side[index])
            return steepness(choice, at) - aim[index], growth(choice)

        X[inner] = increasing_roots(values, low[inner], high[inner], start[inner], exact=False)
        choice = self.means.at(np.exp(X), short)
        b = np.where(least, self.narrow_hz, np.where(most, self.wide_hz, choice.bandwidth_hz))
        moves = np.where(held, 0.0, 1 / growth(choice))
        return Shares(X, b, moves, np.where(held, 0.0, choice.elasticity) * moves)


def steepness(choice: Choice, X: Array) -> Array:
    """Returns F [n], ln(b'(x))."""
    with np.errstate(invalid="ignore"):
        return np.log(choice.bandwidth_hz) + np.log(choice.elasticity) - X


def growth(choice: Choice) -> Array:
    """Returns about how F grows with X [n]."""
    with np.errstate(invalid="ignore"):
        return choice.elasticity + choice.bend / choice.elasticity - 1


def chosen_curves(problem: Problem) -> ChosenCurves:
    """Returns the curves of the devices that compete."""
    means = means_of(problem)
    index = np.flatnonzero((problem.payload_bits > 0) & (problem.snr_hz > 0) & (means.most > 0))
    p, means = problem.take(index) if len(index) else problem, means.take(index)
    if not len(index):
        none = np.zeros(0)
        return ChosenCurves(index, means, *[none] * 6, none > 0, *[none] * 4)
    # no device can have more than the whole band; twice that never binds, so the price stays that of the budget
    wide_hz = np.full(len(index), 2 * p.bandwidth_hz)
    if p.limits is not None:
        wide_hz = np.minimum(wide_hz, p.limits.max_bandwidth_hz)
    x_high = np.clip(means.kept(wide_hz, rate(wide_hz, p.snr_hz)), LEAST, 1.0)
    x_low = np.clip(means.kept(p.least_hz, rate(p.least_hz, p.snr_hz)), np.maximum(p.min_kept, LEAST), None)
    x_high = np.maximum(x_high, np.minimum(x_low, 1.0))
    x_low = np.minimum(x_low, x_high)
    x_kink = means.kink
    inside = (x_kink > x_low * (1 + TIGHT)) & (x_kink < x_high * (1 - TIGHT))
    x_kink = np.where(inside, x_kink, x_high)
    late = np.where(inside, means.late, ~means.short(np.sqrt(x_low * x_high)))
    low, high, kink = np.log(x_low), np.log(x_high), np.log(x_kink)
    ends = means.at(x_low, ~late), means.at(x_kink, ~late), means.at(x_kink, late), means.at(x_high, np.where(inside, late, ~late))
    bottom, before, after, top = (steepness(end, X) for end, X in zip(ends, (low, kink, kink, high), strict=True))
    narrow_hz = np.maximum(ends[0].bandwidth_hz, p.least_hz)
    with np.errstate(divide="ignore"):
        log_weight = np.log(p.weight)
    return ChosenCurves(
        index, means, log_weight, low, high, narrow_hz, np.clip(ends[3].bandwidth_hz, narrow_hz, wide_hz), kink, late, bottom, before,
        np.where(inside, after, np.inf), top,
    )  # fmt: skip


def _fill(curves: ChosenCurves, budget_hz: float) -> tuple[Array, float]:
    """Returns the bandwidth [n] and the price at which the devices use the budget up: the secant on ln(sum b) in ln(price), guarded."""
    count, worth = len(curves.index), np.isfinite(curves.log_weight)
    low = float((curves.log_weight - curves.top)[worth].min())
    high = float((curves.log_weight - curves.bottom)[worth].max())
    log_price = 0.5 * (low + high)
    if count > 2 * SAMPLE:  # what a sample of the devices would pay is a good place to start
        sample = curves.take(slice(None, None, count // SAMPLE))
        share_hz = budget_hz * len(sample.index) / count
        if sample.narrow_hz.sum() < share_hz < sample.wide_hz.sum() and np.isfinite(sample.log_weight).any():
            log_price = float(np.clip(np.log(_fill(sample, share_hz)[1]), low, high))
    start = curves.start()
    before = (np.nan, np.nan)
    for _ in range(200):
        shares = curves.at(log_price, start)
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
        start = shares.X - shares.moves * (step - log_price)
        log_price = step
    return b, float(np.exp(log_price))
