"""The same over gRPC with TLS in both directions, nodes and server in this process: bytes, overhead, and who is refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from nodes.fleet import begin, enrolled, free_port, result, simulate, stand
from nodes.test_energy import SCORE, jetson

from fedprune_cli.errors import CheckpointError, DataError
from fedprune_cli.nodes import certificates, desk, protocol
from fedprune_cli.nodes.attend import _channel
from fedprune_cli.nodes.certificates import Identity, read_identity
from fedprune_cli.nodes.channel import METHOD, grpc
from fedprune_cli.nodes.data import read_samples
from fedprune_cli.nodes.energy import metering
from fedprune_cli.nodes.pilot import Pilot
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.sealed import Sealed

SMALL = ("devices.count=2", "devices.fresh=1", "rounds=4", "payload.bits=[8]")


@dataclasses.dataclass(frozen=True)
class Fleet:
    """A pilot whose server is at a port of this machine, and the simulation that it is to equal."""

    home: Path
    pilot: Path
    port: int
    said: list[str]

    def site(self, config: object = None) -> Pilot:
        return Pilot(self.pilot, f"127.0.0.1:{self.port}", self.said.append, config or {})  # type: ignore[arg-type]

    def start(self, device: int) -> Callable[[], str]:
        """Starts a node in a thread; returns what waits for its end and says what it ended with."""
        ended: list[str] = []

        def live() -> None:
            try:
                stand(self.pilot / f"device-{device}", self.port)
                ended.append("")
            except CheckpointError as error:
                ended.append(str(error))

        thread = threading.Thread(target=live, daemon=True)
        thread.start()

        def wait() -> str:
            thread.join(60)
            assert ended, "the node never ended"
            return ended[0]

        return wait

    def until(self, text: str) -> None:
        """Waits until the server has said it."""
        for _ in range(3000):
            if any(text in line for line in self.said):
                return
            time.sleep(0.02)
        raise AssertionError(f"{text!r} is not among {self.said}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a simulation and of the pilot that goes with it."""
    home = tmp_path_factory.mktemp("made")
    enrolled(home, simulate(home / "simulated", *SMALL))
    return home


@pytest.fixture
def fleet(made: Path, tmp_path: Path) -> Fleet:
    shutil.copytree(made, tmp_path / "home")
    return Fleet(tmp_path / "home", tmp_path / "home" / "pilot", free_port(), [])


def rounds(fleet: Fleet, *overrides: str) -> Iterator[object]:
    setup, config = begin(fleet.pilot, fleet.home / "run", [*SMALL, *overrides])
    return life.run(setup, fleet.home / "run", site=fleet.site(config))


def test_over_grpc_a_run_has_the_simulators_bytes_and_whatever_intrudes_changes_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its rounds come strangers, old and revoked certificates, wrong names, other versions, and messages of all kinds.

    The nodes measure what they draw, which changes nothing either.
    """
    jetson(fleet.home / "sys")
    monkeypatch.setattr("fedprune_cli.nodes.node.metering", lambda _: metering(fleet.home / "sys"))
    (fleet.pilot / "roster.json").unlink()
    waits = [fleet.start(device) for device in range(3)]
    assert [card.train for card in fleet.site().roster()] == [
        read_samples(fleet.pilot / f"device-{device}").training for device in range(3)
    ]
    run = rounds(fleet)
    next(run)
    assert any(line.startswith("note: training.block=10: ") for line in fleet.said)
    for intrude in (_strangers, _refused_hellos, _bad_messages):
        intrude(fleet, monkeypatch)
        if intrude is _bad_messages:  # who spoke as device 1 took its place
            assert "another connection took the place" in waits[1]()
            waits[1] = fleet.start(1)
        next(run)
    assert list(run) == []
    assert result(fleet.home / "run") == result(fleet.home / "simulated")
    assert [wait() for wait in waits] == [""] * 3
    timed = [json.loads(line)["nodes"] for line in (fleet.home / "run" / folder.TIMINGS).read_text().splitlines()]
    for row in [row for rows in timed for row in rows]:
        assert min(row["compute_s"], row["uplink_s"], row["downlink_s"], row["waiting_s"]) >= 0
        assert row["modelled"]["uplink_s"] > 0
        assert row["joules"] >= 12.0 * row["compute_s"] * (1 - 1e-9)  # 12 W, from just before to just after
        assert row["joules_of"] == row["test_joules_of"] == "board"


def _strangers(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates of another authority, one that signed itself, one that has expired, and the server's own in a node's place."""
    other = fleet.home / "other"
    if not other.exists():
        certificates.begin(other, ["127.0.0.1"], 1)
        certificates.enroll(other, 0, 1)
        with monkeypatch.context() as past:
            ago = certificates._now() - datetime.timedelta(days=3)
            past.setattr(certificates, "_now", lambda: ago)
            certificates.enroll(fleet.pilot, 9, 1)
    theirs, ours = read_identity(other / "device-0"), read_identity(fleet.pilot / "device-0")
    with pytest.raises(CheckpointError, match="expired on"):
        read_identity(fleet.pilot / "device-9")
    pem = [(fleet.pilot / "device-9" / name).read_bytes() for name in ("own.pem", "own.key")]
    code, details = _speak(fleet, theirs, [])  # does not believe the server either
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "certificate" in details.lower()
    server = read_identity(fleet.pilot / "server")
    for identity in (Identity(ours.ca, theirs.own, theirs.key), Identity(ours.ca, pem[0], pem[1])):
        assert _speak(fleet, identity, [])[0] == grpc.StatusCode.UNAVAILABLE
    assert _speak(fleet, server, [])[0] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED)


def _refused_hellos(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revoked device, other versions, other data."""
    for device in (8,):
        if not (fleet.pilot / f"device-{device}").exists():
            certificates.enroll(fleet.pilot, device, 1)
    certificates.revoke(fleet.pilot, 8)
    card = read_samples(fleet.pilot / "device-1").card(labels=True)
    mine = protocol.hello_of(card)
    eight, one = (read_identity(fleet.pilot / f"device-{device}") for device in (8, 1))
    older = dataclasses.replace(mine, versions=dataclasses.replace(mine.versions, protocol=0))
    other = dataclasses.replace(mine, card=dataclasses.replace(card, train=card.train + 1, labels=None))
    for identity, hello, code, text in (
        (eight, mine, grpc.StatusCode.PERMISSION_DENIED, "the certificate of device-8 is revoked"),
        (one, older, grpc.StatusCode.FAILED_PRECONDITION, "runs protocol 0"),
        (one, other, grpc.StatusCode.FAILED_PRECONDITION, "its data are not those of the roster"),
    ):
        found, details = _speak(fleet, identity, [hello.encode()])
        assert found == code
        assert text in details
        assert "\n" not in details
        assert any(line.startswith("refused: ") and text in line for line in fleet.said)


def _bad_messages(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbled, truncated, oversized and misplaced messages of a node that may take part: its stream ends, and it may come again."""
    identity = read_identity(fleet.pilot / "device-1")
    hello = protocol.hello_of(read_samples(fleet.pilot / "device-1").card(labels=True)).encode()
    for messages, text in (
        ([b"nonsense"], "its hello was refused: damaged"),
        ([hello[:-3]], "its hello was refused: damaged"),
        ([hello, hello], "not a message that is expected here"),
        ([hello, protocol.got("0" * 64)[:-1]], "damaged"),
        ([hello, Sealed({"kind": "update", "of": 3}).encode()], "not a message"),
        (
            [hello, Sealed({**SCORE, "joules": -1.0, "joules_of": "rapl"}).encode()],
            "joules that cannot be (-1.0 of rapl)",
        ),
    ):
        code, details = _speak(fleet, identity, messages)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert text in details
    code, details = _speak(fleet, identity, [hello, b"\0" * (2**20 + 10**6)])
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details


def _speak(fleet: Fleet, identity: Identity, messages: list[bytes]) -> tuple[object, str]:
    """Returns with what the server ends the stream of somebody who says this and then waits."""
    with _channel(f"127.0.0.1:{fleet.port}", identity) as channel:
        silent = threading.Event()

        def say() -> Iterator[bytes]:
            yield from messages
            silent.wait(30)

        stream = channel.stream_stream(METHOD)(say())
        try:
            for _ in stream:
                pass
        except grpc.RpcError as error:
            return error.code(), str(error.details())  # type: ignore[attr-defined]
        finally:
            silent.set()
    return None, ""


def test_a_revoked_node_is_turned_out_and_one_with_a_new_certificate_taken(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runbook's `a node is removed`: it dies in each round from then on, until it has a new certificate."""
    monkeypatch.setattr(desk, "FIRST_S", 3.0)
    waits = [fleet.start(device) for device in range(3)]
    run = rounds(fleet, "execution.patience_s=0.5", "failsafe.late=drop")
    assert next(run).faults.died == []  # type: ignore[attr-defined]
    certificates.revoke(fleet.pilot, 1)
    assert next(run).faults.died == [1]  # type: ignore[attr-defined]
    assert waits[1]() == "the server refuses this node: the certificate of device-1 is revoked"
    certificates.enroll(fleet.pilot, 1, 1)
    seen = len(fleet.said)
    again = fleet.start(1)
    while not any("device-1: here" in line for line in fleet.said[seen:]):
        time.sleep(0.02)
    assert next(run).faults.died == []  # type: ignore[attr-defined]
    assert len(list(run)) == 1
    assert [waits[0](), again(), waits[2]()] == [""] * 3


def test_a_node_that_is_away_for_some_rounds_comes_back(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "FIRST_S", 3.0)
    waits = [fleet.start(0), fleet.start(2)]
    run = rounds(fleet, "execution.patience_s=0.2", "rounds=6")
    died = [next(run).faults.died for _ in range(3)]  # type: ignore[attr-defined]
    assert died == [[1]] * 3
    waits.append(fleet.start(1))
    fleet.until("device-1: here")
    assert [record.faults for record in run][-1] is None  # type: ignore[attr-defined]
    assert [wait() for wait in waits] == [""] * 3


CLOTHES = (
    "data=fmnist",
    "model=cnn",
    "model.hidden=16",
    "data.limit=900",
    "devices.count=2",
    "devices.fresh=1",
    "rounds=2",
    "training.batch_size=16",
)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("block", [1, 10])
def test_the_cnn_of_fashion_mnist_has_the_simulators_bytes(
    tmp_path: Path, block: int, bits: int, granularity: str
) -> None:
    words = (*CLOTHES, f"training.block={block}", f"payload.bits=[{bits}]", f"pruner.granularity={granularity}")
    try:
        pilot = enrolled(tmp_path, simulate(tmp_path / "simulated", *words))
    except DataError as error:
        pytest.skip(str(error))
    here = Fleet(tmp_path, pilot, free_port(), [])
    context = multiprocessing.get_context("forkserver")  # threads of one process would share its convolutions' threads
    nodes = [context.Process(target=stand, args=(pilot / f"device-{device}", here.port)) for device in range(3)]
    for node in nodes:
        node.start()
    setup, config = begin(pilot, tmp_path / "run", words)
    list(life.run(setup, tmp_path / "run", site=here.site(config)))
    for node in nodes:
        node.join(60)
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
