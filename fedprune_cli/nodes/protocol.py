"""What server and node say to each other, whatever carries it: sealed messages of known form, and nothing that could be unpickled.

    node -> server   hello                    who it is of, what it runs, what its data are like: no sample
    server -> node   run                      the configuration that the node builds its model from
    server -> node   task                     the mask's code, the kept entries of u that are not there yet, the schedule, v_k's round
    both             sum                      keys and shares of a secure sum (`sum_messages`), in which updates are under masks
    node -> server   got                      the task is there: download is over; of a sum the answer says so
    node -> server   update, score, failed    the kept entries of u or their code; correct predictions; why there is neither
    node -> server   refused                  why the device does not take part: in a secure sum, or beyond its privacy budget
    server -> node   end                      the run has had its last round

An answer names the SHA-256 of the task that it is of. Neither v_k nor data have a place in any of them. What is in tasks and answers is
read and written in `orders`; nothing here needs PyTorch, so that a node that starts again is heard at once.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from fedprune_cli.errors import one_line
from fedprune_cli.nodes.board import Board, board_for
from fedprune_cli.nodes.energy import read_spent
from fedprune_cli.store.files import Plain, fits
from fedprune_cli.store.sealed import Sealed, unseal
from fedprune_cli.world.datasets.roster import Card, read_card

PROTOCOL = 5  # raised by a change that an older node or server would misread
SPARE_BYTES = 2**20  # of a message for what is not values


@dataclass(frozen=True)
class Versions:
    """What must be the same on both sides: of the protocol, of fedprune and of PyTorch."""

    protocol: int
    fedprune: str
    torch: str


def versions() -> Versions:
    """Returns those of this machine. PyTorch is not imported for it."""
    return Versions(PROTOCOL, version("fedprune"), version("torch"))


@dataclass(frozen=True)
class Hello:
    """What a node says first: its versions, its machine, and the card of its data."""

    versions: Versions
    machine: str
    card: Card

    def encode(self) -> bytes:
        """Returns the message."""
        header = {"kind": "hello", **asdict(self.versions), "machine": self.machine, "card": self.card.as_plain()}
        return Sealed(header).encode()


def hello_of(card: Card) -> Hello:
    """Returns this machine's hello."""
    return Hello(versions(), f"{platform.machine()}, Python {platform.python_version()}", card)


def read_hello(data: bytes) -> Hello:
    """Returns the hello in a message; raises ValueError."""
    form = {"protocol": int, "fedprune": str, "torch": str, "machine": str, "card": dict}
    header = _opened(data, {"hello": form}).header
    card = read_card(header["card"])
    fedprune, torch = (one_line(str(header[key]))[:50] for key in ("fedprune", "torch"))
    of = Versions(int(str(header["protocol"])), fedprune, torch)
    return Hello(of, one_line(str(header["machine"]))[:200], card)


def _words(of: Versions) -> str:
    return ", ".join(f"{key} {value}" for key, value in vars(of).items())


def _as_told(card: Card) -> tuple[object, ...]:
    return card.train, card.test, card.shape, card.dtype, card.scale, card.classes


@dataclass(frozen=True)
class RunOrder:
    """Which run the tasks are of that follow, and its configuration, of which a node takes the model and how it is trained."""

    run: str
    config: Mapping[str, Plain]

    def encode(self) -> bytes:
        """Returns the message."""
        return Sealed({"kind": "run", "run": self.run, "config": dict(self.config)}).encode()


@dataclass(frozen=True)
class Terms:
    """Under which nodes are taken. pilot: the folder with the certificates; devices: how many there are; most_bytes: of a message.

    patience_s: how long a node may be away before its task is lost; cards: what their data must be like, nothing before there is a
    roster; order: what they are to work on, None: nothing yet; say: told what happens, in one line each; run_dir: the run's folder, for
    whoever watches.
    """

    pilot: Path
    devices: int
    most_bytes: int
    patience_s: float
    say: Callable[[str], None]
    cards: Sequence[Card] = ()
    order: RunOrder | None = None
    run_dir: str = ""

    def board(self) -> Board:
        """Returns what is shown of the nodes, none of which has come yet."""
        board = board_for(self.pilot, range(self.devices), self.say)
        if self.order:
            board.run, board.run_dir = self.order.run, self.run_dir
        return board

    def unfit(self, device: int, hello: Hello) -> str:
        """Returns why the node of a device cannot take part, empty when it can."""
        mine, its = versions(), hello.versions
        if its != mine:
            return f"device-{device} runs {_words(its)}, the server {_words(mine)}: they must be the same"
        if self.cards and device >= len(self.cards) and _as_told(hello.card)[2:] != _as_told(self.cards[0])[2:]:
            return f"device-{device}: its data are of another form than those of the roster"
        if device < len(self.cards) and _as_told(hello.card) != _as_told(self.cards[device]):
            return f"device-{device}: its data are not those of the roster, which a run cannot change"
        return ""


END = Sealed({"kind": "end"}).encode()


TASK = {
    "work": str, "stage": str, "round": int, "device": int, "base": int, "bits": int, "may_diverge": bool, "size": int, "keep": str,
    "onto": bool, "schedule": [[(str, int)]], "attempt": (str, None), "noise": (float, None),
}  # fmt: skip
SUM = {
    "step": str, "device": int, "round": int, "attempt": str, "devices": [int], "counts": [int], "threshold": int, "least": int,
    "largest": float, "bits": int, "survivors": [int], "noise": (float, None), "curious": int, "lengths": [int],
}  # fmt: skip


def read_from_server(data: bytes) -> Sealed:
    """Returns a message of the server's, its form checked; raises ValueError."""
    return _opened(data, {"run": {"run": str, "config": dict}, "task": TASK, "sum": SUM, "end": {}})


def got(of: str) -> bytes:
    """Returns the message that a task is there."""
    return Sealed({"kind": "got", "of": of}).encode()


def failed(of: str, why: str) -> bytes:
    """Returns the message that a task led to an error of the run's."""
    return Sealed({"kind": "failed", "of": of, "why": why}).encode()


ENERGY: dict[str, object] = {"joules": (float, None), "joules_of": (str, None)}


def refused(of: str, why: str) -> bytes:
    """Returns the message that a node does not take part, which the others do without it."""
    return Sealed({"kind": "refused", "of": of, "why": why}).encode()


ANSWERS: dict[str, dict[str, object]] = {
    "got": {"of": str},
    "failed": {"of": str, "why": str},
    "refused": {"of": str, "why": str},
    "sum": {"of": str, "compute_s": float, "step": str, "lengths": [int]},
    "score": {"of": str, "compute_s": float, "correct": int, "total": int, **ENERGY},
    "update": {
        "of": str,
        "compute_s": float,
        "moved": bool,
        "train_loss": (float, None),
        "rounding_error": (float, None),
        **ENERGY,
    },
}


def read_from_node(data: bytes) -> Sealed:
    """Returns a message that a node answers with, its form checked; raises ValueError."""
    message = _opened(data, ANSWERS)
    read_spent(message.header)
    return message


def sha256(message: bytes) -> str:
    """Returns what an answer names its task by."""
    return hashlib.sha256(message).hexdigest()


def _opened(data: bytes, forms: Mapping[str, Mapping[str, object]]) -> Sealed:
    message = unseal(data)
    kind = str(message.header.get("kind"))
    if kind not in forms or not fits(dict(message.header), dict(forms[kind])):
        raise ValueError(f"not a message that is expected here ({kind[:20]})")
    return message
