"""Who is left out where a round cannot meet its deadline: dense and fixed rounds too, and turns for those who waited."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate.baselines import Allocator, Dense, Equal, Fixed, Kkt
from fedprune_cli.allocate.deadline import least_deadline
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.problem import Problem, latency, required_bandwidth
from fedprune_cli.allocate.whole import Blocks
from fedprune_cli.contracts.problems import draw, literature
from fedprune_cli.errors import ConfigError, InfeasibleError

PLAIN: tuple[Allocator, ...] = (Dense("dense"), Fixed("fixed", 0.7))


def with_policy(allocator: Allocator, policy: str) -> Allocator:
    assert isinstance(allocator, Dense | Fixed)
    return replace(allocator, on_infeasible=policy)


@pytest.mark.parametrize("allocator", PLAIN, ids=lambda one: one.name)
def test_a_deadline_that_all_can_meet_changes_nothing(allocator: Allocator) -> None:
    """The laws of the allocator that does not look at the deadline are then those of the one that does."""
    rng = np.random.Generator(np.random.PCG64(0))
    for _ in range(15):
        problem = draw(rng, 6)
        alone = allocator.solve(problem, 0, 0)
        late = replace(problem, deadline_s=1.01 * alone.deadline_s)
        for policy in ("drop", "stretch", "fail"):
            aimed = with_policy(allocator, policy).solve(late, 0, 0)
            np.testing.assert_array_equal(aimed.bandwidth_hz, alone.bandwidth_hz)
            np.testing.assert_array_equal(aimed.prune_ratio, alone.prune_ratio)
            assert aimed.deadline_s == late.deadline_s
        early = replace(problem, deadline_s=0.5 * alone.deadline_s)
        stretched = with_policy(allocator, "stretch").solve(early, 0, 0)
        np.testing.assert_allclose(stretched.deadline_s, alone.deadline_s, rtol=1e-12)
        np.testing.assert_allclose(stretched.bandwidth_hz, alone.bandwidth_hz, rtol=1e-9)
        with pytest.raises(InfeasibleError, match="too early"):
            with_policy(allocator, "fail").solve(early, 0, 0)


@pytest.mark.parametrize("allocator", PLAIN, ids=lambda one: one.name)
def test_dropping_admits_as_many_as_any_set_that_can_end_in_time(allocator: Allocator) -> None:
    """Against all sets; of equal weights the cheapest ones are the most."""
    kept = 1.0 if isinstance(allocator, Dense) else 0.3
    for seed in range(5):
        problem = replace(literature(0.3, seed, count=6), weight=np.full(6, 1 / 6))
        dropped = with_policy(allocator, "drop").solve(problem, 0, 0)
        sets = [[*of] for count in range(1, 7) for of in itertools.combinations(range(6), count)]
        possible = [
            of
            for of in sets
            if least_deadline(problem.take(np.array(of)), np.full(len(of), kept))[0] <= problem.deadline_s
        ]
        assert dropped.admitted.sum() == max(map(len, possible), default=0)
        assert set(dropped.prune_ratio[dropped.admitted]) <= {1 - kept}
        ends = latency(problem, np.full(6, kept), dropped.bandwidth_hz)[dropped.admitted]
        assert (ends <= problem.deadline_s * (1 + 1e-9)).all()


@pytest.mark.parametrize("allocator", PLAIN, ids=lambda one: one.name)
def test_a_policy_that_is_none_is_refused(allocator: Allocator) -> None:
    with pytest.raises(ConfigError, match="must be 'stretch', 'drop', 'fail' or null"):
        with_policy(allocator, "skip")


TAKING_TURNS: tuple[Allocator, ...] = (
    Kkt("kkt", "drop"), Dense("dense", "drop"), Equal("equal", "drop"),
    Blocks("blocks", "drop", block_hz=1e6, count=None, group=1, smooth=False),
)  # fmt: skip


def scarce(seed: int) -> Problem:
    """Returns a problem of eight devices each of which fits alone, even dense, and of which a few fit together: the radio is the limit."""
    rng = np.random.Generator(np.random.PCG64(seed))
    snr_hz, bits, none = 10 ** rng.uniform(7.5, 8.5, 8), np.full(8, 1e7), np.zeros(8)
    problem = Problem(none, bits, none, snr_hz, rng.uniform(0.5, 1, 8), np.full(8, 0.05), 20e6, np.inf)
    alone = [least_deadline(problem.take(np.array([k])), np.ones(1))[0] for k in range(8)]
    return replace(problem, deadline_s=1.5 * max(alone))


@pytest.mark.parametrize(
    "allocator",
    [pytest.param(one, id=one.name, marks=[pytest.mark.slow] * (one.name == "blocks")) for one in TAKING_TURNS],
)
def test_whoever_fits_alone_has_its_turn(allocator: Allocator) -> None:
    """Without turns the same devices are left out of every round of a channel that stays; with them nobody waits for K rounds."""
    starved = 0
    for seed in range(2):
        problem, waited = scarce(seed), np.zeros(8, dtype=np.int64)
        plain = allocator.solve(problem, 0, 0)
        starved += int((~plain.admitted).sum())
        np.testing.assert_array_equal(allocator.solve(replace(problem, waited=waited), 0, 0).admitted, plain.admitted)
        for _ in range(9):
            turn = allocator.solve(replace(problem, waited=waited), 0, 0)
            assert turn.admitted.any()
            assert (
                latency(problem, 1 - turn.prune_ratio, turn.bandwidth_hz)[turn.admitted]
                <= problem.deadline_s * (1 + 1e-9)
            ).all()
            if not turn.admitted.all():
                assert "those who waited longest came first" in turn.message
                cost = required_bandwidth(problem, problem.min_kept) / problem.weight
                cheapest = int(np.argmin(np.where(turn.admitted, np.inf, cost)))
                more = np.append(np.flatnonzero(turn.admitted), cheapest)
                assert not allocator.solve(problem.take(more), 0, 0).admitted.all(), "there was room for another"
            waited = np.where(turn.admitted, 0, waited + 1)
            assert waited.max() < 8
    assert starved


def test_a_device_between_whose_limits_no_block_fits_shuts_nobody_out() -> None:
    """It comes first by what it costs, and any set that begins with it fits nowhere."""
    ones, problem = np.ones(3), literature(0.5, seed=0, count=3)
    width_hz = Blocks("blocks", "stretch").width_hz(problem)
    least_hz, most_hz = np.array([0.0, 1.1 * width_hz, 0.0]), np.array([np.inf, 1.2 * width_hz, np.inf])
    limits = Limits(least_hz, most_hz, np.inf * ones, ones, ones, ones)
    problem = replace(problem, limits=limits, weight=np.array([1.0, 1e6, 1.0]))
    for policy in ("stretch", "drop"):
        answer = Blocks("blocks", policy).solve(problem, 0, 0)
        assert answer.admitted.tolist() == [True, False, True]
        assert "MHz are missing" not in answer.message
        assert "no other choice admits more than 0 more" in answer.message
    assert "no bandwidth helps devices 1: dropped" in Blocks("blocks", "stretch").solve(problem, 0, 0).message


def test_a_device_that_nothing_helps_takes_no_turn_from_others() -> None:
    problem, kkt = scarce(0), Kkt("kkt", "drop")
    weakest = int(np.argmin(problem.snr_hz))
    weak = replace(problem, snr_hz=np.where(np.arange(8) == weakest, problem.snr_hz * 1e-4, problem.snr_hz))
    starved = int(np.flatnonzero(~kkt.solve(weak, 0, 0).admitted & (np.arange(8) != weakest))[0])
    waited = np.where(np.arange(8) == weakest, 100, np.where(np.arange(8) == starved, 5, 0))
    turn = kkt.solve(replace(weak, waited=waited), 0, 0)
    assert (turn.admitted[weakest], turn.admitted[starved]) == (False, True)
