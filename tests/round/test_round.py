"""The run as a whole: same bytes from every executor, after every interruption, and figures that add up."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, composed, make_setup, outcome, resign, results, run_to_end, steps_of
from omegaconf import OmegaConf

from fedprune_cli.allocate.deadline import dense_deadline
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.errors import CheckpointError, InfeasibleError
from fedprune_cli.execute import executor
from fedprune_cli.round.evaluate import tested_devices as devices_tested
from fedprune_cli.round.plan import Beliefs, round_problems
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import build_learner
from fedprune_cli.round.step import round_step
from fedprune_cli.runs import life
from fedprune_cli.serve.participation import Participation
from fedprune_cli.store import folder, lock
from fedprune_cli.store.memory import Sizes


def test_serial_and_processes_give_the_same_bytes(tmp_path: Path) -> None:
    run_to_end(tmp_path / "serial", "pruner=taylor")
    run_to_end(tmp_path / "processes", "pruner=taylor", "execution.kind=processes", "execution.workers=2")
    assert results(tmp_path / "serial") == results(tmp_path / "processes")


def test_a_run_stopped_after_any_round_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    run_to_end(tmp_path / "whole")
    for stop in (0, 1, 2):
        stopped = tmp_path / f"stopped{stop}"
        life.create(make_setup(), OmegaConf.load(tmp_path / "whole" / "config.yaml"), stopped)
        records = life.run(make_setup(), stopped)
        for _ in range(stop):
            next(records)
        records.close()
        if stop == 2:  # killed between the record and the state, in the middle of a line
            with (stopped / "rounds.jsonl").open("ab") as log:
                log.write(
                    (tmp_path / "whole" / "rounds.jsonl").read_bytes().splitlines(keepends=True)[2]
                    + b'{"round": 4, "la'
                )
        list(life.run(life.reopen(stopped), stopped))
        assert results(stopped) == results(tmp_path / "whole")


def test_records_add_up(tmp_path: Path) -> None:
    records = run_to_end(
        tmp_path / "run", "evaluation.every=2", "rounds=5", "channel.outage_enter=0.3", "channel.outage_leave=0.5"
    )
    setup = make_setup("evaluation.every=2", "rounds=5", "channel.outage_enter=0.3", "channel.outage_leave=0.5")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [r["round"] for r in records] == [1, 2, 3, 4, 5]
    assert [r["accuracy"] is not None for r in records] == [False, True, False, True, True]
    assert summary["final_accuracy"] == records[-1]["accuracy"]
    assert summary["bytes_up"] == sum(r["bytes_up"] for r in records)
    assert np.isclose(summary["simulated_s"], sum(r["latency_s"] for r in records))
    for record in records:
        devices = record["devices"]
        if not devices["id"]:
            continue
        parts = np.array(devices["compute_s"]) + devices["uplink_s"] + devices["downlink_s"]
        np.testing.assert_allclose(parts, devices["latency_s"])
        assert record["latency_s"] == max(devices["latency_s"])
        # the count of kept entries is whole: it may exceed the allocated share by half an entry
        entry_s = 32 / (np.array(devices["bytes_up"]) * 8 / devices["uplink_s"])
        assert (np.array(devices["latency_s"]) <= record["deadline_s"] * (1 + 1e-9) + entry_s).all()
        kept = np.rint((1 - np.array(devices["prune_ratio"])) * setup.blueprint.cost.shared_params)
        np.testing.assert_array_equal(devices["bytes_up"], 4 * kept)
        assert sum(devices["bandwidth_hz"]) <= setup.experiment.channel.bandwidth_hz * (1 + 1e-9)
        assert record["dense_latency_s"] <= record["equal_dense_latency_s"]
        assert np.isclose(record["deadline_s"], 0.5 * record["dense_latency_s"]) or record["status"] == "stretched"


def test_the_latency_of_a_round_is_the_equations_of_the_model() -> None:
    """model.md section 3 by hand for one device, against the meter."""
    setup = make_setup("devices=sampled", "method=personalized", "meter=paper")
    ids, radio = np.arange(4), setup.scenario.at(0)
    fleet, samples = setup.scenario.fleet, setup.scenario.partition.train.sizes[ids]
    believed = Beliefs(ids, fleet, radio.gain_linear[ids], samples)
    problem = round_problems(setup.blueprint, believed, 0, setup.initial.slots).by_bits[32]
    cost, channel = setup.blueprint.cost, setup.experiment.channel
    personal_steps, shared_steps, batch = 2, 3, 8
    forward_backward_u = (
        2 * (64 * 16) * 2
    )  # two products: forward, weight gradient (no input gradient in the first layer)
    assert cost.flops["shared"][0] == forward_backward_u
    for k in ids:
        cycles = (
            fleet.cycles_per_flop[k]
            * batch
            * (shared_steps * forward_backward_u + personal_steps * forward_backward_u / 2)
        )
        assert np.isclose(problem.shared_compute_s[k], cycles / fleet.cpu_hz[k])
        assert problem.payload_bits[k] == 32 * (64 * 16 + 16)
        assert np.isclose(problem.snr_hz[k], fleet.tx_power_w[k] * radio.gain_linear[k] / channel.noise_w_per_hz)
    assert np.isclose(problem.deadline_s, 0.5 * dense_deadline(problem)[0])


def test_an_infeasible_round_follows_the_policy(tmp_path: Path) -> None:
    tight = ("deadline.fraction=0.01", "pruner.max_ratio=0.3")
    records = run_to_end(tmp_path / "stretch", *tight)
    assert {r["status"] for r in records} == {"stretched"}
    assert all(r["latency_s"] > 0.01 * r["dense_latency_s"] for r in records)
    records = run_to_end(tmp_path / "drop", *tight, "allocator.on_infeasible=drop")
    assert {r["status"] for r in records} == {"dropped"}
    assert all(len(r["devices"]["id"]) < 4 for r in records)
    half = run_to_end(tmp_path / "half", *tight, "allocator.on_infeasible=drop", "devices.per_round=2")
    for record in half:  # messages name devices, not their places in the round
        named = {int(text) for text in re.findall(r"dropped devices ([\d, ]+) with", record["message"])[0].split(",")}
        assert not named & set(record["devices"]["id"])
    setup = make_setup("devices.per_round=2")
    chosen = [set(choose_roster(setup, n, setup.initial.slots).training.tolist()) for n in range(3)]
    dropped = [
        {int(t) for t in re.findall(r"dropped devices ([\d, ]+) with", r["message"])[0].split(",")} for r in half
    ]
    assert [d | set(r["devices"]["id"]) for d, r in zip(dropped, half, strict=True)] == chosen
    with pytest.raises(InfeasibleError):
        run_to_end(tmp_path / "fail", *tight, "allocator.on_infeasible=fail")


def test_a_round_that_admits_nobody_lasts_until_its_deadline(tmp_path: Path) -> None:
    """No time at all would draw a new channel for nothing."""
    records = run_to_end(tmp_path / "run", "deadline.seconds=1e-6", "allocator.on_infeasible=drop")
    assert not any(r["devices"]["id"] for r in records)
    np.testing.assert_allclose([r["latency_s"] for r in records], 1e-6)
    assert verify_run(life.reopen(tmp_path / "run"), tmp_path / "run", every=0).failures == ()


def test_deadlines_follow_their_schedule(tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "loosening", "deadline.fraction=0.5", "deadline.last_fraction=0.9")
    np.testing.assert_allclose([r["deadline_s"] / r["dense_latency_s"] for r in records], [0.5, 0.7, 0.9])
    total_s = 0.6 * sum(r["dense_latency_s"] for r in records)
    budget = run_to_end(tmp_path / "budget", f"deadline.total_seconds={total_s}", "pruner.max_ratio=1.0")
    assert budget[-1]["simulated_s"] <= total_s * 1.001
    np.testing.assert_allclose(budget[0]["deadline_s"], total_s / 3)
    np.testing.assert_allclose(budget[2]["deadline_s"], total_s - budget[1]["simulated_s"])


def test_partial_participation_and_epochs(tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "run", "devices.per_round=2", "training.epochs=1")
    chosen = [tuple(r["devices"]["id"]) for r in records]
    assert all(len(ids) == 2 for ids in chosen)
    assert len(set(chosen)) > 1


def stop_and_resume(run_dir: Path, stop: int, *overrides: str) -> None:
    """Runs a tiny experiment to its end with an interruption after `stop` rounds."""
    life.create(make_setup(*overrides), composed(*overrides), run_dir)
    records = life.run(make_setup(*overrides), run_dir)
    for _ in range(stop):
        next(records)
    records.close()
    list(life.run(life.reopen(run_dir), run_dir))


PAYLOAD = ("payload.bits=[4,8]",)
FREEZE = ("rounds=8", "participation.freeze_below=0.3", "participation.freeze_window=1", "training.lr=0.02")


@pytest.mark.parametrize("method", ["proposed", "fedsim", "pruned"])
def test_frozen_devices_send_nothing_and_never_come_back(method: str) -> None:
    """Some freeze, the others go on; who is frozen trains its own part alone, and nothing at all when it has none."""
    setup = make_setup(*FREEZE, f"method={method}", "channel.outage_enter=0.2", "channel.outage_leave=0.5")
    steps, band_hz = steps_of(setup, 8), setup.experiment.channel.bandwidth_hz
    mixed = 0
    for step in steps:
        before, record, after = step.before, step.record.as_json(), step.after
        frozen = {*np.flatnonzero(before.slots["frozen"]).tolist()}
        assert frozen <= {*np.flatnonzero(after.slots["frozen"]).tolist()}
        assert record["frozen"] == after.slots["frozen"].sum()
        rows = record["devices"]
        still = [at for at, device in enumerate(rows["id"]) if device in frozen]
        here = setup.scenario.at(before.round).available[:4]
        assert [rows["id"][at] for at in still] == (
            [] if method == "pruned" else sorted(frozen & {*np.flatnonzero(here)})
        )
        for at in still:
            assert rows["bytes_up"][at] == rows["bandwidth_hz"][at] == rows["uplink_s"][at] == 0
            assert rows["compute_s"][at] > 0
            assert rows["downlink_s"][at] > 0
            assert rows["joules"][at] > 0
            assert not np.array_equal(before.personal[rows["id"][at]], after.personal[rows["id"][at]])
        assert record["latency_s"] == max(rows.get("latency_s", []), default=0.0)
        mixed += 0 < len(still) < len(rows["id"])
        if len(still) < len(rows["id"]):  # what the others leave of the band is theirs
            assert np.isclose(sum(rows["bandwidth_hz"]), band_hz)
        else:
            assert record["status"] == ("frozen" if here.any() else "idle")
            np.testing.assert_array_equal(before.shared, after.shared)
    assert frozen
    assert mixed or method == "pruned"


def test_without_freezing_no_state_and_no_record_knows_of_it(tmp_path: Path) -> None:
    """A window beyond the run's end freezes nobody: the same parameters and figures as without, apart from the count."""
    off, on = tmp_path / "off", tmp_path / "on"
    records = [run_to_end(off), run_to_end(on, "participation.freeze_below=0.5", "participation.freeze_window=3")]
    assert set(records[1][0]) - set(records[0][0]) == {"frozen"}
    assert [record | {"frozen": 0} for record in records[0]] == records[1]
    states = [
        folder.load(at, make_setup(*rest).experiment.config_hash).state
        for at, rest in ((off, ()), (on, ("participation.freeze_below=0.5", "participation.freeze_window=3")))
    ]
    assert {*states[1].slots} - {*states[0].slots} == {"frozen", "recent_loss"}
    np.testing.assert_array_equal(states[0].shared, states[1].shared)
    np.testing.assert_array_equal(list(states[0].personal), list(states[1].personal))


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("pruner=taylor", "weights=pruning_error", "channel.outage_enter=0.2", "channel.outage_leave=0.5"),
        pytest.param(("pruner.granularity=channel",), marks=pytest.mark.slow),
        pytest.param(PAYLOAD, marks=pytest.mark.slow),
    ],
)
def test_freezing_runs_are_the_same_bytes_and_sound(tmp_path: Path, extra: tuple[str, ...]) -> None:
    overrides = (*FREEZE, *extra)
    records = run_to_end(tmp_path / "whole", *overrides)
    assert records[-1]["frozen"] > 0
    assert verify_run(life.reopen(tmp_path / "whole"), tmp_path / "whole", every=0).failures == ()
    run_to_end(tmp_path / "processes", *overrides, "execution.kind=processes", "execution.workers=2")
    assert results(tmp_path / "processes") == results(tmp_path / "whole")
    for stop in (1, 3, 5, 7) if not extra else (4,):
        stop_and_resume(tmp_path / f"stopped{stop}", stop, *overrides)
        assert results(tmp_path / f"stopped{stop}") == results(tmp_path / "whole")


def test_a_device_freezes_when_the_line_through_its_losses_falls_too_little() -> None:
    rule = Participation(0.1, 2)
    slots = rule.slots(Sizes(4, 1))
    for losses in ([1.0, 1.0, 1.0], [1.2, 0.94, 0.8], [0.95, 0.9, 0.7]):
        slots = rule.next_slots(slots, outcome([0, 1, 2], train_loss=losses))
    # 5 % of 1.0 down the line; a rise and a fall, 10.2 % of 1.03; 30 %; and one that never trained
    assert slots["frozen"].tolist() == [1, 0, 0, 0]
    slots = rule.next_slots(slots, outcome([2], train_loss=[0.7]))
    assert slots["frozen"].tolist() == [1, 0, 0, 0]
    slots = rule.next_slots(slots, outcome([2, 3], train_loss=[0.7, None]))
    assert slots["frozen"].tolist() == [1, 0, 1, 0]
    slots = rule.slots(Sizes(1, 1))
    for loss in (1.0, 0.951, 0.902):  # 9.8 % of where the line begins, and more than a tenth of its middle
        slots = rule.next_slots(slots, outcome([0], train_loss=[loss]))
    assert slots["frozen"].tolist() == [1]
    assert Participation(None, 5).slots(Sizes(4, 1)) == {}


def test_a_run_folder_is_refused_when_it_exists_or_is_damaged_or_anothers(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    with pytest.raises(CheckpointError, match="exists: continue it with"):
        run_to_end(tmp_path / "run")
    with pytest.raises(CheckpointError, match="belongs to configuration"):
        list(life.run(make_setup("training.lr=0.01"), tmp_path / "run"))
    with pytest.raises(CheckpointError, match="No such file"):
        life.reopen(tmp_path / "nothing")

    damaged = tmp_path / "damaged"
    for name, change, message in (
        ("state.safetensors", lambda b: b[:-1], "damaged checkpoint"),
        ("rounds.jsonl", lambda b: b.replace(b'"round": 2', b'"round": 7'), "line 2 is damaged"),
        ("rounds.jsonl", lambda b: b"".join(b.splitlines(keepends=True)[:1]), "has 1 rounds, the checkpoint 3"),
        ("PERSONAL", lambda b: b[:-4], r"personal-\d+\.f32: damaged"),
        ("PERSONAL", lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], r"personal-\d+\.f32: damaged"),
        ("manifest.json", lambda b: b[:100], "damaged"),
        ("manifest.json", lambda b: b.replace(b'"sha256": "', b'"sha256": "0'), "dataset.sha256"),
        ("config.yaml", lambda b: b.replace(b"lr: 0.05", b"lr: 0.06"), "made with another config"),
        ("config.yaml", lambda b: b.replace(b"lr: 0.05", b"lr: -1"), "training.lr=-1"),
        ("config.yaml", lambda b: b"a: [1,\n\x00", "config.yaml"),
        ("config.yaml", lambda b: b"\xff\xfe", "config.yaml"),
        ("manifest.json", lambda b: b"[]", "not a JSON object"),
    ):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(tmp_path / "run", damaged)
        file = next(damaged.glob("personal-*.f32")) if name == "PERSONAL" else damaged / name
        file.write_bytes(change(file.read_bytes()))
        with pytest.raises(CheckpointError, match="damaged"):
            list(life.run(life.reopen(damaged), damaged))
        resign(damaged)
        with pytest.raises(CheckpointError, match=message):
            list(life.run(life.reopen(damaged), damaged))


def test_only_devices_that_trained_take_room_and_old_rows_are_cleared(tmp_path: Path) -> None:
    """Twelve devices, two a round: the file of personal rows stays within four times the live ones, at every round."""
    overrides = ("devices.count=12", "devices.per_round=2", "rounds=30", "evaluation.every=30", "evaluation.devices=3")
    setup = make_setup(*overrides)
    life.create(setup, composed(*overrides), tmp_path / "run")
    size, trained, state = setup.initial.personal.initial.nbytes, set(), setup.initial
    with executor(
        setup.experiment.execution, functools.partial(build_learner, setup.experiment, setup.scenario)
    ) as workers:
        for record in life.run(setup, tmp_path / "run"):
            trained |= set(record.devices.id)
            (file,) = (tmp_path / "run").glob("personal-*.f32")
            assert file.stat().st_size <= 4 * len(trained) * size
            state, _ = round_step(setup, state, workers)  # all rows in memory: the reference
    stored = folder.load(tmp_path / "run", setup.experiment.config_hash).state
    assert (file.name != "personal-0.f32") == (4 * len(trained) < 60)
    np.testing.assert_array_equal(list(stored.personal), list(state.personal))
    assert len(devices_tested(setup)) == 3
    (tmp_path / "run" / "summary.json").unlink()
    garbage = tmp_path / "run" / "personal-99.f32"  # what a killed process leaves behind
    garbage.write_bytes(b"half")
    with file.open("ab") as rows:
        rows.write(b"more")
    again = folder.load(tmp_path / "run", setup.experiment.config_hash).state
    assert not garbage.exists()
    np.testing.assert_array_equal(list(stored.personal), list(again.personal))


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    with (
        lock.locked(tmp_path / "run"),
        pytest.raises(CheckpointError, match="another process"),
        lock.locked(tmp_path / "run"),
    ):
        pass


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fedprune_cli", *arguments]


def kill_and_resume(tmp_path: Path, kind: str, kills: int) -> None:
    """Kills a real run with SIGKILL at random moments until it is done; its bytes must be those of one that was never killed."""
    overrides = [*TINY, "rounds=25", f"execution.kind={kind}", "execution.workers=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("train", *overrides, f"out={whole}"), check=True, capture_output=True)
    rng, happened = random.Random(0), 0
    while not (killed / "summary.json").exists() and happened < 50:
        start = command("resume", str(killed)) if killed.exists() else command("train", *overrides, f"out={killed}")
        process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        begun = sum(1 for _ in (killed / "rounds.jsonl").open()) if killed.exists() else 0
        if happened < kills:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:  # let it make some progress first
                if killed.exists() and sum(1 for _ in (killed / "rounds.jsonl").open("rb")) > begun + rng.randrange(3):
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 0.05)
            os.kill(process.pid, signal.SIGKILL)
            happened += 1
        process.wait()
    assert happened >= min(kills, 2)
    assert results(killed) == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["serial", "processes"])
def test_runs_killed_ten_times_resume_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    kill_and_resume(tmp_path, kind, kills=10)
