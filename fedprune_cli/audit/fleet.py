"""The nodes of a pilot as they are watched: how they stand with their server, and what a round takes on each beside what the model says."""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedprune_cli.errors import CheckpointError
from fedprune_cli.nodes.board import BOARD, STATES, Posted, Standing, read_board
from fedprune_cli.nodes.energy import Spent, as_plain, read_row
from fedprune_cli.store import folder
from fedprune_cli.store.files import fits, parse_json, read_yaml
from fedprune_cli.terminal import Table

GRACE_S = 10.0  # for which a node may be in no good state before a limit counts it: it may be on its way back
TAIL_BYTES = 2**22  # of timings.jsonl that are read: the last rounds
COUNTS = {f"nodes_{state}": f"nodes {state}" for state in STATES}  # what of nodes can have a limit
HEADERS = ("node", "state", "round", "measured s", "model s", "version", "since, and why", "measured J", "model J")
WHY, MEASURED_J = 6, 7  # where the cells are words; up to WHY a terminal always shows all


@dataclass(frozen=True)
class Cost:
    """What the last training of a node took, measured and by the model, and of which round it was.

    Seconds are without its waiting for others. drawn: joules while it worked, None: not measured; modelled_j: those of its computing and
    its radio, and of what it draws besides only with meter.idle=true; None in timings of an earlier version.
    """

    round: int
    measured_s: float
    modelled_s: float
    drawn: Spent | None = None
    modelled_j: float | None = None


@dataclass(frozen=True)
class Fleet:
    """The nodes of a pilot at a moment. pilot: its folder; served: whether a server is there."""

    pilot: Path
    served: bool
    now_s: float
    nodes: tuple[Standing, ...]
    costs: Mapping[int, Cost]

    def counts(self, grace_s: float = 0.0) -> dict[str, int]:
        """Returns how many nodes are in each state; those that have not been in it for `grace_s` yet count as up."""
        states = [node.state if self.now_s - node.since_s >= grace_s else "up" for node in self.nodes]
        found = Counter(states)
        return {key: found[state] for key, state in zip(COUNTS, STATES, strict=True)}

    def words(self) -> str:
        """Returns how many are in which state, in words."""
        some = [f"{count} {key.removeprefix('nodes_')}" for key, count in self.counts().items() if count]
        return ", ".join(some) + ("" if self.served else "; nobody serves them now")

    def culprits(self, kpi: str) -> str:
        """Returns the nodes that a figure counts, or those that nodes_up does not, and why they are so."""
        state = kpi.removeprefix("nodes_")
        found = [node for node in self.nodes if (node.state != "up" if state == "up" else node.state == state)]
        names = [f"{name_of(node)} {node.state}{': ' * bool(node.why)}{node.why}" for node in found]
        return "; ".join(names[:5]) + ("; ..." if names[5:] else "")

    def cells(self) -> list[list[str]]:
        """Returns a row of text for each node, as HEADERS says."""
        return [self._cells(node) for node in self.nodes]

    def table(self, title: str) -> Table:
        """Returns a row for each node, for the terminal: first those that are not up, since a terminal ends where it ends."""
        folding = (HEADERS[WHY], HEADERS[MEASURED_J])
        nodes = sorted(self.nodes, key=lambda node: node.state == "up")
        table = Table.of(
            title,
            HEADERS,
            [self._cells(node) for node in nodes],
            folding=folding,
            elsewhere="on the page that --serve serves",
        )
        return replace(table, always=WHY + 1)

    def _cells(self, node: Standing) -> list[str]:
        took = self.costs.get(node.device)
        number = max(node.round, took.round if took else 0)
        seconds, joules = [["-", "-"], ["-", "-"]] if took is None else [_seconds(took), _joules(took)]
        return [name_of(node), node.state, str(number or "-"), *seconds, node.version or "-", since(node), *joules]

    def plain(self) -> list[dict[str, object]]:
        """Returns the nodes for programs."""
        return [
            {
                **asdict(node),
                "measured_s": took and took.measured_s,
                "modelled_s": took and took.modelled_s,
                **{f"measured_{key}": value for key, value in as_plain(took.drawn if took else None).items()},
                "modelled_joules": took and took.modelled_j,
            }
            for node in self.nodes
            for took in [self.costs.get(node.device)]
        ]

    def changes(self, before: Fleet | None) -> list[str]:
        """Returns a line for each node that stands otherwise than it did."""
        old = {node.device: (node.state, node.why) for node in before.nodes} if before else {}
        changed = [node for node in self.nodes if old.get(node.device) != (node.state, node.why)]
        return [f"{name_of(node)}: {node.state} {since(node)}" for node in changed]


def _seconds(took: Cost) -> list[str]:
    return [f"{took.measured_s:.3g}", f"{took.modelled_s:.3g}"]


def _joules(took: Cost) -> list[str]:
    measured = "not measured" if took.drawn is None else f"{took.drawn.joules:.3g} {took.drawn.of}"
    return [measured, "-" if took.modelled_j is None else f"{took.modelled_j:.3g}"]


def name_of(node: Standing) -> str:
    """Returns the name on a node's certificate."""
    return f"device-{node.device}"


def since(node: Standing) -> str:
    """Returns since when a node stands as it does, by this machine's clock, and why."""
    return f"since {time.strftime('%H:%M:%S', time.localtime(node.since_s))}{', ' * bool(node.why)}{node.why}"


def is_pilot(path: Path) -> bool:
    """Whether a folder is a pilot's and not a run's."""
    return not (path / folder.MANIFEST).exists() and any((path / name).exists() for name in (BOARD, "ca.pem"))


def fleet_of(pilot: Path, posted: Posted, run_dir: Path | None) -> Fleet:
    """Returns the nodes of a pilot; run_dir: of their run, where there is one."""
    now_s = time.time()
    return Fleet(pilot, posted.served(now_s), now_s, posted.nodes, last_costs(run_dir) if run_dir else {})


def posted_by(pilot: Path) -> Posted:
    """Returns what the server of a pilot has posted; raises CheckpointError where none ever did."""
    if not (pilot / BOARD).exists():
        raise CheckpointError(f"{pilot}: nobody has served this pilot yet; `fedprune serve {pilot}` does")
    return read_board(pilot / BOARD)


def fleet_beside(run_dir: Path, manifest: Mapping[str, object]) -> Fleet | None:
    """Returns the nodes that a run is on; None for a simulation, and when their server is at another run."""
    config = manifest.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    if not isinstance(data, Mapping) or data.get("name") != "nodes" or (pilot := _pilot_of(run_dir)) is None:
        return None
    if not (pilot / BOARD).exists():
        return None
    posted = read_board(pilot / BOARD)
    its = f"{manifest.get('config_hash')}-s{manifest.get('seed')}"
    return fleet_of(pilot, posted, run_dir) if posted.run == its else None


@functools.lru_cache(maxsize=8)
def _pilot_of(run_dir: Path) -> Path | None:
    """Returns the folder in which a run's roster lies."""
    import yaml

    config = yaml.safe_load(read_yaml(run_dir / folder.CONFIG, CheckpointError))
    found = config.get("data", {}).get("file") if fits(config, {"data": {"file": str}}) else None
    return Path(found).parent if found else None


NODES = {"round": int, "nodes": [{"device": int, "compute_s": float, "modelled": {}}]}
WAYS = ("compute_s", "downlink_s", "uplink_s", "carried_s")


def last_costs(run_dir: Path) -> dict[int, Cost]:
    """Returns what the last training of each node took, as far as the last rounds of timings.jsonl say; raises CheckpointError."""
    path, found = run_dir / folder.TIMINGS, dict[int, Cost]()
    for line in reversed(_tail(path)):
        try:
            timing = parse_json(line)
        except ValueError:
            timing = None
        if not fits(timing, {"round": int}) or ("nodes" in timing and not fits(timing, NODES)):
            raise CheckpointError(f"{path}: damaged (not a run's timings)")
        for row in timing.get("nodes", []):
            measured, modelled = (sum(float(of.get(way, 0)) for way in WAYS) for of in (row, row["modelled"]))
            try:
                joules = read_row(row)
            except ValueError as reason:
                raise CheckpointError(f"{path}: damaged ({reason})") from None
            found.setdefault(row["device"], Cost(timing["round"], measured, modelled, *joules))
    return found


def _tail(path: Path) -> list[bytes]:
    """Returns the last whole lines of a log."""
    size = path.stat().st_size if path.is_file() else 0
    if not size:
        return []
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL_BYTES), os.SEEK_SET)
        lines = file.read(TAIL_BYTES).split(b"\n")[:-1]
    return lines[1:] if size > TAIL_BYTES else lines
