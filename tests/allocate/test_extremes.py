"""Whatever numbers come in, an allocator gives a sound allocation or one line that names what is wrong.

Never exit code 4, never a warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedprune_cli.allocate import ALLOCATORS, Allocator
from fedprune_cli.allocate.deadline import dense_deadline, equal_dense_latency
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.problem import Allocation, Problem, energy, latency, upload_s
from fedprune_cli.allocate.variants import frontier, min_latency
from fedprune_cli.commands.app import app
from fedprune_cli.errors import CertificateError, ConfigError, FedpruneError, InfeasibleError

POLICIES = ("stretch", "drop", "fail")
CERTIFIED = ("kkt", "blocks", "minlatency", "proportional", "energy", "weighted")
IGNORE_THE_DEADLINE = ("dense", "dense_equal", "fixed", "minlatency", "weighted")
WRONG = (np.nan, np.inf, -np.inf, -1.0, 5e-324, 1e-310, 1e-41, 1e41, 1e308)


def build(name: str, policy: str) -> Allocator:
    """Returns an allocator with middling values of its own."""
    aim = None if name in IGNORE_THE_DEADLINE else policy  # tests/allocate/test_drop.py gives those a deadline too
    values = {"name": name, "on_infeasible": aim, "ratio": 0.5, "mean_ratio": 0.4, "iterations": 10}
    cls = ALLOCATORS[name]
    return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})  # type: ignore[arg-type]


def figures(rng: np.random.Generator, size: int, low: float, high: float, extremes: tuple[float, ...]) -> np.ndarray:
    """Returns figures between 10^low and 10^high, and now and then extreme ones, equal ones, or all the same."""
    values = 10 ** rng.uniform(low, high, size)
    if rng.random() < 0.3:
        values = np.where(rng.random(size) < rng.choice([0.2, 0.8]), rng.choice(extremes, size), values)
    if rng.random() < 0.3:
        values[rng.integers(size)] = rng.choice(extremes)
    if rng.random() < 0.2:
        values[:] = values[0]
    if rng.random() < 0.3:
        values[rng.integers(size)] = values[rng.integers(size)]
    return values


def extreme_problem(rng: np.random.Generator) -> Problem:
    """Returns a problem that may be anything; raises ConfigError when it is refused."""
    size = int(rng.choice((1, 2, 3, 5, 12)))
    drawn = {
        "shared_compute_s": figures(rng, size, -3, 1, (0.0, 1e-40, 1e-12, 1e12, 1e40)),
        "payload_bits": figures(rng, size, 3, 9, (0.0, 1e-40, 1.0, 1e18, 1e40)),
        "fixed_s": figures(rng, size, -3, 0, (0.0, 1e-40, 1e12, 1e40)),
        "snr_hz": figures(rng, size, 5, 9, (0.0, 5e-324, 1e-20, 1e-3, 1.0, 1e3, 1e15, 1e40)),
        "weight": figures(rng, size, -2, 0, (0.0, 1e-40, 1e-12, 1e12, 1e40)),
        "max_ratio": rng.choice([0.0, 0.5, 0.9, 1.0, 1 - 1e-16], size) if rng.random() < 0.3 else np.full(size, 0.9),
    }
    bandwidth_hz = float(rng.choice([20e6, 20e6, 20e6, 1e-40, 1.0, 1e12, 1e40]))
    if rng.random() < 0.5:  # a whole row twice
        there, here = rng.integers(size, size=2)
        for values in drawn.values():
            values[here] = values[there]
    if rng.random() < 0.05:
        drawn[str(rng.choice(list(drawn)))][rng.integers(size)] = rng.choice(WRONG)
    ids = rng.permutation(1000)[:size]
    problem = Problem(**drawn, bandwidth_hz=bandwidth_hz, deadline_s=np.inf, ids=ids, limits=None)
    problem = replace(problem, energies=costs(size))
    if rng.random() < 0.4:
        problem = replace(problem, limits=extreme_limits(rng, problem))
    deadline_s = rng.choice([0.01, 0.3, 0.5, 0.9, 1.0, 2.0, 1e6]) * dense_deadline(problem)[0]
    if rng.random() < 0.15:
        deadline_s = rng.choice([0.0, 1e-40, 1.0, 1e12, 1e12 + 1.0, 1e40, *WRONG])
    return replace(problem, deadline_s=float(deadline_s))


def costs(size: int) -> Limits:
    """Returns what computing and sending cost devices that nothing limits."""
    nothing, endless = np.zeros(size), np.full(size, np.inf)
    return Limits(nothing, endless, endless, nothing + 0.1, nothing, nothing + 0.2)


def extreme_limits(rng: np.random.Generator, problem: Problem) -> Limits:
    """Returns limits that bind here and there, and some that nobody can keep."""
    size, share_hz = len(problem.weight), problem.bandwidth_hz / len(problem.weight)
    least_hz = np.where(rng.random(size) < 0.3, share_hz * rng.choice([1e-9, 0.1, 0.9, 1.0, 1.1], size), 0.0)
    most_hz = np.maximum(least_hz, rng.choice([np.inf, np.inf, share_hz, 0.1 * share_hz, 10 * share_hz], size))
    return Limits(
        np.clip(least_hz, 0.0, 1e40) * (least_hz >= 1e-40),
        np.where(np.isinf(most_hz), np.inf, np.clip(most_hz, 1e-40, 1e40)),
        np.where(rng.random(size) < 0.5, np.inf, figures(rng, size, -3, 1, (0.0, 1e-40, 1e12, 1e40))),
        figures(rng, size, -3, 0, (0.0, 1e-40, 1e12, 1e40)),
        figures(rng, size, -4, -1, (0.0, 1e-40, 1e12)),
        figures(rng, size, -2, 0, (1e-40, 1e-12, 1e12, 1e40)),
    )


def check_sound(name: str, problem: Problem, allocation: Allocation) -> None:
    """Fails unless the allocation keeps what it promises, by the equations alone."""
    admitted, kept, b = allocation.admitted, 1 - allocation.prune_ratio, allocation.bandwidth_hz
    loose = 1e-6 if name in ("cvxpy", "minlatency") else 1e-9
    for values in (kept, b, allocation.rate_bps, allocation.latency_s):
        assert np.isfinite(values).all()
    assert np.isfinite([allocation.deadline_s, allocation.objective, allocation.price_per_hz]).all()
    assert (kept >= -1e-12).all()
    assert (kept <= 1 + 1e-12).all()
    assert (b >= 0).all()
    assert b.sum() <= problem.bandwidth_hz * (1 + 1e-9)
    assert (b <= problem.most_hz * (1 + 1e-9)).all()
    assert (b >= problem.least_hz * (1 - 1e-9))[admitted].all()
    # x is known to one part in 1e16 of the model, certified to one in 1e9, and from a conic solver to one in 1e4
    sent_s = np.divide(problem.payload_bits, allocation.rate_bps, out=np.zeros(len(b)), where=allocation.rate_bps > 0)
    exact_to = {"cvxpy": 1e-4, "kkt": 1e-9, "minlatency": 1e-9}.get(name, 1e-15)
    # who gets some hertz of many is given them to the last digits of the whole band
    last_digits = np.minimum(2 * np.spacing(problem.bandwidth_hz) / np.maximum(b, 1e-40), 1.0)
    slack_s = loose * allocation.deadline_s + (exact_to + last_digits) * (
        np.minimum(sent_s, 1e200) + problem.shared_compute_s
    )
    t = latency(problem, kept, b)
    assert (t <= allocation.deadline_s + slack_s)[admitted].all()
    if problem.limits is not None:
        joules = energy(problem.limits, kept, upload_s(problem, kept, b))
        budget_j = problem.limits.energy_budget_j
        spent_j = problem.limits.tx_power_w * np.minimum(sent_s, 1e200) + problem.limits.shared_energy_j
        slack_j = loose * np.where(np.isinf(budget_j), 0.0, budget_j) + 1e-9 * spent_j
        assert (joules <= budget_j + slack_j)[admitted].all()
    if name not in ("dense", "dense_equal", "fixed"):
        assert (kept >= problem.min_kept - 1e-9)[admitted].all()
    assert abs(allocation.objective - problem.weight[admitted] @ kept[admitted]) <= 1e-9 * problem.weight.sum()
    assert (allocation.prune_ratio[~admitted] == 1).all()
    assert (b[~admitted] == 0).all()
    if not admitted.all():
        assert f"dropped devices {', '.join(map(str, problem.names[~admitted][:10]))}" in allocation.message
    if name in CERTIFIED and admitted.any():
        assert allocation.certificate
        assert allocation.certificate.residual <= 1e-9
        assert abs(allocation.certificate.gap) <= 1e-9


def check_who_is_dropped(name: str, problem: Problem, allocation: Allocation) -> None:
    """Fails unless `stretch`, and who has no policy, drop nobody but those without a link: each device of a problem without limits."""
    must_send = problem.min_kept > 0
    if name in IGNORE_THE_DEADLINE and name != "minlatency":  # those of a given ratio
        must_send = np.ones(len(problem.weight), dtype=bool)
    np.testing.assert_array_equal(allocation.admitted, problem.linked | ~must_send)


NAMES = re.compile(
    r"devices? \d+|(deadline_s|bandwidth_hz|allocator\.name)=|(devices|allocator|pruner|channel)\.[a-z]+_"
)


def check_refusal(error: FedpruneError) -> None:
    """Fails unless the error is one line that names a device or a key, and not what must not happen."""
    assert not isinstance(error, CertificateError), error
    assert "\n" not in str(error)
    assert NAMES.search(str(error)), error


def try_everything(count: int, seed: int, names: Sequence[str]) -> tuple[int, int]:
    """Returns how many allocations were sound and how many were refused, over the allocators `names` and every policy."""
    sound = refused = 0
    for at in range(count):
        rng = np.random.Generator(np.random.PCG64([seed, at]))
        try:
            problem = extreme_problem(rng)
        except FedpruneError as error:
            check_refusal(error)
            refused += 1
            continue
        for name in names:
            if name in SLOW and at % 5:
                continue
            for policy in POLICIES if name not in IGNORE_THE_DEADLINE else POLICIES[:1]:
                try:
                    allocation = build(name, policy).solve(problem, seed, at)
                except FedpruneError as error:
                    check_refusal(error)
                    refused += 1
                    continue
                check_sound(name, problem, allocation)
                if policy == "stretch" and problem.limits is None:
                    check_who_is_dropped(name, problem, allocation)
                sound += 1
        assert np.isfinite(equal_dense_latency(problem))
        try:
            check_frontier(problem)
        except FedpruneError as error:
            check_refusal(error)
    return sound, refused


def check_frontier(problem: Problem) -> None:
    """Fails unless the frontier falls with the deadline, and is NaN only at its beginning, or where nobody can take part."""
    deadlines, ratios = frontier(problem, (0.1, 0.5, 0.9, 1.0, 1.5))
    assert np.isfinite(deadlines).all()
    known = np.isfinite(ratios)
    assert (np.diff(known.astype(int)) >= 0).all()
    assert ((ratios >= -1e-9) & (ratios <= 1 + 1e-9))[known].all()
    assert (np.diff(ratios[known]) <= 1e-9).all()


FAST = tuple(name for name in ALLOCATORS if name != "cvxpy")
SLOW = ("selective",)  # as long as all the others together: it has every fifth set


@pytest.mark.slow
def test_any_numbers_give_a_sound_allocation_or_one_line() -> None:
    sound, refused = try_everything(20, seed=1, names=FAST)
    assert sound > 200
    assert refused > 20
    sound, refused = try_everything(12, seed=2, names=("cvxpy",))
    assert sound > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_10000_sets_of_any_numbers_give_sound_allocations_or_one_line(part: int) -> None:
    sound, _ = try_everything(1000, seed=100 + part, names=FAST)
    assert sound > 10_000
    sound, _ = try_everything(50, seed=200 + part, names=("cvxpy",))
    assert sound > 20


# --- a few of them by name ------------------------------------------------------------------------------------------


def three(**changes: np.ndarray) -> Problem:
    """Returns three devices with ids 7, 8 and 9, some of whose figures are changed, at half of their dense optimum."""
    ones = np.ones(3)
    given = {
        "shared_compute_s": 0.1 * ones,
        "payload_bits": 1e6 * ones,
        "fixed_s": 0 * ones,
        "snr_hz": 1e7 * ones,
        "weight": ones,
    }
    problem = Problem(
        **(given | changes),
        max_ratio=0.9 * ones,
        bandwidth_hz=20e6,
        deadline_s=np.inf,
        ids=np.array([7, 8, 9]),
        energies=costs(3),
    )
    return replace(problem, deadline_s=0.5 * dense_deadline(problem)[0])


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize(
    ("policy", "snr_hz"),
    [
        ("stretch", 0.0), ("drop", 1e-3),
        *(
            pytest.param(policy, snr_hz, marks=pytest.mark.slow)
            for policy in ("stretch", "drop")
            for snr_hz in (0.0, 5e-324, 1e-20, 1e-3)
            if (policy, snr_hz) not in (("stretch", 0.0), ("drop", 1e-3))
        ),
    ],
)  # fmt: skip
def test_a_device_without_a_link_is_dropped_by_name_and_the_others_go_on(name: str, snr_hz: float, policy: str) -> None:
    """Nothing, or a signal of -103 dB of the noise and less."""
    problem = three(snr_hz=np.array([1e7, snr_hz, 2e7]))
    allocation = build(name, policy).solve(problem, 0, 0)
    assert allocation.admitted.tolist() == [True, False, True]
    assert "no bandwidth helps devices 8: dropped devices 8 with 1 of the weight" in allocation.message
    alone = build(name, policy).solve(problem.take(np.array([0, 2])), 0, 0)
    np.testing.assert_array_equal(allocation.bandwidth_hz[[0, 2]], alone.bandwidth_hz)
    assert allocation.deadline_s == alone.deadline_s
    assert allocation.certificate == alone.certificate
    nobody = build(name, policy).solve(three(snr_hz=np.full(3, snr_hz)), 0, 0)
    assert not nobody.admitted.any()
    assert nobody.deadline_s == 0
    assert "dropped devices 7, 8, 9" in nobody.message


def test_a_device_that_may_drop_all_but_a_rounding_error_sends_nothing_without_a_block() -> None:
    """At 1 - rho_max = 1e-16 and next to no weight: what it keeps is zero, and not a few bits that take for ever."""
    problem = three(weight=np.array([1.0, 1e-40, 1.0]))
    problem = replace(problem, max_ratio=np.array([0.9, np.nextafter(1.0, 0.0), 0.9]))
    allocation = build("selective", "stretch").solve(problem, 0, 0)
    assert allocation.admitted.all()
    assert allocation.bandwidth_hz[1] == 0
    assert allocation.prune_ratio[1] == 1
    check_sound("selective", problem, allocation)
    silent = replace(problem, snr_hz=np.array([1e7, 0.0, 2e7]))  # which has to send that next to nothing, and cannot
    for name in FAST:
        check_who_is_dropped(name, silent, build(name, "stretch").solve(silent, 0, 0))


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name not in IGNORE_THE_DEADLINE])
def test_a_device_without_a_link_fails_by_name_under_fail(name: str) -> None:
    with pytest.raises(InfeasibleError, match="no bandwidth helps devices 8: raise"):
        build(name, "fail").solve(three(snr_hz=np.array([1e7, 0.0, 2e7])), 0, 0)
    with pytest.raises(ConfigError, match="deadline_s=inf: must be finite"):
        build(name, "stretch").solve(replace(three(), deadline_s=np.inf), 0, 0)


def test_the_unit_of_deadlines_is_finite_and_that_of_the_devices_with_a_link() -> None:
    problem = three(snr_hz=np.array([1e7, 0.0, 2e7]))
    deadline_s, bandwidth_hz = dense_deadline(problem)
    alone_s, alone_hz = dense_deadline(problem.take(np.array([0, 2])))
    assert deadline_s == alone_s
    np.testing.assert_array_equal(bandwidth_hz, [alone_hz[0], 0.0, alone_hz[1]])
    assert equal_dense_latency(problem) == equal_dense_latency(problem.take(np.array([0, 2]))) > alone_s
    assert equal_dense_latency(three(snr_hz=np.zeros(3))) == 0
    silent = three(snr_hz=np.zeros(3), payload_bits=np.array([0.0, 1e6, 1e6]))  # who has nothing to send needs no link
    assert dense_deadline(silent)[0] == 0.1
    ones, least_hz = np.ones(3), np.full(3, 15e6)
    crowded = replace(three(), limits=Limits(least_hz, ones * np.inf, ones * np.inf, ones, ones, ones))
    assert np.isfinite(dense_deadline(crowded)[0])
    kept = build("kkt", "drop").solve(replace(crowded, deadline_s=10.0), 0, 0)
    assert kept.admitted.sum() == 1  # of three that need three quarters of the band each
    with pytest.raises(
        InfeasibleError, match=r"'dense' .* breaks the total bandwidth: .* lower devices.min_bandwidth_mhz"
    ):
        build("dense", "stretch").solve(crowded, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payload_bits": np.array([1.0, 1.0, 5e-324])}, "device 9, payload_bits=5e-324: must be finite and >= 0"),
        ({"weight": np.array([1e-320, 1.0, 1.0])}, "device 7, weight=1e-320"),
        ({"snr_hz": np.array([1.0, np.inf, 1.0])}, "device 8, snr_hz=inf"),
        ({"fixed_s": np.array([0.0, 1e300, 0.0])}, r"device 8, fixed_s=1e\+300"),
    ],
)
def test_what_cannot_be_computed_with_is_refused_by_the_devices_name(
    change: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        three(**change)


def test_fair_shares_behind_a_deadline_whose_digits_end_too_soon_are_one_line() -> None:
    """An hour of upload behind 10^12 seconds: of that hour a deadline has eight digits, a certificate has nine."""
    problem = replace(three(fixed_s=np.full(3, 1e12)), bandwidth_hz=1.0, deadline_s=1e12 + 1.0)
    problem = replace(problem, snr_hz=np.full(3, 10**3.41025641025641), payload_bits=np.array([7e5, 7.9e5, 8e5]))
    with pytest.raises(InfeasibleError, match="cannot tell the fairest shares of devices 7, 8, 9 to the last digit"):
        build("proportional", "stretch").solve(problem, 0, 0)


def test_a_deadline_to_its_last_digit_is_met_or_moved() -> None:
    """An upload of a second on top of 1e12 seconds: the deadline's digits end at a ten-thousandth of a second."""
    for fixed_s in (1e9, 1e12, 1e14):
        problem = three(fixed_s=np.full(3, fixed_s))
        allocation = build("kkt", "stretch").solve(replace(problem, deadline_s=fixed_s), 0, 0)
        assert allocation.status == "stretched"
        assert 0 < allocation.deadline_s - fixed_s < max(2.0, 4 * np.spacing(fixed_s))
        check_sound("kkt", problem, allocation)


def test_p2_says_when_devices_without_a_link_keep_its_budget_from_being_met() -> None:
    problem = replace(three(snr_hz=np.array([1e7, 0.0, 2e7])), max_ratio=np.ones(3))
    with pytest.raises(
        InfeasibleError, match=r"ratio to 0.2: devices 8 without a link cost 0.3333; .* allocator.mean_ratio"
    ):
        min_latency(problem, 0.2)
    assert np.isfinite(min_latency(problem, 0.4))


@pytest.mark.parametrize("fraction", [0.0, -0.5, np.nan, np.inf, 1e7])
def test_a_fraction_that_is_no_deadline_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"fractions: .* is not allowed: must be > 0 and at most 1e\+06"):
        frontier(three(), [0.5, fraction])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_devices_without_a_weight_are_served_all_the_same(name: str, policy: str) -> None:
    problem = three(weight=np.zeros(3))
    check_sound(name, problem, build(name, policy).solve(problem, 0, 0))
    some = three(weight=np.array([0.0, 1.0, 0.0]), snr_hz=np.array([1e7, 0.0, 2e7]))
    if policy != "fail" or name in IGNORE_THE_DEADLINE:
        assert build(name, policy).solve(some, 0, 0).admitted.tolist() == [True, False, True]


# --- on the command line --------------------------------------------------------------------------------------------


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_tables_with_dead_links_are_answered() -> None:
    Path("dead.csv").write_text("shared_compute_s,payload_bits,fixed_s,snr_hz,weight\n0.1,1e6,0,0,1\n0.1,1e6,0,1e7,1\n")
    result = json.loads(call("allocate", "--devices", "dead.csv", "--json"))
    assert [device["binds"] for device in result["devices"]] == ["dropped", "deadline"]
    Path("weak.csv").write_text(
        "cpu_ghz,cycles_per_flop,tx_power_dbm,samples,gain_db\n1,1,23,40,-250\n1,1,23,40,-250\n"
    )
    result = json.loads(call("allocate", "channel.fading=none", "--devices", "weak.csv", "--json"))
    assert "dropped devices 0, 1" in result["message"]
    with pytest.raises(ConfigError, match=r"fractions 0.5,inf"):
        call("ladder", "devices.count=4", "--fractions", "0.5,inf")
