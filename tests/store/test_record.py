"""One schema of a line of rounds.jsonl: every kind of round comes back from it as it was, and nothing else is taken for one."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
from conftest import Line, make_setup, steps_of
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.store.record import KINDS, FaultLog, RoundRecord, parse_record

FREEZE = ("rounds=6", "participation.freeze_below=0.9", "participation.freeze_window=1", "training.lr=0.001")
ROUNDS = {
    "plain": (),
    "untested": ("evaluation.every=3",),
    "few bits": ("payload.bits=[4]",),
    "idle": ("channel.outage_enter=1", "channel.outage_leave=1e-9", "faults.die=0.1"),
    "idle, no faults": ("channel.outage_enter=1", "channel.outage_leave=1e-9"),
    "frozen": FREEZE,
    "frozen, nothing to train": (*FREEZE, "method=pruned"),
    "nobody admitted": ("allocator.on_infeasible=drop", "deadline.seconds=1e-9"),
    "stretched": ("deadline.fraction=0.01", "pruner.max_ratio=0.3"),
    "faults": ("faults=flaky", "faults.die=0.5", "failsafe.late=drop", "failsafe.quarantine_after=1"),
    "no certificate": ("allocator=equal",),
    "nothing shared": ("method=local",),
}
ORDER = [
    "round", "simulated_s", "latency_s", "deadline_s", "accuracy", "accuracy_mean", "accuracy_p10", "fresh_accuracy",
    "train_loss", "mean_ratio", "max_ratio", "bits", "rounding_error", "bytes_up", "bytes_down", "joules", "flops", "grad_norm",
    "pruning_error", "dense_latency_s", "equal_dense_latency_s", "price_per_hz", "residual", "gap", "status", "message",
    "frozen", "faults", "devices",
]  # fmt: skip
ORDER_AT_REST = [
    "round", "simulated_s", "accuracy", "accuracy_mean", "accuracy_p10", "fresh_accuracy", "deadline_s", "train_loss",
    "mean_ratio", "max_ratio", "bits", "rounding_error", "pruning_error", "dense_latency_s", "equal_dense_latency_s",
    "price_per_hz", "residual", "gap", "latency_s", "bytes_up", "bytes_down", "joules", "flops", "grad_norm", "status",
    "message", "frozen", "faults", "devices",
]  # fmt: skip
COLUMNS = [
    "id", "prune_ratio", "bandwidth_hz", "compute_s", "uplink_s", "downlink_s", "latency_s", "pruning_error", "joules",
    "bytes_up", "train_loss", "accuracy",
]  # fmt: skip
LOG = [
    "died", "lost", "delayed", "poisoned", "late", "refused", "stale", "expired", "clipped", "outliers", "safe", "quarantined",
    "waited_s",
]  # fmt: skip
OPTIONAL = {"frozen", "faults"}


@functools.cache
def records() -> dict[str, list[RoundRecord]]:
    """Returns the rounds of a run of each kind."""
    setups = {name: make_setup(*options) for name, options in ROUNDS.items()}
    return {name: [step.record for step in steps_of(of, of.experiment.rounds)] for name, of in setups.items()}


def lines() -> list[Line]:
    """Returns their lines, as they are read back."""
    return [json.loads(json.dumps(record.as_json())) for of in records().values() for record in of]


def test_every_kind_of_round_is_among_these() -> None:
    of = records()
    assert {record.status for name in of for record in of[name]} >= {
        "optimal",
        "stretched",
        "dropped",
        "idle",
        "frozen",
    }
    assert [record.accuracy is None for record in of["untested"]] == [True, True, False]
    assert of["few bits"][0].rounding_error is not None
    assert {record.status for record in of["idle"]} == {record.status for record in of["idle, no faults"]} == {"idle"}
    assert all(record.faults is not None for record in (*of["idle"], *of["faults"]))
    assert any(record.status == "frozen" and record.devices.id for record in of["frozen"])
    assert any(record.status == "frozen" and not record.devices.id for record in of["frozen, nothing to train"])
    assert all(not record.rested and not record.devices.id for record in of["nobody admitted"])
    assert of["no certificate"][0].residual is None
    assert any(record.faults.died for record in of["faults"] if record.faults)


@pytest.mark.parametrize("name", ROUNDS)
def test_a_line_is_its_record_and_comes_back_in_order(name: str) -> None:
    for record in records()[name]:
        text = json.dumps(record.as_json())
        back = parse_record(json.loads(text))
        assert back is not None
        assert json.dumps(back.as_json()) == text
        mixed = parse_record(dict(reversed(json.loads(text).items())))  # whatever order they are read in
        assert mixed is not None
        assert json.dumps(mixed.as_json()) == text


@pytest.mark.parametrize("name", ROUNDS)
def test_the_keys_of_a_line_stand_in_the_order_in_which_they_always_stood(name: str) -> None:
    for record in records()[name]:
        line = record.as_json()
        order = ORDER_AT_REST if record.status in ("idle", "frozen") else ORDER
        assert list(line) == [key for key in order if key in line]
        assert {*order} - {*line} <= OPTIONAL
        assert ("frozen" in line) == name.startswith("frozen")
        assert ("faults" in line) == (name in ("idle", "faults"))
        devices, log = line["devices"], line.get("faults")
        assert isinstance(devices, dict)
        bare = record.rested and not record.devices.id
        assert list(devices) == (["id"] if bare else COLUMNS)
        if log is not None:
            assert isinstance(log, dict)
            assert list(log) == LOG
    assert [*KINDS, "waited_s"] == LOG
    assert {*FaultLog().__dataclass_fields__} == {*LOG}


def parts(line: Line) -> list[tuple[Any, ...]]:
    """Returns the paths to every value of a line that has a key of its own."""
    inner = [(outer, key) for outer in ("devices", "faults") for key in line.get(outer, ())]
    return [*((key,) for key in line), *inner]


def at(line: Line, path: tuple[Any, ...]) -> tuple[Line, Any]:
    """Returns a copy of the line and the object in it that holds the value at a path."""
    changed = copy.deepcopy(line)
    return changed, functools.reduce(lambda of, key: of[key], path[:-1], changed)


def test_a_line_without_one_of_its_keys_or_with_another_is_none() -> None:
    for line in lines():
        for path in parts(line):
            changed, holder = at(line, path)
            del holder[path[-1]]
            assert (parse_record(changed) is None) == (path[-1] not in OPTIONAL), path
        for outer in ((), ("devices",), ("faults",)):
            if all(key in line for key in outer):
                changed, holder = at(line, (*outer, "more"))
                holder["more"] = [0.0] * len(line["devices"]["id"])
                assert parse_record(changed) is None, outer


TEXTS, WHOLE = {"status", "message"}, {"round", "bits", "frozen", "id", "bytes_up", *KINDS}
NULL = {
    "deadline_s", "accuracy", "accuracy_mean", "accuracy_p10", "fresh_accuracy", "train_loss", "mean_ratio", "max_ratio", "bits",
    "rounding_error", "pruning_error", "dense_latency_s", "equal_dense_latency_s", "price_per_hz", "residual", "gap",
}  # fmt: skip
NUMBERS = (float("nan"), float("inf"), -float("inf"), 10**400, "1", True, [], {})


def wrong_values(path: tuple[Any, ...], value: Any) -> list[Any]:
    """Returns what cannot stand in the place of a line's value."""
    key, count = path[-1], len(value) if isinstance(value, list) else 0
    if key in ("devices", "faults") and len(path) == 1:
        return [None, [], {}, "", 1]
    if key in TEXTS:
        return [None, 1, True, [], {}]
    inner = len(path) == 2 and key != "waited_s"
    null = () if key in NULL and (not inner or key in ("accuracy", "train_loss")) else (None,)
    half = (1.5,) if key in WHOLE and (inner or key != "bytes_up") else ()
    of_one = [*NUMBERS, *null, *half]
    if not inner:
        return of_one
    no_list = ["", 1, {}, True, *(() if key == "accuracy" else (None,))]
    return [*no_list, *([wrong] * count for wrong in of_one if count)]


def test_a_line_with_a_value_of_another_type_is_none() -> None:
    for line in lines():
        for path in parts(line):
            changed, holder = at(line, path)
            for wrong in wrong_values(path, holder[path[-1]]):
                holder[path[-1]] = wrong
                assert parse_record(changed) is None, (path, wrong)


def test_columns_of_another_length_and_negative_devices_are_none() -> None:
    for line in lines():
        for key, column in line["devices"].items():
            if column:
                for wrong in (column[1:], [*column, column[0]]):
                    changed, holder = at(line, ("devices", key))
                    holder[key] = wrong
                    assert (parse_record(changed) is None) or len(line["devices"]) == 1, key
        if line["devices"]["id"]:
            changed, holder = at(line, ("devices", "id"))
            holder["id"][0] = -1
            assert parse_record(changed) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from([*COLUMNS, *LOG, "x"]), inner, max_size=3)
    ),
)


@given(st.data())
def test_what_is_read_as_a_record_is_written_as_it_was(data: st.DataObject) -> None:
    """Whatever somebody puts into a line: it is refused, or comes out again."""
    line = data.draw(st.sampled_from(lines()))
    path = data.draw(st.sampled_from(parts(line)))
    changed, holder = at(line, path)
    holder[path[-1]] = data.draw(VALUES)
    record = parse_record(changed)
    assert record is None or record.as_json() == changed


@given(VALUES)
def test_other_json_is_no_record(value: Any) -> None:
    assert parse_record(value) is None
