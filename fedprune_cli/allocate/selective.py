"""P1 where every block has a gain of its own: who gets which block (model.md, section 4).

A device radiates with the same power density on every block that it has, p / B, whatever their number; so a block carries
r_kn = D log2(1 + s_k gamma_kn / B), rates add up, and with the share y_kn of block n in time

    maximise sum_k w_k phi_k(R_k),   R_k = sum_n y_kn r_kn,   sum_k y_kn <= 1,   phi(R) = (T - d) R / (a R + c)

is concave: the time-sharing relaxation. For any worth theta_k of a rate

    sum_n max_k theta_k r_kn + sum_k max_R [w_k phi_k(R) - theta_k R]

is an upper bound, of whole blocks too, and its least is the relaxation's optimum. It is found by Newton on the bound with soft maxima
that sharpen. Whole blocks begin with who has most of each, and with what lets everybody keep its least, and are moved one by one while
that gains; what the better of both leaves open is stated. Not offered here: energy budgets, limits of bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from fedprune_cli.allocate.inverse import LN2, rate
from fedprune_cli.allocate.limits import SMALLEST, refuse_first
from fedprune_cli.allocate.problem import LATEST, TIGHT, Allocation, Problem, resources
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

SHARPEST = 1e-8  # of the mean worth of a block: what is as good as the best
STEPS = 20  # of Newton at each softness
NOTHING = 1e-10  # of the mean worth of a block: below it a rate is worth nothing
EVERYTHING = 1e8  # of it: no block is worth more, but to who cannot have its least
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
        root = np.sqrt(self.weight * self.budget * self.transfer / np.maximum(theta, SMALLEST))
        inner = (root - self.transfer) / np.maximum(work, SMALLEST)
        free = (inner > self.least_bps) & (inner < self.most_bps)
        slope = np.where(free, 0.5 * root / np.maximum(theta, SMALLEST) / np.maximum(work, SMALLEST), 0.0)
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
    if problem.max_snr is not None:
        raise ConfigError("channel.p0_dbm and channel.max_bits_per_hz: not with a gain for every block")
    if block_gain.ndim != 2 or len(block_gain) != len(problem.weight) or not block_gain.shape[1]:
        raise ConfigError(f"block_gain: {block_gain.shape} entries for {len(problem.weight)} devices")
    refuse_first(
        "block_gain",
        block_gain.min(1),
        (block_gain >= 0).all(1) & np.isfinite(block_gain).all(1),
        "finite and >= 0",
        problem.called,
    )
    block_bps = _block_rates(problem.snr_hz, block_gain, problem.bandwidth_hz)
    time, everything = resources(replace(problem, deadline_s=min(problem.deadline_s, LATEST)))[0], block_bps.sum(1)
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


def _block_rates(snr_hz: Array, block_gain: Array, band_hz: float) -> Array:
    """Returns what each block of a band carries for each device [K, N], bits per second, at the power density p / B."""
    block_hz = band_hz / block_gain.shape[1]
    carried: Array = block_hz * np.log1p(snr_hz[:, None] * block_gain / band_hz) / LN2
    return carried


def rates_at(problem: Problem, allocation: Allocation) -> Array:
    """Returns the rates [K] that an allocation's bandwidths, blocks and powers give at a problem's own signals, bits per second."""
    if allocation.owner is None:
        power = 1.0 if allocation.power is None else allocation.power
        return rate(allocation.bandwidth_hz, problem.snr_hz * power, problem.log_cap)
    count, blocks = len(problem.weight), len(allocation.owner)
    gain = np.ones((count, blocks)) if problem.block_gain is None else problem.block_gain
    carried = _block_rates(problem.snr_hz, gain, blocks * (allocation.block_hz or 0.0))
    return (_given(allocation.owner, count) * carried).sum(1)


def relax(rates: Rates) -> tuple[Array, Array]:
    """Returns the shares y [K, N] of the time-sharing optimum, and theta [K]: what a bit per second is worth to each device.

    A device to which no rate is worth anything has none: it has no link, nothing to send, no time, or neither weight nor a least.
    """
    asks = (rates.most_bps > 0) & (rates.transfer > 0) & ((rates.weight > 0) | (rates.least_bps > 0))
    share, theta = np.zeros(rates.block_bps.shape), np.zeros(len(asks))
    if asks.any():
        some = Rates(**{field.name: getattr(rates, field.name)[asks] for field in fields(rates)})
        share[asks], theta[asks] = _relaxed(some)
    return share, theta


def _relaxed(rates: Rates) -> tuple[Array, Array]:
    count, blocks = rates.block_bps.shape
    unit_bps = np.maximum(rates.block_bps.sum(1) / count, SMALLEST)  # in which every device's rate is of order one
    mean = max(float(rates.weight.sum()), SMALLEST) / blocks
    scaled = rates.block_bps / unit_bps[:, None]
    theta = np.full(count, mean * blocks / count)
    dearest = np.maximum(scaled.max(1), SMALLEST)
    least, most = NOTHING * mean / dearest, EVERYTHING * mean / dearest
    soft = 0.3
    while True:
        for _ in range(STEPS):
            chosen = _softly(theta, scaled, soft * mean)[0]
            R, fall = rates.best(theta / unit_bps)
            sent = chosen * scaled * theta[:, None]
            slope = sent.sum(1) - theta * R / unit_bps  # in ln theta, in which steps are of one size for all devices
            # einsum and no BLAS, whose last digits depend on how many threads it has
            curve = (np.diag((sent * scaled).sum(1) * theta) - np.einsum("kn,jn->kj", sent, sent)) / (soft * mean)
            curve += np.diag(fall * (theta / unit_bps) ** 2 + np.abs(slope) + 1e-13 * mean)
            step = np.clip(-np.linalg.solve(curve, slope), -FARTHEST, FARTHEST)
            lower = _lowered(rates, (theta, step, slope), (scaled, unit_bps), soft * mean)
            lower = theta if (np.clip(lower, least, most) == theta).all() else np.clip(lower, least, most)
            # at theta = 0 every slope is 0: who has less than is best for it says whether that is the end
            short = (-slope > 1e-9 * theta * R / unit_bps).any()
            open_ = (theta > least) | (slope < 0)
            if lower is theta or (not short and np.abs(slope[open_]).sum() <= 1e-13 * mean * blocks):
                break
            theta = lower
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
    if -down <= 1e-15 * here:  # nothing to gain but noise
        return theta
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
    starts = (share.argmax(0), _fair(rates))
    owner = max(
        (_improved(rates, problem.min_kept, start) for start in starts),
        key=lambda one: _value(rates, problem.min_kept, one),
    )
    whole = _given(owner, len(theta))
    kept = rates.kept((whole * rates.block_bps).sum(1))
    value, relaxed = float(rates.weight @ kept), float(rates.weight @ rates.kept((share * rates.block_bps).sum(1)))
    if value > relaxed:  # where nobody wants more the bound is flat, and its shares are any
        share, relaxed = whole, value
    return Selection(owner, kept, share, value, relaxed, rates.bound(theta), theta)


def hand_out(problem: Problem, block_gain: Array) -> Array:
    """Returns what each device keeps [K] on whole blocks that are handed out for the devices' least first, without the bound."""
    rates = rates_of(problem, block_gain)
    owner = _improved(rates, problem.min_kept, _fair(rates))
    return rates.kept((_given(owner, len(problem.weight)) * rates.block_bps).sum(1))


def _given(owner: Array, count: int) -> Array:
    return (np.arange(count)[:, None] == owner).astype(float)


def _fair(rates: Rates) -> Array:
    """Returns owners [N]: block by block the device that is farthest from its least takes its best; what is left goes to the strongest."""
    count, blocks = rates.block_bps.shape
    owner, R = np.full(blocks, -1), np.zeros(count)
    free, needy = np.ones(blocks, dtype=bool), rates.least_bps > 0
    while free.any() and needy.any():
        part = np.where(needy, R / np.maximum(rates.least_bps, SMALLEST), np.inf)
        to = int(part.argmin())
        if part[to] >= 1:
            break
        block = int(np.where(free, rates.block_bps[to], -1.0).argmax())
        if not rates.block_bps[to, block] > 0:
            needy[to] = False
            continue
        owner[block], free[block] = to, False
        R[to] += rates.block_bps[to, block]
    return np.where(free, (rates.weight[:, None] * rates.block_bps).argmax(0), owner)


def _worth(rates: Rates, min_kept: Array, R: Array) -> Array:
    """Returns what rates [K] or [K, N] are worth; keeping less than the least costs more than all the rest can be worth."""
    column = (slice(None), *[None] * (R.ndim - 1))
    x = rates.kept(R)
    lacks = min_kept[column] - x
    short = (1 + float(rates.weight.sum())) * (1 + lacks)
    return rates.weight[column] * x - np.where(lacks > TIGHT, short, 0.0)


def _value(rates: Rates, min_kept: Array, owner: Array) -> float:
    return float(_worth(rates, min_kept, (_given(owner, len(min_kept)) * rates.block_bps).sum(1)).sum())


def _improved(rates: Rates, min_kept: Array, owner: Array) -> Array:
    """Returns the owners [N] after moving the block that gains most, again and again, until none gains; who is short comes first."""
    count, blocks = rates.block_bps.shape
    short = 1 + float(rates.weight.sum())
    for _ in range(20 * blocks):
        R = (_given(owner, count) * rates.block_bps).sum(1)
        now, mine = _worth(rates, min_kept, R), np.arange(blocks)
        left = R[owner] - rates.block_bps[owner, mine]
        some = replace(
            rates, **{name: getattr(rates, name)[owner] for name in ("weight", "budget", "work", "transfer")}
        )
        loss = now[owner] - _worth(some, min_kept[owner], np.maximum(left, 0.0))
        gain = _worth(rates, min_kept, R[:, None] + rates.block_bps) - now[:, None] - loss
        gain[owner, mine] = -np.inf
        to, block = np.unravel_index(int(gain.argmax()), gain.shape)
        if not gain[to, block] > 1e-14 * short:
            break
        owner = np.where(mine == block, to, owner)
    return owner
