"""A comparison's members side by side: the bytes of one by one, and one that fails or dies leaves the rest alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from conftest import TINY, composed, fedprune
from omegaconf import OmegaConf

from fedprune_cli.config.build import build_experiment
from fedprune_cli.many.side_by_side import Member, run_members


def make_member(tmp_path: Path, arm: str, seed: int, *overrides: str) -> Member:
    config = composed(f"out={tmp_path}/{arm}{seed}", f"seed={seed}", *overrides)
    build_experiment(config)
    return Member(arm, seed, OmegaConf.to_yaml(config, resolve=True), tmp_path / f"{arm}{seed}")


@pytest.mark.slow
def test_side_by_side_gives_the_bytes_of_one_by_one() -> None:
    for jobs in ("1", "2"):
        Path(jobs).mkdir()
        result = fedprune("compare", *TINY, "--jobs", jobs, cwd=jobs)
        assert result.returncode == 0, result.stderr
    alone, together = (
        {path.name: (path / "state.safetensors").read_bytes() for path in Path(jobs, "outputs/main").glob("*-s?")}
        for jobs in ("1", "2")
    )
    assert len(alone) == 2
    assert alone == together


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_failing_member_is_named_and_the_complete_seeds_are_reported(jobs: str) -> None:
    fedprune("train", *TINY, "seed=1")
    (damaged,) = Path("outputs/main").glob("*-s1")
    (damaged / "summary.json").unlink()
    (damaged / "state.safetensors").write_bytes(b"no checkpoint")
    arms = ("--methods", "proposed", "--jobs", jobs)
    result = fedprune("compare", *TINY, *arms, "--seeds", "0,1", "--out", "cmp")
    assert result.returncode == 5
    named, last = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert named.startswith(f"error: proposed, seed 1: {damaged}")
    assert last == "error: 1 of 2 runs failed, see above; left out of the report: seed 1"
    assert "report: cmp/index.html" in result.stdout
    assert str(damaged) in Path("cmp/index.html").read_text()
    none_left = fedprune("compare", *TINY, *arms, "--seeds", "1", "--out", "none")
    assert (none_left.returncode, Path("none").exists()) == (5, False)


def test_an_infeasible_arm_ends_with_its_own_exit_code() -> None:
    arms = 'arms={a: ["method=personalized"], b: ["method=proposed", "allocator.on_infeasible=fail", "deadline.fraction=1e-6"]}'
    result = fedprune("compare", *TINY, arms, "--jobs", "1")
    assert result.returncode == 3
    assert "error: b, seed 0: " in result.stderr
    assert "1/2" in result.stderr or "2/2" in result.stderr


def test_a_member_whose_process_dies_is_a_failure_and_can_be_continued(tmp_path: Path) -> None:
    first, second = make_member(tmp_path, "a", 0, "rounds=100000"), make_member(tmp_path, "b", 0)
    ended = run_members([first, second], jobs=2)
    name, failure = next(ended)
    assert (name, failure) == (second, None)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid or 0, signal.SIGKILL)
    name, failure = next(ended)
    assert name == first
    assert failure
    assert failure.exit_code == 7
    assert "its process died (exit code -9)" in str(failure)
    assert list(ended) == []
    assert fedprune("verify", str(first.run_dir)).returncode == 0


def test_leaving_early_ends_the_children(tmp_path: Path) -> None:
    members = [make_member(tmp_path, "a", 0, "rounds=100000"), make_member(tmp_path, "b", 0)]
    ended = run_members(members, jobs=2)
    next(ended)
    ended.close()
    assert multiprocessing.active_children() == []
