"""Nodes for tests: the simulator's devices with their own samples each, and a carrier that hands messages over in this process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from conftest import TINY, composed, make_setup

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.plain import plain
from fedprune_cli.execute import Executor
from fedprune_cli.nodes.data import Place, read_samples, samples_of, write_samples
from fedprune_cli.nodes.executor import Invite, NodeExecutor, Reply, Request, Taken, measured, reply_in
from fedprune_cli.nodes.node import Node, build_node
from fedprune_cli.nodes.orders import Heard
from fedprune_cli.nodes.protocol import read_from_node, read_from_server, sha256
from fedprune_cli.round.setup import Setup, prepare
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.files import Plain
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.world.datasets.roster import roster_json


@dataclass
class InProcess:
    """Carries messages as bytes to nodes in this process; `wire` keeps them all; devices in `away` are lost."""

    nodes: Mapping[int, Node]
    wire: list[bytes] = field(default_factory=list)
    away: set[int] = field(default_factory=set)
    known: dict[int, Heard] = field(default_factory=dict)
    heard: dict[int, Heard] = field(default_factory=dict)

    def exchange(self, requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        replies = {}
        for device, request in requests.items():
            if device in self.away:
                continue
            node = self.nodes[device]
            message, known = request.write(self.known.get(device))
            order, heard = node.read(read_from_server(message), self.heard.get(device))
            self.known[device], self.heard[device] = known, heard
            answer = node.respond(sha256(message), order)
            self.wire += [message, answer]
            reply = reply_in(read_from_node(answer), request, 0.0, 1.0, 5.0)
            replies[device] = reply if reply.failure else replace(reply, compute_s=3.0)
        return replies

    def welcome(self, invite: Invite) -> None:
        """Knows no newcomers."""


@dataclass
class InProcessSite:
    """The site of nodes in this process; sys: where they read what they draw, nowhere unless a test says where."""

    places: Mapping[int, Place]
    config: Mapping[str, Plain]
    carrier: InProcess = field(default_factory=lambda: InProcess({}))
    done: dict[int, Taken] = field(default_factory=dict)
    sys: Path = Path("/nowhere")

    @contextlib.contextmanager
    def executor(self, setup: Setup) -> Iterator[Executor]:
        run = f"{setup.experiment.config_hash}-s{setup.experiment.seed}"
        self.carrier.nodes = {
            device: replace(build_node(place, run, self.config), sys=self.sys) for device, place in self.places.items()
        }
        for node in self.carrier.nodes.values():
            node.purse.open()
        policy = setup.experiment.failsafe.policy
        yield NodeExecutor(self.carrier, setup.blueprint.layout, not (policy.waits or policy.defers), self.done)

    def measured(self, record: RoundRecord) -> dict[str, object]:
        return measured(self.done, record)


def simulate(run_dir: Path, *overrides: str) -> Setup:
    """Runs the simulator to its end; returns its setup."""
    setup = make_setup(*overrides)
    life.create(setup, composed(*overrides), run_dir)
    list(life.run(setup, run_dir))
    return setup


def deal(setup: Setup, home: Path) -> dict[int, Place]:
    """Gives each of a simulation's devices a folder of its own with its samples; writes their roster. Returns where they are."""
    scenario, places = setup.scenario, {}
    for device in range(len(scenario.partition.train)):
        write_samples(home / f"device-{device}", samples_of(scenario.dataset, scenario.partition, device))
        places[device] = Place(device, home / f"device-{device}", read_samples(home / f"device-{device}"))
    (home / "roster.json").write_bytes(roster_json([place.samples.card(labels=True) for place in places.values()]))
    return places


def on_nodes(home: Path, overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of the same run on nodes."""
    own = [one for one in (*TINY, *overrides) if not one.startswith(("execution.kind", "data=", "data.", "partition"))]
    return ["data=nodes", f"data.file={home / 'roster.json'}", *own]


def begin(home: Path, run_dir: Path, overrides: Sequence[str]) -> tuple[Setup, dict[str, Plain]]:
    """Makes the folder of the same run on nodes; returns its setup and configuration."""
    config = compose_config(on_nodes(home, overrides))
    setup = prepare(build_experiment(config))
    life.create(setup, config, run_dir)
    return setup, plain(config, resolve=True)


def result(run_dir: Path) -> tuple[bytes, bytes]:
    """Returns the records and u of a run, as bytes."""
    return (run_dir / folder.RECORDS).read_bytes(), folder.read_state(run_dir).state.shared.tobytes()


def enrolled(home: Path, setup: Setup) -> Path:
    """Returns a pilot's folder with the certificates and the samples of a simulation's devices, and their roster."""
    from fedprune_cli.nodes import certificates

    pilot = home / "pilot"
    certificates.begin(pilot, ["127.0.0.1", "localhost"], 1)
    for device in range(len(setup.scenario.partition.train)):
        certificates.enroll(pilot, device, 1)
    deal(setup, pilot)
    return pilot


def places_of(pilot: Path) -> dict[int, Place]:
    """Returns where the devices of a pilot's folder are."""
    found = sorted(pilot.glob("device-*"), key=lambda path: int(path.name.split("-")[1]))
    return {device: Place(device, path, read_samples(path)) for device, path in enumerate(found)}


def stand(folder: Path, port: int, say: Callable[[str], None] = lambda _: None) -> None:
    """Is a node until the run is over."""
    from fedprune_cli.nodes.attend import Post, attend

    device = int(folder.name.split("-")[1])
    attend(Post(f"127.0.0.1:{port}", folder, Place(device, folder, read_samples(folder)), True, say))


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
