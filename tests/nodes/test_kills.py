"""Nodes and server that are killed at any moment and started again go on to the bytes of a run that never was."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from nodes.fleet import begin, enrolled, free_port, result, simulate, stand

from fedprune_cli.nodes.pilot import Pilot
from fedprune_cli.runs import life
from fedprune_cli.store import folder

SERVER = -1
SECURE = (
    "devices.count=4",
    "devices.fresh=0",
    "privacy.secure=true",
    "privacy.least=3",
    "privacy.public_scores=true",
    "payload.bits=[32]",
)
LONG = ("devices.count=2", "devices.fresh=1", "payload.bits=[8]", "execution.patience_s=600")


def serve_run(home: Path, port: int, overrides: tuple[str, ...]) -> None:
    """Begins or continues the run, as `serve` does; notes what it says and when."""
    run_dir = home / "run"
    with (home / "said.txt").open("a", buffering=1) as said:

        def say(line: str) -> None:
            said.write(f"{time.monotonic():.3f} {line}\n")

        if run_dir.exists():
            from fedprune_cli.config.plain import plain
            from fedprune_cli.runs.inputs import read_config

            setup, config = life.reopen(run_dir), plain(read_config(run_dir), resolve=True)
        else:
            setup, config = begin(home / "pilot", run_dir, overrides)
        say("the server is up")
        for _ in life.run(setup, run_dir, wait=True, site=Pilot(home / "pilot", f"127.0.0.1:{port}", say, config)):
            pass


@dataclass
class Cast:
    """The processes of a pilot on this machine, by device; the server is SERVER."""

    home: Path
    overrides: tuple[str, ...]
    port: int = field(default_factory=free_port)
    running: dict[int, multiprocessing.process.BaseProcess] = field(default_factory=dict)

    def start(self, who: int) -> None:
        target: Callable[..., None] = serve_run if who == SERVER else stand
        args = (
            (self.home, self.port, self.overrides)
            if who == SERVER
            else (self.home / "pilot" / f"device-{who}", self.port)
        )
        self.running[who] = multiprocessing.get_context("forkserver").Process(target=target, args=args)
        self.running[who].start()

    def kill(self, who: int) -> None:
        self.running[who].kill()
        self.running[who].join()

    def said(self, text: str, after_s: float, within_s: float) -> float:
        """Returns how many seconds after a moment, 0: the beginning, the server said something; fails when it did not in time."""
        until_s = max(after_s, time.monotonic() if not after_s else 0.0) + within_s
        while time.monotonic() < until_s:
            lines = (self.home / "said.txt").read_text().splitlines() if (self.home / "said.txt").exists() else []
            for moment, _, line in (one.partition(" ") for one in lines):
                if text in line and float(moment) >= after_s:
                    return float(moment) - after_s
            time.sleep(0.02)
        raise AssertionError(f"{text!r} was not said within {within_s} s")

    def rounds(self) -> int:
        path = self.home / "run" / folder.RECORDS
        return len(path.read_bytes().splitlines()) if path.exists() else -1


def kill_and_restart(home: Path, kills: int, rounds: int, seed: int, more: tuple[str, ...] = ()) -> set[int]:
    """Kills and restarts a random one at random moments of one run; returns after how many rounds."""
    overrides = (*LONG, *more, f"rounds={rounds}")
    setup = simulate(home / "simulated", *[one for one in overrides if "patience" not in one])
    enrolled(home, setup)
    cast, rng, moments = Cast(home, overrides), random.Random(seed), set[int]()
    everybody = (SERVER, *range(len(setup.scenario.partition.train)))
    for who in everybody:
        cast.start(who)
    try:
        cast.said(f"device-{everybody[-1]}: here", 0.0, 120)
        for _ in range(kills):
            reached = min(max(cast.rounds(), 0) + rng.randrange(3), rounds - 2)
            while cast.rounds() < reached:  # 0 more: perhaps before it is up again
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            who = rng.choice(everybody)
            assert cast.running[who].is_alive(), f"{who} ended by itself with {cast.running[who].exitcode}"
            cast.kill(who)
            moments.add(cast.rounds())
            cast.start(who)
        for process in cast.running.values():
            process.join(300)
        assert {who: process.exitcode for who, process in cast.running.items()} == dict.fromkeys(cast.running, 0)
    finally:
        for process in cast.running.values():
            process.kill()
    assert result(home / "run") == result(home / "simulated")
    folder.check(home / "run")
    return moments


@pytest.mark.slow
def test_two_kills_change_no_byte(tmp_path: Path) -> None:
    kill_and_restart(tmp_path, kills=2, rounds=40, seed=2)


@pytest.mark.slow
def test_twenty_kills_of_a_run_with_secure_sums_change_no_byte(tmp_path: Path) -> None:
    """A node has its secrets on its disk, and a server that forgot a sum begins another: a sum is exact whoever masks it."""
    moments = [kill_and_restart(tmp_path / str(run), kills=10, rounds=60, seed=run, more=SECURE) for run in range(2)]
    print("killed after rounds", [sorted(of) for of in moments])


@pytest.mark.slow
def test_fifty_kills_change_no_byte(tmp_path: Path) -> None:
    moments = [kill_and_restart(tmp_path / str(run), kills=10, rounds=200, seed=run) for run in range(5)]
    print("killed after rounds", [sorted(of) for of in moments])
    assert len(set.union(*moments)) > 10


@pytest.mark.slow
def test_who_is_killed_or_silent_is_noticed_and_back_in_time(tmp_path: Path) -> None:
    """A killed node in under 1 s, a silent one in under 20 s; one that was started again is here within 5 s."""
    overrides = (*LONG, "rounds=100000", "evaluation.every=1000")
    enrolled(tmp_path, simulate(tmp_path / "simulated", *LONG[:3]))
    cast = Cast(tmp_path, overrides)
    for who in (SERVER, 0, 1, 2):
        cast.start(who)
    try:
        for device in range(3):
            cast.said(f"device-{device}: here", 0.0, 120)
        killed_s = time.monotonic()
        cast.kill(1)
        noticed_s = cast.said("device-1: gone", killed_s, 1.0)
        started_s = time.monotonic()
        cast.start(1)
        back_s = cast.said("device-1: here", started_s, 5.0)
        silent_s = time.monotonic()
        os.kill(cast.running[0].pid or 0, signal.SIGSTOP)
        unheard_s = cast.said("device-0: gone", silent_s, 20.0)
        os.kill(cast.running[0].pid or 0, signal.SIGCONT)
        again_s = cast.said("device-0: here", time.monotonic() - 1, 20.0)
        print(
            f"killed: noticed in {noticed_s:.2f} s, back in {back_s:.2f} s; silent: {unheard_s:.1f} s, back {again_s:.2f} s"
        )
    finally:
        for process in cast.running.values():
            process.kill()
