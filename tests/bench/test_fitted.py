"""`fedprune calibrate --run`: a fleet and a channel from the seconds of a pilot's rounds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fedprune, make_setup, resign
from nodes.fleet import InProcessSite, begin, deal, on_nodes

from fedprune_cli.allocate.inverse import rate
from fedprune_cli.bench import fitted
from fedprune_cli.bench.seen import Seen, read_pilot
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.plain import plain
from fedprune_cli.errors import CheckpointError
from fedprune_cli.round.setup import Setup, prepare
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.state import Array

ROUNDS = 12
PRUNED = (
    "devices.count=3", "devices.fresh=0", f"rounds={ROUNDS}", "pruner.granularity=channel", "model.hidden=[64]",
    "deadline.fraction=0.3", "training.shared_steps=1", "training.personal_steps=1",
)  # fmt: skip
SLOWER, STEP_S = np.array([3.0, 0.5, 40.0]), np.array([2e-6, 1e-6, 4e-5])
UPLINK_BPS, DOWN_S = np.array([2e5, 1e6, 6e4]), 0.03
Line = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a finished run of a pilot, whose seconds are no one's."""
    home = tmp_path_factory.mktemp("made")
    places = deal(make_setup(*PRUNED), home)
    setup, config = begin(home, home / "run", PRUNED)
    list(life.run(setup, home / "run", site=InProcessSite(places, config)))
    return home


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "pilot")
    return tmp_path / "pilot" / "run"


def rewrite(run_dir: Path, change: Callable[[Line], object]) -> None:
    """Changes each line of timings.jsonl, and signs the folder anew."""
    path = run_dir / folder.TIMINGS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    resign(run_dir)


def timings(run_dir: Path) -> list[Line]:
    """Returns the lines of timings.jsonl."""
    return [json.loads(line) for line in (run_dir / folder.TIMINGS).read_text().splitlines()]


def take(run_dir: Path, noise: float = 0.0) -> Setup:
    """Makes the nodes as fast as SLOWER, STEP_S and UPLINK_BPS say, up to a noise; returns the run's setup."""
    setup = life.reopen(run_dir)
    seen, rng = {one.device: one for one in read_pilot(setup, run_dir).seen}, np.random.default_rng(0)

    def noisy(seconds: float) -> float:
        return float(seconds * np.exp(noise * rng.standard_normal()))

    def change(line: Line) -> None:
        for node in line["nodes"]:
            of, k = seen[node["device"]], node["device"]
            at = int(np.flatnonzero(of.round == line["round"])[0])
            node["compute_s"] = noisy(SLOWER[k] * of.work_s[at] + STEP_S[k] * of.steps[at])
            node["uplink_s"] = noisy(of.bits[at] / UPLINK_BPS[k])
            node["test_downlink_s"], node["downlink_s"] = DOWN_S, 0.0 if line["round"] > 1 else DOWN_S

    rewrite(run_dir, change)
    return setup


def chosen(out: Path, home: Path) -> Setup:
    """Returns the setup of a run that plans with what was written."""
    own = [one for one in on_nodes(home, PRUNED) if not one.startswith("devices.")]
    return prepare(build_experiment(compose_config([*own, "devices=fitted", "channel=fitted"], out)))


def test_known_speeds_are_recovered_and_the_next_allocation_plans_with_them(run_dir: Path, tmp_path: Path) -> None:
    setup = take(run_dir)
    fit = fitted.fit_run(setup, run_dir)
    assert [one.identified for one in fit.devices] == [True] * 3
    np.testing.assert_allclose([one.slower for one in fit.devices], SLOWER, rtol=1e-6)
    np.testing.assert_allclose([one.step_s for one in fit.devices], STEP_S, rtol=1e-4)
    np.testing.assert_allclose([one.uplink_bps for one in fit.devices], UPLINK_BPS, rtol=1e-9)
    for one in fit.devices:
        assert (
            max(one.compute.after, one.uplink.after, one.compute.spread, one.uplink.spread) < 1e-6 < one.compute.before
        )
    fitted.write(tmp_path / "cal", setup, fit)
    next_one = chosen(tmp_path / "cal", run_dir.parent)
    fleet, channel = next_one.scenario.fleet, next_one.experiment.channel
    np.testing.assert_allclose(fleet.cycles_per_flop, SLOWER * setup.scenario.fleet.cycles_per_flop, rtol=1e-6)
    assert fleet.practice is not None
    np.testing.assert_allclose(fleet.practice.step_s, STEP_S, rtol=1e-4)
    np.testing.assert_array_equal(fleet.cpu_hz, setup.scenario.fleet.cpu_hz)
    assert channel.bandwidth_hz >= fleet.min_bandwidth_hz.sum()
    for number in (0, 7):
        snr_hz = fleet.tx_power_w * channel.gain(5, number, fleet) / channel.noise_w_per_hz
        np.testing.assert_allclose(rate(fleet.max_bandwidth_hz, snr_hz), UPLINK_BPS, rtol=1e-6)
    places = deal(make_setup(*PRUNED), run_dir.parent)
    config = compose_config([*(one for one in on_nodes(run_dir.parent, PRUNED) if not one.startswith("devices.")),
                             "devices=fitted", "channel=fitted", "rounds=1"], tmp_path / "cal")  # fmt: skip
    life.create(planned := prepare(build_experiment(config)), config, tmp_path / "next")

    (record,) = life.run(planned, tmp_path / "next", site=InProcessSite(places, plain(config, resolve=True)))
    bits = 8 * np.array(record.devices.bytes_up)
    np.testing.assert_allclose(record.devices.uplink_s, bits / UPLINK_BPS[[*record.devices.id]], rtol=1e-3)
    np.testing.assert_allclose(record.devices.downlink_s, DOWN_S, rtol=1e-3)
    assert record.mean_ratio is not None
    assert record.mean_ratio > 0


def test_noise_moves_the_fit_no_further_than_a_median_is_moved(run_dir: Path) -> None:
    fit = fitted.fit_run(take(run_dir, noise=0.05), run_dir)
    np.testing.assert_allclose([one.uplink_bps for one in fit.devices], UPLINK_BPS, rtol=0.08)
    for one, seen in zip(fit.devices, read_pilot(life.reopen(run_dir), run_dir).seen, strict=True):
        true = SLOWER[one.device] * seen.work_s + STEP_S[one.device] * seen.steps
        np.testing.assert_allclose(one.slower * seen.work_s + one.step_s * seen.steps, true, rtol=0.2)
        assert one.compute.after < 0.1
        assert 0.01 < one.uplink.spread < 0.3


def test_a_round_that_went_wrong_moves_nothing(run_dir: Path) -> None:
    """The first round builds the model, and another machine may be busy for one: a median does not see them."""
    setup = take(run_dir)

    def spoil(line: Line) -> None:
        if line["round"] in (1, 5):
            for node in line["nodes"]:
                node["compute_s"] *= 50
                node["uplink_s"] *= 20

    rewrite(run_dir, spoil)
    fit = fitted.fit_run(setup, run_dir)
    np.testing.assert_allclose([one.slower for one in fit.devices], SLOWER, rtol=1e-3)
    np.testing.assert_allclose([one.uplink_bps for one in fit.devices], UPLINK_BPS, rtol=1e-9)


def fit_of(work_s: Array, compute_s: Array, known_s: float = 0.0) -> tuple[float, float, bool]:
    return fitted.fit_compute(work_s, np.full(len(work_s), 10.0), compute_s, known_s)


def test_a_fixed_cost_is_told_only_from_flops_that_differ() -> None:
    same = np.full(9, 2.0)
    np.testing.assert_allclose(fit_of(same, 3 * same), (3, 0, 0))
    slower, step_s, identified = fit_of(same, 3 * (same + 10 * 0.1), known_s=0.1)
    np.testing.assert_allclose((slower, step_s), (3, 0.3))
    assert not identified
    apart = np.linspace(1, 2, 9)
    np.testing.assert_allclose(fit_of(apart, 3 * apart + 10 * 0.05), (3, 0.05, 1))
    assert fit_of(apart, 3 * apart)[2] is False  # a proportion says it already
    assert fit_of(apart, 5 - apart)[2] is False  # a line that falls is no speed


def cut(run_dir: Path, text: str) -> None:
    path = run_dir / folder.TIMINGS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], text, *lines[2:]]) + "\n")


def few(run_dir: Path) -> None:
    rewrite(run_dir, lambda line: line.update(nodes=line["nodes"] if line["round"] < 3 else line["nodes"][:2]))


def without_nodes(run_dir: Path) -> None:
    rewrite(run_dir, lambda line: line.pop("nodes"))


def over_flower(run_dir: Path) -> None:
    rewrite(run_dir, lambda line: [node.update(carried_s=1.0) for node in line["nodes"]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (few, "device-2 has 2 measured rounds: must be at least 3"),
        (without_nodes, "a run without nodes"),
        (over_flower, "a run over Flower"),
        (lambda run_dir: cut(run_dir, '{"round": 2, "nod'), "timings.jsonl: line 2 is damaged"),
        (lambda run_dir: cut(run_dir, '{"round": 2, "nodes": [{"device": 0}]}'), "timings.jsonl: line 2 is damaged"),
        (lambda run_dir: cut(run_dir, "[]"), "timings.jsonl: line 2 is damaged"),
        (lambda run_dir: (run_dir / folder.TIMINGS).unlink(), "timings.jsonl"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(run_dir: Path, spoil: Callable[[Path], object], message: str) -> None:
    setup = life.reopen(run_dir)
    spoil(run_dir)
    with pytest.raises(CheckpointError, match=message):
        fitted.fit_run(setup, run_dir)


def test_the_command_prints_a_table_of_eighty_columns_and_writes(run_dir: Path) -> None:
    take(run_dir)
    result = fedprune("calibrate", "--run", str(run_dir), "--out", "cal")
    assert result.returncode == 0, result.stderr
    rows = result.stdout.splitlines()[:9]
    assert max(map(len, rows)) <= 80
    assert [row.split()[:2] for row in rows[2:8]] == [[str(k), way] for k in range(3) for way in ("compute", "uplink")]
    assert "Energy: not measured" in result.stdout
    assert "devices=fitted channel=fitted" in result.stdout
    written = json.loads(Path("cal/fitted.json").read_text())
    assert json.loads(fedprune("calibrate", "--run", str(run_dir), "--json").stdout) == written
    without_nodes(run_dir)
    result = fedprune("calibrate", "--run", str(run_dir))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (5, "", 1)
    refused = fedprune("calibrate", "model=mlp", "--run", str(run_dir))
    assert (refused.returncode, refused.stderr) == (
        2, "error: model=mlp: not with --run, whose folder has its configuration\n",
    )  # fmt: skip


def test_what_nodes_drew_is_told_and_not_fitted(run_dir: Path) -> None:
    """Medians of the rounds in which it was measured, beside the model's of the same rounds; the others count for nothing."""
    setup = take(run_dir)
    before = fitted.fit_run(setup, run_dir)
    assert before.drawn == ()
    assert fitted.to_json(before)["joules"] is None

    def measure(line: Line) -> None:
        for node in line["nodes"]:
            if node["device"] == 1 and line["round"] != 2:
                node["joules"], node["joules_of"] = 7.0 if line["round"] % 2 else 9.0, "board"
                node["modelled"]["joules"] = 0.5

    rewrite(run_dir, measure)
    after = fitted.fit_run(setup, run_dir)
    (one,) = after.drawn
    assert (one.device, one.of, one.modelled_j) == (1, "board", 0.5)
    assert one.rounds == sum(any(node["device"] == 1 for node in line["nodes"]) for line in timings(run_dir)) - 1
    assert one.measured_j in (7.0, 8.0, 9.0)
    assert dataclasses.replace(after, drawn=()) == before
    assert f"{one.measured_j:.3g} J of board on device 1 (0.5)" in fitted.sentence(after)
    assert json.loads(json.dumps(fitted.to_json(after)))["joules"][0]["device"] == 1
    rewrite(run_dir, lambda line: [node.update(joules=-1.0) for node in line["nodes"]])
    with pytest.raises(CheckpointError, match="round 1 is damaged"):
        fitted.fit_run(setup, run_dir)


def test_devices_that_died_in_a_round_are_left_out_of_it(run_dir: Path) -> None:
    setup = take(run_dir)
    rewrite(run_dir, lambda line: line["nodes"].pop(0) if line["round"] == 4 else None)
    seen: tuple[Seen, ...] = read_pilot(setup, run_dir).seen
    assert [len(one.round) for one in seen] == [ROUNDS - 1, ROUNDS, ROUNDS]
    assert 4 not in seen[0].round


def test_copies_are_fitted_each_by_its_own_link(tmp_path: Path) -> None:
    """The slowest exactly, as it decides rounds; the others come out by their uplinks, where downlinks are four times as fast here."""
    own, down_bps = (*PRUNED, "meter.unicast=true", "rounds=3"), 4 * UPLINK_BPS
    places = deal(make_setup(*own), tmp_path)
    setup, config = begin(tmp_path, run_dir := tmp_path / "run", own)
    list(life.run(setup, run_dir, site=InProcessSite(places, config)))
    sent = {record.round: record.devices for record in folder.read_records(run_dir)}

    def change(line: Line) -> None:
        for node in line["nodes"]:
            rows, node["test_downlink_s"] = sent[line["round"]], 0.0
            node["compute_s"], node["uplink_s"] = 0.1, 8 * rows.bytes_up[node["device"]] / UPLINK_BPS[node["device"]]
            node["downlink_s"] = 8 * (rows.bytes_down or [])[node["device"]] / down_bps[node["device"]]

    rewrite(run_dir, change)
    fit = fitted.fit_run(setup, run_dir)
    np.testing.assert_allclose([one.downlink_bps or 0 for one in fit.devices], down_bps, rtol=1e-9)
    assert fit.downlink_bps == min(one.downlink_bps or 0 for one in fit.devices)
    assert fit.round.after < 0.05 < fit.round.before  # each took as long to compute, whatever it kept
    assert "kbit/s, the slowest device's." in fitted.sentence(fit)
    fitted.write(tmp_path / "cal", setup, fit)
    config = compose_config([*(one for one in on_nodes(tmp_path, own) if not one.startswith("devices.")),
                             "devices=fitted", "channel=fitted"], tmp_path / "cal")  # fmt: skip
    life.create(planned := prepare(build_experiment(config)), config, tmp_path / "next")
    record = next(iter(life.run(planned, tmp_path / "next", site=InProcessSite(places, plain(config, resolve=True)))))
    waits = 8 * np.array(record.devices.bytes_down) / down_bps
    np.testing.assert_allclose(record.devices.downlink_s, waits, rtol=0.25)
    np.testing.assert_allclose(record.devices.downlink_s[2], waits[2], rtol=1e-3)
