"""P1 where every block has a gain of its own: who gets which block (model.md, section 4).

A device radiates with the same power density on every block that it has, p / B, whatever their number; so a block carries
r_kn = D log2(1 + s_k gamma_kn / B), rates add up, and with the share y_kn of block n in time

    maximise sum_k w_k phi_k(R_k),   R_k = sum_n y_kn r_kn,   sum_k y_kn <= 1,   phi(R) = (T - d) R / (a R + c)

is concave: the time-sharing relaxation. For any worth theta_k of a rate

    sum_n max_k theta_k r_kn + sum_k max_R [w_k phi_k(R) - theta_k R]

is an upper bound, of whole blocks too, and its least is the relaxation's optimum. It is found by Newton on the bound with soft maxima
that sharpen. Whole blocks begin with who has most of each and are moved one by one while that gains; what they leave open is stated.
Not offered here: energy budgets, limits of bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.allocate.inverse import LN2
from fedprune_cli.allocate.limits import SMALLEST, refuse_first
from fedprune_cli.allocate.problem import Problem, resources
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

SHARPEST = 1e-8  # of the mean worth of a block: what is as good as the best
STEPS = 60  # of Newton at each softness
NOTHING = 1e-10  # of the mean worth of a block: below it a rate is worth nothing
FARTHEST = 3.0  # step in ln theta


@dataclass(frozen=True)
class Rates:
    """What each block carries for each device, bits per second [K, N], and what a rate is worth to it: w phi(R), R in [least, most].

    budget, work, transfer: of phi(R) = budget R / (work R + transfer) [K].
    """

    block_bps: Array
    weight: Array
    budget: Array
    work: Array
    transfer: Array
    least_bps: Array
    most_bps: Array

    def kept(self, rate_bps: Array) -> Array:
        """Returns x = phi(R) for rates [K] or [K, N], at most 1; 1 for a device that has nothing to send and time enough."""
        column = (slice(None), *[None] * (rate_bps.ndim - 1))
        spent = self.work[column] * rate_bps + self.transfer[column]
        free = self.budget / np.maximum(self.work, SMALLEST)
        x = np.where(spent > 0, self.budget[column] * rate_bps / np.maximum(spent, SMALLEST), free[column])
        return np.minimum(np.where(self.transfer[column] > 0, x, free[column]), 1.0)

    def best(self, theta: Array) -> tuple[Array, Array]:
        """Returns the rate [K] that is best at a worth theta of a rate, and how fast it falls with theta."""
        work = np.maximum(
            self.work, 1e-9 * self.transfer / np.maximum(self.most_bps, SMALLEST)
        )  # a straight line bends a little
        root = np.sqrt(self.weight * self.budget * self.transfer / theta)
        inner = (root - self.transfer) / np.maximum(work, SMALLEST)
        free = (inner > self.least_bps) & (inner < self.most_bps)
        slope = np.where(free, 0.5 * root / theta / np.maximum(work, SMALLEST), 0.0)
        return np.clip(inner, self.least_bps, self.most_bps), slope

    def bound(self, theta: Array) -> float:
        """Returns the upper bound that theta [K] gives: exact, at the best of what `best` says and both ends."""
        tried = (self.best(theta)[0], self.least_bps, self.most_bps)
        own = np.max([self.weight * self.kept(R) - theta * R for R in tried], 0)
        return float((theta[:, None] * self.block_bps).max(0).sum() + own.sum())


@dataclass(frozen=True)
class Selection:
    """Who gets which block. owner: the device of each block [N], by its place; kept x [K] with whole blocks; share y [K, N] in time;

    value, relaxed: sum w x of both; bound: what nothing exceeds; worth: theta [K], of a bit per second. Where time-sharing has room for all
    that anybody wants, no rate is worth anything, and `relaxed` is up to a thousandth below the bound.
    """

    owner: Array
    kept: Array
    share: Array
    value: float
    relaxed: float
    bound: float
    worth: Array

    def gap(self, weight: Array) -> float:
        """Returns how far whole blocks may be from the best ones, relative to the sum of weights."""
        return (self.bound - self.value) / max(float(weight.sum()), SMALLEST)


def rates_of(problem: Problem, block_gain: Array) -> Rates:
    """Returns the rates of blocks whose gains are `block_gain` [K, N] times a device's own; raises ConfigError for what is not offered."""
    if problem.limits is not None:
        raise ConfigError("devices.energy_budget_j and devices.max_bandwidth_mhz: not with a gain for every block")
    if block_gain.ndim != 2 or len(block_gain) != len(problem.weight) or not block_gain.shape[1]:
        raise ConfigError(f"block_gain: {block_gain.shape} entries for {len(problem.weight)} devices")
    refuse_first(
        "block_gain",
        block_gain.min(1),
        (block_gain >= 0).all(1) & np.isfinite(block_gain).all(1),
        "finite and >= 0",
        problem.called,
    )
    block_hz = problem.bandwidth_hz / block_gain.shape[1]
    block_bps = block_hz * np.log1p(problem.snr_hz[:, None] * block_gain / problem.bandwidth_hz) / LN2
    time, everything = resources(problem)[0], block_bps.sum(1)
    budget = np.maximum(time.left, 0.0)
    least_bps = time.rate(problem.min_kept)
    most_bps = np.maximum(np.minimum(time.rate(np.ones(len(budget))), everything), 0.0)
    return Rates(
        block_bps,
        problem.weight,
        budget,
        time.work,
        time.transfer,
        np.minimum(least_bps, everything),
        np.maximum(most_bps, np.minimum(least_bps, everything)),
    )


def relax(rates: Rates) -> tuple[Array, Array]:
    """Returns the shares y [K, N] of the time-sharing optimum, and theta [K]: what a bit per second is worth to each device."""
    count, blocks = rates.block_bps.shape
    unit_bps = np.maximum(rates.block_bps.sum(1) / count, SMALLEST)  # in which every device's rate is of order one
    mean = max(float(rates.weight.sum()), SMALLEST) / blocks
    scaled = rates.block_bps / unit_bps[:, None]
    theta = np.full(count, mean * blocks / count)
    least = NOTHING * mean / np.maximum(scaled.max(1), SMALLEST)
    soft = 0.3
    while True:
        for _ in range(STEPS):
            chosen = _softly(theta, scaled, soft * mean)[0]
            R, fall = rates.best(theta / unit_bps)
            sent = chosen * scaled * theta[:, None]
            slope = sent.sum(1) - theta * R / unit_bps  # in ln theta, in which steps are of one size for all devices
            curve = (np.diag((sent * scaled).sum(1) * theta) - sent @ sent.T) / (soft * mean)
            curve += np.diag(fall * (theta / unit_bps) ** 2 + np.abs(slope) + 1e-13 * mean)
            step = np.clip(-np.linalg.solve(curve, slope), -FARTHEST, FARTHEST)
            lower = _lowered(rates, (theta, step, slope), (scaled, unit_bps), soft * mean)
            # at theta = 0 every slope is 0: who has less than is best for it says whether that is the end
            short = (-slope > 1e-9 * theta * R / unit_bps).any()
            open_ = (theta > least) | (slope < 0)
            if lower is theta or (not short and np.abs(slope[open_]).sum() <= 1e-13 * mean * blocks):
                break
            theta = np.maximum(lower, least)
        if soft <= SHARPEST:
            return chosen, theta / unit_bps
        soft = max(0.3 * soft, SHARPEST)


def _softly(theta: Array, scaled: Array, width: float) -> tuple[Array, float]:
    """Returns who has how much of each block where the best one is chosen softly [K, N], and the soft maxima's sum."""
    worth = theta[:, None] * scaled
    best = worth.max(0)
    chosen = np.exp((worth - best) / width)
    total = chosen.sum(0)
    return chosen / total, float((best + width * np.log(total)).sum())


def _lowered(rates: Rates, at: tuple[Array, Array, Array], units: tuple[Array, Array], width: float) -> Array:
    """Returns theta one step of Newton in ln theta further, or as much of it as lowers the soft bound; theta itself where none does."""
    theta, step, slope = at
    scaled, unit_bps = units

    def height(theta: Array) -> float:
        R = rates.best(theta / unit_bps)[0]
        own = rates.weight * rates.kept(R) - theta / unit_bps * R
        return _softly(theta, scaled, width)[1] + float(own.sum())

    here, down, length = height(theta), float(slope @ step), 1.0
    while length > 1e-9:
        further = theta * np.exp(length * step)
        if height(further) <= here + 1e-4 * length * min(down, 0.0):
            return further
        length *= 0.5
    return theta


def select(problem: Problem, block_gain: Array) -> Selection:
    """Returns whole blocks for a problem with a deadline, blocks having gains `block_gain` [K, N] relative to the devices' own.

    Where the blocks do not suffice for what every device must keep, those that are short keep less than their least: `kept` shows it.
    """
    rates = rates_of(problem, block_gain)
    share, theta = relax(rates)
    owner = _improved(rates, problem.min_kept, share.argmax(0))
    whole = _given(owner, len(theta))
    kept = rates.kept((whole * rates.block_bps).sum(1))
    value, relaxed = float(rates.weight @ kept), float(rates.weight @ rates.kept((share * rates.block_bps).sum(1)))
    if value > relaxed:  # where nobody wants more the bound is flat, and its shares are any
        share, relaxed = whole, value
    return Selection(owner, kept, share, value, relaxed, rates.bound(theta), theta)


def _given(owner: Array, count: int) -> Array:
    return (np.arange(count)[:, None] == owner).astype(float)


def _improved(rates: Rates, min_kept: Array, owner: Array) -> Array:
    """Returns the owners [N] after moving the block that gains most, again and again, until none gains; who is short comes first."""
    count, blocks = rates.block_bps.shape
    short = 1 + float(rates.weight.sum())  # worth more than all the rest

    def worth(R: Array) -> Array:
        column = (slice(None), *[None] * (R.ndim - 1))
        x = rates.kept(R)
        return rates.weight[column] * x - short * np.maximum(min_kept[column] - x, 0.0)

    for _ in range(20 * blocks):
        R = (_given(owner, count) * rates.block_bps).sum(1)
        now, mine = worth(R), np.arange(blocks)
        left = np.repeat(R[:, None], blocks, 1)
        left[owner, mine] = np.maximum(left[owner, mine] - rates.block_bps[owner, mine], 0.0)
        loss = (now[:, None] - worth(left))[owner, mine]
        gain = worth(R[:, None] + rates.block_bps) - now[:, None] - loss
        gain[owner, mine] = -np.inf
        to, block = np.unravel_index(int(gain.argmax()), gain.shape)
        if not gain[to, block] > 1e-14 * short:
            break
        owner = np.where(mine == block, to, owner)
    return owner
