"""Faults of the real machine: a run that is killed, or refused a write, at any moment goes on to the bytes of one that never was."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, make_setup

from fedprune_cli import execute
from fedprune_cli.errors import CheckpointError, OutputError
from fedprune_cli.round.setup import Setup
from fedprune_cli.runs import life
from fedprune_cli.store import folder

RUN = ("rounds=12", "devices.count=6", "devices.per_round=2", "evaluation.every=4", "execution.workers=2")


def files(run_dir: Path) -> dict[str, bytes]:
    """Returns what must be the same whatever happened: everything but wall time, what was asked, and the checksums of both."""
    different = (folder.TIMINGS, folder.CONFIG, folder.SUMS)
    return {path.name: path.read_bytes() for path in sorted(run_dir.iterdir()) if path.name not in different}


def to_the_end(run_dir: Path, kind: str) -> None:
    """Begins or continues the run, as `train` and `resume` do."""
    setup = kill_setup(kind)
    if run_dir.exists():
        setup = life.reopen(run_dir)
    else:
        life.create(setup, composed(*RUN, f"execution.kind={kind}"), run_dir)
    for _ in range(1000):  # the workers of a killed process hold its lock until they notice
        try:
            list(life.run(setup, run_dir))
            return
        except CheckpointError as error:
            if "another process is writing" not in str(error):
                raise
            time.sleep(0.01)


def kill_setup(kind: str) -> Setup:
    return make_setup(*RUN, f"execution.kind={kind}")


def kill_and_resume(tmp_path: Path, kills: int) -> None:
    """Kills runs at random moments, from before their folder is there to after their last round, each once, and resumes each.

    It runs in a process of its own that forks the runs: importing everything again would take seconds for each.
    """
    import torch

    torch.set_num_threads(1)  # a process with threads cannot be forked
    context = multiprocessing.get_context("fork")
    execute.forkserver = lambda preload: context  # type: ignore[assignment, return-value]
    execute._share = lambda build: build  # a forked worker has it in memory

    def process(run_dir: Path, kind: str) -> Any:
        started = context.Process(target=to_the_end, args=(run_dir, kind))
        started.start()
        return started

    seconds, whole = {}, {}
    for kind in ("serial", "processes"):
        kill_setup(kind)
        started = time.monotonic()
        process(tmp_path / kind, kind).join()
        seconds[kind] = time.monotonic() - started
        whole[kind] = files(tmp_path / kind)
        assert folder.SUMMARY in whole[kind]
    assert whole["serial"] == whole["processes"]
    rng, happened, missed, stopped_at, began = random.Random(0), 0, 0, set(), time.monotonic()
    while happened < kills:
        kind, run_dir = ("serial", "processes")[happened % 2], tmp_path / "killed"
        victim = process(run_dir, kind)
        victim.join(rng.random() * seconds[kind])
        victim.kill()
        victim.join()
        if victim.exitcode != -signal.SIGKILL:  # it was at its end already
            assert victim.exitcode == 0
            missed += 1
            shutil.rmtree(run_dir)
            continue
        happened += 1
        stopped_at.add(len((run_dir / folder.RECORDS).read_bytes().splitlines()) if run_dir.exists() else -1)
        resumed = process(run_dir, kind)
        resumed.join()
        assert resumed.exitcode == 0
        assert files(run_dir) == whole[kind], f"kill {happened}"
        folder.check(run_dir)
        shutil.rmtree(run_dir)
    assert len(stopped_at) >= min(kills, 20) / 4  # the moments differ
    assert not list(tmp_path.glob(".killed.*"))  # half a folder is removed by the next process that makes it
    took = f"{kills} kills and resumes in {time.monotonic() - began:.0f} s"
    (tmp_path / "done").write_text(
        f"{took}, after these numbers of rounds: {sorted(stopped_at)}; {missed} came too late"
    )


def in_its_own_process(tmp_path: Path, kills: int) -> None:
    process = execute.forkserver([]).Process(target=kill_and_resume, args=(tmp_path, kills))
    process.start()
    process.join()
    assert process.exitcode == 0
    print((tmp_path / "done").read_text())


@pytest.mark.slow
def test_a_few_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    in_its_own_process(tmp_path, kills=3)


@pytest.mark.slow
def test_two_hundred_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    in_its_own_process(tmp_path, kills=200)


class KilledError(BaseException):
    """Stands for a SIGKILL: nobody catches it."""


OPERATIONS = (
    (os, "fsync"),
    (os, "truncate"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "open"),
    (Path, "mkdir"),
)


def _wrap(counted: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: counted(real, *args, **options)


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Returns what makes the nth of the system's operations that change a folder fail, counted from now on."""
    left: dict[str, Any] = {"calls": 0, "error": None}

    def counted(real: Any, *args: Any, **options: Any) -> Any:
        if not (real.__name__ == "open" and (*args, "r")[1] in ("r", "rb")):
            left["calls"] -= 1
            if left["calls"] == 0:
                raise left["error"]
        return real(*args, **options)

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, _wrap(counted, getattr(owner, name)))

    def arm(number: int, error: BaseException) -> None:
        left.update(calls=number, error=error)

    return arm


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        KilledError(),
    ],
    ids=["full", "read-only", "killed"],
)
def test_whichever_operation_fails_the_run_goes_on_from_the_last_good_checkpoint(
    tmp_path: Path, fail_at: Callable[[int, BaseException], None], error: BaseException, every: int
) -> None:
    """Every single write, rename and removal of a whole run fails once: one line, and then the same bytes."""
    overrides = ("rounds=2", "devices.count=3", "devices.per_round=2", "evaluation.every=2")
    setup, config = make_setup(*overrides), composed(*overrides)
    life.create(setup, config, tmp_path / "whole")
    list(life.run(setup, tmp_path / "whole"))
    whole, number = files(tmp_path / "whole"), 1 - every
    while True:
        number += every
        run_dir = tmp_path / f"run{number}"
        fail_at(number, error)
        try:
            life.create(setup, config, run_dir)
            list(life.run(setup, run_dir))
            break
        except (OutputError, KilledError):
            pass
        finally:
            fail_at(0, error)
        rounds = folder.read_state(run_dir).state.round if run_dir.exists() else 0
        assert rounds <= 2
        if not run_dir.exists():
            life.create(setup, config, run_dir)
        list(life.run(life.reopen(run_dir) if every == 1 else setup, run_dir))
        assert files(run_dir) == whole, f"operation {number}"
        folder.check(run_dir)
        assert not list(tmp_path.glob(f".{run_dir.name}.*"))
    assert number > 20


def test_a_read_only_folder_of_a_killed_run_is_one_line(
    tmp_path: Path, fail_at: Callable[[int, BaseException], None]
) -> None:
    """What a resume removes and cuts first: each refusal is an OutputError, and nothing is lost by it."""
    setup, config = make_setup(), composed()
    life.create(setup, config, tmp_path / "run")
    records = life.run(setup, tmp_path / "run")
    next(records), next(records)
    records.close()
    for name in (folder.RECORDS, folder.TIMINGS, "personal-0.f32"):
        with (tmp_path / "run" / name).open("ab") as file:
            file.write(b"half")
    (tmp_path / "run" / "personal-99.f32").write_bytes(b"half")
    for number in range(1, 5):
        shutil.copytree(tmp_path / "run", tmp_path / f"copy{number}")
        fail_at(number, PermissionError(errno.EROFS, "Read-only file system"))
        with pytest.raises(OutputError, match="Read-only"):
            list(life.run(setup, tmp_path / f"copy{number}"))
        fail_at(0, OSError())
        assert folder.load(tmp_path / f"copy{number}", setup.experiment.config_hash).state.round == 2


def test_what_another_process_left_half_made_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    dead.start()
    dead.join()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".run.{pid}.new").mkdir()
    life.create(make_setup(), composed(), tmp_path / "run")
    assert [path.name for path in tmp_path.glob(".run.*")] == [f".run.{os.getppid()}.new"]


def test_of_two_that_make_the_same_folder_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one made it between this one's look and its rename."""
    setup, config = make_setup(), composed()
    life.create(setup, config, tmp_path / "run")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(CheckpointError, match="exists: continue it with"):
        life.create(setup, config, tmp_path / "run")
    assert not list(tmp_path.glob(".run.*"))


def test_nothing_depends_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps by years in both directions, at every look at it."""
    life.create(make_setup(), composed(), tmp_path / "calm")
    list(life.run(make_setup(), tmp_path / "calm"))
    rng = random.Random(0)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: rng.randrange(-(10**9), 10**10))
    life.create(make_setup(), composed(), tmp_path / "jumps")
    records = life.run(make_setup(), tmp_path / "jumps")
    next(records)
    records.close()
    list(life.run(life.reopen(tmp_path / "jumps"), tmp_path / "jumps"))
    assert files(tmp_path / "jumps") == files(tmp_path / "calm")
