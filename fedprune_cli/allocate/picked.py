"""The allocator that says which blocks are whose, where each has gains of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedprune_cli.allocate.blocks import grid_of
from fedprune_cli.allocate.certificate import TOLERANCE
from fedprune_cli.allocate.deadline import earliest
from fedprune_cli.allocate.policy import as_policy, build_allocation, nobody, settle, with_deadline
from fedprune_cli.allocate.problem import TIGHT, Allocation, Problem
from fedprune_cli.allocate.selective import hand_out, rates_at, rates_of, select
from fedprune_cli.allocate.whole import BLOCK_HZ
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

CLOSE = 1e-6  # relative: to which the smallest deadline is searched for
MOST_BLOCKS = 10_000  # 1.8 GHz of LTE: beyond, handing out takes minutes, and a block alone makes no difference


@dataclass(frozen=True)
class LeastOnPicked:
    """The smallest deadline at which blocks were found that suffice, to a millionth: no earlier one is proven not to."""

    counts_hz: ClassVar[bool] = False

    def __call__(self, problem: Problem) -> float:
        soonest_s = _soonest(problem)
        return earliest(lambda deadline_s: self.holds(replace(problem, deadline_s=deadline_s)), soonest_s, CLOSE)[1]

    def has_room(self, problem: Problem) -> bool:
        """Whether blocks are found that suffice at the problem's deadline."""
        return self.holds(problem)

    def holds(self, problem: Problem) -> bool:
        """Whether blocks are found that suffice at the problem's deadline."""
        kept, least = hand_out(problem, _gain(problem)), problem.min_kept
        return bool((_able(problem) & (kept >= least - TIGHT)).all())

    def alone(self, problem: Problem, floor_hz: Array) -> Array:
        """Whether all blocks suffice for each device alone, bool [K]."""
        rates = rates_of(problem, _gain(problem))
        return _able(problem) & (rates.kept(rates.block_bps.sum(1)) >= problem.min_kept - TIGHT)

    def most(self, share: float) -> float:
        """Returns the share; with these blocks it bounds nothing."""
        return share


@dataclass(frozen=True)
class Selective:
    """Whole resource blocks, and which: P1 where every block has a gain of its own for each device, by time-sharing and rounding.

    A device radiates the same power density on each of its blocks. The answer is not proven to be the best: its gap to a certified upper
    bound is stated. On a channel whose blocks are alike it hands out blocks of one gain, 180 kHz wide where the band says nothing.
    """

    name: str
    on_infeasible: str
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_policy(self.on_infeasible)

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        at = _in_blocks(problem)
        settled = settle(with_deadline(at), as_policy(self.on_infeasible), LeastOnPicked())
        block_hz, owner = at.bandwidth_hz / _gain(at).shape[1], np.full(_gain(at).shape[1], -1)
        if not settled.admitted.any():
            return replace(nobody(at, settled), block_hz=block_hz, owner=owner)
        feasible, places = settled.feasible, np.flatnonzero(settled.admitted)
        found = select(feasible, _gain(feasible))
        # up to its least, which it has but for rounding; whoever has no block keeps nothing, also where its least is 1e-16
        kept = np.where(found.kept > 0, np.clip(found.kept, feasible.min_kept, 1.0), 0.0)
        gap = max(found.gap(feasible.weight), 0.0)
        owner = places[found.owner]
        bandwidth_hz = block_hz * np.bincount(owner, minlength=len(at.weight))
        if settled.status == "feasible" and gap <= TOLERANCE:
            settled = replace(settled, status="optimal")
        answer = build_allocation(at, settled, kept, bandwidth_hz[places], 0.0, None)
        answer = replace(answer, block_hz=block_hz, owner=owner, gap=gap)
        rate_bps, x = rates_at(at, answer), 1 - answer.prune_ratio
        sent_bits = np.where(settled.admitted, x * at.payload_bits, 0.0)
        sent_s = np.divide(sent_bits, rate_bps, out=np.zeros(len(x)), where=sent_bits > 0)
        latency_s = np.where(settled.admitted, x * at.shared_compute_s + sent_s + at.fixed_s, 0.0)
        return replace(answer, rate_bps=rate_bps, latency_s=latency_s)


def _in_blocks(problem: Problem) -> Problem:
    """Returns the problem on the blocks of its band, each with a gain; raises ConfigError for what is not offered."""
    if problem.limits is not None:
        raise ConfigError(
            "allocator=selective: not together with devices.energy_budget_j, devices.min_bandwidth_mhz or devices.max_bandwidth_mhz"
        )
    if problem.block_gain is not None:
        return problem
    grid = grid_of(problem, problem.block_hz or BLOCK_HZ, None, 1, smooth=False)
    if grid.count > MOST_BLOCKS:
        many = f"{grid.count} blocks of {grid.block_hz / 1e3:g} kHz, at most {MOST_BLOCKS} are handed out one by one"
        raise ConfigError(f"channel.bandwidth_mhz={problem.bandwidth_hz / 1e6:g}: {many}; take allocator=blocks")
    return replace(
        problem, bandwidth_hz=grid.count * grid.block_hz, block_gain=np.ones((len(problem.weight), grid.count))
    )


def _able(problem: Problem) -> Array:
    """Whether blocks can help each device at all, bool [K]: it has a link or nothing that it must send, and time before the deadline."""
    return (problem.linked | (problem.min_kept == 0)) & (problem.deadline_s >= problem.fixed_s)


def _gain(problem: Problem) -> Array:
    return np.zeros((0, 0)) if problem.block_gain is None else problem.block_gain


def _soonest(problem: Problem) -> float:
    """Returns when the last device is done that has all blocks to itself and keeps its least; infinite where it has no link."""
    carried_bps = rates_of(problem, _gain(problem)).block_bps.sum(1)
    bits = problem.min_kept * problem.payload_bits
    with np.errstate(divide="ignore"):
        sent_s = np.where(bits > 0, bits / np.where(bits > 0, carried_bps, 1.0), 0.0)
    return float((problem.min_kept * problem.shared_compute_s + sent_s + problem.fixed_s).max())
