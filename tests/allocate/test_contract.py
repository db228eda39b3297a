"""Laws over every registered allocator, and over P1's solver in particular."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from problems import draw, literature

from fedprune_cli.allocate import ALLOCATORS, Allocator
from fedprune_cli.allocate.baselines import Kkt
from fedprune_cli.allocate.deadline import dense_deadline, least_feasible
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.problem import (
    Allocation,
    Problem,
    energy,
    kept_fraction,
    kept_on,
    latency,
    rate,
    upload_s,
)
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import InfeasibleError

each_allocator = pytest.mark.parametrize("name", ALLOCATORS)
AIMS = [
    name for name in ALLOCATORS if name not in ("dense", "dense_equal", "fixed", "minlatency")
]  # those that aim at the deadline
each_that_aims = pytest.mark.parametrize("name", AIMS)
LOOSE = {"cvxpy": 1e-6, "minlatency": 1e-6}  # as exact as a conic solver, and as a bisection for the deadline


@functools.cache
def allocator_of(name: str, policy: str = "stretch") -> Allocator:
    overrides = [f"allocator={name}"] + [f"allocator.on_infeasible={policy}"] * (name in AIMS)
    return build_experiment(compose_config(overrides)).allocator


def solve(name: str, problem: Problem, policy: str = "stretch") -> Allocation:
    return allocator_of(name, policy).solve(problem, 0, 0)


def instances(count: int, seed: int, sizes: tuple[int, ...] = (1, 2, 3, 10), name: str = "dense") -> list[Problem]:
    """Returns wild problems; every third one with limits where the allocator looks at them."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return [draw(rng, int(rng.choice(sizes)), limited=name in AIMS and at % 3 == 2) for at in range(count)]


@each_allocator
def test_every_allocation_is_feasible(name: str) -> None:
    for problem in (
        [literature(0.5, seed) for seed in range(4)] if name == "cvxpy" else instances(60, seed=1, name=name)
    ):
        allocation = solve(name, problem)
        admitted = allocation.admitted
        assert allocation.bandwidth_hz.sum() <= problem.bandwidth_hz * (1 + 1e-9)
        assert (allocation.bandwidth_hz[admitted] >= problem.least_hz[admitted] * (1 - 1e-9)).all()
        assert (allocation.bandwidth_hz <= problem.most_hz * (1 + 1e-9)).all()
        if problem.limits is not None:
            kept = 1 - allocation.prune_ratio
            joules = energy(problem.limits, kept, upload_s(problem, kept, allocation.bandwidth_hz))
            assert (joules <= problem.limits.energy_budget_j * (1 + 1e-9))[admitted].all()
        if name not in ("fixed", "dense", "dense_equal"):
            assert (allocation.prune_ratio <= problem.max_ratio + 1e-9)[admitted].all()
        assert (allocation.prune_ratio >= -1e-12).all()
        t = latency(problem, 1 - allocation.prune_ratio, allocation.bandwidth_hz)
        # x is known to one part in 1e16 of the model; where a device keeps next to nothing, that is many parts of its time
        slack = 1e-9 + 1e-15 * problem.payload_bits / np.maximum(allocation.rate_bps, 1e-300) / allocation.deadline_s
        assert (t[admitted] <= allocation.deadline_s * (1 + slack[admitted] + LOOSE.get(name, 0))).all()
        assert np.isclose(allocation.objective, problem.weight[admitted] @ (1 - allocation.prune_ratio[admitted]))
        assert len(allocation.binds) == len(problem.weight)


@each_that_aims
def test_none_is_better_than_the_optimum(name: str) -> None:
    for problem in (
        [literature(0.5, seed) for seed in range(4)] if name == "cvxpy" else instances(60, seed=2, name=name)
    ):
        allocation = solve(name, problem)
        if allocation.status == "stretched":
            problem = replace(problem, deadline_s=allocation.deadline_s)
        best = solve("kkt", problem)
        assert allocation.objective <= best.objective + LOOSE.get(name, 1e-9) * problem.weight.sum()


@each_allocator
def test_the_order_of_devices_is_irrelevant(name: str) -> None:
    if name == "random":
        pytest.skip("shares are drawn by position; the run keeps devices in id order")
    for problem in [literature(0.5, seed) for seed in range(3)] if name in LOOSE else instances(30, seed=3, name=name):
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(problem.weight))
        a, b = solve(name, problem), solve(name, problem.take(order))
        np.testing.assert_allclose(a.objective, b.objective, atol=LOOSE.get(name, 1e-9))
        if name not in LOOSE:  # of a flat optimum its objective is exact, its argument less so
            np.testing.assert_allclose(a.prune_ratio[order], b.prune_ratio, atol=1e-8)
        np.testing.assert_allclose(a.deadline_s, b.deadline_s, rtol=1e-9)


@each_allocator
def test_units_scale_out(name: str) -> None:
    """Milliseconds for seconds, and kilobits for bits: the same ratios and shares."""
    if name == "blocks":
        pytest.skip("its blocks have a size of their own")
    for problem in [literature(0.5, seed) for seed in range(3)] if name in LOOSE else instances(30, seed=4, name=name):
        t, q = 1e3, 1e-3
        limits = problem.limits
        if limits is not None:
            limits = replace(
                limits, min_bandwidth_hz=limits.min_bandwidth_hz * q / t, max_bandwidth_hz=limits.max_bandwidth_hz * q / t,
                tx_power_w=limits.tx_power_w / t,
            )  # fmt: skip
        scaled = replace(
            problem, limits=limits, deadline_s=problem.deadline_s * t,
            shared_compute_s=problem.shared_compute_s * t, fixed_s=problem.fixed_s * t,
            payload_bits=problem.payload_bits * q, snr_hz=problem.snr_hz * q / t, bandwidth_hz=problem.bandwidth_hz * q / t,
        )  # fmt: skip
        a, b = solve(name, problem), solve(name, scaled)
        np.testing.assert_allclose(a.objective, b.objective, atol=LOOSE.get(name, 1e-9))
        if name not in LOOSE:  # of a flat optimum its objective is exact, its argument less so
            np.testing.assert_allclose(a.prune_ratio, b.prune_ratio, atol=1e-8)
        np.testing.assert_allclose(a.deadline_s * t, b.deadline_s, rtol=1e-9)


@each_that_aims
def test_more_bandwidth_or_a_later_deadline_is_never_worse(name: str) -> None:
    if name in ("random", "alternating", "greedy"):
        pytest.skip("no theorem: what these hand out moves with what the floors leave over")
    for problem in (
        [literature(0.5, seed) for seed in range(2)] if name == "cvxpy" else instances(30, seed=5, name=name)
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
            assert worst >= -LOOSE.get(name, 1e-9) * problem.weight.sum()


@each_that_aims
def test_the_policies_for_infeasible_rounds(name: str) -> None:
    rng = np.random.Generator(np.random.PCG64(6))
    for _ in range(2 if name == "cvxpy" else 10):
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


def test_drop_admits_as_many_as_any_set_could() -> None:
    """Equal weights: the greedy prefix has the largest number of devices, checked against every subset."""
    rng = np.random.Generator(np.random.PCG64(7))
    for _ in range(10):
        problem = replace(draw(rng, 6), weight=np.full(6, 1 / 6), max_ratio=np.full(6, 0.6))
        problem = replace(problem, deadline_s=0.6 * least_feasible(problem))
        admitted = int(solve("kkt", problem, "drop").admitted.sum())
        subsets = [np.flatnonzero([(mask >> k) & 1 for k in range(6)]) for mask in range(1, 64)]
        best = max((len(s) for s in subsets if least_feasible(problem.take(s)) <= problem.deadline_s), default=0)
        assert admitted == best


def test_the_certificate_holds_and_would_notice() -> None:
    noticed = 0
    for problem in instances(100, seed=8, sizes=(2, 5, 20), name="kkt"):
        allocation = solve("kkt", problem)
        assert allocation.certificate
        assert allocation.certificate.residual <= 1e-9
        assert abs(allocation.certificate.gap) <= 1e-9
        feasible = replace(problem, deadline_s=allocation.deadline_s)
        b, price = solve_p1(feasible)
        if price == 0 or (b > 0).sum() < 2 or allocation.status == "stretched":
            continue
        # move a hundredth of the largest share to the others: feasible, and no longer optimal
        giver = int(np.argmax(b))
        moved = b.copy()
        moved[giver] *= 0.99
        moved[np.arange(len(b)) != giver] += 0.01 * b[giver] / (len(b) - 1)
        kept = kept_on(feasible, moved)
        worse = certify(feasible, kept, moved, price)
        if worse.primal > 1e-9:  # it took from a device what that needs
            continue
        assert worse.gap >= -1e-12
        noticed += worse.residual > 1e-6
    assert noticed > 30


def test_the_price_is_the_value_of_a_hertz() -> None:
    problem = literature(0.5, seed=0)
    price = solve("kkt", problem).price_per_hz
    more = 1e3
    gain = (
        solve("kkt", replace(problem, bandwidth_hz=problem.bandwidth_hz + more)).objective
        - solve("kkt", problem).objective
    )
    assert np.isclose(gain / more, price, rtol=1e-3)


def test_dense_is_latency_optimal_and_everybody_ends_together() -> None:
    for problem in instances(40, seed=9):
        deadline_s, bandwidth_hz = dense_deadline(problem)
        t = latency(problem, np.ones(len(bandwidth_hz)), bandwidth_hz)
        sends = (problem.payload_bits > 0) & (problem.snr_hz > 0)
        if not sends.all() or not np.isfinite(deadline_s):
            continue
        np.testing.assert_allclose(t, deadline_s, rtol=1e-6)
        assert solve("kkt", replace(problem, deadline_s=deadline_s * (1 + 1e-9))).objective >= problem.weight.sum() * (
            1 - 1e-6
        )
        equal = latency(problem, np.ones(len(t)), np.full(len(t), problem.bandwidth_hz / len(t))).max()
        assert deadline_s <= equal * (1 + 1e-9)


def test_alternation_stalls_where_it_starts() -> None:
    """Before the fastest device could be dense, the alternation ends with the equal split it began with."""
    problem = literature(0.35, seed=3)
    equal_dense_s = latency(problem, np.ones(10), np.full(10, problem.bandwidth_hz / 10))
    problem = replace(problem, deadline_s=0.9 * equal_dense_s.min(), max_ratio=np.ones(10))
    alternating, equal, best = (solve(name, problem) for name in ("alternating", "equal", "kkt"))
    assert equal.prune_ratio.min() > 0
    np.testing.assert_allclose(alternating.bandwidth_hz, equal.bandwidth_hz, rtol=1e-6)
    assert best.objective > alternating.objective + 0.005


@pytest.mark.parametrize("count", [2, 3])
def test_brute_force_on_a_grid(count: int) -> None:
    rng = np.random.Generator(np.random.PCG64(10))
    steps = 2000 if count == 2 else 200
    shares = np.arange(steps + 1) / steps
    if count == 2:
        grid = np.stack([shares, 1 - shares], axis=1)
    else:
        a, b = np.meshgrid(shares, shares)
        grid = np.stack([a.ravel(), b.ravel(), 1 - a.ravel() - b.ravel()], axis=1)
        grid = grid[grid[:, 2] >= -1e-12].clip(0)
    for _ in range(12):
        problem = draw(rng, count)
        allocation = solve("kkt", problem)
        at = replace(problem, deadline_s=allocation.deadline_s)
        values = []
        for point in grid * problem.bandwidth_hz:
            kept = np.minimum(1.0, kept_fraction(at, rate(point, at.snr_hz)))
            if (kept >= at.min_kept - 1e-12).all():
                values.append(at.weight @ kept)
        if values:
            assert allocation.objective >= max(values) - 1e-12
            assert allocation.objective <= max(values) + 0.05 * at.weight.sum()  # the grid is near somewhere


def test_impossible_edges() -> None:
    base = literature(0.5, seed=0)
    dead = replace(base, snr_hz=np.where(np.arange(10) == 3, 0.0, base.snr_hz), deadline_s=30.0)
    with pytest.raises(InfeasibleError, match="no bandwidth helps devices 3"):
        Kkt("kkt", "fail").solve(dead, 0, 0)
    assert not Kkt("kkt", "drop").solve(dead, 0, 0).admitted[3]
    alone = Kkt("kkt", "stretch").solve(
        replace(dead, deadline_s=1e6), 0, 0
    )  # no deadline helps a device without a signal
    assert alone.status == "dropped"
    assert np.flatnonzero(~alone.admitted).tolist() == [3]
    assert "no bandwidth helps devices 3: dropped devices 3" in alone.message
    both = Kkt("kkt", "stretch").solve(replace(dead, deadline_s=0.5 * least_feasible(base)), 0, 0)
    assert both.status == "stretched"
    assert np.flatnonzero(~both.admitted).tolist() == [3]
    allowed = Kkt("kkt", "fail").solve(replace(dead, max_ratio=np.ones(10)), 0, 0)
    assert allowed.prune_ratio[3] == 1
    assert allowed.bandwidth_hz[3] == 0
    silent = replace(base, payload_bits=np.zeros(10), shared_compute_s=np.zeros(10))
    free = Kkt("kkt", "fail").solve(replace(silent, deadline_s=1e3), 0, 0)
    assert (free.prune_ratio == 0).all()
    late = replace(base, deadline_s=0.5 * base.fixed_s.max(), fixed_s=base.fixed_s + 1.0)
    assert Kkt("kkt", "drop").solve(late, 0, 0).admitted.sum() == 0
    tight = replace(base, deadline_s=least_feasible(base))
    exact = Kkt("kkt", "fail").solve(tight, 0, 0)
    np.testing.assert_allclose(exact.prune_ratio, base.max_ratio, atol=1e-9)
