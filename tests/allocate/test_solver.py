"""Laws of P1's solver in particular, and what is known of the others: brute force, prices, edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate.baselines import Kkt
from fedprune_cli.allocate.deadline import dense_deadline, least_feasible
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.problem import kept_fraction, kept_on, latency
from fedprune_cli.contracts.problems import draw, literature
from fedprune_cli.contracts.test_allocators import instances, solve
from fedprune_cli.errors import InfeasibleError


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


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
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
            kept = np.minimum(1.0, kept_fraction(at, point))
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
