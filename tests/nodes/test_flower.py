"""Flower as the carrier: its two apps and what `pilot init` writes without it, and live a SuperLink with two SuperNodes on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Client
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from conftest import fedprune
from cryptography.hazmat.primitives import serialization
from nodes.fleet import begin, enrolled, free_port, result, simulate

from fedprune_cli.config.plain import plain
from fedprune_cli.errors import DeviceError
from fedprune_cli.nodes import certificates, flower
from fedprune_cli.nodes.data import Place, read_samples
from fedprune_cli.nodes.pilot import Pilot
from fedprune_cli.nodes.post import Post
from fedprune_cli.nodes.protocol import END, Terms, hello_of, read_hello
from fedprune_cli.runs import life
from fedprune_cli.runs.inputs import read_config
from fedprune_cli.store import folder
from fedprune_cli.store.sealed import unseal

SMALL = ("devices.count=2", "devices.fresh=0", "rounds=2", "payload.bits=[8]")


@contextlib.contextmanager
def started(command: list[str], where: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a process that is ended at the end."""
    with log.open("wb") as file:
        environment = {**flower._environment(where / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            command, cwd=where, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


class Error(str):
    """What a message has in place of content: its reason."""

    reason = property(str)


class Message:
    """As flwr's: to a node, or in reply to another."""

    def __init__(self, content: object, node: int = 0, kind: str = "", *, reply_to: Message | None = None) -> None:
        self.content, self.error, self.node, self.kind = content, content, node, kind
        self.metadata = types.SimpleNamespace(reply_to_message_id=reply_to.name if reply_to else "")
        self.name = str(id(self))

    def has_error(self) -> bool:
        return isinstance(self.content, Error)


class App:
    """As flwr's ServerApp and ClientApp: functions by what they are registered for."""

    def main(self):  # type: ignore[no-untyped-def]
        return lambda f: f

    train = main


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Returns an app's module, loaded where a stub stands for flwr."""
    names = {"Message": Message, "RecordDict": dict, "ConfigRecord": dict, "Context": object, "Grid": object}
    for module in ("flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp"):
        stub = types.ModuleType(module)
        vars(stub).update(names, ClientApp=App, ServerApp=App)
        monkeypatch.setitem(sys.modules, module, stub)
    spec = importlib.util.spec_from_file_location(name, flower.FILES / "app" / f"{name}.py")
    assert spec
    assert spec.loader
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


@dataclass
class StubLink:
    """A SuperLink with its SuperNodes: a ClientApp runs at once in place of a node that is there; `wrong`: errors, once each."""

    client: types.ModuleType
    sockets: dict[int, str] = field(default_factory=dict)
    away: set[int] = field(default_factory=set)
    wrong: dict[int, str] = field(default_factory=dict)
    replies: dict[str, Message] = field(default_factory=dict)
    pushed: list[tuple[int, bytes]] = field(default_factory=list)

    def get_node_ids(self) -> list[int]:
        return [node for node in self.sockets if node not in self.away]

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            assert message.kind == "train"
            self.pushed.append((message.node, message.content["fedprune"]["bytes"]))  # type: ignore[index]
            context = types.SimpleNamespace(node_config={"socket": self.sockets[message.node]})
            wrong = self.wrong.pop(message.node, "")
            reply = Message(Error(wrong), reply_to=message) if wrong else self.client.work(message, context)
            self.replies[message.name] = reply
        return [message.name for message in messages]

    def pull_messages(self, names: list[str]) -> list[Message]:
        return [self.replies.pop(name) for name in names if name in self.replies]


@dataclass(frozen=True)
class Scene:
    """A pilot whose SuperLink is a stub, with the worker of each node in a thread; numbers of nodes are those of devices plus 100."""

    pilot: Path
    link: StubLink
    said: list[str]

    def site(self, config: Mapping[str, object]) -> Pilot:
        return Pilot(self.pilot, "", self.said.append, config, kind="flower")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a simulation and of the pilot that goes with it."""
    home = tmp_path_factory.mktemp("made")
    flower.write_pilot(enrolled(home, simulate(home / "simulated", *SMALL)), [0, 1], "127.0.0.1", 8443)
    return home


@pytest.fixture
def scene(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    pilot = tmp_path / "pilot"
    server, link = load("server_app", monkeypatch), StubLink(load("client_app", monkeypatch))

    def flwr(_: Path, *arguments: str) -> str:
        if arguments[0] == "supernode":
            return json.dumps({"success": True, "node-id": 100 + int(Path(arguments[2]).parent.name.split("-")[1])})
        path = arguments[-1].removeprefix('socket="').removesuffix('"')
        context = types.SimpleNamespace(run_config={"socket": path})
        threading.Thread(target=server.main, args=(link, context), daemon=True).start()
        return ""

    def supernode(post: Post, path: str) -> object:
        link.sockets[100 + post.place.device] = path
        return types.SimpleNamespace(poll=lambda: None, terminate=lambda: None)

    monkeypatch.setattr(flower, "_flwr", flwr)
    monkeypatch.setattr(flower, "_start_supernode", supernode)
    monkeypatch.setattr(flower, "ONLINE_S", 0.1)
    monkeypatch.setattr(flower, "LOOK_S", 0.01)
    for device in range(2):
        home = pilot / f"device-{device}"
        post = Post("", home, Place(device, home, read_samples(home)), True, print)
        threading.Thread(target=flower.attend, args=(post,), daemon=True).start()
    return Scene(pilot, link, [])


def test_through_both_apps_a_run_has_the_simulators_bytes(scene: Scene, tmp_path: Path) -> None:
    """The roster too; a message that Flower loses is sent again; what travels has neither samples nor v_k."""
    (scene.pilot / "roster.json").unlink()
    assert [card.train for card in scene.site({}).roster()] == _trained(tmp_path / "simulated")
    assert json.loads((scene.pilot / "flower" / "nodes.json").read_text()).keys() == {
        (scene.pilot / f"device-{device}" / "node.pub").read_text() for device in range(2)
    }
    setup, config = begin(scene.pilot, tmp_path / "run", SMALL)
    scene.link.wrong[101] = "Node\nunavailable"
    list(life.run(setup, tmp_path / "run", site=scene.site(config)))
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
    assert "device-1: Flower says: Node unavailable; trying again (the training of round 1)" in scene.said
    rows = [json.loads(line)["nodes"] for line in (tmp_path / "run" / folder.TIMINGS).read_text().splitlines()]
    assert [row["device"] for row in rows[0]] == [0, 1]
    assert all(row["compute_s"] > 0 and row["carried_s"] >= 0 and "uplink_s" not in row for one in rows for row in one)


def test_who_is_away_or_revoked_is_a_device_that_died(scene: Scene, tmp_path: Path) -> None:
    setup, config = begin(scene.pilot, tmp_path / "run", [*SMALL, "rounds=3", "execution.patience_s=0"])
    run = life.run(setup, tmp_path / "run", site=scene.site(config))
    scene.link.away = {101}
    first = next(run)
    scene.link.away = set()
    second = next(run)
    certificates.revoke(scene.pilot, 0)
    sent = len(scene.link.pushed)
    third = next(run)
    assert [record.faults.died if record.faults else [] for record in (first, second, third)] == [[1], [], [0]]
    assert {node for node, _ in scene.link.pushed[sent:]} == {101}
    assert "the certificate of device-0 is revoked (the training of round 3)" in scene.said


def test_a_node_of_another_version_and_a_garbled_answer_are_refused(scene: Scene, tmp_path: Path) -> None:
    """Each in one line, tried again, and the run's bytes are as if nothing had been."""
    setup, config = begin(scene.pilot, tmp_path / "run", SMALL)
    work, turns = scene.link.client.work, iter(range(100))

    def garble(message: Message, context: object) -> Message:
        reply = work(message, context)
        first, second = flower._split(reply.content["fedprune"]["bytes"])
        turn = next(turns)
        if turn == 0:
            first = hello_of(read_samples(scene.pilot / "device-0").card(labels=True)).encode().replace(b"x", b"y")
        elif turn == 1:
            second = second[:-1]
        elif turn == 2:
            other = dataclasses.replace(hello_of(read_samples(scene.pilot / "device-1").card(labels=True)))
            first = dataclasses.replace(other, versions=dataclasses.replace(other.versions, torch="1.0")).encode()
        reply.content["fedprune"]["bytes"] = flower._joined(first, second)
        return reply

    scene.link.client.work = garble  # type: ignore[attr-defined]
    list(life.run(setup, tmp_path / "run", site=scene.site(config)))
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
    assert sum("damaged" in line for line in scene.said) == 2
    assert sum("they must be the same" in line for line in scene.said) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_app_that_ends_is_one_line(scene: Scene) -> None:
    with (
        pytest.raises(DeviceError, match="ServerApp has ended"),
        flower.superlink(Terms(scene.pilot, 2, 2**20, 0.0, print)) as here,
    ):
        here.grid({"push": "nonsense"})


def test_a_task_that_a_node_cannot_do_is_told_and_it_stays(scene: Scene) -> None:
    """Damaged, of another protocol, or of a part that its disk has not: the worker answers why."""
    with socket.socket(socket.AF_UNIX) as node:
        while 100 not in scene.link.sockets:
            time.sleep(0.01)
        node.connect(scene.link.sockets[100])
    for task in (b"nonsense", END):
        with Client(scene.link.sockets[100], "AF_UNIX") as worker:
            worker.send_bytes(flower._joined(b"", task))
            hello, answer = flower._split(worker.recv_bytes())
        assert read_hello(hello).card.train > 0
        assert unseal(answer).header["kind"] == "failed"


def test_init_writes_the_app_keys_and_units_and_keeps_what_is_there(tmp_path: Path) -> None:
    def init(*devices: str) -> None:
        done = fedprune("pilot", "init", "pilot", *devices, "--host", "10.0.0.1", "--port", "9000")
        assert done.returncode == 0, done.stderr

    init("0", "1")
    pilot = tmp_path / "pilot"
    files = {str(path.relative_to(pilot)) for path in pilot.rglob("*") if path.is_file()}
    app = {f"flower/app/{name}" for name in ("pyproject.toml", "server_app.py", "client_app.py")}
    node = {
        f"device-{k}/{name}"
        for k in (0, 1)
        for name in ("ca.pem", "own.pem", "own.key", "node.key", "node.pub", "node.service")
    }
    server = {"server/ca.pem", "server/own.pem", "server/own.key", "ca.pem", "ca.key"}
    assert files == app | node | server | {"flower/home/config.toml", "flower/superlink.service"}
    known = tomllib.loads((pilot / "flower" / "home" / "config.toml").read_text())["superlink"]["pilot"]
    assert known == {"address": "10.0.0.1:9000", "root-certificates": str(pilot / "ca.pem")}
    assert "fedprune join device-1 10.0.0.1:9000 --flower" in (pilot / "device-1" / "node.service").read_text()
    assert "flower-superlink --host 10.0.0.1 --port 9000 " in (pilot / "flower" / "superlink.service").read_text()
    assert (pilot / "device-0" / "node.key").stat().st_mode & 0o777 == 0o600
    keys = [(pilot / f"device-{device}" / "node.pub").read_bytes() for device in (0, 1)]
    key = serialization.load_ssh_private_key((pilot / "device-0" / "node.key").read_bytes(), None)
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    assert key.public_key().public_bytes(*form) == keys[0].strip()
    certificates.revoke(pilot, 1)
    init("0", "1", "2")
    now = [(pilot / f"device-{device}" / "node.pub").read_bytes() for device in (0, 1, 2)]
    assert now[0] == keys[0]
    assert len({*now, keys[1]}) == 4


def test_what_does_not_go_with_flower_is_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        (("serve", "pilot", "execution.kind=flower", "--listen", "0.0.0.0:1"), "--listen"),
        (("serve", "pilot", "execution.kind=serial"), "must be one of nodes, flower"),
        (("train", "execution.kind=flower"), "go together"),
        (("train", "execution.kind=flowers"), "'flower'"),
    ):
        done = fedprune(*arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


LIVE = pytest.mark.skipif(shutil.which("flower-superlink", path=flower.PATH) is None, reason="needs the extra flower")
SECURE = (
    "devices.count=4",
    "payload.bits=[32]",
    "privacy.secure=true",
    "privacy.least=3",
    "privacy.public_scores=true",
)


def _superlink(pilot: Path, port: int) -> list[str]:
    """Returns the command by which its unit starts a pilot's SuperLink."""
    unit = (pilot / "flower" / "superlink.service").read_text().replace("\\\n", "")
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).removeprefix("ExecStart=")
    return shlex.split(command)


def _join(pilot: Path, device: int, port: int) -> list[str]:
    join = [sys.executable, "-m", "fedprune_cli", "join", str(pilot / f"device-{device}"), f"127.0.0.1:{port}"]
    return [*join, "--flower", "--labels"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@LIVE
@pytest.mark.parametrize("more", [(), SECURE])
def test_over_flower_a_run_has_the_simulators_bytes(tmp_path: Path, more: tuple[str, ...]) -> None:
    """A SuperLink as its unit starts it, with TLS and node authentication, SuperNodes that `join` starts, digits, two rounds."""
    overrides = (*SMALL, *more)
    simulation = simulate(tmp_path / "simulated", *overrides)
    pilot, devices = enrolled(tmp_path, simulation), range(len(simulation.scenario.partition.train))
    port = free_port()
    flower.write_pilot(pilot, devices, "127.0.0.1", port)
    with contextlib.ExitStack() as running:
        running.enter_context(started(_superlink(pilot, port), pilot, tmp_path / "superlink.log"))
        for device in devices:
            running.enter_context(started(_join(pilot, device, port), tmp_path, tmp_path / f"node-{device}.log"))
        _wait_for(port)
        setup, config = begin(pilot, tmp_path / "run", overrides)
        told = (pilot / "roster.json").rename(tmp_path / "roster.json").read_bytes()
        site = Pilot(pilot, "", print, config, kind="flower")
        site.roster()
        assert (pilot / "roster.json").read_bytes() == told
        list(life.run(setup, tmp_path / "run", site=site))
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
    lines = [json.loads(line) for line in (tmp_path / "run" / folder.TIMINGS).read_text().splitlines()]
    print("seconds a round:", [round(line["wall_s"], 1) for line in lines])


def _serve(home: Path) -> None:
    """Begins or continues the run, as `serve` does."""
    if (home / "run").exists():
        setup, config = life.reopen(home / "run"), plain(read_config(home / "run"), resolve=True)
    else:
        setup, config = begin(home / "pilot", home / "run", (*SMALL, "rounds=8", "execution.patience_s=600"))
    list(life.run(setup, home / "run", wait=True, site=Pilot(home / "pilot", "", print, config, kind="flower")))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@LIVE
def test_five_kills_over_flower_change_no_byte(tmp_path: Path) -> None:
    """Of a node, with its SuperNode, or of the server, each at another moment of a round of some 14 s, and started again at once."""
    pilot, port = enrolled(tmp_path, simulate(tmp_path / "simulated", *SMALL, "rounds=8")), free_port()
    flower.write_pilot(pilot, [0, 1], "127.0.0.1", port)
    records, rng = tmp_path / "run" / folder.RECORDS, random.Random(1)
    forked = multiprocessing.get_context("forkserver")

    def start(who: int) -> Process:
        of = (_serve, (tmp_path,)) if who < 0 else (_stand, (pilot, who, port))
        process = forked.Process(target=of[0], args=of[1])
        process.start()
        return process

    running = dict[int, Process]()
    with started(_superlink(pilot, port), pilot, tmp_path / "superlink.log"):
        _wait_for(port)
        try:
            running |= {who: start(who) for who in (0, 1, -1)}
            for kill, who in enumerate((0, -1, 1, -1, 0)):
                while len(records.read_bytes().splitlines() if records.exists() else ()) < kill + 1:
                    assert running[-1].is_alive(), f"the server ended with {running[-1].exitcode}"
                    time.sleep(0.2)
                time.sleep(14 * rng.random())
                running[who].kill()
                running[who].join()
                print(f"killed {who} after round {len(records.read_bytes().splitlines())}")
                running[who] = start(who)
            running[-1].join(1200)
            assert running[-1].exitcode == 0
        finally:
            for process in running.values():
                process.kill()
    assert result(tmp_path / "run") == result(tmp_path / "simulated")
    folder.check(tmp_path / "run")


def _stand(pilot: Path, device: int, port: int) -> None:
    """Is a node until it is killed."""
    place = pilot / f"device-{device}"
    flower.attend(Post(f"127.0.0.1:{port}", place, Place(device, place, read_samples(place)), True, print))


def _trained(run_dir: Path) -> list[int]:
    return [len(samples) for samples in life.reopen(run_dir).scenario.partition.train]


def _wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    raise AssertionError("nobody listens")
