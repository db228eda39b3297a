"""The equations behind the allocators, and P1 against cvxpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import lambertw

from fedprune_cli.allocate.baselines import Dense
from fedprune_cli.allocate.deadline import dense_deadline, least_feasible
from fedprune_cli.allocate.inverse import LN2, bandwidth_of, log_snr_for_rate, rate
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.policy import solve_under_policy
from fedprune_cli.allocate.problem import (
    Allocation,
    Problem,
    energy,
    kept_fraction,
    kept_on,
    required_bandwidth,
    upload_s,
)
from fedprune_cli.allocate.reference import solve_p1_cvxpy
from fedprune_cli.allocate.variants import frontier, min_latency
from fedprune_cli.contracts.problems import draw, literature, with_limits
from fedprune_cli.errors import CertificateError, ConfigError, InfeasibleError


def test_bandwidth_for_a_rate_is_the_lambert_form_of_the_model() -> None:
    """z = -W_{-1}(-eta e^-eta)/eta - 1, b = s / z, away from the branch point; at it, the rate itself is the check."""
    rng = np.random.Generator(np.random.PCG64(0))
    eta, snr_hz = rng.uniform(1e-3, 0.99, 1000), 10 ** rng.uniform(3, 15, 1000)
    b = bandwidth_of(log_snr_for_rate(eta * snr_hz / LN2, snr_hz), snr_hz)
    z = -lambertw(-eta * np.exp(-eta), -1).real / eta - 1
    np.testing.assert_allclose(b, snr_hz / z, rtol=1e-9)
    eta = 1 - 10.0 ** -np.arange(1, 14)
    np.testing.assert_allclose(
        rate(bandwidth_of(log_snr_for_rate(eta / LN2, np.ones(13)), np.ones(13)), np.ones(13)), eta / LN2, rtol=1e-14
    )
    tiny = 10.0 ** -np.arange(1, 280, 20)
    np.testing.assert_allclose(
        rate(bandwidth_of(log_snr_for_rate(tiny, np.ones(14)), np.ones(14)), np.ones(14)), tiny, rtol=1e-11
    )


def test_kept_fraction_ends_just_at_the_deadline() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    for _ in range(50):
        problem = draw(rng, 5)
        kept = rng.uniform(0.01, 1, 5)
        b = required_bandwidth(problem, kept)
        ok = np.isfinite(b) & (b > 0)
        np.testing.assert_allclose(kept_fraction(problem, b)[ok], kept[ok], rtol=1e-9)


def never_better(ours: Allocation, problem: Problem, bandwidth_hz: np.ndarray) -> None:
    """What a bandwidth really gives is never better than the optimum, apart from what it takes from devices below their floor.

    Clarabel keeps the floors to some 1e-9 and the budget to some 1e-7, which frees bandwidth that is worth its price.
    """
    kept = np.clip(kept_fraction(problem, bandwidth_hz), 0, 1)
    assert np.maximum(problem.min_kept - kept, 0).max() < 1e-4
    slack = 1e-9 * problem.weight.sum() + 1e-6 * ours.price_per_hz * problem.bandwidth_hz
    assert ours.objective >= problem.weight @ kept - slack


def compare_with_cvxpy(count: int, seed: int) -> None:
    """The literature's scenario with every edge: one device, identical ones, a dead channel, limits, a tight budget, infeasibility."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        size = (1, 2, 3, 5, 10)[at % 5]
        problem = literature(float(rng.uniform(0.3, 1.05)), seed=int(rng.integers(2**32)), count=size)
        problem = replace(
            problem, weight=rng.uniform(0.1, 1, size), shared_compute_s=problem.shared_compute_s * (at % 4 != 3)
        )
        if at % 10 == 6:
            problem = problem.take(np.zeros(size, dtype=int))
        if at % 10 == 7:
            problem = replace(
                problem,
                snr_hz=np.where(np.arange(size) == 0, 0.0, problem.snr_hz),
                max_ratio=np.ones(size),
                deadline_s=2.0,
            )
        if at % 5 == 4 and at % 10 != 9:
            problem = with_limits(rng, problem)
        least_s = least_feasible(problem)
        if at % 10 == 8:
            with pytest.raises(InfeasibleError):
                solve_under_policy(
                    replace(problem, deadline_s=0.9 * least_s), "fail", solve_p1, least_feasible, certify
                )
        problem = replace(problem, deadline_s=least_s if at % 10 == 9 else max(problem.deadline_s, 1.001 * least_s))
        ours = solve_under_policy(problem, "fail", solve_p1, least_feasible, certify)
        theirs, b = solve_p1_cvxpy(problem)
        scale = problem.weight.sum()
        # where the budget is exactly tight, Clarabel's own tolerance on it is worth its price
        slack = 1e-6 * ours.price_per_hz * problem.bandwidth_hz if at % 10 == 9 else 0.0
        assert abs(ours.objective - theirs) <= 1e-6 * scale + slack, at
        never_better(ours, problem, b)


def test_p1_agrees_with_cvxpy() -> None:
    compare_with_cvxpy(30, seed=2)


@pytest.mark.slow
def test_p1_agrees_with_cvxpy_on_500_instances() -> None:
    compare_with_cvxpy(500, seed=3)


def test_cvxpy_is_never_better_on_wild_instances() -> None:
    """Over 12 decades of gains Clarabel fails now and then, and is less exact; it never beats the certified optimum."""
    rng = np.random.Generator(np.random.PCG64(4))
    solved = 0
    for at in range(40):
        problem = draw(rng, (1, 2, 3, 5, 10)[at % 5])
        try:
            _, b = solve_p1_cvxpy(problem)
        except CertificateError:
            continue
        solved += 1
        never_better(solve_under_policy(problem, "fail", solve_p1, least_feasible, certify), problem, b)
    assert solved > 20


def certify_many(count: int, seed: int, sizes: tuple[int, ...]) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        problem = draw(rng, int(rng.choice(sizes)), limited=at % 3 == 2)
        b, price = solve_p1(problem)
        kept = kept_on(problem, b)
        certificate = certify(problem, kept, b, price)
        assert np.isfinite(price), at
        assert certificate.residual <= 1e-9, (at, certificate)
        assert abs(certificate.gap) <= 1e-9, (at, certificate)


def test_p1_is_certified_on_random_instances() -> None:
    certify_many(200, 4, (1, 2, 3, 10, 50, 200))


@pytest.mark.slow
def test_p1_is_certified_on_10000_random_instances() -> None:
    certify_many(10_000, 5, (1, 2, 3, 5, 10, 20, 50, 100, 500, 2000))


def test_p2_is_the_inverse_of_p1_and_the_frontier_is_monotone() -> None:
    problem = literature(0.5, seed=1)
    for budget in (0.05, 0.2, 0.5):
        deadline_s = min_latency(problem, budget)
        at = replace(problem, deadline_s=deadline_s)
        ratio = 1 - solve_under_policy(at, "fail", solve_p1, least_feasible, certify).objective / problem.weight.sum()
        assert abs(ratio - budget) < 1e-9
    assert np.isclose(min_latency(problem, 0.0), dense_deadline(problem)[0], rtol=1e-6)
    assert min_latency(problem, 1.0) == least_feasible(problem)
    deadlines, ratios = frontier(problem, [0.01, 0.4, 0.6, 0.8, 1.0, 1.2])
    assert np.isnan(ratios[0])
    assert (np.diff(ratios[1:]) <= 1e-12).all()
    assert abs(ratios[-1]) < 1e-12
    np.testing.assert_allclose(deadlines / deadlines[4], [0.01, 0.4, 0.6, 0.8, 1.0, 1.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snr_hz": np.array([1.0, np.nan])}, "device 1, snr_hz=nan"),
        ({"payload_bits": np.array([-1.0, 1.0])}, "device 0, payload_bits=-1.0: must be finite and >= 0"),
        ({"max_ratio": np.array([0.5, 1.5])}, r"device 1, max_ratio=1.5: must be in \[0, 1\]"),
        ({"weight": np.ones(3)}, "entries for 3 devices"),
        ({"bandwidth_hz": 0.0}, "bandwidth_hz=0: must be > 0"),
        ({"bandwidth_hz": np.inf}, "bandwidth_hz=inf"),
        ({"deadline_s": -1.0}, "deadline_s=-1.0"),
    ],
)
def test_bad_problems_are_refused_by_name(change: dict[str, object], message: str) -> None:
    two = np.ones(2)
    good = {
        "shared_compute_s": two,
        "payload_bits": two,
        "fixed_s": two,
        "snr_hz": two,
        "weight": two,
        "max_ratio": two,
    }
    with pytest.raises(ConfigError, match=message):
        Problem(**(good | {"bandwidth_hz": 1.0, "deadline_s": 1.0} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_bandwidth_hz": np.array([0.0, -1.0])}, "device 1, min_bandwidth_hz=-1.0: must be finite and >= 0"),
        (
            {"max_bandwidth_hz": np.array([0.0, 1.0])},
            "device 0, max_bandwidth_hz=0.0: must be > 0 and at least the minimum",
        ),
        ({"energy_budget_j": np.array([np.nan, 1.0])}, "device 0, energy_budget_j=nan"),
        ({"tx_power_w": np.array([1.0, 0.0])}, "device 1, tx_power_w=0.0: must be finite and > 0"),
        ({"fixed_energy_j": np.ones(3)}, "fixed_energy_j"),
    ],
)
def test_bad_limits_are_refused_by_name(change: dict[str, np.ndarray], message: str) -> None:
    names = (
        "min_bandwidth_hz",
        "max_bandwidth_hz",
        "energy_budget_j",
        "shared_energy_j",
        "fixed_energy_j",
        "tx_power_w",
    )
    with pytest.raises(ConfigError, match=message):
        Limits(**(dict.fromkeys(names, np.ones(2)) | change))


def test_limits_that_never_bind_change_nothing() -> None:
    """To the bit where they are infinite; a generous budget goes through the two stretches and gives the same optimum."""
    for seed in range(5):
        problem = literature(0.5, seed)
        size = len(problem.weight)
        none = Limits(np.zeros(size), *[np.full(size, np.inf)] * 2, *[np.ones(size)] * 3)
        generous = replace(none, energy_budget_j=np.full(size, 1e6), max_bandwidth_hz=np.full(size, 1e9))
        plain, free, wide = (
            solve_under_policy(replace(problem, limits=limits), "fail", solve_p1, least_feasible, certify)
            for limits in (None, none, generous)
        )
        np.testing.assert_array_equal(plain.prune_ratio, free.prune_ratio)
        np.testing.assert_allclose(plain.prune_ratio, wide.prune_ratio, atol=1e-9)


def test_what_a_limit_binds_is_said_and_dense_allocators_refuse_a_budget_that_they_break() -> None:
    problem = literature(0.8, seed=0)
    problem = replace(problem, weight=np.where(np.arange(10) == 2, 1.0, 0.01))  # worth all the band that it can use
    size = len(problem.weight)
    # half of what it costs to send everything on the whole band
    half_j = 0.5 * 0.2 * problem.payload_bits / rate(np.full(size, problem.bandwidth_hz), problem.snr_hz)
    nothing, endless = np.zeros(size), np.full(size, np.inf)
    budget_j = np.where(np.arange(size) == 2, half_j, np.inf)
    slow = Limits(nothing, endless, budget_j, nothing, nothing, np.full(size, 0.2))
    allocation = solve_under_policy(replace(problem, limits=slow), "fail", solve_p1, least_feasible, certify)
    assert allocation.binds[2] == "energy"
    kept = 1 - allocation.prune_ratio
    joules = energy(slow, kept, upload_s(problem, kept, allocation.bandwidth_hz))
    assert np.isclose(joules[2], half_j[2])
    with pytest.raises(
        InfeasibleError, match="'dense' does not choose ratios and breaks the energy budget of devices 2"
    ):
        Dense("dense").solve(replace(problem, limits=slow), 0, 0)
    with pytest.raises(
        InfeasibleError, match=r"no deadline brings the weighted mean ratio to 0: .* raise devices.energy_budget_j"
    ):
        min_latency(replace(problem, limits=slow), 0.0)
