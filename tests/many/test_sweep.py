"""Sweeps: Hydra's multirun skips what is finished, continues what is broken, and reports what is there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, extra, fedprune, make_experiment, run_to_end

from fedprune_cli.errors import ConfigError
from fedprune_cli.many import sweep


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    """Returns what a sweep's runs modelled, by file."""
    kept = ("rounds.jsonl", "state.safetensors", "summary.json", "manifest.json", "personal-*.f32", "report/*")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in kept
        for path in Path(folder).glob(f"outputs/main/*/{name}")
    }


@pytest.mark.slow
def test_the_same_command_skips_what_is_finished_and_continues_what_is_broken() -> None:
    command = ("train", "-m", *TINY, "method=proposed,personalized", "seed=0,1", "partition.alpha=1")
    Path("whole").mkdir()
    assert fedprune(*command, cwd="whole").returncode == 0
    partial = ("train", "-m", *TINY, "method=proposed", "seed=0,1", "partition.alpha=1")
    assert fedprune(*partial).returncode == 0
    finished, broken = sorted(Path("outputs/main").glob("*"))
    (broken / "summary.json").unlink()  # killed before it could finish
    untouched = (finished / "rounds.jsonl").stat().st_mtime_ns
    result = fedprune(*command, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [of["values"] for of in answer["groups"]] == [{"method": "proposed"}, {"method": "personalized"}]
    assert [of["seeds"] for of in answer["groups"]] == [[0, 1], [0, 1]]
    assert (finished / "rounds.jsonl").stat().st_mtime_ns == untouched
    assert bytes_of(".") == bytes_of("whole")
    page = Path(answer["report"])
    again = fedprune("report", str(page.parents[1]), "-q")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    again = fedprune(*command, "-q")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert {"index.html", "table.csv", "table.tex", "pareto.svg", "pareto.pdf"} == {
        file.name for file in page.parent.iterdir()
    }


def test_a_failing_run_is_named_and_the_others_go_on() -> None:
    result = fedprune("train", "-m", *TINY, "partition.alpha=-1,1")
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "partition.alpha=-1: must be" in lines[0]
    assert lines[1:] == ["error: 1 of 2 runs of the sweep failed, see above"]
    assert "Traceback" not in result.stderr
    assert "partition.alpha=1" in result.stdout
    (page,) = Path("outputs/sweeps").glob("*/report/index.html")
    assert "partition.alpha=-1: must be" in page.read_text()


def test_a_sweep_never_mixes_configurations_in_one_folder() -> None:
    result = fedprune("train", "-m", *TINY, "partition.alpha=0.1,1", "out=same")
    assert result.returncode == 5
    assert "same: holds another run (config_hash" in result.stderr
    assert make_experiment("partition.alpha=0.1").config_hash in Path("same/manifest.json").read_text()


def test_the_folder_is_named_by_what_is_asked_and_not_by_who_runs_it() -> None:
    asked = sweep.sweep_dir(["seed=0,1", "method=proposed,fedavg"])
    assert asked == sweep.sweep_dir(
        ["method=proposed,fedavg", "hydra/launcher=cores", "seed=0,1", "execution.kind=serial"]
    )
    assert asked == sweep.sweep_dir(["method=proposed,fedavg", "seed=0,1", "hydra.launcher.n_jobs=2"])
    assert asked != sweep.sweep_dir(["method=proposed,fedavg", "seed=0,1,2"])


def test_objectives_are_figures_of_the_summary(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    experiment = replace(make_experiment(), out=str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert sweep.objectives(experiment, ["final_accuracy"]) == summary["final_accuracy"]
    assert sweep.objectives(experiment, ["joules", "simulated_s"]) == [summary["joules"], summary["simulated_s"]]
    with pytest.raises(ConfigError, match=r"unknown objective 'joule'. Did you mean 'joules'"):
        sweep.objectives(experiment, ["joule"])


# --- on real launchers, each in an environment of its own ---------------------------------------------------------------

GRID = ("method=proposed,personalized,pruned", "partition.alpha=0.1,1", "seed=0,1,2,3")  # 24 runs
SWEEP = ("-m", "fedprune_cli", "train", "-m", *TINY)


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_with_the_bytes_of_one_that_was_not(overlay: Callable[..., Path]) -> None:
    python = overlay(*extra("joblib"))
    command = [str(python), *SWEEP, "rounds=30", *GRID, "hydra/launcher=cores", "hydra.launcher.n_jobs=2"]
    for place in ("whole", "killed"):
        Path(place).mkdir()
    subprocess.run(command, cwd="whole", check=True, capture_output=True, timeout=500)
    random = np.random.default_rng(0)
    for attempt in range(3):
        process = subprocess.Popen(
            command, cwd="killed", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        finished = len(list(Path("killed/outputs/main").glob("*/summary.json")))
        while len(list(Path("killed/outputs/main").glob("*/summary.json"))) < finished + 4 and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 2))
        if attempt < 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its workers find out by themselves
        process.wait()
        assert len(list(Path("killed/outputs/main").glob("*/summary.json"))) < 24
    continued = subprocess.run(command, cwd="killed", capture_output=True, text=True, timeout=500, check=False)
    assert continued.returncode == 0, continued.stderr
    assert len(list(Path("killed/outputs/main").glob("*/summary.json"))) == 24
    assert bytes_of("killed") == bytes_of("whole")
    left = [
        path
        for path in Path("/proc").glob("[0-9]*/cwd")
        if path.exists() and path.resolve() == Path("killed").resolve()
    ]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("joblib", ("hydra/launcher=cores",)),
        ("submitit", ("hydra/launcher=submitit_local",)),
        ("ray", ("hydra/launcher=cluster",)),
        ("optuna", ("hydra/sweeper=search", "hydra.sweeper.n_trials=4", "deadline.fraction=interval(0.3,0.9)")),
    ],
)
def test_every_launcher_and_sweeper_runs(package: str, arguments: Sequence[str], overlay: Callable[..., Path]) -> None:
    """One bad combination fails alone, the others give the bytes that they have by themselves."""
    bad = () if package == "optuna" else ("partition.alpha=-1,1",)
    command = [str(overlay(*extra(package))), *SWEEP, "seed=0,1", *bad, *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == (2 if bad else 0), result.stderr
    answer = json.loads(result.stdout)
    assert len(answer["failed"]) == len(bad) * 2
    assert sum(len(of["runs"]) for of in answer["groups"]) == (2 if bad else 4)
    for of in answer["groups"] if package == "joblib" else ():
        for seed, path in zip(of["seeds"], map(Path, of["runs"]), strict=True):
            alone = Path(f"alone-{path.name}")
            assert fedprune(*shlex.split(of["command"])[1:], f"seed={seed}", f"out={alone}").returncode == 0
            assert (path / "rounds.jsonl").read_bytes() == (alone / "rounds.jsonl").read_bytes()
