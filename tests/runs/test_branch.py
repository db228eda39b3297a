"""A branch: another run that goes on from where one is, for longer or under another deadline, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import fedprune, read_lines, run_to_end

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.report.read import read_run
from fedprune_cli.report.run import run_table
from fedprune_cli.runs import life
from fedprune_cli.store import folder

RICH = (
    "payload.bits=[4,8]",
    "pruner=taylor",
    "participation.freeze_below=0.3",
    "participation.freeze_window=1",
    "channel.outage_enter=0.2",
)


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [pytest.param((), marks=pytest.mark.slow), RICH, pytest.param(("method=pruned",), marks=pytest.mark.slow)],
)
def test_more_rounds_are_the_rounds_of_a_run_that_was_longer_from_the_start(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    run_to_end(tmp_path / "short", *options)
    before = contents(tmp_path / "short")
    setup = life.branch(tmp_path / "short", ["rounds=6", f"out={tmp_path / 'branch'}"])
    records = life.run(setup, tmp_path / "branch")
    next(records)
    records.close()  # and is interrupted, and resumed as any other run
    list(life.run(life.reopen(tmp_path / "branch"), tmp_path / "branch"))
    run_to_end(tmp_path / "long", "rounds=6", *options)
    assert contents(tmp_path / "short") == before
    for name in (folder.RECORDS, *(path.name for path in (tmp_path / "long").glob("personal-*.f32"))):
        assert (tmp_path / "branch" / name).read_bytes() == (tmp_path / "long" / name).read_bytes(), name
    findings = verify_run(life.reopen(tmp_path / "branch"), tmp_path / "branch", every=1)
    assert (findings.failures, findings.rounds, findings.inherited) == ((), 6, 3)


def test_another_deadline_changes_only_what_comes_after_and_the_branch_says_where_it_comes_from(tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "run")
    result = fedprune("resume", "run", "rounds=5", "deadline.fraction=0.9", "--json")
    assert result.returncode == 0, result.stderr
    place = Path(json.loads(result.stdout)["run_dir"])
    branch = read_lines(place)
    assert branch[:3] == records
    assert [record["deadline_s"] for record in branch[3:]] == pytest.approx(
        [0.9 * r["dense_latency_s"] for r in branch[3:]]
    )
    manifest = json.loads((place / "manifest.json").read_text())
    parent = json.loads(Path("run/manifest.json").read_text())
    assert manifest["config"]["branch"] == {"run": f"{parent['config_hash']}-s0", "round": 3}
    assert manifest["config_hash"] != parent["config_hash"]
    assert "a branch" in [name for name, _ in run_table(read_run(place)).rows]
    again = fedprune("resume", "run", "rounds=5", "deadline.fraction=0.9")
    assert again.returncode == 5
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=3"], "rounds=3: must be more than the 3 that the run branches from"),
        (["rounds"], "must be KEY=VALUE"),
        (["training.lr=1"], "unknown key of a branch"),
        (["deadline.fractoin=1"], "Did you mean 'deadline.fraction'"),
        (["rounds=9", "deadline.fraction=-1"], r"deadline.fraction=-1"),
        (["rounds=9", "seed=1"], "unknown key of a branch"),
        (["rounds=[", "out=there"], "rounds"),
    ],
)
def test_what_would_change_what_the_state_means_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    run_to_end(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        life.branch(tmp_path / "run", overrides)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_branch_needs_a_run() -> None:
    made_up = ("branch={run: 0123456789ab-s0, round: 2}", "out=here")
    result = fedprune("train", *made_up)
    assert (result.returncode, Path("here").exists()) == (2, False)
    assert result.stderr.startswith("error: branch: is made from a run that is there")
    with pytest.raises(CheckpointError, match="a run folder is expected"):
        life.branch(Path("nowhere"), ["rounds=9"])
