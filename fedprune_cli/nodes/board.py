"""What a pilot's server shows of its nodes to whoever watches: PILOT/nodes.json, replaced whole whenever something changes.

It has what the server sees and nothing of the model: no run reads it, and a server that cannot write it says so and goes on. Times are
Unix seconds of the server's clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedprune_cli.errors import CheckpointError, OutputError, one_line
from fedprune_cli.store.files import fits, read_json
from fedprune_cli.store.write import write_whole

BOARD = "nodes.json"
STATES = ("up", "late", "silent", "refused", "away")
SHOW_S = 0.5  # between looks at whether something changed
BEAT_S = 5.0  # after which it is written even if nothing did, so that a server that was killed is told from a quiet one
STALE_S = 15.0  # without a beat, until nobody is taken to serve
SILENT_S = 5.0  # that a node may take to say that a task is there
MOST_NODES = 100_000
MOST_WHY = 200  # characters


@dataclass(frozen=True)
class Standing:
    """How a node stands with the server. state: one of STATES; since_s: since when; round: of its last answer, 0: none yet.

    why: a reason in words, empty where there is none; version: of fedprune; torch, machine: what else it says of itself.
    """

    device: int
    state: str = "away"
    since_s: float = 0.0
    round: int = 0
    why: str = ""
    version: str = ""
    torch: str = ""
    machine: str = ""


@dataclass(frozen=True)
class Posted:
    """What is posted. run: its name, empty before there is one; run_dir: its folder; serving: whether the server was not about to end."""

    run: str
    run_dir: str
    serving: bool
    written_s: float
    nodes: tuple[Standing, ...]

    def served(self, now_s: float) -> bool:
        """Whether a server keeps it up at a moment."""
        return self.serving and now_s - self.written_s < STALE_S


@dataclass
class Board:
    """What the server has seen of its nodes so far. say: told once when it cannot be written."""

    path: Path
    say: Callable[[str], None]
    run: str = ""
    run_dir: str = ""
    nodes: dict[int, Standing] = field(default_factory=dict)
    shown: tuple[Standing, ...] | None = None
    written_s: float = 0.0
    trouble: str = ""

    def see(self, device: int, state: str, why: str = "") -> None:
        """Notes how a node stands from now on; nothing where it stood so before."""
        old, why = self.nodes.get(device) or Standing(device), one_line(why)[:MOST_WHY]
        if (old.state, old.why) != (state, why) or not old.since_s:
            self.nodes[device] = replace(old, state=state, since_s=time.time(), why=why)

    def know(self, device: int, **known: str | int) -> None:
        """Notes further fields of a Standing."""
        self.nodes[device] = replace(self.nodes.get(device) or Standing(device), **known)  # type: ignore[arg-type]

    def news(self, *, serving: bool = True) -> bytes:
        """Returns what is to be written now, nothing where what is there is still true."""
        now_s, nodes = time.time(), tuple(self.nodes[device] for device in sorted(self.nodes))
        if serving and nodes == self.shown and now_s - self.written_s < BEAT_S:
            return b""
        self.shown, self.written_s = nodes, now_s
        return encode(Posted(self.run, self.run_dir, serving, now_s, nodes))

    def write(self, data: bytes) -> None:
        """Writes what `news` returned; says once why it cannot."""
        try:
            if data:
                write_whole(self.path, data)
        except OutputError as error:
            if self.trouble != str(error):
                self.trouble = str(error)
                self.say(f"{error}: who watches sees no news of the nodes")


def board_for(pilot: Path, devices: Collection[int], say: Callable[[str], None]) -> Board:
    """Returns the board of a pilot whose devices have not come yet."""
    board = Board(pilot / BOARD, say)
    for device in devices:
        board.see(device, "away")
    return board


def encode(posted: Posted) -> bytes:
    """Returns the file's content, a line a node."""
    head = {**asdict(posted), "nodes": []}
    lines = ",\n".join(json.dumps(asdict(node)) for node in posted.nodes)
    return json.dumps(head).encode().removesuffix(b"[]}") + f"[\n{lines}\n]}}\n".encode()


FORM = {
    "run": str, "run_dir": str, "serving": bool, "written_s": float,
    "nodes": [{"device": int, "state": str, "since_s": float, "round": int, "why": str, "version": str, "torch": str, "machine": str}],
}  # fmt: skip


def read_board(path: Path) -> Posted:
    """Returns what is posted; raises CheckpointError for a file that is missing or damaged."""
    value = read_json(path, CheckpointError)
    if not fits(value, FORM) or len(value["nodes"]) > MOST_NODES:
        raise CheckpointError(f"{path}: damaged (not what a server says of its nodes)")
    fields = tuple(FORM["nodes"][0])  # type: ignore[index]
    nodes = tuple(Standing(**{key: node[key] for key in fields}) for node in value["nodes"])
    if any(node.state not in STATES or node.device < 0 for node in nodes):
        raise CheckpointError(f"{path}: damaged (a node's state is none of {', '.join(STATES)})")
    return Posted(value["run"], value["run_dir"], value["serving"], float(value["written_s"]), nodes)
