"""`fedprune allocate` and `fedprune ladder`: what they print and write, and that it is what a run would do."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_experiment, make_setup, run_to_end
from typer.testing import CliRunner

from fedprune_cli.commands.app import app
from fedprune_cli.contracts.problems import literature
from fedprune_cli.errors import DataError, FedpruneError
from fedprune_cli.report.allocation import answer
from fedprune_cli.round.first import allocate_first_round, ask


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_is_all_that_is_printed_and_has_every_key() -> None:
    result = json.loads(call("allocate", "--json", "devices.count=5", "seed=1"))
    assert list(result) == ["status", "deadline_s", "objective", "price_per_hz", "certificate", "message", "devices"]
    assert list(result["devices"][0]) == [
        "id",
        "prune_ratio",
        "bandwidth_hz",
        "rate_bps",
        "latency_s",
        "binds",
        "admitted",
    ]
    assert max(result["certificate"].values()) <= 1e-9
    assert sum(device["bandwidth_hz"] for device in result["devices"]) <= 20e6 * (1 + 1e-9)
    assert max(device["latency_s"] for device in result["devices"]) <= result["deadline_s"] * (1 + 1e-9)


def test_the_first_round_of_a_run_is_what_allocate_says(tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "run")
    result = answer(allocate_first_round(make_experiment()), of_several=False)
    assert [device["prune_ratio"] for device in result["devices"]] == records[0]["devices"]["prune_ratio"]


def write_own(problem: object) -> None:
    names = ("shared_compute_s", "payload_bits", "fixed_s", "snr_hz", "weight")
    with Path("own.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(zip(*(getattr(problem, name) for name in names), strict=True))


def test_own_columns_are_the_problem_itself() -> None:
    problem = literature(0.5, seed=0)
    write_own(problem)
    result = json.loads(
        call("allocate", "--json", "--devices", "own.csv", "--deadline-fraction", "0.5", "--max-ratio", "0.95")
    )
    assert np.isclose(result["deadline_s"], problem.deadline_s)
    fair = json.loads(
        call("allocate", "--json", "--devices", "own.csv", "--objective", "minmax", "--max-ratio", "0.95")
    )
    worst = [max(device["prune_ratio"] for device in r["devices"]) for r in (result, fair)]
    assert worst[1] < worst[0]
    assert fair["certificate"] is None
    short = json.loads(
        call(
            "allocate",
            "--json",
            "--devices",
            "own.csv",
            "--objective",
            "p2",
            "--mean-ratio",
            "0.3",
            "--max-ratio",
            "0.95",
        )
    )
    assert np.isclose(sum(device["prune_ratio"] for device in short["devices"]) / 10, 0.3)
    narrow = json.loads(
        call(
            "allocate",
            "--json",
            "--devices",
            "own.csv",
            "--bandwidth-mhz",
            "10",
            "--deadline-s",
            str(result["deadline_s"]),
        )
    )
    assert narrow["objective"] < result["objective"]


def test_physical_columns_reproduce_the_fleet(tmp_path: Path) -> None:
    setup = make_setup("devices=sampled")
    fleet, count = setup.scenario.fleet, setup.scenario.num_devices
    gain = setup.scenario.at(0).gain_linear
    with Path("fleet.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cpu_ghz", "cycles_per_flop", "tx_power_dbm", "samples", "gain_db"])
        for k in range(count):
            samples = len(setup.scenario.partition.train[k])
            writer.writerow([fleet.cpu_hz[k] / 1e9, fleet.cycles_per_flop[k], 23, samples, 10 * np.log10(gain[k])])
    experiment = make_experiment("devices=sampled", "channel.fading=none")
    a, b = ask(experiment, Path("fleet.csv")).problem, ask(make_experiment("devices=sampled")).problem
    for name in ("shared_compute_s", "payload_bits", "snr_hz", "weight", "fixed_s"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-9)


def test_outputs_are_written_and_the_price_is_said() -> None:
    text = call("allocate", "devices.count=5", "--out", "plan")
    assert "One more MHz lowers the weighted mean ratio by" in text
    assert {path.name for path in Path("plan").iterdir()} == {
        "allocation.csv",
        "allocation.json",
        "frontier.csv",
        "frontier.svg",
    }
    with Path("plan/frontier.csv").open() as file:
        frontier = list(csv.DictReader(file))
    ratios = [float(row["mean_ratio"]) for row in frontier]
    assert ratios == sorted(ratios, reverse=True)


def test_the_ladder_ranks_allocators_as_the_theory_does() -> None:
    names = ["kkt", "minmax", "equal", "uniform", "alternating"]
    rows = json.loads(
        call(
            "ladder",
            "--json",
            "experiment=literature",
            "--allocators",
            ",".join(names),
            "--fractions",
            "0.1,0.5,0.8,1.0",
        )
    )
    assert list(rows[0]) == ["fraction", "deadline_s", *names]
    for row in rows:
        met = {name: row[name] for name in names if row[name]}
        if "kkt" in met:
            assert met["kkt"][0] <= min(mean for mean, _ in met.values()) + 1e-12
            assert met["minmax"][1] <= min(largest for _, largest in met.values()) + 1e-9
    assert rows[0]["uniform"] is None  # a tenth of the dense time is too little for equal bandwidth
    assert rows[-1]["kkt"][1] < 1e-9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cpu_ghz,cycles_per_flop,tx_power_dbm,samples,gain_db\n1,1,23,100,-90\n1,-1,23,100,-90\n",
            "line 3: cycles_per_flop='-1'",
        ),
        ("cpu_ghz,cycles_per_flop,tx_power_dbm,samples,gain_db\n1,1,23,2.5,-90\n", "line 2: samples='2.5'"),
        ("shared_compute_s,payload_bits,fixed_s,snr_hz,weight\n1,1e6,0,-5,1\n", "line 2: snr_hz='-5'"),
        ("shared_compute_s,payload_bits\n1,1e6\n", "line 1: column fixed_s is missing"),
        ("", "column samples is missing"),
    ],
)
def test_bad_rows_are_named_with_their_line(text: str, message: str) -> None:
    Path("bad.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        ask(make_experiment(), Path("bad.csv"))
    with pytest.raises(DataError, match="No such file"):
        ask(make_experiment(), Path("none.csv"))
    with pytest.raises(FedpruneError, match="unknown objective 'p3'"):
        call("allocate", "--objective", "p3")
