"""Laws of allocators: what each hands out is there, meets its deadline, and depends on neither order nor units."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate import ALLOCATORS
from fedprune_cli.allocate.baselines import Allocator
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.problem import (
    Allocation,
    Problem,
    energy,
    latency,
    upload_s,
)
from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import configured, each, has_field
from fedprune_cli.contracts.problems import draw, literature
from fedprune_cli.errors import InfeasibleError

each_allocator = each("allocators")
NO_AIM = tuple(name for name in ALLOCATORS if not has_field("allocators", name, "on_infeasible"))
each_that_aims = each("allocators", without=NO_AIM)  # at the deadline: it has a policy for a round that cannot meet it
SEARCHING = (
    "blocks",
    "minlatency",
    "selective",
    "weighted",
)  # for which a problem takes as long as ten do for the others
LOOSE = {
    "cvxpy": 1e-6,
    "minlatency": 1e-6,
    "weighted": 1e-6,
}  # as exact as a conic solver, and as a search for a deadline


def tolerance(name: str, exact: float = 1e-9) -> float:
    """Returns how exact an objective must be: what comes from outside need not be more so than a conic solver."""
    return LOOSE.get(name, exact if name in ALLOCATORS else 1e-6)


def aims(name: str) -> bool:
    return has_field("allocators", name, "on_infeasible")


def needs_a_policy(name: str) -> None:
    if not aims(name):
        pytest.skip("it has no field on_infeasible, and so no policy for rounds that cannot meet their deadline")


@functools.cache
def allocator_of(name: str, policy: str = "stretch") -> Allocator:
    overrides = [f"allocator={name}"] + [f"allocator.on_infeasible={policy}"] * aims(name)
    return build_experiment(configured(*overrides)).allocator


def solve(name: str, problem: Problem, policy: str = "stretch") -> Allocation:
    return allocator_of(name, policy).solve(problem, 0, 0)


def instances(
    count: int, seed: int, sizes: tuple[int, ...] = (1, 2, 3, 10), name: str = "dense_equal"
) -> list[Problem]:
    """Returns wild problems, half as many where one takes long; every third one with limits where the allocator looks at them."""
    rng, looks = np.random.Generator(np.random.PCG64(seed)), aims(name) and name != "selective"
    count = count // 2 if name in SEARCHING else count
    return [draw(rng, int(rng.choice(sizes)), limited=looks and at % 3 == 2) for at in range(count)]


@each_allocator
def test_every_allocation_is_feasible(name: str) -> None:
    for problem in (
        [literature(0.5, seed) for seed in range(4)] if name == "cvxpy" else instances(30, seed=1, name=name)
    ):
        allocation = solve(name, problem)
        admitted = allocation.admitted
        given = allocation.bandwidth_hz.sum()
        assert given <= problem.bandwidth_hz * (1 + 1e-9), (
            f"{given:.9g} Hz of {problem.bandwidth_hz:.9g} Hz are given away"
        )
        assert (allocation.bandwidth_hz[admitted] >= problem.least_hz[admitted] * (1 - 1e-9)).all(), "less than a least"
        assert (allocation.bandwidth_hz <= problem.most_hz * (1 + 1e-9)).all(), "more than a device may be given"
        if problem.limits is not None:
            kept = 1 - allocation.prune_ratio
            joules = energy(problem.limits, kept, upload_s(problem, kept, allocation.bandwidth_hz))
            assert (joules <= problem.limits.energy_budget_j * (1 + 1e-9))[admitted].all(), "above an energy budget"
        if name not in ("fixed", "dense", "dense_equal"):
            assert (allocation.prune_ratio <= problem.max_ratio + 1e-9)[admitted].all(), "a ratio is above max_ratio"
        assert (allocation.prune_ratio >= -1e-12).all(), "a ratio is negative"
        t = latency(problem, 1 - allocation.prune_ratio, allocation.bandwidth_hz)
        # x is known to one part in 1e16 of the model; where a device keeps next to nothing, that is many parts of its time
        slack = 1e-9 + 1e-15 * problem.payload_bits / np.maximum(allocation.rate_bps, 1e-300) / allocation.deadline_s
        assert (t[admitted] <= allocation.deadline_s * (1 + slack[admitted] + tolerance(name, 0.0))).all(), (
            f"an admitted device takes {t[admitted].max():.9g} s of {allocation.deadline_s:.9g} s"
        )
        assert np.isclose(allocation.objective, problem.weight[admitted] @ (1 - allocation.prune_ratio[admitted])), (
            "the objective is not the weighted sum of what is kept"
        )
        assert len(allocation.binds) == len(problem.weight)


@each_that_aims
def test_none_is_better_than_the_optimum(name: str) -> None:
    needs_a_policy(name)
    for problem in (
        [literature(0.5, seed) for seed in range(4)] if name == "cvxpy" else instances(30, seed=2, name=name)
    ):
        allocation = solve(name, problem)
        if allocation.status == "stretched":
            problem = replace(problem, deadline_s=allocation.deadline_s)
        if not allocation.admitted.any():  # limits may forbid some, or all, to be dense
            continue
        best = solve("kkt", problem.take(np.flatnonzero(allocation.admitted)))
        assert allocation.objective <= best.objective + tolerance(name) * problem.weight.sum(), "better than possible"


@each_allocator
def test_the_order_of_devices_is_irrelevant(name: str) -> None:
    if name in ("random", "selective"):
        pytest.skip("shares are drawn, and ties between blocks broken, by position; the run keeps devices in id order")
    for problem in [literature(0.5, seed) for seed in range(3)] if name in LOOSE else instances(20, seed=3, name=name):
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(problem.weight))
        a, b = solve(name, problem), solve(name, problem.take(order))
        np.testing.assert_allclose(a.objective, b.objective, atol=tolerance(name))
        if tolerance(name) < 1e-6:  # of a flat optimum its objective is exact, its argument less so
            np.testing.assert_allclose(a.prune_ratio[order], b.prune_ratio, atol=1e-8)
        np.testing.assert_allclose(a.deadline_s, b.deadline_s, rtol=1e-9)


@each_allocator
def test_units_scale_out(name: str) -> None:
    """Milliseconds for seconds, and kilobits for bits: the same ratios and shares."""
    if name in ("blocks", "selective", "weighted"):
        pytest.skip("its blocks, or what a second is worth, have a size of their own")
    for problem in [literature(0.5, seed) for seed in range(3)] if name in LOOSE else instances(20, seed=4, name=name):
        t, q = 1e3, 1e-3
        limits = problem.limits
        if limits is not None:
            limits = replace(
                limits, min_bandwidth_hz=limits.min_bandwidth_hz * q / t, max_bandwidth_hz=limits.max_bandwidth_hz * q / t,
                tx_power_w=limits.tx_power_w / t,
            )  # fmt: skip
        energies = problem.energies
        if energies is not None:
            energies = replace(energies, tx_power_w=energies.tx_power_w / t)
        scaled = replace(
            problem, limits=limits, energies=energies, deadline_s=problem.deadline_s * t,
            shared_compute_s=problem.shared_compute_s * t, fixed_s=problem.fixed_s * t,
            payload_bits=problem.payload_bits * q, snr_hz=problem.snr_hz * q / t, bandwidth_hz=problem.bandwidth_hz * q / t,
        )  # fmt: skip
        a, b = solve(name, problem), solve(name, scaled)
        np.testing.assert_allclose(a.objective, b.objective, atol=tolerance(name))
        if tolerance(name) < 1e-6:  # of a flat optimum its objective is exact, its argument less so
            np.testing.assert_allclose(a.prune_ratio, b.prune_ratio, atol=1e-8)
        np.testing.assert_allclose(a.deadline_s * t, b.deadline_s, rtol=1e-9)


@each_that_aims
def test_more_bandwidth_or_a_later_deadline_is_never_worse(name: str) -> None:
    needs_a_policy(name)
    if name in ("random", "alternating", "greedy", "selective"):
        pytest.skip("no theorem: what these hand out moves with what the floors leave over, or with the rounding")
    for problem in (
        [literature(0.5, seed) for seed in range(2)] if name == "cvxpy" else instances(20, seed=5, name=name)
    ):
        at = replace(problem, deadline_s=max(problem.deadline_s, 1.01 * least_feasible(problem)))
        before = solve(name, at)
        if before.status == "stretched":
            continue
        for better in (replace(at, bandwidth_hz=1.3 * at.bandwidth_hz), replace(at, deadline_s=1.2 * at.deadline_s)):
            after = solve(name, better)
            worst = (
                (1 - after.prune_ratio).min() - (1 - before.prune_ratio).min()
                if name == "minmax"
                else after.objective - before.objective
            )
            assert worst >= -tolerance(name) * problem.weight.sum(), "more room gave less"


@each_that_aims
def test_the_policies_for_infeasible_rounds(name: str) -> None:
    needs_a_policy(name)
    rng = np.random.Generator(np.random.PCG64(6))
    for _ in range(2 if name in ("cvxpy", "selective") else 6):
        problem = draw(rng, 8)
        problem = replace(problem, max_ratio=np.full(8, 0.5), weight=np.maximum(problem.weight, 0.1))
        problem = replace(problem, deadline_s=0.7 * least_feasible(problem))
        with pytest.raises(InfeasibleError, match=r"s too early.*raise the deadline"):
            solve(name, problem, "fail")
        stretched = solve(name, problem, "stretch")
        assert stretched.status == "stretched"
        assert stretched.admitted.all()
        assert stretched.deadline_s >= least_feasible(problem) * (1 - 1e-9)
        dropped = solve(name, problem, "drop")
        assert dropped.status == "dropped"
        assert not dropped.admitted.all()
        assert dropped.deadline_s == problem.deadline_s
        assert {b for b, a in zip(dropped.binds, dropped.admitted, strict=True) if not a} == {"dropped"}
        assert (dropped.latency_s[dropped.admitted] <= problem.deadline_s * (1 + 1e-6)).all()
        assert "dropped devices" in dropped.message
