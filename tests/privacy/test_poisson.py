"""Devices that take part by a draw of their own: the draw, what it saves of epsilon, and that nothing else tells who came."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import forge, make_setup, read_lines, results, run_in_parts, run_to_end, sent_by, steps_of

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.errors import ConfigError
from fedprune_cli.privacy.accounting import Release, epsilon
from fedprune_cli.round import roster as rosters
from fedprune_cli.round.plan import plan_round
from fedprune_cli.round.receive import receive
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import Setup
from fedprune_cli.round.work import assign
from fedprune_cli.store.state import Array, State

SAMPLED = pytest.mark.skipif(find_spec("dp_accounting") is None, reason="needs the extra `privacy`")
WORLD = ("devices.count=8", "rounds=6", "deadline.fraction=0.6", "model.hidden=[24]")
CLIENT = (
    *WORLD, "privacy.dp=client", "privacy.epsilon=9", "privacy.delta=1e-3", "privacy.clip=0.5", "privacy.public_scores=true",
    "weights=uniform",
)  # fmt: skip
POISSON = (*CLIENT, "rounds=4", "participation.rate=0.15", "privacy.noise=20", "privacy.delta=1e-9")


def test_each_device_is_drawn_by_itself_whoever_else_can_be() -> None:
    """A draw of a fixed number would have sizes that do not vary, and pairs that are met less often."""
    rounds, rate, count = 1000, 0.3, 8
    setup = make_setup(*WORLD, f"participation.rate={rate}")
    everybody, few = np.arange(count), np.array([1, 4, 6])
    came = np.array([np.isin(everybody, rosters._drawn(setup, number, everybody)) for number in range(rounds)])
    spread = math.sqrt(rate * (1 - rate))
    assert np.abs(came.mean(0) - rate).max() < 4 * spread / math.sqrt(rounds)
    assert came.sum(1).var() == pytest.approx(count * rate * (1 - rate), rel=0.1)
    together = np.corrcoef(came.T) - np.eye(count)
    assert np.abs(together).max() < 4.5 / math.sqrt(rounds)
    for number in range(50):
        assert {*rosters._drawn(setup, number, few).tolist()} == {*few.tolist()} & {*np.flatnonzero(came[number])}


@pytest.mark.parametrize("options", [WORLD, CLIENT])
def test_a_rate_of_one_is_everybody(options: tuple[str, ...]) -> None:
    for plain, drawn in zip(
        steps_of(make_setup(*options), 4), steps_of(make_setup(*options, "participation.rate=1"), 4), strict=True
    ):
        assert plain.record == drawn.record
        assert plain.after.shared.tobytes() == drawn.after.shared.tobytes()


@SAMPLED
def test_epsilon_is_that_of_a_poisson_draw_by_the_accountant_itself() -> None:
    """Called as its own documentation does, with the event that says what is done, and by its other method as a bound."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    budget = make_setup(*CLIENT, "rounds=10", "participation.rate=0.25", "privacy.noise=8", "privacy.delta=1e-6").budget
    assert budget is not None
    assert (budget.one.rate, budget.one.times, budget.rounds) == (0.25, 1, 10)
    event = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(8.0))
    by_losses, by_renyi = (of().compose(event, 10).get_epsilon(1e-6) for of in (PLDAccountant, RdpAccountant))
    assert budget.spent(10) == pytest.approx(by_losses, rel=0.005)
    assert budget.spent(10) < by_renyi < epsilon(Release(8.0, 1.0, 10), 1e-6)


@SAMPLED
@pytest.mark.slow
def test_epsilon_is_what_opacus_says() -> None:
    """Opacus 1.6.0, PRVAccountant (Gopi et al., NeurIPS 2021): noise 1.0, rate 0.1, 100 steps, delta 1e-5."""
    wide = ("rounds=100", "participation.rate=0.1", "privacy.noise=1", "privacy.delta=1e-5")
    budget = make_setup(*CLIENT, *wide).budget
    assert budget is not None
    assert budget.spent(100) == pytest.approx(7.0571, rel=0.02)


@SAMPLED
def test_only_a_poisson_draw_of_devices_is_given_its_gain() -> None:
    """Neither is a draw of a fixed number, nor one that takes all samples of a device together."""
    given = (*CLIENT, "privacy.noise=10", "privacy.delta=1e-6")
    drawn, fixed = (make_setup(*given, more).budget for more in ("participation.rate=0.5", "devices.per_round=4"))
    assert drawn is not None
    assert fixed is not None
    assert (drawn.one.rate, drawn.rounds) == (0.5, 6)
    assert (fixed.one.rate, fixed.rounds) == (1.0, 3)
    assert drawn.spent(6) < fixed.spent(3) < fixed.spent(6)
    samples = (
        "privacy.dp=example",
        "privacy.public_samples=true",
        "privacy.noise=60",
        "rounds=2",
        "training.shared_steps=1",
        "training.personal_steps=1",
    )
    one, all_ = (make_setup(*CLIENT, *samples, *more).budget for more in (("participation.rate=0.5",), ()))
    assert one is not None
    assert all_ is not None
    assert one.one == all_.one


def after_draw(setup: Setup, state: State, training: Array) -> tuple[Array, dict[int, bytes]]:
    """Returns u after a round that the draw took `training` in, and what each of them sent."""
    sent = sent_by(setup, state, training)
    return receive(setup, state, sent)[1], {update.device: update.shared.tobytes() for update in sent.updates}


@SAMPLED
@pytest.mark.parametrize("pruner", ["magnitude", "taylor"])
def test_nothing_but_its_own_clipped_change_tells_whether_a_device_came(pruner: str) -> None:
    """The law that the gain rests on: the others send the same, and the sum is divided by the same, with one more and without."""
    rate, clip = 0.4, 0.02
    setup = make_setup(*CLIENT, "participation.rate=0.4", "privacy.noise=9", f"privacy.clip={clip}", f"pruner={pruner}")
    state = steps_of(setup, 2)[-1].after
    roster = choose_roster(setup, state.round, state.slots)
    plan = plan_round(setup, roster, state.slots)
    expected = assign(setup, state, roster, plan).expected
    assert expected is not None
    assert plan.allocation.prune_ratio.max() > 0
    own: Array | None = None
    for others in ((), (2,), (0, 3, 7), (0, 1, 2, 3, 4, 6, 7)):
        without, sent = after_draw(setup, state, np.array(others, dtype=int))
        more, also = after_draw(setup, state, np.sort([*others, 5]))
        assert {device: also[device] for device in others} == sent
        apart = (more.astype(float) - without)[expected.order[: len(expected.keepers)]] * expected.keepers
        assert np.linalg.norm(apart) == pytest.approx(clip, rel=1e-3)  # which is shorter than what it learns
        own = apart if own is None else own
        np.testing.assert_allclose(apart, own, atol=1e-5)  # the same, whoever else came
        assert not np.array_equal(without, state.shared)  # also where nobody came
    assert expected.keepers.max() == pytest.approx(rate * 8)


@SAMPLED
def test_a_round_without_anybody_is_noise_of_the_same_scale() -> None:
    setup = make_setup(*POISSON, "allocator=dense", "model.hidden=[256]", "privacy.epsilon=900")
    state = setup.initial
    new, _ = after_draw(setup, state, np.zeros(0, dtype=int))
    assert (new - state.shared).std() == pytest.approx(0.5 * 20 / (0.15 * 8), rel=0.02)


@SAMPLED
def test_a_run_is_audited_with_its_draws_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    setup = make_setup(*POISSON)
    lines = run_to_end(tmp_path / "whole", *POISSON)
    came = [line["devices"]["id"] for line in lines]
    assert [] in came  # which is noise alone, and counts
    assert len({len(ids) for ids in came}) > 1
    assert "the draw took none of 8 devices" in lines[came.index([])]["message"]
    spent = [line["privacy"]["epsilon"] for line in lines]
    assert spent == [pytest.approx(setup.budget.spent(number)) for number in range(1, 5)]  # type: ignore[union-attr]
    assert not verify_run(setup, tmp_path / "whole", 3).failures

    run_in_parts(tmp_path / "parts", *POISSON, stops=2)
    assert results(tmp_path / "whole") == results(tmp_path / "parts")

    lines = read_lines(tmp_path / "whole")
    at = next(number for number, ids in enumerate(came) if ids)
    lines[at]["privacy"]["devices"] = 0
    for key, column in lines[at]["devices"].items():
        lines[at]["devices"][key] = [] if isinstance(column, list) else column
    forge(tmp_path / "whole", records=lines)
    told = " ".join(verify_run(setup, tmp_path / "whole", 3).failures)
    assert f"round {at + 1}: the recorded allocation is not what the configuration gives" in told


def test_a_round_that_draws_nobody_rests_where_nothing_is_a_secret(tmp_path: Path) -> None:
    options = (*WORLD, "participation.rate=0.15")
    lines = run_to_end(tmp_path / "run", *options)
    idle = [line for line in lines if line["status"] == "idle"]
    assert idle
    assert len(idle) < 6
    assert all(line["message"] == "the draw took none of the 8 devices that could take part" for line in idle)
    assert not verify_run(make_setup(*options), tmp_path / "run", 2).failures


@SAMPLED
def test_a_budget_of_draws_ends_by_name(tmp_path: Path) -> None:
    options = (*CLIENT, "participation.rate=0.5", "privacy.noise=5", "privacy.epsilon=0.75", "privacy.delta=1e-5")
    lines = run_to_end(tmp_path / "run", *options)
    status = [line["status"] for line in lines]
    assert "spent" in status
    assert status == sorted(status, key="spent".__eq__)
    assert lines[-1]["privacy"]["epsilon"] <= 0.75
    assert not verify_run(make_setup(*options), tmp_path / "run", 2).failures


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("participation.rate=0",), "participation.rate=0: must be in (0, 1] or null"),
        (("participation.rate=0.5", "devices.per_round=2"), "participation.rate=0.5: not with devices.per_round=2"),
        (
            (*WORLD, "participation.rate=0.5", "privacy.secure=true"),
            "participation.rate=0.5: not with privacy.secure=true: an entry is of at least privacy.least + privacy.spare = 5",
        ),
    ],
)
def test_a_rate_that_makes_no_sense_is_refused(options: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_setup(*options)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("privacy.secure=true", "the server of a secure sum knows who takes part"),
        ("failsafe.late=drop", "failsafe.late=drop: not with privacy.dp=client: and participation.rate=0.5"),
        ("failsafe.safe_ratio=true", "failsafe.safe_ratio=true"),
        ("participation.rotation=true", "participation.rotation=true"),
        ("deadline.total_seconds=9", "deadline.total_seconds=9.0"),
        ("weights=pruning_error privacy.public_samples=true", "weights=pruning_error"),
    ],
)
def test_what_would_tell_who_came_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_setup(*CLIENT, "participation.rate=0.5", *override.split())
    assert told in str(caught.value)
