"""Protected rounds: what the server has of them, what they cost, what the records say, and what an audit finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import forge, make_setup, read_lines, results, run_in_parts, run_to_end, sent_by, steps_of

pytest.importorskip("cryptography")

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.errors import ConfigError
from fedprune_cli.privacy import secure
from fedprune_cli.privacy.secure import exchanged_bytes
from fedprune_cli.round import protect
from fedprune_cli.round.protect import Ranked
from fedprune_cli.round.receive import receive
from fedprune_cli.runs import life
from fedprune_cli.store import folder

WORLD = ("devices.count=8", "rounds=3", "deadline.fraction=0.7", "model.hidden=[24]")
SECURE = (*WORLD, "privacy.secure=true")
CLIENT = (
    *WORLD, "privacy.dp=client", "privacy.epsilon=9", "privacy.delta=1e-3", "privacy.clip=0.5", "privacy.public_scores=true",
    "weights=uniform",
)  # fmt: skip
T_OF_THREE = 4.303  # Student's t at 97.5 % of two degrees of freedom


def test_a_secure_round_is_the_plain_one_up_to_the_fixed_point() -> None:
    """With what everybody keeps and the same schedule; the mean gradient as well."""
    dense = ("allocator=dense", "pruner=taylor")
    plain, hidden = (steps_of(make_setup(*of, *dense), 1)[0] for of in (WORLD, SECURE))
    step = 1.0 / (2**17 - 1)
    assert np.abs(plain.after.shared - hidden.after.shared).max() < step
    assert not np.array_equal(plain.after.shared, plain.before.shared)
    assert np.allclose(plain.after.slots["gradient"], hidden.after.slots["gradient"], atol=2 * step / 0.15)


def test_no_entry_is_sent_that_few_keep_and_what_that_costs_is_recorded() -> None:
    for step in steps_of(make_setup(*SECURE, "deadline.fraction=0.5"), 3):
        log, ratios = step.record.privacy, np.array(step.record.devices.prune_ratio)
        assert log is not None
        assert log.refused == ""
        assert (log.keepers or 0) >= 5
        assert (np.sort(ratios)[:5] == ratios.min()).all()
        assert step.record.mean_ratio == pytest.approx(ratios.mean())
    withheld = [
        step.record.privacy.withheld
        for step in steps_of(make_setup(*SECURE, "deadline.fraction=0.5"), 3)
        if step.record.privacy
    ]
    assert max(withheld) > 0.01


def test_records_hold_no_score_of_one_device_unless_it_is_no_secret() -> None:
    hidden = steps_of(make_setup(*SECURE), 1)[0].record
    assert hidden.train_loss is None
    assert set(hidden.devices.train_loss) == {None}
    assert hidden.devices.accuracy is None
    assert hidden.accuracy is not None
    shown = steps_of(make_setup(*SECURE, "privacy.public_scores=true"), 1)[0].record
    assert shown.train_loss is not None
    assert shown.devices.accuracy is not None


def test_keys_and_shares_are_metered_and_planned_for() -> None:
    """Every device sends them besides, and meets its deadline."""
    plain, hidden = (steps_of(make_setup(*of, "allocator=dense"), 1)[0].record for of in (WORLD, SECURE))
    up, down = exchanged_bytes(8)
    more = np.array(hidden.devices.bytes_up) - np.array(plain.devices.bytes_up)
    assert (more == up).all()
    assert hidden.bytes_down - plain.bytes_down == down
    assert hidden.latency_s > plain.latency_s
    assert hidden.joules > plain.joules
    for step in steps_of(make_setup(*SECURE, "faults.clock_error=0.0"), 2):
        assert step.record.latency_s <= (step.record.deadline_s or 0) * 1.01


def test_no_round_and_no_configuration_uses_the_mask_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, int]] = []

    def noted(key: bytes, size: int) -> np.ndarray:
        seen.append((key, size))
        return np.zeros(size, dtype=np.uint32)

    monkeypatch.setattr(secure, "mask_stream", noted)
    for options in (SECURE, (*SECURE, "privacy.bits=17"), (*SECURE, "seed=1")):
        before = len(seen)
        steps_of(make_setup(*options), 2)
        keys = [key for key, _ in seen[before:]]
        pairs, owns = 8 * 7 // 2, 8
        assert len({*keys}) == 2 * (pairs + owns)  # of two rounds; both ends of a pair have the same
        assert not {*keys} & {key for key, _ in seen[:before]}


def test_too_few_survivors_leave_u_as_it_was_and_the_record_says_why() -> None:
    steps = steps_of(make_setup(*SECURE, "faults.die=0.5", "privacy.least=3"), 3)
    refused = [step for step in steps if step.record.privacy and step.record.privacy.refused]
    assert refused
    for step in refused:
        assert np.array_equal(step.before.shared, step.after.shared)
        assert "the threshold is 6" in str(step.record.privacy)
        assert step.record.privacy is not None
        assert step.record.privacy.devices == 0


def test_dropouts_do_not_change_what_the_others_sum_to(tmp_path: Path) -> None:
    lines = run_to_end(
        tmp_path / "run", *SECURE, "faults.die=0.1", "privacy.least=3", "privacy.threshold=0.5", "privacy.spare=2"
    )
    died = [line["faults"]["died"] for line in lines]
    assert any(died)
    assert [line["privacy"]["devices"] for line in lines] == [8 - len(gone) for gone in died]
    assert not verify_run(
        make_setup(*SECURE, "faults.die=0.1", "privacy.least=3", "privacy.threshold=0.5", "privacy.spare=2"),
        tmp_path / "run",
        3,
    ).failures


@pytest.mark.parametrize("options", [SECURE, (*CLIENT, "privacy.secure=true")])
def test_a_run_that_goes_on_has_the_bytes_of_one_that_never_stopped(tmp_path: Path, options: tuple[str, ...]) -> None:
    run_to_end(tmp_path / "whole", *options)
    run_in_parts(tmp_path / "parts", *options, stops=1)
    assert results(tmp_path / "whole") == results(tmp_path / "parts")


def test_a_run_without_privacy_says_nothing_of_it(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run", *WORLD)
    assert "privacy" not in (tmp_path / "run" / folder.CONFIG).read_text()
    assert all("privacy" not in line for line in read_lines(tmp_path / "run"))
    assert life.reopen(tmp_path / "run").experiment.privacy.none


def test_what_is_clipped_is_no_longer_than_clip_and_the_server_adds_the_noise() -> None:
    change = np.random.default_rng(0).normal(size=500)
    assert np.linalg.norm(protect.clipped(change, 0.5)) == pytest.approx(0.5)
    assert np.array_equal(protect.clipped(change * 1e-3, 0.5), change * 1e-3)
    setup = make_setup(*CLIENT)
    assert setup.budget is not None
    nothing = Ranked(np.arange(40_000), range(8), [40_000] * 8, {device: np.zeros(40_000) for device in range(8)})
    total = protect._noised_total(setup, 0, nothing)
    assert total.std() == pytest.approx(0.5 * setup.budget.one.noise, rel=0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e10])
@pytest.mark.parametrize("options", [(*CLIENT, "deadline.fraction=0.5"), SECURE])
def test_a_device_whose_update_is_not_sound_is_in_the_sum_without_a_change(
    options: tuple[str, ...], bad: float
) -> None:
    """Were it refused, the sum would be divided by one less, and the log would name it: both tell what only its data decide."""
    setup = make_setup(*options)
    state, sent = setup.initial, sent_by(setup, setup.initial)
    at, mine = 3, sent.updates[3]
    found = []
    for shared in (np.full_like(mine.shared, bad), state.shared[sent.masks[mine.device]]):
        updates = [*sent.updates[:at], replace(mine, shared=shared), *sent.updates[at + 1 :]]
        found.append(receive(setup, state, replace(sent, updates=updates)))
    (delivery, unsound, _), (quiet, nothing, _) = found
    assert unsound.tobytes() == nothing.tobytes()
    assert delivery.privacy == quiet.privacy
    assert delivery.log == quiet.log
    assert delivery.privacy
    assert delivery.privacy.devices == 8


def test_devices_together_add_the_noise_even_when_as_many_are_gone_as_may_be() -> None:
    setup = make_setup(*CLIENT, "privacy.secure=true", "privacy.least=3", "privacy.threshold=0.6")
    assert setup.budget is not None
    counts = [30_000, 30_000, 30_000, 30_000, 20_000, 20_000, 20_000, 20_000]
    left = [*range(5)]  # of eight, three are gone: the threshold is 5
    ranked = Ranked(np.arange(30_000), range(8), counts, {device: np.zeros(counts[device]) for device in left})
    point = protect.fixed_point(setup, range(8))
    whole = protect._whole(setup, 0, ranked, point)
    total = sum(np.pad(mine, (0, 30_000 - len(mine))) for mine in whole.values()) * point.step / 0.5
    wanted = setup.budget.one.noise
    assert total[:20_000].std() == pytest.approx(wanted, rel=0.03)  # five of at least five
    assert total[20_000:].std() == pytest.approx(wanted * np.sqrt(4 / 3), rel=0.03)  # four of at least three


@pytest.mark.parametrize("curious", [1, 2])
def test_the_noise_is_enough_without_that_of_curious_devices_when_as_many_are_gone_as_may_be(curious: int) -> None:
    options = (*CLIENT, "privacy.secure=true", "privacy.least=4", "privacy.threshold=0.65")
    setup = make_setup(*options, f"privacy.curious={curious}")
    assert setup.budget is not None
    assert setup.budget.one.noise == make_setup(*options).budget.one.noise  # type: ignore[union-attr]
    counts = [30_000] * 4 + [20_000] * 4
    honest = [*range(6 - curious)]  # of eight, two are gone and `curious` have told what they added
    ranked = Ranked(np.arange(30_000), range(8), counts, {device: np.zeros(counts[device]) for device in honest})
    point = protect.fixed_point(setup, range(8))
    whole = protect._whole(setup, 0, ranked, point)
    total = sum(np.pad(mine, (0, 30_000 - len(mine))) for mine in whole.values()) * point.step / 0.5
    assert total[:20_000].std() == pytest.approx(setup.budget.one.noise, rel=0.03)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (("privacy.secure=true", "privacy.least=4", "privacy.curious=3"), r"3: must be in 0\.\.2"),
        (("privacy.secure=true", "privacy.curious=-1"), r"-1: must be in 0\.\.3"),
        (("privacy.secure=true", "privacy.least=8", "privacy.curious=4"), "4: with 6 of 8 devices asked in the end"),
        (("privacy.curious=1",), "1: must be 0 unless secure=true and dp=client"),
    ],
)
def test_a_number_of_curious_devices_that_means_nothing_is_refused(options: tuple[str, ...], allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"privacy.curious={allowed}"):
        make_setup(*CLIENT, *options)


def test_a_spent_budget_ends_the_training_by_name(tmp_path: Path) -> None:
    options = (*CLIENT, "rounds=4", "privacy.noise=1.2", "privacy.epsilon=4")
    lines = run_to_end(tmp_path / "run", *options)
    status = [line["status"] for line in lines]
    assert status[:2] == ["optimal", "optimal"]
    assert status[2:] == ["spent", "spent"]
    assert "has spent its privacy budget: epsilon 3." in lines[-1]["message"]
    spent = [line["privacy"]["epsilon"] for line in lines]
    assert spent[0] < spent[1] == spent[2] == spent[3] <= 4
    assert not verify_run(make_setup(*options), tmp_path / "run", 4).failures


@pytest.mark.parametrize(
    ("key", "value"),
    [("keepers", 4), ("epsilon", 0.1), ("noise", 9.0), ("clip", 0.25), ("withheld", 0.3), ("bits", 12), ("devices", 7)],
)
def test_an_audit_finds_what_does_not_follow_from_the_configuration(tmp_path: Path, key: str, value: float) -> None:
    options = (*CLIENT, "rounds=1", "privacy.secure=true")
    run_to_end(tmp_path / "run", *options)
    assert not verify_run(make_setup(*options), tmp_path / "run", 1).failures
    lines = read_lines(tmp_path / "run")
    lines[0]["privacy"][key] = value
    forge(tmp_path / "run", records=lines)
    assert any(f"privacy.{key}" in what for what in verify_run(make_setup(*options), tmp_path / "run", 1).failures)


def test_where_nothing_is_shared_nothing_is_exchanged(tmp_path: Path) -> None:
    options = (*SECURE, "method=local", "rounds=1")
    (line,) = run_to_end(tmp_path / "run", *options)
    assert line["bytes_up"] == 0
    assert line["privacy"]["refused"] == "nobody sends anything"
    assert not verify_run(make_setup(*options), tmp_path / "run", 1).failures


def test_too_few_devices_for_a_sum_are_refused_before_the_first_round() -> None:
    with pytest.raises(ConfigError, match="there are 4"):
        make_setup("privacy.secure=true", "devices.count=4")


@pytest.mark.slow
def test_accuracy_at_18_bits_is_that_of_float32() -> None:
    """Of the same devices on the same seeds: the mean difference is within its own interval and half a point, or there is none."""
    options = ("devices.count=20", "rounds=10", "evaluation.every=10", "training.shared_steps=10", "training.personal_steps=10",
               "training.batch_size=32", "model.hidden=[64]", "allocator=dense")  # fmt: skip

    def accuracy(seed: int, *more: str) -> float:
        return float(steps_of(make_setup(*options, f"seed={seed}", *more), 10)[-1].record.accuracy or 0)

    plain, hidden = ([accuracy(seed, *more) for seed in range(3)] for more in ((), ("privacy.secure=true",)))
    apart = np.array(hidden) - plain
    half = T_OF_THREE * apart.std(ddof=1) / np.sqrt(3)
    print(
        f"accuracy % in float32 {np.mean(plain):.2%}, at 18 bits {np.mean(hidden):.2%}, apart {apart.mean():+.2%} ± {half:.2%}"
    )
    assert min(plain) > 0.8  # there is something to lose
    assert abs(apart.mean()) <= min(half, 0.005) or not apart.any()
