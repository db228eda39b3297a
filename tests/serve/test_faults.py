"""Faults and fail-safes: what never happens changes no byte, what does is drawn, logged, remembered and survived."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import composed, make_experiment, make_setup, outcome, results, run_to_end
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedprune_cli import CONF
from fedprune_cli.allocate.problem import latency
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.errors import ConfigError, DeviceError
from fedprune_cli.learn.batched import train_block
from fedprune_cli.learn.client import Update, train
from fedprune_cli.learn.prune import Masks
from fedprune_cli.report.read import read_run
from fedprune_cli.report.run import fault_sections, write_report
from fedprune_cli.round.plan import Beliefs, round_problems
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import build_learner
from fedprune_cli.round.work import train_devices, training_task
from fedprune_cli.runs import life
from fedprune_cli.sections import part_of
from fedprune_cli.serve.aggregate import Contribution, Mean, Median, TrimmedMean
from fedprune_cli.serve.deliver import Arrival, Delivery, Sent, UnderWay, deliver
from fedprune_cli.serve.failsafe import LATE_POLICIES, MAX_CAUTION, RECOVERY, Failsafe, with_margins
from fedprune_cli.store import folder
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.record import KINDS, FaultLog
from fedprune_cli.store.state import Array, State, untrained
from fedprune_cli.world.faults import FAULTS, Fates, Garbler, Moment, Poisoner

NO_FAULTS = make_experiment().faults
PLAIN = make_experiment().failsafe
POISON = Poisoner(NO_FAULTS.poison, NO_FAULTS.poison_scale)
ALL = (
    "devices=sampled", "faults=flaky", "faults.die=0.2", "faults.lose_enter=0.2", "faults.stale=0.3", "faults.nan_share=0.25",
    "faults.poisoned_share=0.25", "faults.clock_error=0.3", "faults.channel_error=0.3", "failsafe.late=defer",
    "failsafe.clip_norm=1", "failsafe.safe_ratio=true", "failsafe.quarantine_after=2", "failsafe.quarantine_rounds=2",
    "channel.outage_enter=0.1", "rounds=8", "pruner=taylor", "payload.bits=[4,8]",
)  # fmt: skip


# --- runs -----------------------------------------------------------------------------------------------------------


def test_faults_that_never_happen_change_no_byte(tmp_path: Path) -> None:
    run_to_end(tmp_path / "without")
    zeros = ("faults=poisoned", "faults.poisoned_share=0", "failsafe.wait_factor=3", "failsafe.max_staleness=0")
    run_to_end(tmp_path / "zeros", *zeros)
    assert results(tmp_path / "zeros") == results(tmp_path / "without")
    assert b"faults" not in (tmp_path / "without" / "rounds.jsonl").read_bytes()
    assert set(make_setup().initial.slots) == {"prune_ratio", "simulated_s"}
    # the machinery switched on with nothing to do: the same figures, and a log of nothing
    records = run_to_end(
        tmp_path / "idle", "failsafe.late=drop", "failsafe.quarantine_after=1", "failsafe.outlier_norm=99"
    )
    log = {kind: [] for kind in KINDS} | {"waited_s": 0.0}
    without = [json.loads(line) for line in (tmp_path / "without" / "rounds.jsonl").read_text().splitlines()]
    assert records == [record | {"faults": log} for record in without]


def test_runs_with_every_fault_are_the_same_bytes_and_sound(tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "whole", *ALL)
    seen = {kind for record in records for kind in KINDS if record["faults"][kind]}
    assert seen >= {"died", "lost", "delayed", "late", "refused", "stale", "clipped", "safe", "quarantined"}
    assert verify_run(life.reopen(tmp_path / "whole"), tmp_path / "whole", every=0).failures == ()
    run_to_end(tmp_path / "processes", *ALL, "execution.kind=processes", "execution.workers=2")
    assert results(tmp_path / "processes") == results(tmp_path / "whole")
    life.create(make_setup(*ALL), composed(*ALL), tmp_path / "stopped")
    unfinished = life.run(make_setup(*ALL), tmp_path / "stopped")
    for record in unfinished:  # with updates under way
        log = record.faults
        if record.round > 1 and log and {*log.late, *log.delayed} - {*log.refused}:
            break
    unfinished.close()
    assert len(folder.load(tmp_path / "stopped", make_setup(*ALL).experiment.config_hash).state.slots["way_due"])
    list(life.run(life.reopen(tmp_path / "stopped"), tmp_path / "stopped"))
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_faults_find_nothing_to_spoil_in_a_method_that_sends_nothing(tmp_path: Path) -> None:
    everything = (
        *ALL,
        "payload.bits=[32]",
        "pruner=magnitude",
        "failsafe.aggregation=median",
    )
    records = run_to_end(tmp_path / "run", "method=local", *everything)
    assert all(record["bytes_up"] == 0 for record in records)


@pytest.mark.parametrize(
    ("late", "fault"),
    [
        ("wait", "faults.die=1"),
        ("drop", "faults.die=1"),
        ("defer", "faults.die=1"),
        ("drop", "faults.lose_enter=1 faults.lose_leave=1e-9"),
        ("defer", "faults.stale=1 failsafe.max_staleness=0"),
        ("wait", "faults.nan_share=1"),
        ("defer", "channel.outage_enter=1 channel.outage_leave=1e-9"),
    ],
)
def test_a_run_in_which_nothing_arrives_goes_on_and_changes_nothing(tmp_path: Path, late: str, fault: str) -> None:
    overrides = (*fault.split(), f"failsafe.late={late}", "allocator.on_infeasible=drop", "failsafe.aggregation=median")
    records = run_to_end(tmp_path / "run", *overrides)
    setup = make_setup(*overrides)
    state = folder.load(tmp_path / "run", setup.experiment.config_hash).state
    np.testing.assert_array_equal(state.shared, setup.initial.shared)
    for record in records:
        if record["status"] != "idle" and fault != "faults.nan_share=1":  # garbage does arrive
            assert record["latency_s"] == record["deadline_s"]
        if fault == "faults.die=1":
            assert record["train_loss"] is None
            assert record["faults"]["died"] == record["devices"]["id"]
    if fault == "faults.die=1":
        np.testing.assert_array_equal(list(state.personal), list(setup.initial.personal))


def test_poison_that_makes_training_diverge_ends_no_run(tmp_path: Path) -> None:
    overrides = (
        "faults.poisoned_share=0.5",
        "faults.poison_scale=1e7",
        "training.lr=0.5",
        "rounds=4",
        "payload.bits=[8]",
    )
    records = run_to_end(tmp_path / "run", *overrides)
    assert any(record["faults"]["refused"] for record in records)
    state = folder.load(tmp_path / "run", make_setup(*overrides).experiment.config_hash).state
    assert np.isfinite(state.shared).all()
    assert all(np.isfinite(row).all() for row in state.personal)


@pytest.mark.parametrize("bits", [8, 32])
def test_who_diverged_keeps_its_personal_part(bits: int) -> None:
    setup = make_setup("faults=poisoned")
    learner = build_learner(setup.experiment, setup.scenario)
    size = setup.blueprint.cost.shared_params
    task = training_task(setup, setup.initial, Masks(np.arange(size), np.full(4, size)), 1, bits)
    task = dataclasses.replace(task, shared=np.full_like(task.shared, 1e30))
    for update in (train(learner, task), train_block(learner, [task])[0]):
        assert not np.isfinite(update.shared).all()
        assert update.train_loss is None

    class Once:
        def map(self, f: Any, tasks: Any, cost: Any) -> list[Any]:
            return [f(learner, each) for each in tasks]

    for batched in (True, False):
        (kept,) = train_devices(dataclasses.replace(setup, batched=batched), Once(), [task])
        np.testing.assert_array_equal(kept.personal, task.personal)
        assert (kept.train_loss, kept.rounding_error) == (None, None)
    with pytest.raises(DeviceError, match="the training loss is nan"):
        train(learner, dataclasses.replace(task, may_diverge=False))


def test_the_dead_are_waited_for_and_what_they_spent_is_counted(tmp_path: Path) -> None:
    alive = run_to_end(tmp_path / "alive", "rounds=1")[0]
    dying = run_to_end(tmp_path / "dying", "rounds=1", "faults.die=0.5", "failsafe.wait_factor=2")[0]
    dead = set(dying["faults"]["died"])
    assert 0 < len(dead) < 4
    assert dying["latency_s"] == 2 * dying["deadline_s"]
    assert np.isclose(dying["faults"]["waited_s"], 2 * dying["deadline_s"] - alive["latency_s"], rtol=1e-3)
    for row, device in enumerate(dying["devices"]["id"]):
        before, after = ({key: record["devices"][key][row] for key in alive["devices"]} for record in (alive, dying))
        spent = ("joules", "compute_s", "uplink_s", "bytes_up", "latency_s")
        if device not in dead:
            assert before == after | {"accuracy": before["accuracy"]}
            continue
        assert all(after[key] <= before[key] for key in spent)
        assert 0 < after["joules"] < before["joules"]
        # it stops in the order of its work: it has sent nothing until it has computed everything
        assert after["uplink_s"] == 0 or np.isclose(after["compute_s"], before["compute_s"])


def test_estimates_that_are_wrong_make_devices_late_and_the_margin_brings_them_back(tmp_path: Path) -> None:
    wrong = ("faults.clock_error=0.5", "rounds=8")
    late = {}
    for name, more in (
        ("wait", ()),
        ("drop", ("failsafe.late=drop",)),
        ("safe", ("failsafe.late=drop", "failsafe.safe_ratio=true")),
    ):
        records = run_to_end(tmp_path / name, *wrong, *more)
        late[name] = [len(record["faults"]["late"]) for record in records]
        for record in records:
            if name == "wait":
                assert record["latency_s"] == max(record["devices"]["latency_s"])
                assert (record["latency_s"] > 1.01 * record["deadline_s"]) == bool(record["faults"]["late"])
            else:
                assert record["latency_s"] <= 1.01 * record["deadline_s"]
    assert sum(late["drop"]) > 0
    assert sum(late["safe"][4:]) < sum(late["drop"][4:])


# --- what the server takes ------------------------------------------------------------------------------------------


def _sent(state: State, values: Sequence[Array], latency_s: Any = 1.0, **fate: Any) -> Sent:
    """What devices 0, 1, ... send that keep everything, under a deadline of 1 s."""
    count, size = len(values), len(state.shared)
    no = np.zeros(count, dtype=bool)
    fates = Fates(no, np.ones(count), no, np.zeros(count, np.int64), [None] * count)
    updates = [Update(at, value, np.zeros(0, np.float32), 1.0, 4 * size) for at, value in enumerate(values)]
    return Sent(
        updates, Masks(np.arange(size), np.full(count, size)), dataclasses.replace(fates, **fate),
        Moment(0, state.round, 9, count, np.arange(count)), np.full(count, 1.0) * latency_s, 1.0,
    )  # fmt: skip


def _deliver(failsafe: Failsafe, values: list[Array], latency_s: Any = 1.0, **fate: Any) -> Delivery:
    size, count = len(values[0]), len(values)
    sizes = Sizes(count, size)
    slots = {**failsafe.slots(sizes), **UnderWay(failsafe.policy.defers).slots(sizes)}
    state = State(0, np.zeros(size, np.float32), untrained(np.zeros(0, np.float32), count), slots)
    return deliver(failsafe, state, _sent(state, values, latency_s, **fate))


def _combined(arrivals: Sequence[Arrival], failsafe: Failsafe) -> Array:
    """The new u where each of the devices has one sample."""
    added = [Contribution(one.mask, one.values, 1 / (1 + one.age), 0.1) for one in arrivals]
    return failsafe.aggregator.combine(np.zeros(5, np.float32), added)[0]


@pytest.mark.parametrize("kind", ["nan", "inf", "misshapen"])
@pytest.mark.parametrize("aggregation", ["mean", "median", "trimmed_mean"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_refused_update_changes_nothing(kind: str, aggregation: str, clip_norm: float | None) -> None:
    failsafe = dataclasses.replace(PLAIN, aggregation=aggregation, clip_norm=clip_norm)
    values = list(np.random.RandomState(0).normal(size=(4, 5)).astype(np.float32))
    with_it = _deliver(failsafe, values, forgers=[None, None, None, Garbler(kind)])
    assert with_it.log.refused == [3]
    assert with_it.log.poisoned == []
    without = _deliver(failsafe, values[:3])
    np.testing.assert_array_equal(_combined(with_it.arrivals, failsafe), _combined(without.arrivals, failsafe))


def test_what_is_late_is_not_also_delayed() -> None:
    late, delay = np.array([False, True, False, True]), np.array([0, 0, 3, 3])
    decided = {
        name: [column.tolist() for column in policy().decide(late, delay)] for name, policy in LATE_POLICIES.items()
    }
    never = [False] * 4
    assert decided == {
        "wait": [[0, 0, 3, 0], never],
        "drop": [[0, 0, 3, 0], late.tolist()],
        "defer": [[0, 1, 3, 1], never],
    }


def test_late_updates_follow_the_policy_and_stale_ones_count_less() -> None:
    values = [np.full(5, value, np.float32) for value in (1, 3)]
    ends = {}
    for late in ("wait", "drop", "defer"):
        failsafe = dataclasses.replace(PLAIN, late=late)
        delivery = _deliver(failsafe, values, latency_s=np.array([0.5, 1.5]))
        assert delivery.log.late == [1]
        ends[late] = delivery.latency_s, [arrival.device for arrival in delivery.arrivals]
    assert ends == {"wait": (1.5, [0, 1]), "drop": (1.0, [0]), "defer": (1.0, [0])}
    assert delivery.under_way["way_due"].tolist() == [1]

    def next_round(number: int, old: float, **slots: Array) -> Delivery:
        nothing = untrained(np.zeros(0, np.float32), 2)
        state = State(number, np.full(5, old, np.float32), nothing, {**delivery.under_way, **slots})
        return deliver(failsafe, state, _sent(state, []))

    taken = next_round(2, 10.0)
    assert taken.log.stale == [1]
    assert taken.arrivals[0].age == 2
    assert taken.arrivals[0].values.tolist() == [13] * 5  # its change of u, on what u is now
    assert len(taken.under_way["way_due"]) == 0
    assert next_round(3, 10.0).log.expired == [1]
    assert next_round(2, 10.0, quarantined_until=np.array([0, 9])).log.expired == [1]
    fresh = Arrival(0, np.ones(5, bool), np.full(5, 1, np.float32))
    assert _combined([fresh, taken.arrivals[0]], PLAIN).tolist() == [4] * 5  # (1 + 13 / 3) / (1 + 1 / 3)


def test_an_update_of_an_earlier_round_is_clipped_and_judged_like_every_other() -> None:
    failsafe = dataclasses.replace(PLAIN, late="defer", clip_norm=2.0, quarantine_after=3, outlier_norm=5.0)
    values = [np.full(5, value, np.float32) for value in (1, 1, 100)]
    sent = _deliver(failsafe, values, latency_s=np.array([0.5, 0.5, 1.5]))
    assert (sent.log.late, sent.log.clipped, sent.log.outliers) == ([2], [], [])
    state = State(1, np.zeros(5, np.float32), untrained(np.zeros(0, np.float32), 3), sent.under_way)
    delivery = deliver(failsafe, state, _sent(state, values[:2]))
    assert (delivery.log.stale, delivery.log.clipped, delivery.log.outliers) == ([2], [2], [2])
    np.testing.assert_allclose(delivery.arrivals[-1].values, 2)


def test_the_log_names_those_that_are_planned_with_a_margin() -> None:
    failsafe = dataclasses.replace(PLAIN, safe_ratio=True)
    values = [np.ones(5, np.float32)] * 3
    assert _deliver(failsafe, values).log.safe == []
    slots = {"caution": np.array([1.0, 1.5, 1.0])}
    state = State(0, np.zeros(5, np.float32), untrained(np.zeros(0, np.float32), 3), slots)
    assert deliver(failsafe, state, _sent(state, values)).log.safe == [1]


@pytest.mark.parametrize("kind", ["refused", "outliers"])
def test_repeated_offences_in_a_row_lead_to_quarantine(kind: str) -> None:
    rule = dataclasses.replace(PLAIN, quarantine_after=2, quarantine_rounds=3)
    slots = rule.slots(Sizes(3, 5))
    for number, offends in enumerate(([1], [2], [0, 2])):
        slots = {**slots, **rule.next_slots(slots, outcome([0, 1, 2], number, log=FaultLog(**{kind: offends})))}
    assert slots["offences"].tolist() == [1, 0, 0]
    assert slots["quarantined_until"].tolist() == [0, 0, 6]  # out in rounds 3, 4 and 5
    setup = make_setup("failsafe.quarantine_after=2", "failsafe.quarantine_rounds=3", "rounds=7")
    for number, there in ((3, False), (5, False), (6, True)):
        until = {"quarantined_until": np.array([0, 0, 6, 0])}
        assert (2 in choose_roster(setup, number, until).training) == there


def test_caution_multiplies_a_devices_time_and_nothing_else() -> None:
    setup = make_setup()
    ids, scenario = np.array([1, 3]), setup.scenario
    believed = Beliefs(ids, scenario.fleet, scenario.at(0).gain_linear[ids], scenario.partition.train.sizes[ids])
    problem = round_problems(setup.blueprint, believed, 0, setup.initial.slots).by_bits[32]
    careful = with_margins(problem, {"caution": np.array([9.0, 2.0, 9.0, 1.5])})
    kept, bandwidth_hz = np.array([0.3, 0.8]), np.array([1e6, 2e6])
    np.testing.assert_allclose(latency(careful, kept, bandwidth_hz), latency(problem, kept, bandwidth_hz) * [2, 1.5])
    assert careful.deadline_s == problem.deadline_s
    assert with_margins(problem, {}) is problem


@pytest.mark.parametrize("kind", ["died", "lost", "delayed"])
def test_who_is_not_heard_of_is_neither_forgiven_nor_trusted(kind: str) -> None:
    rule = dataclasses.replace(PLAIN, safe_ratio=True, quarantine_after=3)
    slots = {**rule.slots(Sizes(2, 5)), "caution": np.array([2.0, 2.0]), "offences": np.array([1, 1])}
    new = rule.next_slots(slots, outcome([0, 1], latency_s=np.array([0.1, 0.1]), log=FaultLog(**{kind: [1]})))
    assert new["caution"].tolist() == [2 * RECOVERY, 2.0]
    assert new["offences"].tolist() == [0, 1]


def test_caution_follows_what_a_device_took_and_is_given_back_slowly() -> None:
    rule = dataclasses.replace(PLAIN, safe_ratio=True)
    slots = {"caution": np.array([1.0, 2.0, 2.0, 2.0, 1.0, 90.0])}
    latency_s = np.array([3.0, 2.3, 1.0, 9.0, 1.0, 9.0])  # late, late, early, dead, early, far too late
    facts = outcome(range(6), latency_s=latency_s, deadline_s=2.0, log=FaultLog(died=[3]))
    new = rule.next_slots(slots, facts)["caution"]
    np.testing.assert_allclose(new, [1.5, 2.3, 2 * RECOVERY, 2.0, 1.0, MAX_CAUTION])
    assert rule.next_slots(slots, outcome(deadline_s=2.0))["caution"].tolist() == slots["caution"].tolist()


# --- robust means ---------------------------------------------------------------------------------------------------

FLOATS = st.floats(-1e6, 1e6, width=32)


@given(arrays(np.float32, 7, elements=FLOATS), st.integers(1, 9), st.floats(0, 0.5))
def test_the_trimmed_mean_of_identical_updates_is_the_update(value: Array, count: int, trim: float) -> None:
    old, mask = np.ones(7, np.float32), np.arange(7) != 3
    new, _ = TrimmedMean(trim).combine(old, [Contribution(mask, value[mask], 1.0, 0.5)] * count)
    np.testing.assert_array_equal(new[mask], value[mask])
    assert new[3] == 1


@given(st.integers(1, 6), st.data())
def test_the_median_lies_between_honest_values_while_they_are_more(honest: int, data: st.DataObject) -> None:
    poisoned = data.draw(st.integers(0, honest - 1))
    good = data.draw(arrays(np.float32, (honest, 5), elements=FLOATS))
    bad = data.draw(arrays(np.float32, (poisoned, 5), elements=st.floats(-1e9, 1e9, width=32)))
    everyone = [Contribution(np.ones(5, bool), value, 1.0, 1.0) for value in (*good, *bad)]
    new, _ = Median().combine(np.zeros(5, np.float32), everyone)
    assert (new >= good.min(0)).all()
    assert (new <= good.max(0)).all()


@given(st.integers(1, 8), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 0.25, 0.4, 0.5]))
def test_the_trimmed_mean_is_its_definition(count: int, seed: int, trim: float) -> None:
    rng = np.random.RandomState(seed)
    old, sizes = rng.normal(size=6).astype(np.float32), rng.uniform(0.1, 1, count)
    masks, dense = rng.random_sample((count, 6)) < 0.7, rng.normal(size=(count, 6)).astype(np.float32)
    everyone = [
        Contribution(*one) for one in zip(masks, map(np.compress, masks, dense), [1.0] * count, sizes, strict=True)
    ]
    new, gradient = TrimmedMean(trim).combine(old, everyone)
    for at in range(6):
        column, pull = np.sort(dense[masks[:, at], at]), np.sort(((old[at] - dense[:, at]) / sizes)[masks[:, at]])
        if not len(column):
            assert (new[at], gradient[at]) == (old[at], 0)
            continue
        cut = min(int(trim * len(column) + 1e-9), (len(column) - 1) // 2)
        for got, of in ((new[at], column), (gradient[at], pull)):
            np.testing.assert_allclose(got, of[cut : len(of) - cut].mean(), rtol=1e-4, atol=1e-5)
    if trim == 0:
        np.testing.assert_allclose(new, Mean().combine(old, everyone)[0], rtol=1e-5, atol=1e-6)
    if trim == 0.5:
        np.testing.assert_array_equal(new, Median().combine(old, everyone)[0])


@given(arrays(np.float32, 5, elements=FLOATS), arrays(np.float32, (3, 5), elements=FLOATS), st.floats(1e-3, 1e3))
def test_a_clipped_change_is_no_longer_than_the_bound_and_keeps_its_direction(
    old: Array, values: Array, clip_norm: float
) -> None:
    state = State(0, old, untrained(np.zeros(0, np.float32), 3), {})
    kept = np.arange(5) < 4  # everybody drops the last entry
    sent = dataclasses.replace(_sent(state, values[:, kept]), masks=Masks(np.arange(5), np.full(3, 4)))
    delivery = deliver(dataclasses.replace(PLAIN, clip_norm=clip_norm), state, sent)
    changes = (values - old)[:, kept]
    norms = np.linalg.norm(changes.astype(float), axis=1)
    bound = clip_norm * np.median(norms)
    clipped = (norms > bound) & (bound > 0)
    near = np.isclose(norms, bound, rtol=1e-12)  # where the last digit decides
    assert {*np.flatnonzero(clipped & ~near)} <= {*delivery.log.clipped} <= {*np.flatnonzero(clipped | near)}
    tolerance = 1e-5 * (np.abs(old).max() + np.abs(values).max() + bound) + 1e-40
    for device, arrival in enumerate(delivery.arrivals):
        if device not in delivery.log.clipped:
            np.testing.assert_array_equal(arrival.values, values[device, kept])
            continue
        change = arrival.values - old[kept]
        assert np.linalg.norm(change.astype(float)) <= bound + tolerance
        np.testing.assert_allclose(change, changes[device] * (bound / norms[device]), atol=tolerance)


# --- draws, configuration and report --------------------------------------------------------------------------------


def test_draws_come_as_often_as_they_should_and_do_not_depend_on_who_takes_part() -> None:
    faults = dataclasses.replace(
        NO_FAULTS, die=0.2, lose_enter=0.15, lose_leave=0.35, stale=0.3, max_delay=3, nan_share=0.1, inf_share=0.05,
        misshapen_share=0.05, poisoned_share=0.2, clock_error=0.2, channel_error=0.1,
    )  # fmt: skip
    everyone = np.arange(1000)
    rounds = [faults.draw(Moment(3, number, 60, 1000, everyone)) for number in range(60)]
    some, saboteur = faults.draw(Moment(3, 7, 60, 1000, np.array([5, 99]))), rounds[7].forgers.index(POISON)
    for field in dataclasses.fields(Fates):
        if field.name != "forgers":
            np.testing.assert_array_equal(getattr(some, field.name), getattr(rounds[7], field.name)[[5, 99]])
    assert some.forgers == [rounds[7].forgers[5], rounds[7].forgers[99]]
    assert faults.draw(Moment(3, 9, 60, 1000, np.array([saboteur]))).forgers == [POISON]
    assert np.isclose(np.mean([fates.died for fates in rounds]), 0.2, atol=0.01)
    work = [np.concatenate([fates.work[fates.died == so] for fates in rounds]) for so in (True, False)]
    assert np.isclose(work[0].mean(), 0.5, atol=0.01)  # any moment is as likely as any other
    assert (work[1] == 1).all()
    lost = np.array([fates.lost for fates in rounds])
    assert np.isclose(lost.mean(), 0.3, atol=0.02)
    assert np.isclose((lost[1:] & ~lost[:-1]).sum() / (~lost[:-1]).sum(), 0.15, atol=0.01)
    delay = np.array([fates.delay for fates in rounds])
    assert np.isclose((delay > 0).mean(), 0.3, atol=0.01)
    assert {*np.unique(delay)} == {0, 1, 2, 3}
    assert Counter(rounds[0].forgers) == {
        None: 600, Garbler("nan"): 100, Garbler("inf"): 50, Garbler("misshapen"): 50, POISON: 200,
    }  # fmt: skip
    assert {*faults.kinds} == {part_of(faults, kind) for kind in FAULTS.values()}
    cpu_hz, gain = faults.estimate(3, 0, np.ones(1000), np.ones(1000))
    assert np.isclose(np.log(cpu_hz).std(), 0.2, atol=0.02)
    assert np.isclose(np.log(gain).std(), 0.1, atol=0.01)
    again, other = faults.estimate(3, 1, np.ones(1000), np.ones(1000))
    np.testing.assert_array_equal(cpu_hz, again)
    assert (gain != other).all()


def test_poison_is_what_it_says() -> None:
    before, values = np.zeros(4000, np.float32), np.full(4000, 0.5, np.float32)
    moment = Moment(0, 0, 1, 1, np.array([0]))

    def forged(**kind: Any) -> Array:
        faults = dataclasses.replace(NO_FAULTS, poisoned_share=1.0, **kind)
        (forger,) = faults.draw(moment).forgers
        assert forger is not None
        assert forger.poisons
        return forger.forge(values, before, moment, 0)

    np.testing.assert_array_equal(forged(poison="sign_flip", poison_scale=4.0), np.full(4000, -2))
    noise = forged(poison="noise", poison_scale=4.0)
    assert np.isclose(noise.std(), 2, rtol=0.05)
    assert abs(noise.mean()) < 0.2


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "faults").glob("*.yaml")))
def test_every_choice_of_faults_composes(name: str) -> None:
    assert make_experiment(f"faults={name}").faulty == (name != "none")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("die", 1.5), ("lose_leave", 0.0), ("poison", "arsenic"), ("max_delay", 0), ("clock_error", float("nan")), ("poisoned_share", -0.1),
        ("late", "never"), ("wait_factor", 0.5), ("aggregation", "mode"), ("trim", 0.5), ("quarantine_after", 0), ("outlier_norm", 0.0),
        ("clip_norm", float("inf")), ("max_staleness", -1),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="must be") as caught:
        dataclasses.replace(NO_FAULTS if hasattr(NO_FAULTS, key) else PLAIN, **{key: value})
    assert caught.value.key == key


def test_bad_values_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^failsafe.late=never: must be one of wait, drop, defer$"):
        make_experiment("failsafe.late=never")
    with pytest.raises(ConfigError, match=r"^faults.poisoned_share=0.6: must be such that all shares are at most 1$"):
        make_experiment("faults.nan_share=0.6", "faults.poisoned_share=0.6")


def test_the_report_counts_what_went_wrong_and_says_what_was_done(tmp_path: Path) -> None:
    run_to_end(tmp_path / "plain")
    assert fault_sections({"plain": [read_run(tmp_path / "plain")]}) == []
    records = run_to_end(tmp_path / "run", "faults.die=0.5", "failsafe.late=drop", "failsafe.quarantine_after=2")
    page = write_report(tmp_path / "run")
    text, died = page.read_text(), sum(len(record["faults"]["died"]) for record in records)
    assert died
    assert f"died in mid-round: nothing arrived</td><td>{died}</td>" in text.replace('<td class="n">', "<td>")
    assert "dropped late updates (late after 1 deadlines)" in text
    assert "shut devices out for good after 2 offences in a row" in text
    header, *rows = (page.parent / "rounds.csv").read_text().splitlines()
    at = header.split(",").index("died")
    assert [len(record["faults"]["died"]) for record in records] == [int(row.split(",")[at]) for row in rows]
