"""The round on nodes, carried within this process: the simulator's bytes, and what travels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import composed
from nodes.fleet import InProcessSite, begin, deal, result, simulate

from fedprune_cli.errors import CheckpointError, ConfigError, DataError
from fedprune_cli.nodes.executor import Reply, Request
from fedprune_cli.nodes.protocol import hello_of, read_from_node, read_from_server, read_hello
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.sealed import Sealed, unseal
from fedprune_cli.take_home.take import open_run
from fedprune_cli.world.datasets.roster import read_card

CASES = (
    "training.block=10 payload.bits=[32]",
    "training.block=1 payload.bits=[8] deadline.fraction=0.2",
    "training.block=1 pruner.granularity=channel deadline.fraction=0.2",
    "training.block=10 payload.bits=[8] pruner.granularity=channel deadline.fraction=0.2",
    "faults.die=0.3 faults.lose_enter=0.2 rounds=6",
    "participation.freeze_below=0.5 participation.freeze_window=1 rounds=5",
    "devices.per_round=2 evaluation.every=2 rounds=4 pruner=taylor payload.bits=[2,16]",
    "training.lr=1e9 faults.die=0.01",
)
QUICK = (CASES[3], CASES[4])  # what is pruned, rounded and lost


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES])
def test_a_run_on_nodes_has_the_simulators_bytes(tmp_path: Path, case: str) -> None:
    """Whatever is pruned, rounded, lost, frozen, drawn or diverges: records and u are the same, and the server has no v_k."""
    overrides = case.split()
    places = deal(simulate(tmp_path / "simulated", *overrides), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", overrides)
    site = InProcessSite(places, config)
    list(life.run(setup, tmp_path / "run", site=site))
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
    state = folder.read_whole_state(tmp_path / "run")
    assert state.personal.initial.shape == (1,)
    for device, place in places.items():
        if device < setup.scenario.num_devices and (number := int(state.personal[device][0])):
            run = f"{setup.experiment.config_hash}-s0"
            mine = unseal((place.folder / run / f"personal-{number}.safetensors").read_bytes()).arrays["personal"]
            simulated = folder.read_whole_state(tmp_path / "simulated").personal[device]
            assert mine.tobytes() == simulated.tobytes()
    lines = (tmp_path / "run" / folder.TIMINGS).read_text().splitlines()
    trained = [row["device"] for row in json.loads(lines[0])["nodes"]]
    assert trained == json.loads((tmp_path / "run" / folder.RECORDS).read_text().splitlines()[0])["devices"]["id"]


def test_neither_personal_parts_nor_data_are_on_the_wire(tmp_path: Path) -> None:
    """No eight bytes of any v_k, nor eight of any sample that are not all the same, stand in any message."""
    places = deal(simulate(tmp_path / "simulated", "payload.bits=[8]"), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", ["payload.bits=[8]"])
    site, seen = InProcessSite(places, config), dict[str, bytes]()
    wire = site.carrier.wire
    wire += [hello_of(place.samples.card(labels=True)).encode() for place in places.values()]
    for _ in life.run(setup, tmp_path / "run", site=site):
        for place in places.values():
            seen |= {str(path): path.read_bytes() for path in place.folder.glob("*/personal-*.safetensors")}
    assert len(seen) == (4 + 1) * 3  # the fresh device keeps what it begins with
    sent = b"\0".join(wire)
    parts = [unseal(data).arrays["personal"] for data in seen.values()]
    assert any(part.tobytes()[:8] in b"".join(seen.values()) for part in parts)
    for part in parts:
        pairs = np.frombuffer(part.tobytes(), "V8")[: len(part) // 2]
        assert not any(pair.tobytes() in sent for pair in pairs if any(pair.tobytes()))
    for place in places.values():
        for row in place.samples.inputs.reshape(len(place.samples.inputs), -1):
            assert row.tobytes()[8:24] not in sent


def test_what_a_test_has_sent_of_u_is_not_sent_again(tmp_path: Path) -> None:
    """The test of a round and the next task are about the same u: together they send the entries that either keeps, once."""
    places = deal(simulate(tmp_path / "simulated"), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", [])
    site = InProcessSite(places, config)
    list(life.run(setup, tmp_path / "run", site=site))
    sent: dict[tuple[object, object], int] = {}
    for message in map(unseal, site.carrier.wire):
        if message.header["kind"] == "task":
            key = message.header["round"], message.header["device"]
            sent[key] = sent.get(key, 0) + len(message.arrays["values"])
    assert len(sent) == 4 * 4 + 3  # four devices in rounds 0 to 3, the fresh one in tests alone
    assert max(sent.values()) <= setup.blueprint.cost.shared_params


def test_whole_and_pruned_devices_are_asked_at_once(tmp_path: Path) -> None:
    """A simulation trains some side by side and some alone; nodes that waited for one another would make a round twice as long."""
    overrides = ("pruner.granularity=channel", "deadline.fraction=0.7", "rounds=2")
    places = deal(simulate(tmp_path / "simulated", *overrides), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", overrides)
    site = InProcessSite(places, config)
    asked = list[set[str]]()
    exchange = site.carrier.exchange

    def counted(requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        heads = [read_from_server(request.write(None)[0]).header for request in requests.values()]
        asked.append({f"{head['work']} {'whole' if head['keep'] == 'Whole' else 'pruned'}" for head in heads})
        return exchange(requests)

    site.carrier.exchange = counted  # type: ignore[method-assign]
    list(life.run(setup, tmp_path / "run", site=site))
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
    trained = [works for works in asked if not any(work.startswith("test") for work in works)]
    assert len(trained) == 2
    assert {"block whole", "train pruned"} in trained


def test_a_lost_task_is_a_device_that_died_and_its_work_rolls_back(tmp_path: Path) -> None:
    """A node away for ten rounds goes on from the part that the server last accepted, and a run with it ends as one that is told so."""
    places = deal(simulate(tmp_path / "simulated"), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", ["rounds=14"])
    site = InProcessSite(places, config)
    versions = []
    for record in life.run(setup, tmp_path / "run", site=site):
        site.carrier.away = {1} if 2 <= record.round < 12 else set()
        versions.append(int(folder.read_whole_state(tmp_path / "run").personal[1][0]))
        assert (record.faults.died if record.faults else ()) == ([1] if 3 <= record.round < 13 else ())
    assert versions == [1, 2, *[2] * 10, 13, 14]


def test_killed_between_any_two_rounds_and_redone_work_end_with_the_same_bytes(tmp_path: Path) -> None:
    places = deal(simulate(tmp_path / "simulated"), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", [])
    for _ in range(3):
        rounds = life.run(setup, tmp_path / "run", site=InProcessSite(places, config))
        next(rounds)  # its end is never seen: the next one begins anew, from what is on disk
        rounds.close()
        lost = InProcessSite(places, config)
        with lost.executor(setup) as workers:  # work whose round was never finished
            state = folder.read_whole_state(tmp_path / "run")
            if state.round < 3:
                life.round_step(setup, state, workers)
    list(life.run(setup, tmp_path / "run", site=InProcessSite(places, config)))
    assert result(tmp_path / "run") == result(tmp_path / "simulated")


def test_a_thousand_mutated_messages_are_all_refused(tmp_path: Path) -> None:
    """Bits that flip, bytes that go missing or are put in: nothing of it is ever taken for a message, and all of it is a ValueError."""
    places = deal(simulate(tmp_path / "simulated", "payload.bits=[8]"), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", ["payload.bits=[8]"])
    site = InProcessSite(places, config)
    list(life.run(setup, tmp_path / "run", site=site))
    rng = np.random.default_rng(0)
    messages = [*site.carrier.wire, hello_of(places[0].samples.card(labels=False)).encode()]
    for _ in range(1000):
        message = bytearray(messages[rng.integers(len(messages))])
        at, kind = int(rng.integers(len(message))), rng.integers(5)
        if kind == 0:
            message[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del message[at:]
        elif kind == 2:
            del message[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            message[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            message[:8] = rng.bytes(8)
        for read in (read_from_server, read_from_node, read_hello):
            with pytest.raises(ValueError, match="damaged"):
                read(bytes(message))


@pytest.mark.parametrize(
    "header",
    [{}, {"kind": "update"}, {"kind": "score", "of": 3, "compute_s": 1.0, "correct": 1, "total": 2}, {"kind": "task"}],
)
def test_a_sound_message_of_another_form_is_refused(header: dict[str, object]) -> None:
    for read in (read_from_server, read_from_node, read_hello):
        with pytest.raises(ValueError, match="not a message"):
            read(Sealed(header).encode())  # type: ignore[arg-type]


def test_a_card_that_contradicts_itself_is_refused() -> None:
    card = {"train": 3, "test": 1, "shape": [1, 8, 8], "dtype": "uint8", "scale": 16.0, "classes": 2, "labels": [3, 1]}
    assert read_card(card).labels == (3, 1)  # type: ignore[arg-type]
    for bad in ({"labels": [3, 2]}, {"train": 0}, {"shape": [8]}, {"dtype": "object"}, {"scale": 0.0}, {"more": 1}):
        with pytest.raises(ValueError, match="card"):
            read_card({**card, **bad})  # type: ignore[arg-type]


def test_nodes_and_their_data_go_together(tmp_path: Path) -> None:
    deal(simulate(tmp_path / "simulated"), tmp_path)
    with pytest.raises(ConfigError, match="go together"):
        life.prepare(life.build_experiment(composed("data=nodes", f"data.file={tmp_path / 'roster.json'}")))
    setup, _ = begin(tmp_path, tmp_path / "run", [])
    with pytest.raises(ConfigError, match="fedprune serve"):
        list(life.run(setup, tmp_path / "run"))
    (tmp_path / "roster.json").write_text('{"devices": [{"train": 1}]}')
    with pytest.raises(DataError, match=r"devices\[0\]: not the card of a device"):
        begin(tmp_path, tmp_path / "other", [])


def test_what_only_nodes_have_cannot_be_taken_home(tmp_path: Path) -> None:
    places = deal(simulate(tmp_path / "simulated"), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", [])
    list(life.run(setup, tmp_path / "run", site=InProcessSite(places, config)))
    with pytest.raises(ConfigError, match="a run on nodes"):
        open_run(tmp_path / "run")


def test_a_part_that_is_gone_from_a_node_is_one_line(tmp_path: Path) -> None:
    places = deal(simulate(tmp_path / "simulated"), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", [])
    rounds = life.run(setup, tmp_path / "run", site=InProcessSite(places, config))
    next(rounds)
    for path in places[2].folder.glob("*/personal-1.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"personal-1\.safetensors: No such file"):
        next(rounds)


@pytest.mark.parametrize(
    ("policy", "seconds", "late"),
    [
        ("wait", 4, True),
        ("drop", 6, False),
        pytest.param("drop", 4, True, marks=pytest.mark.slow),
        pytest.param("defer", 4, True, marks=pytest.mark.slow),
    ],
)
def test_who_is_late_by_the_servers_clock_is_late(tmp_path: Path, policy: str, seconds: int, late: bool) -> None:
    """An exchange in this process is said to take 5 s, where the model has milliseconds: the policies do what they do in a simulation."""
    overrides = [f"failsafe.late={policy}", f"deadline.seconds={seconds}", "rounds=2"]
    places = deal(simulate(tmp_path / "simulated", *overrides), tmp_path)
    setup, config = begin(tmp_path, tmp_path / "run", [*overrides, "execution.by_clock=true"])
    record = next(run := life.run(setup, tmp_path / "run", site=InProcessSite(places, config)))
    assert record.faults
    assert record.faults.late == ([0, 1, 2, 3] if late else [])
    moved = result(tmp_path / "run")[1] != setup.initial.shared.tobytes()
    assert moved == (not late or policy == "wait")
    assert next(run).faults.stale == ([0, 1, 2, 3] if policy == "defer" else [])  # type: ignore[union-attr]
