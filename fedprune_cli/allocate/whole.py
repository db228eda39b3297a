"""The allocator of whole resource blocks, beside those of any bandwidth in `baselines`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedprune_cli.allocate.blocks import (
    Grid,
    LeastOnBlocks,
    certify_blocks,
    dual_bound,
    grid_of,
    solve_blocks,
    solve_table,
    table_of,
)
from fedprune_cli.allocate.certificate import Certificate
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.policy import as_freedom, as_policy, solve_under_policy
from fedprune_cli.allocate.problem import Allocation, Problem
from fedprune_cli.errors import require
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array

BLOCK_HZ = 180e3  # of a band that says nothing of blocks


@dataclass(frozen=True)
class Blocks:
    """P1 in whole resource blocks, to the optimum: a scheduler hands out no other.

    block_hz: of one block, None: the band's own, or 180 kHz, of LTE and of 5G at 15 kHz spacing, where it has none;
    count: blocks of the band, None: as many as it holds;
    group: they are handed out in groups of so many; smooth: a device may have 2^a 3^b 5^c groups only, as an uplink of one carrier.
    clock, power: `fixed` or `chosen` by the devices.
    With smooth counts there is no certificate: the optimum is that of dynamic programming, and the message states the dual bound's gap.
    """

    name: str
    on_infeasible: str
    block_hz: float | None = None
    count: int | None = None
    group: int = 1
    smooth: bool = False
    clock: str = field(default="fixed", metadata=LATER)
    power: str = field(default="fixed", metadata=LATER)
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_policy(self.on_infeasible)
        as_freedom(self.clock, self.power)
        require(self.block_hz is None or 0 < self.block_hz < np.inf, "block_hz", self.block_hz, "> 0 or null")
        require(self.count is None or 1 <= self.count <= 10**9, "count", self.count, "in 1..1000000000 or null")
        require(1 <= self.group <= 1000, "group", self.group, "in 1..1000")

    def width_hz(self, problem: Problem) -> float:
        """Returns the bandwidth of one block of a problem's band."""
        return self.block_hz or problem.block_hz or BLOCK_HZ

    def free(self, problem: Problem) -> Problem:
        """Returns the problem in which devices choose what this allocator lets them choose."""
        return replace(problem, freedom=as_freedom(self.clock, self.power))

    def grid(self, problem: Problem) -> Grid:
        """Returns the blocks of a problem's band; raises ConfigError when it has none, or not as many as asked."""
        return grid_of(problem, self.width_hz(problem), self.count, self.group, smooth=self.smooth)

    def certify(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        """Returns the certificate of x [K] and whole blocks [K] of the admitted devices at a price."""
        problem = self.free(problem)
        return certify_blocks(problem, self.grid(problem), kept, bandwidth_hz, price_per_hz)

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        problem = self.free(problem)
        grid, policy = self.grid(problem), as_policy(self.on_infeasible)
        least = LeastOnBlocks(grid)
        if self.smooth:
            allocation = solve_under_policy(problem, policy, functools.partial(_by_table, grid), least)
            return replace(allocation, message=_with_gap(problem, grid, allocation), block_hz=self.width_hz(problem))
        allocation = solve_under_policy(problem, policy, functools.partial(_by_greedy, grid), least, self.certify)
        return replace(allocation, block_hz=self.width_hz(problem))


def _by_greedy(grid: Grid, problem: Problem) -> tuple[Array, float]:
    """Returns the bandwidth [K] of the optimal counts, and the price per Hz."""
    count, price = solve_blocks(problem, grid)
    return count * grid.block_hz, price / grid.block_hz


def _by_table(grid: Grid, problem: Problem) -> tuple[Array, float]:
    """Returns the bandwidth [K] of the best allowed counts, and no price."""
    return solve_table(table_of(problem, grid), grid.count)[0] * grid.block_hz, 0.0


def _with_gap(problem: Problem, grid: Grid, allocation: Allocation) -> str:
    """Returns the allocation's message, and how far the dual bound is from it."""
    if not allocation.admitted.any():
        return allocation.message
    at = replace(problem, deadline_s=allocation.deadline_s).take(np.flatnonzero(allocation.admitted))
    bound, total = dual_bound(table_of(at, grid), grid.count), max(float(at.weight.sum()), SMALLEST)
    gap = max(bound - allocation.objective, 0.0) / total
    stated = (
        f"optimal among the allowed counts by dynamic programming; a price alone proves it to {gap:.2g} of the weight"
    )
    return "; ".join(filter(None, (allocation.message, stated)))
