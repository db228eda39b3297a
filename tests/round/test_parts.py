"""A new aggregator, late policy, fault or memory is one class and one entry of its table: everything else follows by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
from conftest import Line, composed, forge, make_experiment, results

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.round.memory import MEMORIES
from fedprune_cli.round.setup import prepare
from fedprune_cli.runs import life
from fedprune_cli.serve.aggregate import AGGREGATORS, Contribution
from fedprune_cli.serve.failsafe import LATE_POLICIES
from fedprune_cli.store import folder
from fedprune_cli.store.memory import Outcome, Sizes, Slots
from fedprune_cli.store.state import Array, State
from fedprune_cli.world.faults import FAULTS, Fates, Moment


@dataclass(frozen=True)
class LastWord:
    """Of each entry what the last device made of it, and the share `trim` of what it was."""

    trim: float
    needs: ClassVar[Literal["sum", "each"]] = "each"

    def combine(self, old: Array, contributions: Sequence[Contribution]) -> tuple[Array, Array]:
        new = old.copy()
        for one in contributions:
            new[one.mask] = one.values
        new = (self.trim * old + (1 - self.trim) * new).astype(old.dtype)
        return new, old - new


@dataclass(frozen=True)
class Postpone:
    """A late update counts two rounds later."""

    defers: ClassVar[bool] = True
    waits: ClassVar[bool] = False

    def decide(self, late: Array, delay: Array) -> tuple[Array, Array]:
        return np.where(late, 2, delay), np.zeros(len(late), dtype=bool)


@dataclass(frozen=True)
class Echo:
    """Sends the broadcast back."""

    poisons: ClassVar[bool] = True

    def forge(self, values: Array, before: Array, moment: Moment, device: int) -> Array:
        return before.copy()


@dataclass(frozen=True)
class Sunday:
    """Every third round is lost, in the others device 1 sends back what it got."""

    delays: ClassVar[bool] = False

    @property
    def active(self) -> bool:
        return True

    def befall(self, fates: Fates, moment: Moment) -> Fates:
        lost = np.full(len(moment.ids), moment.number % 3 == 2)
        return replace(
            fates, lost=fates.lost | lost, forgers=[Echo() if device == 1 else None for device in moment.ids]
        )


@dataclass(frozen=True)
class Slept:
    """How many rounds ago each device last trained the shared part, `slept` int64 [N]."""

    def slots(self, sizes: Sizes) -> Slots:
        return {"slept": np.zeros(sizes.num_devices, dtype=np.int64)}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        slept = slots["slept"] + 1
        slept[outcome.devices] = 0
        return {"slept": slept}


def lived(run_dir: Path, *overrides: str) -> tuple[list[Line], State]:
    """Returns the lines and the last state of a run that is sound and has the same bytes when it is interrupted twice and resumed.

    Its setup is its own: one that `make_setup` remembers would take the new part to other tests.
    """
    stopped, config = run_dir.with_name("stopped"), composed(*overrides)
    for place in (run_dir, stopped):
        life.create(prepare(make_experiment(*overrides)), config, place)
    lines = [record.as_json() for record in life.run(life.reopen(run_dir), run_dir)]
    for _ in range(2):
        records = life.run(life.reopen(stopped), stopped)
        next(records), next(records)
        records.close()
    list(life.run(life.reopen(stopped), stopped))
    assert results(stopped) == results(run_dir)
    assert verify_run(life.reopen(run_dir), run_dir, every=0).failures == ()
    return lines, folder.read_whole_state(run_dir)


def test_an_aggregator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATORS, "last_word", LastWord)
    overrides = ("failsafe.aggregation=last_word", "failsafe.trim=0", "devices.per_round=1", "rounds=5")
    lines, state = lived(tmp_path / "run", *overrides)
    _, mean = lived(tmp_path / "plain" / "run", *overrides, "failsafe.aggregation=mean")
    np.testing.assert_allclose(state.shared, mean.shared, rtol=1e-6)  # of one device, its word is the mean
    _, half = lived(tmp_path / "half" / "run", *overrides, "failsafe.trim=0.4")  # its field is a key of the section
    assert np.linalg.norm(half.shared - state.shared) > 0
    assert all(line["grad_norm"] > 0 for line in lines)


def test_a_late_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LATE_POLICIES, "postpone", Postpone)
    lines, _ = lived(tmp_path / "run", "failsafe.late=postpone", "faults.clock_error=0.5", "rounds=6")
    late, stale = ([line["faults"][kind] for line in lines] for kind in ("late", "stale"))
    assert any(late[:4])
    assert stale == [[], [], *late[:4]]
    assert all(line["latency_s"] <= 1.01 * line["deadline_s"] for line in lines)


def test_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, "sunday", Sunday)
    lines, _ = lived(tmp_path / "run", "rounds=6", "devices.per_round=3")
    for line in lines:
        chosen, lost = line["devices"]["id"], line["round"] % 3 == 0
        assert line["faults"]["lost"] == (chosen if lost else [])
        assert line["faults"]["poisoned"] == ([1] if 1 in chosen and not lost else [])
    assert any(line["faults"]["poisoned"] for line in lines)


@pytest.mark.parametrize("more", [(), ("faults=flaky", "channel.outage_enter=0.4", "channel.outage_leave=0.5")])
def test_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    entry: Callable[[Experiment], Slept] = lambda experiment: Slept()  # noqa: E731
    monkeypatch.setitem(MEMORIES, "slept", entry)
    lines, state = lived(tmp_path / "run", "rounds=6", "devices.per_round=2", *more)
    worked = [
        set(line["devices"]["id"]) for line in lines if line["devices"]["id"]
    ]  # nobody learns from rounds at rest
    last = [next((ago for ago, ids in enumerate(reversed(worked)) if at in ids), len(worked)) for at in range(4)]
    assert state.slots["slept"].tolist() == last
    changed = {**state.slots, "slept": state.slots["slept"] + 1}
    forge(tmp_path / "run", state=replace(folder.read_state(tmp_path / "run").state, slots=changed))
    failures = verify_run(life.reopen(tmp_path / "run"), tmp_path / "run", every=0).failures
    assert failures == ("the state's slept is not what the records lead to",)
