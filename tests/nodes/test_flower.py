"""Flower as the carrier: its two apps and what `pilot init` writes without it, and live a SuperLink with two SuperNodes on loopback."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from conftest import fedprune
from nodes.fleet import begin, enrolled, free_port, result, simulate

from fedprune_cli.nodes import certificates, flower
from fedprune_cli.nodes.data import Place, read_samples
from fedprune_cli.nodes.pilot import Pilot
from fedprune_cli.nodes.post import Post
from fedprune_cli.nodes.protocol import Terms
from fedprune_cli.runs import life
from fedprune_cli.store import folder

SMALL = ("devices.count=2", "devices.fresh=0", "rounds=2", "payload.bits=[8]")


@contextlib.contextmanager
def started(command: list[str], where: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a process that is ended at the end."""
    with log.open("wb") as file:
        environment = {**flower._environment(where / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, cwd=where, env=environment, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("flower-superlink", path=flower._path()) is None, reason="needs the extra flower")
def test_over_flower_a_run_has_the_simulators_bytes(tmp_path: Path) -> None:
    """A SuperLink as its unit starts it, with TLS and node authentication, two SuperNodes that `join` starts, digits, two rounds."""
    pilot = enrolled(tmp_path, simulate(tmp_path / "simulated", *SMALL))
    port = free_port()
    flower.write_pilot(pilot, [0, 1], "127.0.0.1", port)
    unit = (pilot / "flower" / "superlink.service").read_text().replace("\\\n", "")
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).removeprefix("ExecStart=")
    with contextlib.ExitStack() as running:
        running.enter_context(started(shlex.split(command), pilot, tmp_path / "superlink.log"))
        for device in range(2):
            join = [sys.executable, "-m", "fedprune_cli", "join", str(pilot / f"device-{device}"), f"127.0.0.1:{port}"]
            running.enter_context(started([*join, "--flower"], tmp_path, tmp_path / f"node-{device}.log"))
        _wait_for(port)
        setup, config = begin(pilot, tmp_path / "run", SMALL)
        (pilot / "roster.json").unlink()
        site = Pilot(pilot, "", print, config, kind="flower")
        assert [card.train for card in site.roster()] == [len(of) for of in _trained(tmp_path / "simulated")]
        list(life.run(setup, tmp_path / "run", site=site))
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
    lines = [json.loads(line) for line in (tmp_path / "run" / folder.TIMINGS).read_text().splitlines()]
    print("seconds a round:", [round(line["wall_s"], 1) for line in lines])


def _trained(run_dir: Path) -> list[object]:
    return list(life.reopen(run_dir).scenario.partition.train)


def _wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    raise AssertionError("nobody listens")
