"""A pilot on this machine that is watched while it is served: a node that is silent, gone, late or refused is shown as such."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from nodes.fleet import begin, enrolled, free_port, result, simulate, stand
from nodes.test_kills import LONG, SERVER, Cast

from fedprune_cli.audit import watch
from fedprune_cli.audit.watch import Look, Prices
from fedprune_cli.errors import CheckpointError
from fedprune_cli.nodes import desk, protocol
from fedprune_cli.nodes.attend import _channel
from fedprune_cli.nodes.board import BOARD, read_board
from fedprune_cli.nodes.certificates import Peer, read_identity
from fedprune_cli.nodes.channel import METHOD
from fedprune_cli.nodes.data import read_samples
from fedprune_cli.nodes.executor import Request
from fedprune_cli.nodes.pilot import Pilot
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.sealed import Sealed

FREE = Prices(0.0, 0.0)
SMALL = ("devices.count=2", "devices.fresh=0", "rounds=3", "payload.bits=[8]", "execution.patience_s=600")


def until(place: Path, wanted: Callable[[dict[int, str], Look], bool], within_s: float = 60.0) -> Look:
    """Returns what is seen as soon as the states of the nodes are as wanted."""
    until_s, now = time.monotonic() + within_s, None
    while time.monotonic() < until_s:
        with contextlib.suppress(CheckpointError):  # nothing is posted yet
            now = watch.look(place, FREE)
        if now and now.fleet and wanted({node.device: node.state for node in now.fleet.nodes}, now):
            return now
        time.sleep(0.02)
    raise AssertionError(f"seen last: {now and now.fleet}")


def test_who_is_silent_gone_refused_and_back_is_shown_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device 1 takes its task and says nothing, is gone, comes with another version and at last as it should: the bytes stay."""
    monkeypatch.setattr(desk, "SILENT_S", 0.2)
    monkeypatch.setattr(desk, "SHOW_S", 0.05)
    place = enrolled(tmp_path, simulate(tmp_path / "simulated", *SMALL[:4]))
    run_dir, port = tmp_path / "run", free_port()
    setup, config = begin(place, run_dir, [*SMALL, f"out={run_dir}"])
    site = Pilot(place, f"127.0.0.1:{port}", lambda _: None, config)
    rounds = threading.Thread(target=lambda: list(life.run(setup, run_dir, site=site)), daemon=True)
    rounds.start()
    threading.Thread(target=stand, args=(place / "device-0", port), daemon=True).start()
    hello = protocol.hello_of(read_samples(place / "device-1").card(labels=True))

    with _channel(f"127.0.0.1:{port}", read_identity(place / "device-1")) as channel:
        gone = threading.Event()

        def says() -> Iterator[bytes]:
            yield hello.encode()
            gone.wait(60)

        stream = channel.stream_stream(METHOD)(says(), wait_for_ready=True)
        seen = until(place, lambda states, now: states == {0: "up", 1: "silent"})
        assert seen.fleet
        assert seen.fleet.nodes[1].why == "the training of round 1: does not say that it is there"
        assert (seen.run_dir, seen.held, seen.finished) == (run_dir, True, False)
        stream.cancel()
        gone.set()
    seen = until(place, lambda states, now: states == {0: "up", 1: "away"})
    assert seen.fleet
    assert seen.fleet.nodes[1].why == "gone, and the training of round 1 is not done"
    older = dataclasses.replace(hello, versions=dataclasses.replace(hello.versions, fedprune="0.0.9"))
    with (
        _channel(f"127.0.0.1:{port}", read_identity(place / "device-1")) as channel,
        pytest.raises(Exception, match="must be the same"),
    ):
        list(channel.stream_stream(METHOD)(iter([older.encode()])))
    seen = until(run_dir, lambda states, now: states == {0: "up", 1: "refused"})
    assert seen.fleet
    assert seen.fleet.nodes[1].version == "0.0.9"
    assert "they must be the same" in seen.fleet.nodes[1].why
    threading.Thread(target=stand, args=(place / "device-1", port), daemon=True).start()
    rounds.join(60)
    assert result(run_dir) == result(tmp_path / "simulated")
    folder.check(run_dir)
    assert BOARD not in {path.name for path in run_dir.rglob("*")}
    posted, now = read_board(place / BOARD), watch.look(run_dir, FREE)
    assert (posted.serving, now.finished) == (False, True)
    assert now.fleet
    assert [row[::2][:2] for row in now.fleet.cells()] == [["device-0", "3"], ["device-1", "3"]]
    assert {node.why for node in now.fleet.nodes} <= {"", "the run is over"}
    assert all(one.measured_s > 0 and one.modelled_s > 0 for one in now.fleet.costs.values())


def test_who_is_late_is_shown_until_a_training_is_in_time(tmp_path: Path) -> None:
    """By the desk's own clock, with nobody at the other end: how long a task is out decides."""
    loop = asyncio.new_event_loop()
    here = desk.Desk(protocol.Terms(tmp_path, 1, 2**20, 0.0, lambda _: None), loop)
    peer = Peer("device-0", 0, 1, datetime.datetime.now(datetime.UTC))
    link = desk._Link(peer, None, None)  # type: ignore[arg-type]
    here.links[0] = link

    def out(number: int, ago_s: float, due_s: float | None) -> str:
        """Has a task out for so long; returns the state that is shown."""
        sent_s, read = time.monotonic() - ago_s, lambda _: None
        asked = Request(lambda _: (b"", None), read, due_s, due_s, number, f"the training of round {number}")  # type: ignore[arg-type,return-value]
        here.asks = {0: desk._Ask(asked, loop.create_future(), "of", link, sent_s, sent_s)}
        here._observe()
        return here.board.nodes[0].state

    def answered() -> str:
        here._take(0, Sealed({"kind": "update", "of": "of", "compute_s": 0.1}))
        here._observe()
        return here.board.nodes[0].state

    try:
        assert out(1, 5.0, 10.0) == "up"
        assert out(1, 5.0, None) == "up"
        assert out(1, 5.0, 2.0) == "late"
        assert here.board.nodes[0].why == "the training of round 1: not within 2 s"
        assert answered() == "late"
        assert here.board.nodes[0].why == "the training of round 1: 5 s, 2 s are given"
        assert (out(1, 0.0, None), answered()) == ("late", "late")  # a test: it has no time of its own
        assert (out(2, 0.1, 2.0), answered()) == ("late", "up")
        out(3, 5.0, 2.0)
        here._overdue(0, here.asks[0])
        here.asks = {}
        here._observe()
        assert here.board.nodes[0].state == "late"
        assert here.board.nodes[0].round == 2
    finally:
        loop.close()


@pytest.mark.slow
def test_a_killed_node_is_shown_within_two_seconds_and_back_within_seven(tmp_path: Path) -> None:
    enrolled(tmp_path, simulate(tmp_path / "simulated", *LONG[:3]))
    cast = Cast(tmp_path, (*LONG, "rounds=100000", "evaluation.every=1000", f"out={tmp_path / 'run'}"))
    place = tmp_path / "pilot"
    for who in (SERVER, 0, 1, 2):
        cast.start(who)
    try:
        while not (place / BOARD).exists():
            time.sleep(0.1)
        until(place, lambda states, now: set(states.values()) == {"up"} and len(now.rows) > 2, 120)
        cast.kill(1)
        started_s = time.monotonic()
        until(place, lambda states, now: states[1] == "away", 10)
        noticed_s = time.monotonic() - started_s
        cast.start(1)
        started_s = time.monotonic()
        until(place, lambda states, now: states[1] == "up", 20)
        print(f"shown as away after {noticed_s:.2f} s, as up {time.monotonic() - started_s:.2f} s after its start")
        cast.kill(SERVER)
        seen = watch.look(place, FREE)
        assert not seen.held
    finally:
        for process in cast.running.values():
            process.kill()
    assert noticed_s < 2
