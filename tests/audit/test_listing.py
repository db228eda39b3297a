"""The list of runs, and what of them can go."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import composed, fedprune, make_setup, run_to_end

from fedprune_cli.audit import listing as runs
from fedprune_cli.errors import CheckpointError
from fedprune_cli.report.run import write_report
from fedprune_cli.runs import life
from fedprune_cli.store import folder, lock


def interrupted(run_dir: Path) -> None:

    life.create(make_setup(), composed(), run_dir)
    records = life.run(make_setup(), run_dir)
    next(records)
    records.close()


def test_the_list_says_what_each_run_is(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    records = run_to_end(root / "a/finished")
    interrupted(root / "b/interrupted")
    run_to_end(root / "c/damaged")
    (root / "c/damaged/manifest.json").write_text("{")
    run_to_end(root / "d/running")
    with lock.locked(root / "d/running"):
        found = {Path(of.path).name: of for of in runs.find_runs(root)}
    assert {name: of.status for name, of in found.items()} == {name: name for name in found}
    assert (found["interrupted"].rounds, found["interrupted"].wanted_rounds) == (1, 3)
    assert found["finished"].accuracy == records[-1]["accuracy"]
    assert found["finished"].size_bytes >= (root / "a/finished/state.safetensors").stat().st_size
    listed = fedprune("runs", "outputs", "--json")
    assert [Path(of["path"]).name for of in json.loads(listed.stdout)] == [
        "finished",
        "interrupted",
        "damaged",
        "running",
    ]
    with pytest.raises(CheckpointError, match="no such folder"):
        runs.find_runs(tmp_path / "nowhere")


def test_pruning_takes_checkpoints_of_finished_runs_and_what_dead_processes_left(tmp_path: Path) -> None:
    root = Path("outputs")
    run_to_end(root / "finished")
    interrupted(root / "interrupted")
    child = subprocess.Popen(["true"])
    child.wait()
    (left := root / f".half.{child.pid}.new").mkdir()
    (mine := root / ".half.1.new").mkdir()  # process 1 is alive
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    shown = fedprune("runs", "--prune")
    assert "can go: add --yes" in shown.stdout
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert left.exists()
    answer = json.loads(fedprune("runs", "--prune", "--yes", "--json").stdout)
    gone = {
        root / "finished/state.safetensors",
        root / "finished/personal-0.f32",
        root / "finished/masks-3.safetensors",
    }
    assert {Path(path) for path in answer["bytes"]} == gone | {left}
    sums = root / "finished" / folder.SUMS
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path != sums} == {
        path: content for path, content in before.items() if path not in gone | {sums}
    }
    folder.check(root / "finished")
    assert (left.exists(), mine.exists()) == (False, True)
    assert {Path(of.path).name: of.status for of in runs.find_runs(root)} == {
        "finished": "pruned",
        "interrupted": "interrupted",
    }
    write_report(root / "finished")
    assert len(list(life.run(life.reopen(root / "interrupted"), root / "interrupted"))) == 2
    with pytest.raises(CheckpointError, match="its checkpoint was pruned"):
        list(life.run(life.reopen(root / "finished"), root / "finished"))
