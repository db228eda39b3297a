"""P1 in whole resource blocks: b_k = n_k D with whole n_k, sum n_k <= N (model.md, section 4).

x_k(n) = min(1, phi_k(n D), psi_k(n D)) is concave in n from the least count on, so giving the next block to whom it helps most is optimal
(Fox 1966), and the dual function D(price) = sum_k max_n [w x_k(n) - price n] + price N has no gap at the price of the last block.
Where only some counts are allowed this no longer holds: dynamic programming is exact, and the dual bound leaves a gap that is stated.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedprune_cli.allocate.certificate import Certificate
from fedprune_cli.allocate.deadline import earliest, least_feasible
from fedprune_cli.allocate.inverse import LN2
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.problem import Problem, kept_fraction, latency, possible, required_bandwidth, resources
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

WHOLE = 1e-10  # of a count: a device that needs 3.0000000001 blocks gets three
FEW = 20_000  # blocks up to which they are handed out one by one; more begin at the continuous solution
MOST = 10**9  # blocks of a band
MOST_SMOOTH = 10_000  # blocks that dynamic programming takes
UNFIT = (
    np.iinfo(np.int64).max // 2**20
)  # blocks of a device that no number of them helps: a thousand such sums stay exact


@dataclass(frozen=True)
class Grid:
    """The blocks that there are: block_hz D each, `count` N of them. allowed: the counts that a device may have, None: all."""

    block_hz: float
    count: int
    allowed: Array | None = None

    def up(self, count: Array) -> Array:
        """Returns the least allowed counts [K] that are at least `count` [K]; UNFIT where none is."""
        if self.allowed is None:
            return count
        at = np.searchsorted(self.allowed, count)
        return np.append(self.allowed, UNFIT)[at]

    def least(self, problem: Problem) -> Array:
        """Returns the least blocks [K] with which each device keeps what it must; UNFIT where no number suffices."""
        needed = required_bandwidth(problem, problem.min_kept) / self.block_hz
        needed = np.where(needed < UNFIT, np.ceil(needed * (1 - WHOLE)), UNFIT)
        sends = problem.min_kept * problem.payload_bits > 0  # be the deadline as late as it may
        return self.up(np.maximum(needed, sends).astype(np.int64))

    def most(self, problem: Problem) -> Array:
        """Returns the most blocks [K] that each device may have."""
        held = np.minimum(np.floor(problem.most_hz / self.block_hz * (1 + WHOLE)), self.count)
        return held.astype(np.int64)

    def fits(self, problem: Problem) -> bool:
        """Whether there are blocks enough for what every device must keep."""
        least = self.least(problem)
        return bool((least <= self.most(problem)).all() and least.sum() <= self.count)


def smooth_counts(count: int) -> Array:
    """Returns 0 and the numbers 2^a 3^b 5^c up to `count`, int64: what a single-carrier uplink may hold (3GPP TS 38.211, 6.3.1.4).

    >>> smooth_counts(12).tolist()
    [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12]
    """
    found = {0}
    for twos in range(count.bit_length()):
        for threes in range(count.bit_length()):
            for fives in range(count.bit_length()):
                found.add(2**twos * 3**threes * 5**fives)
    return np.array(sorted(value for value in found if value <= count), dtype=np.int64)


def grid_of(problem: Problem, block_hz: float, count: int | None, group: int, *, smooth: bool) -> Grid:
    """Returns the blocks of a problem's band, in groups of `group`; raises ConfigError when the band has not as many as asked."""
    whole = math.floor(problem.bandwidth_hz / block_hz * (1 + WHOLE))
    if whole > MOST:
        raise ConfigError(
            f"a band of {problem.bandwidth_hz / 1e6:g} MHz has more than {MOST} blocks: raise allocator.block_khz"
        )
    if count is not None and count > whole:
        raise ConfigError(
            f"allocator.count={count}: the band of {problem.bandwidth_hz / 1e6:g} MHz holds {whole} blocks of {block_hz / 1e3:g} kHz"
        )
    total = (whole if count is None else count) // group
    if total == 0:
        raise ConfigError(
            f"a band of {problem.bandwidth_hz / 1e6:g} MHz has no {'block' if group == 1 else f'group of {group} blocks'} of "
            f"{block_hz / 1e3:g} kHz: raise channel.bandwidth_mhz, or lower allocator.block_khz or allocator.group"
        )
    if smooth and total > MOST_SMOOTH:
        raise ConfigError(f"allocator.smooth: a band of {total} blocks is too much for it: at most {MOST_SMOOTH}")
    return Grid(group * block_hz, total, smooth_counts(total) if smooth else None)


def kept_at(problem: Problem, block_hz: float, count: Array) -> Array:
    """Returns x [K] with so many blocks, within its bounds."""
    return np.clip(kept_fraction(problem, count * block_hz), np.minimum(problem.min_kept, 1.0), 1.0)


@dataclass(frozen=True)
class LeastOnBlocks:
    """The smallest deadline at which the blocks of a grid suffice for what every device must keep; infinite when none is late enough."""

    grid: Grid
    counts_hz: ClassVar[bool] = True

    def __call__(self, problem: Problem) -> float:
        # without whole blocks it is never later
        low, high = earliest(
            lambda deadline_s: self.grid.fits(replace(problem, deadline_s=deadline_s)), least_feasible(problem)
        )
        if problem.chooses or high == np.inf:
            return high
        count = self.grid.least(replace(problem, deadline_s=high))
        return max(float(latency(problem, problem.min_kept, count * self.grid.block_hz).max()), low)

    def has_room(self, problem: Problem) -> bool:
        """Returns False: a status that says `stretched` is decided by the smallest deadline alone."""
        return False

    def holds(self, problem: Problem) -> bool:
        """Whether the blocks suffice at the problem's deadline."""
        return self.grid.fits(problem)

    def alone(self, problem: Problem, floor_hz: Array) -> Array:
        """Whether the blocks suffice for each device alone, bool [K]."""
        return self.grid.least(problem) <= self.grid.most(problem)

    def most(self, share: float) -> float:
        """Returns the share, which may be above 1: what is left over in blocks may hold others than the next device."""
        return share


class _Device:
    """The worth of blocks to each device, one figure at a time: what a heap asks for. A view of the problem, never changed."""

    def __init__(self, problem: Problem, block_hz: float) -> None:
        self.problem = problem
        self.budgets = [
            list(zip(one.left.tolist(), one.work.tolist(), one.transfer.tolist(), strict=True))
            for one in resources(problem)
        ]
        self.snr_hz, self.weight = problem.snr_hz.tolist(), problem.weight.tolist()
        self.least_kept, self.block_hz = problem.min_kept.tolist(), block_hz
        self.log_cap = [math.inf] * len(self.weight) if problem.log_cap is None else problem.log_cap.tolist()

    def worth(self, device: int, count: int) -> float:
        """Returns w x(n) of one device."""
        if self.problem.chooses:
            alone = self.problem.take(np.array([device]))
            return float((alone.weight * kept_at(alone, self.block_hz, np.array([count])))[0])
        b, s = count * self.block_hz, self.snr_hz[device]
        r = b * min(math.log1p(s / b), self.log_cap[device]) / LN2 if b > 0 and s > 0 else 0.0
        x = 1.0
        for budget in self.budgets:
            left, work, transfer = budget[device]
            spent = work * r + transfer
            if transfer == 0:
                x = min(x, max(left, 0.0) / work if work > 0 else 1.0)
            else:
                x = min(x, max(left, 0.0) * r / spent if left < math.inf else 1.0)
        return self.weight[device] * max(x, self.least_kept[device])


def _steps(problem: Problem, grid: Grid, count: Array) -> tuple[Array, Array]:
    """Returns what one block more is worth to each device, 0 where it may have no more, and one fewer, infinite where it needs all [K]."""
    here = problem.weight * kept_at(problem, grid.block_hz, count)
    more = problem.weight * kept_at(problem, grid.block_hz, count + 1) - here
    fewer = here - problem.weight * kept_at(problem, grid.block_hz, np.maximum(count - 1, 0))
    return np.where(count < grid.most(problem), more, 0.0), np.where(count > grid.least(problem), fewer, np.inf)


def solve_blocks(problem: Problem, grid: Grid) -> tuple[Array, float]:
    """Returns the optimal count of blocks [K] of a problem that fits, any count being allowed, and the price of a block.

    Beginning at the least counts the greedy is exact; with more than FEW blocks it begins at the continuous solution instead, and
    exchanges blocks until no exchange gains: for concave worths that is the optimum too.
    """
    least, most = grid.least(problem), grid.most(problem)
    count = least.copy()
    if grid.count > FEW:
        whole = np.floor(solve_p1(problem)[0] / grid.block_hz)
        count = np.clip(whole, least, most).astype(np.int64)
    device = _Device(problem, grid.block_hz)
    more, fewer = _steps(problem, grid, count)
    helped, spared = np.flatnonzero(more > 0), np.flatnonzero(np.isfinite(fewer))
    gains = list(zip((-more[helped]).tolist(), helped.tolist(), count[helped].tolist(), strict=True))
    losses = list(zip(fewer[spared].tolist(), spared.tolist(), count[spared].tolist(), strict=True))
    heapq.heapify(gains)
    heapq.heapify(losses)
    held, spare = count.tolist(), grid.count - int(count.sum())
    limits = (least.tolist(), most.tolist())

    def move(k: int, by: int) -> None:
        n = held[k] = held[k] + by
        now = device.worth(k, n)
        if n < limits[1][k] and (gain := device.worth(k, n + 1) - now) > 0:
            heapq.heappush(gains, (-gain, k, n))
        if n > limits[0][k]:
            heapq.heappush(losses, (now - device.worth(k, n - 1), k, n))

    while True:
        gain, loss = _current(gains, held), _current(losses, held)
        if spare > 0 and gain:
            move(gain[1], 1)
            spare -= 1
        elif spare < 0 and loss:
            move(loss[1], -1)
            spare += 1
        elif spare == 0 and gain and loss and -gain[0] > loss[0] * (1 + 1e-14) and gain[1] != loss[1]:
            move(gain[1], 1)
            move(loss[1], -1)
        else:
            break
    price = -gain[0] if gain and spare == 0 else 0.0
    return np.array(held, dtype=np.int64), price


def _current(heap: list[tuple[float, int, int]], held: Sequence[int]) -> tuple[float, int, int] | None:
    """Returns the first entry that speaks of what its device holds now; those before it are dropped."""
    while heap and held[heap[0][1]] != heap[0][2]:
        heapq.heappop(heap)
    return heap[0] if heap else None


def certify_blocks(problem: Problem, grid: Grid, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
    """Returns the certificate of x = `kept` [K] on whole blocks and a price: residuals relative to the sum of weights, and the dual gap.

    primal: whole counts within the bounds and the band, the deadline; stationarity: no block that is not given is worth more than the
    price; dual: none that is given is worth less; slackness: price times unused blocks; gap: to the dual bound over whole counts.
    """
    price, block_hz = price_per_hz * grid.block_hz, grid.block_hz
    count = np.rint(bandwidth_hz / block_hz).astype(np.int64)
    least, most = grid.least(problem), grid.most(problem)
    scale = max(float(problem.weight.sum()), np.finfo(float).tiny) + price * grid.count
    late = kept - np.where(possible(problem), kept_fraction(problem, bandwidth_hz), -1.0)
    primal = max(
        float((np.abs(bandwidth_hz - count * block_hz) / block_hz).max()),
        float((count - most).max()) / grid.count,
        float((least - count).max()) / grid.count,
        count.sum() / grid.count - 1,
        float(late.max()),
        float((kept - 1).max()),
        float((problem.min_kept - kept).max()),
        0.0,
    )
    more, fewer = _steps(problem, grid, count)
    slackness = price * max(grid.count - int(count.sum()), 0) / scale
    best = _best_counts(problem, grid, price)
    bound = float(problem.weight @ kept_at(problem, block_hz, best)) + price * (grid.count - float(best.sum()))
    return Certificate(
        primal,
        max(float(more.max()) - price, 0.0) / scale,
        max(price - float(fewer.min()), 0.0, -price) / scale,
        slackness,
        (bound - float(problem.weight @ kept)) / scale,
    )


def _best_counts(problem: Problem, grid: Grid, price: float) -> Array:
    """Returns the count [K] that is best for each device by itself at a price: the dual function's argument, by bisection."""
    low, high = grid.least(problem), np.maximum(grid.most(problem), grid.least(problem))
    while (low < high).any():
        middle = (low + high) // 2  # is the block after it worth its price?
        gain = kept_at(problem, grid.block_hz, middle + 1) - kept_at(problem, grid.block_hz, middle)
        better = problem.weight * gain > price
        low, high = np.where(better & (low < high), middle + 1, low), np.where(better, high, middle)
    return low


@dataclass(frozen=True)
class Table:
    """What every allowed count is worth to every device: worth w x, float64 [K, counts], -inf where it is not possible."""

    counts: Array
    worth: Array


def table_of(problem: Problem, grid: Grid) -> Table:
    """Returns the worth of every allowed count."""
    counts = np.arange(grid.count + 1) if grid.allowed is None else grid.allowed
    least, most = grid.least(problem), grid.most(problem)
    columns = [
        np.where((count >= least) & (count <= most), problem.weight * kept_at(problem, grid.block_hz, np.full(len(least), count)), -np.inf)
        for count in counts.tolist()
    ]  # fmt: skip
    return Table(counts, np.stack(columns, 1))


def solve_table(table: Table, count: int) -> tuple[Array, float]:
    """Returns the best allowed counts [K] with at most `count` blocks together, and what they are worth: dynamic programming."""
    best = np.zeros(count + 1)
    chosen = np.zeros((len(table.worth), count + 1), dtype=np.int64)
    for k, worth in enumerate(table.worth):
        after = np.full(count + 1, -np.inf)
        for at in np.flatnonzero(np.isfinite(worth)):
            n = int(table.counts[at])
            value = best[: count + 1 - n] + worth[at]
            better = value > after[n:]
            after[n:][better] = value[better]
            chosen[k, n:][better] = n
        best = after
    counts, left = np.zeros(len(table.worth), dtype=np.int64), count
    for k in range(len(counts) - 1, -1, -1):
        counts[k] = chosen[k, left]
        left -= int(counts[k])
    return counts, float(best[count])


def dual_bound(table: Table, count: int) -> float:
    """Returns the least upper bound that a price gives, min over price >= 0 of sum_k max_n [w x_k(n) - price n] + price N."""

    def at(price: float) -> float:
        return float((table.worth - price * table.counts).max(1).sum()) + price * count

    low, high = 0.0, max(float(np.where(np.isfinite(table.worth), table.worth, 0.0).max()), SMALLEST)
    for _ in range(200):  # the function is convex
        third = (high - low) / 3
        low, high = (low + third, high) if at(low + third) > at(high - third) else (low, high - third)
    return min(at(low), at(high), at(0.0))
