"""The allocators by name: the exact ones, and what they are compared with. Each is a frozen dataclass of its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from fedprune_cli.allocate.bits import Menu, allocate_bits
from fedprune_cli.allocate.certificate import Certificate
from fedprune_cli.allocate.deadline import equal_share, least_deadline, least_equal, least_feasible
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.policy import (
    POLICIES,
    Policy,
    Settled,
    as_freedom,
    as_policy,
    build_allocation,
    leave_out,
    listed,
    nobody,
    settle,
    solve_under_policy,
    with_deadline,
)
from fedprune_cli.allocate.problem import (
    TIGHT,
    Allocation,
    Problem,
    energy,
    fit_band,
    kept_on,
    latency,
    required_bandwidth,
    upload_s,
)
from fedprune_cli.allocate.variants import min_latency, min_max
from fedprune_cli.allocate.whole import Blocks
from fedprune_cli.errors import InfeasibleError, require
from fedprune_cli.rng import stream
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array


class Allocator(Protocol):
    """An allocator plug-in. `prunes` is False where no device ever drops anything."""

    @property
    def name(self) -> str: ...

    prunes: ClassVar[bool]

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        """Returns the allocation of round `number`; raises InfeasibleError under the policy `fail`."""


@runtime_checkable
class Certifying(Protocol):
    """An allocator that claims to be optimal, and can prove it of a recorded answer."""

    def certify(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        """Returns the certificate of x [K] and b [K] of the admitted devices at a price."""


@runtime_checkable
class Referenced(Protocol):
    """An allocator of another aim than P1's, which cvxpy can answer too."""

    def apart(self, problem: Problem, kept: Array, bandwidth_hz: Array) -> float:
        """Returns how far cvxpy's optimum is from x [K] and b [K] of the admitted devices, relative; raises CertificateError."""


@runtime_checkable
class ChoosesBits(Protocol):
    """An allocator that can give each device bits of its own."""

    def solve_bits(self, problem: Problem, menu: Menu) -> tuple[Problem, Allocation]:
        """Returns the problem with the bits that each device was given, and its allocation."""


@dataclass(frozen=True)
class AimsAtDeadline:
    """An allocator that aims at a deadline, what it does when the deadline cannot be met, and what devices choose beside the ratio.

    clock, power: their clock and the power that they radiate, each `fixed` or `chosen`.
    """

    name: str
    on_infeasible: str
    clock: str = field(default="fixed", metadata=LATER)
    power: str = field(default="fixed", metadata=LATER)
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_policy(self.on_infeasible)
        as_freedom(self.clock, self.power)

    def free(self, problem: Problem) -> Problem:
        """Returns the problem in which devices choose what this allocator lets them choose."""
        return replace(problem, freedom=as_freedom(self.clock, self.power))

    @property
    def policy(self) -> Policy:
        """What happens to a round that cannot meet its deadline."""
        return as_policy(self.on_infeasible)


@dataclass(frozen=True)
class Kkt(AimsAtDeadline):
    """P1 exactly: the least weighted sum of ratios, with its certificate.

    blocks: whether whole resource blocks are handed out, as by the allocator of that name.
    """

    blocks: bool = field(default=False, metadata=LATER)

    @property
    def whole(self) -> Blocks:
        """The allocator of whole blocks with the same policy and choices."""
        return Blocks("blocks", self.on_infeasible, clock=self.clock, power=self.power)

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        if self.blocks:
            return self.whole.solve(problem, seed, number)
        return solve_under_policy(self.free(problem), self.policy, solve_p1, least_feasible, self.certify)

    def certify(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        """Returns the certificate of x [K] and b [K] of the admitted devices at a price."""
        if self.blocks:
            return self.whole.certify(problem, kept, bandwidth_hz, price_per_hz)
        return certify(self.free(problem), kept, bandwidth_hz, price_per_hz)

    def solve_bits(self, problem: Problem, menu: Menu) -> tuple[Problem, Allocation]:
        """Returns the problem with the bits that each device was given, and its allocation; other choices are not made beside it."""
        return allocate_bits(problem, self.policy, menu)


@dataclass(frozen=True)
class MinMax(AimsAtDeadline):
    """The largest ratio as small as possible: fairness between devices."""

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        return solve_under_policy(self.free(problem), self.policy, min_max, least_feasible)


@dataclass(frozen=True)
class MinLatency:
    """P2: the smallest deadline at which the weighted mean ratio stays within `mean_ratio`; the round's own deadline is not looked at."""

    name: str
    mean_ratio: float
    clock: str = field(default="fixed", metadata=LATER)
    power: str = field(default="fixed", metadata=LATER)
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_freedom(self.clock, self.power)
        require(0 <= self.mean_ratio <= 1, "mean_ratio", self.mean_ratio, "in [0, 1]")

    def free(self, problem: Problem) -> Problem:
        """Returns the problem in which devices choose what this allocator lets them choose."""
        return replace(problem, freedom=as_freedom(self.clock, self.power))

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        problem = self.free(problem)
        settled = settle(replace(problem, deadline_s=np.inf), "stretch", least_feasible)
        if not settled.admitted.any():
            return nobody(problem, _ending(settled, 0.0))
        at = replace(problem, deadline_s=min_latency(settled.feasible, self.mean_ratio))
        return solve_under_policy(at, "stretch", solve_p1, least_feasible, self.certify)

    def certify(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        """Returns the certificate of x [K] and b [K] of the admitted devices at a price."""
        return certify(self.free(problem), kept, bandwidth_hz, price_per_hz)


@dataclass(frozen=True)
class Fixed:
    """One given ratio for all, on the bandwidth that ends such a round soonest.

    on_infeasible: what becomes of a round that takes longer than its deadline; `drop` admits the largest set that meets it. None: the
    deadline is not looked at.
    """

    name: str
    ratio: float
    on_infeasible: str | None = field(default=None, metadata=LATER)
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.ratio <= 1, "ratio", self.ratio, "in [0, 1]")
        require(
            self.on_infeasible in (None, *POLICIES),
            "on_infeasible",
            self.on_infeasible,
            "'stretch', 'drop', 'fail' or null",
        )

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        if self.on_infeasible is None:
            return self._soonest(problem)
        at = replace(with_deadline(problem), max_ratio=np.full(len(problem.weight), self.ratio))
        settled = settle(at, as_policy(self.on_infeasible), least_feasible)
        if not settled.admitted.any():
            return nobody(problem, settled)
        kept = settled.feasible.min_kept
        return build_allocation(problem, settled, kept, least_deadline(settled.feasible, kept)[1], 0.0, None)

    def _soonest(self, problem: Problem) -> Allocation:
        settled = leave_out(problem, ~problem.linked & (self.ratio < 1))
        if not settled.admitted.any():
            return nobody(problem, _ending(settled, 0.0))
        kept = np.full(len(settled.feasible.weight), 1 - self.ratio)
        deadline_s, bandwidth_hz = least_deadline(settled.feasible, kept)
        return _whatever_the_deadline(self.name, problem, _ending(settled, deadline_s), kept, bandwidth_hz)


@dataclass(frozen=True)
class Dense:
    """Latency-optimal bandwidth without pruning: P1's honest baseline.

    on_infeasible: what becomes of a round that cannot be dense by its deadline, as of `Fixed`; None: the deadline is not looked at.
    """

    name: str
    on_infeasible: str | None = field(default=None, metadata=LATER)
    prunes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(
            self.on_infeasible in (None, *POLICIES),
            "on_infeasible",
            self.on_infeasible,
            "'stretch', 'drop', 'fail' or null",
        )

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        return Fixed(self.name, 0.0, self.on_infeasible).solve(problem, seed, number)


@dataclass(frozen=True)
class DenseEqual:
    """Equal bandwidth without pruning: the naive baseline. The deadline is not looked at."""

    name: str
    prunes: ClassVar[bool] = False

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        settled = leave_out(problem, ~problem.linked)
        if not settled.admitted.any():
            return nobody(problem, _ending(settled, 0.0))
        bandwidth_hz = equal_share(settled.feasible)
        kept = np.ones(len(bandwidth_hz))
        deadline_s = float(latency(settled.feasible, kept, bandwidth_hz).max())
        return _whatever_the_deadline(self.name, problem, _ending(settled, deadline_s), kept, bandwidth_hz)


def _ending(settled: Settled, deadline_s: float) -> Settled:
    """Returns the settled round with the deadline at which it ends by itself."""
    return replace(settled, feasible=replace(settled.feasible, deadline_s=deadline_s))


def _whatever_the_deadline(
    name: str, problem: Problem, settled: Settled, kept: Array, bandwidth_hz: Array
) -> Allocation:
    """Returns the allocation of an allocator that chooses no ratios; raises InfeasibleError when it breaks a limit."""
    feasible = settled.feasible
    if (limits := feasible.limits) is not None:
        over = energy(limits, kept, upload_s(feasible, kept, bandwidth_hz)) > limits.energy_budget_j * (1 + TIGHT)
        crowded = bandwidth_hz.sum() > feasible.bandwidth_hz * (1 + TIGHT)
        crowded |= bool((bandwidth_hz < feasible.least_hz * (1 - TIGHT)).any())
        if feasible.deadline_s == np.inf:
            over |= np.isinf(required_bandwidth(feasible, kept))
            crowded = True
        if over.any() or crowded:
            broken, knob = "the total bandwidth", "lower devices.min_bandwidth_mhz"
            if over.any():
                broken = f"the energy budget of devices {listed(feasible.called[over])}"
                knob = "raise devices.energy_budget_j"
            raise InfeasibleError(
                f"allocator {name!r} does not choose ratios and breaks {broken}: choose an allocator that aims at a deadline, "
                f"such as kkt, or {knob}"
            )
    return build_allocation(problem, settled, kept, bandwidth_hz, 0.0, None)


@dataclass(frozen=True)
class Equal(AimsAtDeadline):
    """Equal bandwidth; each device drops the least that meets the deadline."""

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        return solve_under_policy(self.free(problem), self.policy, lambda p: (equal_share(p), 0.0), least_equal)


@dataclass(frozen=True)
class CommonRatio(AimsAtDeadline):
    """Equal bandwidth and one ratio for all: the least with which the slowest device meets the deadline."""

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        problem = self.free(problem)
        settled = settle(with_deadline(problem), self.policy, least_equal)
        if not settled.admitted.any():
            return nobody(problem, settled)
        bandwidth_hz = equal_share(settled.feasible)
        common = kept_on(settled.feasible, bandwidth_hz).min()
        kept = np.maximum(common, settled.feasible.min_kept)  # a device with a cap of its own keeps what it must
        return build_allocation(problem, settled, kept, bandwidth_hz, 0.0, None)


@dataclass(frozen=True)
class Alternating:
    """The literature's alternation from an equal split: fix b, solve rho; fix rho, solve b. A warning, not advice.

    With rho tight every b_k is forced to what it was, so only what dense devices do not need ever moves: it stalls where it starts.
    """

    name: str
    on_infeasible: str
    iterations: int
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_policy(self.on_infeasible)
        require(1 <= self.iterations <= 10_000, "iterations", self.iterations, "in 1..10000")

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        return solve_under_policy(problem, as_policy(self.on_infeasible), self._alternate, least_equal)

    def _alternate(self, problem: Problem) -> tuple[Array, float]:
        bandwidth_hz = equal_share(problem)
        for _ in range(self.iterations):
            needed = np.minimum(required_bandwidth(problem, kept_on(problem, bandwidth_hz)), bandwidth_hz)
            spare_hz = max(problem.bandwidth_hz - needed.sum(), 0.0) / len(needed)
            bandwidth_hz = np.minimum(needed + spare_hz, problem.most_hz)
        return bandwidth_hz, 0.0


@dataclass(frozen=True)
class Greedy(AimsAtDeadline):
    """Best channel first: everybody gets its least, then the strongest devices get all they can use until the band is full."""

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        return solve_under_policy(self.free(problem), self.policy, self._fill, least_feasible)

    def _fill(self, problem: Problem) -> tuple[Array, float]:
        floor = required_bandwidth(problem, problem.min_kept)
        useful = np.minimum(required_bandwidth(problem, np.ones(len(floor))), problem.most_hz)
        wants = np.where((problem.payload_bits > 0) & (problem.snr_hz > 0), np.maximum(useful - floor, 0.0), 0.0)
        order = np.lexsort((problem.payload_bits, problem.shared_compute_s, -problem.weight, -problem.snr_hz))
        left = max(problem.bandwidth_hz - floor.sum(), 0.0)
        before = np.concatenate([[0.0], np.cumsum(wants[order])[:-1]])
        extra = np.zeros(len(floor))
        extra[order] = np.clip(left - before, 0.0, wants[order])
        return _within_budget(problem, floor + extra), 0.0


@dataclass(frozen=True)
class RandomShares(AimsAtDeadline):
    """Everybody gets its least and a random share of the rest, from stream (seed, "allocator", round)."""

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        def shares(p: Problem) -> tuple[Array, float]:
            floor = required_bandwidth(p, p.min_kept)
            share = stream(seed, "allocator", number).dirichlet(np.ones(len(floor)))
            return _within_budget(p, floor + share * max(p.bandwidth_hz - floor.sum(), 0.0)), 0.0

        return solve_under_policy(self.free(problem), self.policy, shares, least_feasible)


def _within_budget(problem: Problem, bandwidth_hz: Array) -> Array:
    """Takes back what rounding handed out too much, and what is above a device's limit."""
    return fit_band(problem, np.minimum(bandwidth_hz, problem.most_hz))
