"""Flower as the carrier: a SuperLink and SuperNodes take the same messages, over TLS, and each node proves whose key it has.

Flower starts a process of its own for each message. Its apps, `flower_files/app/`, therefore only hand bytes over, by a socket of their
machine: at the SuperLink to `fedprune serve`, at a SuperNode to `fedprune join`, where PyTorch and the model are warm. flwr is not imported
here: its commands are called, so that it may as well be installed apart, on the PATH. Besides its certificates a pilot's folder then has

    flower/      app/, which Flower brings to all; home/, where the SuperLink is; nodes.json, its number of each key; its systemd unit
    device-K/    node.key and node.pub, what device K proves itself by, and its systemd unit
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune_cli.errors import CheckpointError, ConfigError, DeviceError, FedpruneError
from fedprune_cli.nodes import certificates
from fedprune_cli.nodes.board import Board
from fedprune_cli.nodes.executor import Invite, Reply, Request, reply_in
from fedprune_cli.nodes.post import Post, node_for
from fedprune_cli.nodes.protocol import Terms, failed, hello_of, read_from_node, read_from_server, read_hello, sha256
from fedprune_cli.store.files import read_bytes, read_json
from fedprune_cli.store.write import write_whole, writing
from fedprune_cli.world.datasets.roster import Card

if TYPE_CHECKING:
    from fedprune_cli.nodes.node import Node

FILES = Path(__file__).with_name("flower_files")
FOLDER, APP, HOME, NODES = "flower", "app", "home", "nodes.json"
LOOK_S, ONLINE_S = 0.2, 2.0  # how often replies are asked for, and who is there
AGAIN_S = 15.0  # between two starts of a SuperNode
START_S, STARTS = 120.0, 3  # within which the app has to come: Flower drops one that needs more than 30 s to start
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


# --- what `fedprune pilot init` writes -----------------------------------------------------------------------------------


def write_pilot(pilot: Path, devices: Sequence[int], host: str, port: int) -> list[Path]:
    """Writes what a pilot over Flower has besides its certificates; returns where. A device that has a key already keeps it."""
    here, root = pilot / FOLDER, (pilot / certificates.CA).resolve()
    config = f'[superlink.pilot]\naddress = "{host}:{port}"\nroot-certificates = {json.dumps(str(root))}\n'
    with writing(here):
        shutil.rmtree(here / APP, ignore_errors=True)
        shutil.copytree(FILES / APP, here / APP, ignore=shutil.ignore_patterns("__pycache__"))
        (here / HOME).mkdir(exist_ok=True)
    link, node = ((FILES / name).read_text() for name in ("superlink.service", "node.service"))
    files = {here / HOME / "config.toml": config, here / "superlink.service": link.format(host=host, port=port)}
    for device in devices:
        folder = pilot / f"device-{device}"
        files[folder / "node.service"] = node.format(host=host, port=port, device=device)
        if not (folder / certificates.NODE_PUBLIC).exists():
            certificates.write_node_key(folder)
    for path, text in files.items():
        write_whole(path, text.encode())
    return [here / APP, *files, *(pilot / f"device-{device}" / certificates.NODE_KEY for device in devices)]


# --- the server's side ---------------------------------------------------------------------------------------------------


@dataclass
class _Out:
    """A task that is out. name: of Flower's message, empty while it waits to be sent; away_s: since when its node is away or fails."""

    task: bytes
    request: Request | None
    asked_s: float = field(default_factory=time.monotonic)
    name: str = ""
    sent_s: float = 0.0
    away_s: float | None = None

    @property
    def what(self) -> str:
        """What it is, in words."""
        return self.request.what if self.request else "its card"


class RefusedError(ValueError):
    """What came back is of a node that cannot take part."""


@dataclass(frozen=True)
class Flower:
    """The nodes of a pilot. grid: asks the ServerApp, whose `server_app.py` says what; nodes: Flower's number of each device."""

    terms: Terms
    grid: Callable[[Mapping[str, object]], list]  # type: ignore[type-arg]  # of JSON
    nodes: Mapping[int, int]
    board: Board
    cards: dict[int, Card] = field(default_factory=dict)

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, Reply]:
        """As Carrier.exchange. Each message stands for itself: it says nothing of what a node has heard before."""
        return self._carry({device: _Out(one.write(None)[0], one) for device, one in requests.items()})

    def welcome(self, invite: Invite) -> None:
        """As Carrier.welcome: over Flower there are no newcomers, as nobody is heard who was not asked."""

    def gather(self) -> list[Card]:
        """As Host.gather."""
        while missing := [device for device in range(self.terms.devices) if device not in self.cards]:
            self._carry({device: _Out(b"", None) for device in missing})
        return [self.cards[device] for device in range(self.terms.devices)]

    def end(self) -> None:
        """As Host.end: nodes stay for the next run, and the ServerApp ends with the connection to it."""

    def _carry(self, out: dict[int, _Out]) -> dict[int, Reply]:
        replies = dict[int, Reply]()
        looked_s = -ONLINE_S
        while out:
            if time.monotonic() - looked_s >= ONLINE_S and any(not one.name for one in out.values()):
                self._send(out)
                looked_s = time.monotonic()
            waiting = {one.name: device for device, one in out.items() if one.name}
            for name, wrong, data in self.grid({"pull": [*waiting]}) if waiting else ():
                device = waiting[name]
                try:
                    replies[device] = self._take(device, out[device], wrong, base64.b64decode(data))
                except (ValueError, IndexError, KeyError, TypeError) as error:
                    self.terms.say(f"device-{device}: {error}; trying again ({out[device].what})")
                    self.board.see(device, "refused" if isinstance(error, RefusedError) else "away", str(error))
                    out[device].name, out[device].away_s = "", out[device].away_s or time.monotonic()
            for device, one in [*out.items()]:
                if device in replies or self._is_lost(device, one):
                    del out[device]
            self.board.write(self.board.news())
            time.sleep(LOOK_S if out else 0.0)
        return replies

    def _send(self, out: Mapping[int, _Out]) -> None:
        """Sends what waits to be sent to the nodes that are there and wanted, and notes which are not."""
        online, refused = set(self.grid({})), certificates.revoked(self.terms.pilot)
        todo = dict[int, _Out]()
        for device, one in out.items():
            unwanted = certificates.unwanted(certificates.peer_in(self.terms.pilot / f"device-{device}"), refused)
            if not one.name and self.nodes[device] in online and not unwanted:
                todo[self.nodes[device]] = one
            elif not one.name and one.away_s is None:
                one.away_s = time.monotonic()
                self.board.see(device, "refused" if unwanted else "away", unwanted)
                self.terms.say(f"{unwanted or f'device-{device}: away'} ({one.what})")
        order = self.terms.order.encode() if self.terms.order else b""
        now_s = time.monotonic()
        sent = [[node, base64.b64encode(_joined(order, one.task)).decode()] for node, one in todo.items()]
        for one, name in zip(todo.values(), self.grid({"push": sent}) if sent else (), strict=True):
            one.name, one.sent_s = name or "", now_s

    def _take(self, device: int, one: _Out, wrong: str, data: bytes) -> Reply:
        """Returns the reply in what came back; raises ValueError and others for none, and for that of a node that cannot take part."""
        if wrong:
            raise ValueError(f"Flower says: {' '.join(wrong.split())[:200]}")
        now_s, (first, second) = time.monotonic(), _split(data)
        hello = read_hello(first)
        self.board.know(device, version=hello.versions.fedprune, torch=hello.versions.torch, machine=hello.machine)
        if why := self.terms.unfit(device, hello):
            raise RefusedError(f"refused: {why}")
        self.cards[device] = hello.card
        due_s = one.request.due_s if one.request else None
        late = due_s is not None and now_s - one.sent_s > due_s
        self.board.see(device, "late" if late else "up", f"{one.what}: not within {due_s:.3g} s" if late else "")
        if one.request is None:
            return Reply(None, one.sent_s, None, now_s)
        answer = read_from_node(second)
        if answer.header["of"] != sha256(one.task):
            raise ValueError("an answer to another task")
        self.board.know(device, round=one.request.round)
        return reply_in(answer, one.request, one.sent_s, None, now_s)

    def _is_lost(self, device: int, one: _Out) -> bool:
        now_s, within_s = time.monotonic(), one.request.within_s if one.request else None
        if within_s is not None and now_s - one.asked_s > within_s:
            self.terms.say(f"device-{device}: late, nobody waits for it ({one.what})")
            self.board.see(device, "late", f"{one.what}: not within {within_s:.3g} s")
            return True
        if one.name or one.away_s is None or one.request is None or now_s - one.away_s < self.terms.patience_s:
            return False
        self.terms.say(f"device-{device}: away for {self.terms.patience_s:.3g} s, its task is lost ({one.what})")
        return True


@contextlib.contextmanager
def superlink(terms: Terms) -> Iterator[Flower]:
    """Yields the nodes of a pilot, once its SuperLink has started the app; raises DeviceError when it does not."""
    app = terms.pilot / FOLDER / APP
    if not app.exists():
        raise CheckpointError(f"{app}: missing; `fedprune pilot init {terms.pilot} DEVICE... --host HOST` writes it")
    nodes = _registered(terms)
    with _listening() as (ears, path):
        ears.settimeout(START_S)
        for _ in range(STARTS):
            _flwr(terms.pilot, "run", str(app), "pilot", "--run-config", f'socket="{path}"')
            with contextlib.suppress(TimeoutError):
                other, _ = ears.accept()
                break
            terms.say(f"the SuperLink has started no app within {START_S:.0f} s")
        else:
            raise DeviceError(f"the SuperLink started no app, {STARTS} times: its log says why")
        with Connection(other.detach()) as connection:
            here = Flower(terms, lambda asked: _ask(connection, asked), nodes, terms.board())
            try:
                yield here
            finally:
                here.board.write(here.board.news(serving=terms.order is None))


def _ask(app: Connection, asked: Mapping[str, object]) -> list:  # type: ignore[type-arg]
    try:
        app.send_bytes(json.dumps(asked).encode())
        return json.loads(app.recv_bytes())
    except (EOFError, OSError):
        raise DeviceError("Flower's ServerApp has ended; the same command continues after the last round") from None


def _registered(terms: Terms) -> dict[int, int]:
    """Returns Flower's number of each device; makes the keys that are new known to the SuperLink."""
    path = terms.pilot / FOLDER / NODES
    known, nodes = read_json(path, CheckpointError) if path.exists() else {}, dict[int, int]()
    for device in range(terms.devices):
        public = terms.pilot / f"device-{device}" / certificates.NODE_PUBLIC
        key = read_bytes(public, certificates.MAX_BYTES, CheckpointError).decode(errors="replace")
        if key not in known:
            said = _flwr(terms.pilot, "supernode", "register", str(public), "pilot", "--format", "json")
            known[key] = json.loads(said)["node-id"]
            write_whole(path, (json.dumps(known) + "\n").encode())
        nodes[device] = int(known[key])
    return nodes


def _flwr(pilot: Path, *arguments: str) -> str:
    """Returns what the command `flwr` prints; raises DeviceError with what it complains of."""
    home = _environment(pilot / FOLDER / HOME)
    done = subprocess.run([_command("flwr"), *arguments], env=home, capture_output=True, text=True)
    if done.returncode:
        words = " ".join(f"{done.stdout} {done.stderr}".split())
        raise DeviceError(f"flwr {arguments[0]}: {words[-300:] or f'exit code {done.returncode}'}")
    return done.stdout


# --- the node's side -----------------------------------------------------------------------------------------------------


def attend(post: Post) -> None:
    """Does the tasks that a SuperNode brings, which is started here, and again whenever it ends; does so until it is stopped."""
    hello = hello_of(post.place.samples.card(labels=post.labels)).encode()
    node: Node | None = None
    supernode, started_s = None, 0.0
    with _listening() as (ears, path), contextlib.ExitStack() as ending:
        ears.settimeout(0.5)
        while True:
            if supernode is None or (supernode.poll() is not None and time.monotonic() - started_s > AGAIN_S):
                post.say(f"device-{post.place.device}: starting a SuperNode{' again' if supernode else ''}")
                supernode, started_s = _start_supernode(post, path), time.monotonic()
                ending.callback(supernode.terminate)
            with contextlib.suppress(EOFError, OSError):  # nobody has come, or who came is gone
                node = _attend_one(post, ears, hello, node)


def _attend_one(post: Post, ears: socket.socket, hello: bytes, node: Node | None) -> Node | None:
    """Does the task that the next app brings, if it brings one; returns the node that did."""
    app, _ = ears.accept()
    with Connection(app.detach()) as connection:
        order, task = _split(connection.recv_bytes())
        node, answer = _answer(post, order, task, node) if task else (node, b"")
        connection.send_bytes(_joined(hello, answer))
    return node


def _answer(post: Post, order: bytes, task: bytes, node: Node | None) -> tuple[Node | None, bytes]:
    """Returns the node of the order's run, and what it makes of a task, or why it could not."""
    try:
        node = node_for(post, read_from_server(order), node)
        return node, node.respond(sha256(task), node.read(read_from_server(task), None)[0])
    except (FedpruneError, ValueError, KeyError, OSError) as error:
        return node, failed(sha256(task), f"device-{post.place.device}: {error}")


def _start_supernode(post: Post, path: str) -> subprocess.Popen[bytes]:
    read_bytes(post.folder / certificates.NODE_KEY, certificates.MAX_BYTES, CheckpointError)  # that it is there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        _command("flower-supernode"), "--superlink", post.address, "--root-certificates", str(post.folder / certificates.CA),
        "--auth-supernode-private-key", str(post.folder / certificates.NODE_KEY), "--port", port, "--node-config", f'socket="{path}"',
    ]  # fmt: skip
    home = post.folder / FOLDER
    return subprocess.Popen(command, env=_environment(home), stdout=sys.stderr, preexec_fn=_end_with_parent)


def _end_with_parent() -> None:
    """Has the kernel end this process with the one that started it: an orphan would keep the key from its successor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _joined(first: bytes, second: bytes) -> bytes:
    return len(first).to_bytes(8, "little") + first + second


def _split(data: bytes) -> tuple[bytes, bytes]:
    at = 8 + int.from_bytes(data[:8], "little")
    return data[8:at], data[at:]


@contextlib.contextmanager
def _listening() -> Iterator[tuple[socket.socket, str]]:
    """Yields a socket that only this user's processes on this machine reach, and its path."""
    with tempfile.TemporaryDirectory(prefix="fedprune-") as folder, socket.socket(socket.AF_UNIX) as ears:
        ears.bind(path := f"{folder}/socket")
        ears.listen()
        yield ears, path


def _command(name: str) -> str:
    if found := shutil.which(name, path=PATH):
        return found
    raise ConfigError(f"{name} is not here: nodes over Flower need the package flwr: pip install 'fedprune[flower]'")


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, **QUIET, "PATH": PATH, "FLWR_HOME": str(home.resolve())}
