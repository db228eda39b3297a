"""Blocks with gains of their own: the bound against cvxpy, whole blocks against brute force and dynamic programming."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate.blocks import Table, solve_table
from fedprune_cli.allocate.picked import LeastOnPicked, Selective
from fedprune_cli.allocate.problem import Allocation, Problem
from fedprune_cli.allocate.selective import Rates, rates_of, relax, select
from fedprune_cli.contracts.problems import literature
from fedprune_cli.errors import ConfigError, InfeasibleError


def drawn(seed: int, count: int, blocks: int, fraction: float = 0.5) -> tuple[Problem, np.ndarray]:
    """Returns a problem whose devices may drop everything, and Rayleigh gains of its blocks."""
    rng = np.random.Generator(np.random.PCG64(seed))
    problem = replace(literature(fraction, seed, count=count), max_ratio=np.ones(count))
    return replace(problem, weight=rng.uniform(0.1, 1, count)), rng.exponential(size=(count, blocks))


def relaxed_by_cvxpy(rates: Rates) -> float:
    import cvxpy as cp

    y, x = cp.Variable(rates.block_bps.shape), cp.Variable(len(rates.weight))
    constraints = [y >= 0, cp.sum(y, 0) <= 1, x <= 1]
    for k in range(len(rates.weight)):
        R = y[k] @ rates.block_bps[k] / rates.transfer[k]
        a = rates.work[k]
        constraints.append(x[k] / rates.budget[k] <= (1 - cp.inv_pos(1 + a * R)) / a)
    problem = cp.Problem(cp.Maximize(rates.weight @ x), constraints)
    problem.solve(solver=cp.CLARABEL)
    return float(problem.value)


def test_the_bound_is_the_relaxations_optimum() -> None:
    for seed, (count, blocks) in enumerate([(1, 4), (2, 6), (4, 10)]):
        problem, gain = drawn(seed, count, blocks)
        rates = rates_of(problem, gain)
        share, theta = relax(rates)
        np.testing.assert_allclose(share.sum(0), 1, rtol=1e-12)
        relaxed = float(rates.weight @ rates.kept((share * rates.block_bps).sum(1)))
        best, total = relaxed_by_cvxpy(rates), problem.weight.sum()
        assert relaxed <= best + 1e-7 * total
        assert rates.bound(theta) >= best - 1e-7 * total
        assert rates.bound(theta) - relaxed <= 1e-6 * total


def check_bounds(count: int, seed: int) -> None:
    """The bound closes on the relaxation, and whole blocks are below it by what few blocks cost."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        devices, blocks = int(rng.choice((1, 2, 5, 20))), int(rng.choice((6, 25, 50)))
        problem, gain = drawn(int(rng.integers(2**32)), devices, blocks, float(rng.uniform(0.2, 1.1)))
        found = select(problem, gain)
        total = problem.weight.sum()
        room = found.bound >= total * (1 - 1e-6)  # for all that anybody wants: the bound is known, the shares are any
        assert found.bound - found.relaxed <= (1e-3 if room else 1e-4) * total, at
        assert found.value <= found.bound + 1e-12 * total
        assert found.gap(problem.weight) <= max(devices, 2) / blocks


def test_the_bound_closes_on_the_relaxation() -> None:
    check_bounds(8, seed=1)


@pytest.mark.slow
def test_the_bound_closes_on_2000_relaxations() -> None:
    check_bounds(2000, seed=2)


def test_whole_blocks_against_brute_force() -> None:
    """Never better than the best of all choices, which the bound never is below; and mostly that best one."""
    best_found = 0
    for seed in range(6):
        count, blocks = (2, 7) if seed % 2 else (3, 5)
        problem, gain = drawn(seed, count, blocks)
        found, rates = select(problem, gain), rates_of(problem, gain)
        tried = []
        for owners in itertools.product(range(count), repeat=blocks):
            given = np.arange(count)[:, None] == np.array(owners)
            tried.append(float(rates.weight @ rates.kept((given * rates.block_bps).sum(1))))
        assert found.value <= max(tried) + 1e-12
        assert max(tried) <= found.bound + 1e-12
        assert found.value >= max(tried) - 0.05 * problem.weight.sum()
        best_found += found.value >= max(tried) - 1e-9
    assert best_found >= 3


def test_flat_gains_are_counts_of_blocks_to_the_optimum() -> None:
    """Which block it is does not matter then: dynamic programming over counts is exact, and so are exchanges of concave worths."""
    for seed in range(2):
        problem, gain = drawn(seed, 4, 15)
        rates = rates_of(problem, np.ones_like(gain))
        counts = np.arange(16)
        worth = rates.weight[:, None] * rates.kept(counts * rates.block_bps[:, :1])
        best = solve_table(Table(counts, worth), 15)[1]
        assert select(problem, np.ones_like(gain)).value == pytest.approx(best, rel=1e-12)


def test_who_must_keep_something_gets_it() -> None:
    problem, gain = drawn(3, 4, 30, fraction=1.0)
    problem = replace(problem, max_ratio=np.full(4, 0.6), weight=np.array([1.0, 1.0, 1e-6, 1.0]))
    found = select(problem, gain)
    assert (found.kept >= 0.4 - 1e-12).all()
    assert found.value <= found.bound + 1e-12


def test_what_is_not_offered_is_refused_by_name() -> None:
    problem, gain = drawn(0, 2, 4)
    with pytest.raises(ConfigError, match=r"block_gain: \(3, 4\) entries for 2 devices"):
        select(problem, np.ones((3, 4)))
    with pytest.raises(ConfigError, match=r"device 1, block_gain=-1\.0: must be finite"):
        select(problem, np.array([[1.0, 1.0], [1.0, -1.0]]))
    with pytest.raises(ConfigError, match="not with a gain for every block"):
        select(replace(problem, limits=problem.energies), gain)
    with pytest.raises(
        ConfigError, match=r"channel\.bandwidth_mhz=2000: 11111 blocks of 180 kHz, at most 10000 are handed"
    ):
        Selective("selective", "stretch").solve(replace(problem, bandwidth_hz=2e9, deadline_s=1.0), 0, 0)


# --- the allocator --------------------------------------------------------------------------------------------------


def given_to(problem: Problem, found: Allocation) -> np.ndarray:
    """Returns the rates [K] by hand: of each block with its own gain, at the same power density on all."""
    assert found.owner is not None
    assert problem.block_gain is not None
    block_hz, total = problem.bandwidth_hz / len(found.owner), np.zeros(len(problem.weight))
    for block, place in enumerate(found.owner.tolist()):
        if place >= 0:
            snr = problem.snr_hz[place] * problem.block_gain[place, block] / problem.bandwidth_hz
            total[place] += block_hz * np.log2(1 + snr)
    return total


def check_answer(problem: Problem, found: Allocation) -> None:
    kept, admitted = 1 - found.prune_ratio, found.admitted
    rate_bps = given_to(problem, found)
    np.testing.assert_allclose(found.rate_bps[admitted], rate_bps[admitted], rtol=1e-12)
    sent = kept * problem.payload_bits
    took_s = kept * problem.shared_compute_s + sent / np.maximum(rate_bps, 1e-300) + problem.fixed_s
    np.testing.assert_allclose(found.latency_s[admitted], took_s[admitted], rtol=1e-9)
    assert (took_s[admitted] <= found.deadline_s * (1 + 1e-9)).all()
    assert (kept[admitted] >= problem.min_kept[admitted] - 1e-9).all()
    assert not rate_bps[~admitted].any()
    assert (found.gap or 0.0) >= 0
    assert (found.gap is None) == (not admitted.any())
    assert found.certificate is None
    assert (found.status == "optimal") <= ((found.gap or 0.0) <= 1e-9)


def test_no_choice_of_blocks_is_above_the_stated_gap() -> None:
    """Brute force over all owners, with a least that everybody must keep."""
    for seed in range(6):
        count, blocks = (2, 7) if seed % 2 else (3, 6)
        problem, gain = drawn(seed, count, blocks, fraction=0.9)
        problem = replace(problem, max_ratio=np.full(count, 0.9), block_gain=gain)
        found = Selective("selective", "stretch").solve(problem, 0, 0)
        check_answer(problem, found)
        at = rates_of(replace(problem, deadline_s=found.deadline_s), gain)
        best = -np.inf
        for owners in itertools.product(range(count), repeat=blocks):
            kept = at.kept(((np.arange(count)[:, None] == np.array(owners)) * at.block_bps).sum(1))
            if (kept >= 0.1).all():
                best = max(best, float(problem.weight @ kept))
        assert found.objective <= best + 1e-9
        assert found.gap is not None
        assert best <= found.objective + found.gap * problem.weight.sum() + 1e-9


@pytest.mark.parametrize("policy", ["stretch", "drop"])
def test_a_round_that_blocks_do_not_suffice_for(policy: str) -> None:
    for seed in range(4):
        problem, gain = drawn(seed, 6, 12, fraction=0.6)
        problem = replace(problem, max_ratio=np.full(6, 0.3), block_gain=gain)
        found = Selective("selective", policy).solve(problem, 0, 0)
        check_answer(problem, found)
        late = replace(problem, deadline_s=0.999 * found.deadline_s)
        if policy == "stretch":
            assert found.status == "stretched"
            assert found.admitted.all()
            assert "too early: stretched to" in found.message
            assert not LeastOnPicked().holds(late)
        else:
            assert found.status == "dropped"
            assert found.admitted.any()
            assert found.deadline_s == problem.deadline_s
            assert found.message.endswith("another choice may admit more")
    with pytest.raises(InfeasibleError, match=r"s too early: raise the deadline"):
        Selective("selective", "fail").solve(problem, 0, 0)


def test_who_has_no_link_is_dropped_and_gets_no_block() -> None:
    problem, gain = drawn(1, 3, 8)
    problem = replace(problem, max_ratio=np.full(3, 0.9), snr_hz=problem.snr_hz * [1, 0, 1], block_gain=gain)
    found = Selective("selective", "stretch").solve(problem, 0, 0)
    check_answer(problem, found)
    assert found.admitted.tolist() == [True, False, True]
    assert found.owner is not None
    assert 1 not in found.owner
    nobody = Selective("selective", "drop").solve(replace(problem, deadline_s=1e-6), 0, 0)
    assert nobody.owner is not None
    assert (nobody.owner == -1).all()


def test_blocks_that_are_alike_are_as_many_as_the_band_holds() -> None:
    problem = literature(0.6, 2)
    found = Selective("selective", "stretch").solve(problem, 0, 0)
    assert found.owner is not None
    assert len(found.owner) == 111
    assert found.block_hz == 180e3
    grid = Selective("selective", "stretch").solve(replace(problem, bandwidth_hz=36e5, block_hz=36e4), 0, 0)
    assert grid.owner is not None
    assert len(grid.owner) == 10


def test_the_order_of_devices_changes_nothing_but_digits() -> None:
    problem, gain = drawn(7, 6, 24)
    problem = replace(problem, block_gain=gain, max_ratio=np.full(6, 0.95))
    turned = np.array([3, 1, 5, 0, 2, 4])
    one, other = (Selective("selective", "stretch").solve(p, 0, 0) for p in (problem, problem.take(turned)))
    assert other.objective == pytest.approx(one.objective, rel=1e-9)
    assert one.owner is not None
    assert other.owner is not None
    np.testing.assert_array_equal(turned[other.owner], one.owner)
