"""Tasks and their answers as messages: of u the kept entries or their code, of a mask its code, and of v_k only the round it is of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from fedprune_cli.learn.client import Score, Task, Update
from fedprune_cli.learn.kept import Channels, Entries, Kept, Whole
from fedprune_cli.learn.personalize import Kind
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.learn.structured import Layout
from fedprune_cli.nodes.energy import Spent, as_plain
from fedprune_cli.store.files import Plain
from fedprune_cli.store.sealed import Sealed
from fedprune_cli.store.state import Array
from fedprune_cli.wire.masks import decode_mask, encode_mask
from fedprune_cli.wire.quantize import BITS_PER_PARAM, BLOCK, QUANTIZED_BITS, dequantize

WORKS = ("block", "train", "test")  # what `learn.batched.train_block`, `learn.client.train` and `evaluate` do


@dataclass(frozen=True)
class Heard:
    """What a node has of the u of one round, so that the next task need not send it again: which entries, bool [U], of `shared` [U]."""

    round: int
    known: Array
    shared: Array


@dataclass(frozen=True)
class Order:
    """A task on its way. work: one of WORKS; base: the round that v_k is to be of, 0 for the one that every device begins with.

    attempt: which secure sum of the round what comes of it is for, empty where too few are there for one, and nothing is handed in, None
    where updates are no secret; levels: of each entry that the device keeps, in the order of which they are summed, of one level by
    index; None where all are of one. noise: what a node is told to noise its steps with, over its clip.
    """

    work: str
    task: Task
    base: int
    attempt: str | None = None
    levels: Array | None = None
    noise: float | None = None

    def encode(self, layout: Layout, heard: Heard | None) -> tuple[bytes, Heard]:
        """Returns the message, and what the node has heard then: of u the entries that the device keeps and has not heard yet."""
        task, kept = self.task, self.task.kept
        mask = sent_mask(kept, layout, task.shared.size)
        onto = heard is not None and heard.round == task.round and heard.shared is task.shared
        known = heard.known if heard is not None and onto else np.zeros(task.shared.size, dtype=bool)
        wanted = ~known if mask is None else mask & ~known
        header: dict[str, Plain] = {
            "kind": "task", "work": self.work, "stage": task.stage, "round": task.round, "device": task.device, "base": self.base,
            "bits": task.bits, "may_diverge": task.may_diverge, "size": task.shared.size, "keep": type(kept).__name__, "onto": onto,
            "attempt": self.attempt, "noise": task.noised.noise if task.noised else None,
            "schedule": [[phase.kind, phase.samples, phase.batch, phase.epoch] for phase in task.schedule],
        }  # fmt: skip
        arrays = {"values": task.shared[wanted]} | ({} if self.levels is None else {"levels": self.levels})
        if flags := _flags(kept, task.shared.size):
            header["flags"], header["set"] = len(flags[0]), int(flags[0].sum())
            arrays["mask"] = np.frombuffer(encode_mask(flags[0]), dtype=np.uint8)
        return Sealed(header, arrays).encode(), Heard(task.round, known | wanted, task.shared)


def read_order(message: Sealed, layout: Layout, heard: Heard | None) -> tuple[Order, Heard]:
    """Returns the task in a message, and what is heard by then; entries that the device does not keep are zero. Raises ValueError."""
    header, arrays = message.header, message.arrays
    size = int(str(header["size"]))
    if size != sum(math.prod(shape) for shape in list(layout.shapes.values())[: layout.num_shared]):
        raise ValueError(f"of a model with {size} shared entries, and not of this one")
    kept = _read_kept(header, arrays, layout)
    mask = sent_mask(kept, layout, size)
    before = Heard(int(str(header["round"])), np.zeros(size, dtype=bool), np.zeros(size, dtype=np.float32))
    if header["onto"]:
        if heard is None or heard.round != before.round:
            raise ValueError("a task that goes on from one that was never here")
        before = heard
    values, wanted = arrays["values"], ~before.known if mask is None else mask & ~before.known
    if values.dtype != np.float32 or values.shape != (int(wanted.sum()),) or header["work"] not in WORKS:
        raise ValueError("not a task")
    if not np.isfinite(values).all():
        # a dropped entry would be 0 * inf, which is no number, and nothing that the task says
        raise ValueError("of a u that is not finite")
    after = Heard(before.round, before.known | wanted, before.shared.copy())
    after.shared[wanted] = values
    shared = after.shared if mask is None else after.shared * mask
    schedule = tuple(_read_phase(phase) for phase in _list(header["schedule"]))
    task = Task(
        str(header["stage"]), after.round, int(str(header["device"])), shared, np.zeros(0, np.float32), kept, schedule,
        int(str(header["bits"])), header["may_diverge"] is True, coded=True,
    )  # fmt: skip
    if min(task.round, int(str(header["base"]))) < 0 or task.bits not in (*QUANTIZED_BITS, BITS_PER_PARAM):
        raise ValueError("not a task")
    levels, count = arrays.get("levels"), size if mask is None else int(mask.sum())
    if levels is not None and (levels.dtype.kind != "u" or levels.shape != (count,)):
        raise ValueError("levels of another number or type")
    attempt = None if header["attempt"] is None else str(header["attempt"])
    noise = None if header["noise"] is None else float(str(header["noise"]))
    return Order(str(header["work"]), task, int(str(header["base"])), attempt, levels, noise), after


def _read_phase(of: list[Plain]) -> LocalPhase:
    kind, samples, batch, epoch = of
    if kind not in ("personal", "shared", "both") or not all(
        isinstance(number, int) for number in (samples, batch, epoch)
    ):
        raise ValueError("not a phase of a schedule")
    phase = LocalPhase(cast(Kind, kind), int(str(samples)), int(str(batch)), int(str(epoch)))
    if min(phase.samples, phase.batch - 1, phase.epoch) < 0:
        # else steps could be taken back, which nobody would pay for
        raise ValueError("not a phase of a schedule")
    return phase


def _list(value: Plain) -> list[list[Plain]]:
    return [one for one in value if isinstance(one, list)] if isinstance(value, list) else []


def sent_mask(kept: Kept, layout: Layout, size: int) -> Array | None:
    """Returns which of the shared entries travel, bool [U]; None for all."""
    return layout.masks(kept.units)[0] if isinstance(kept, Channels) else kept.mask(size)


def _flags(kept: Kept, size: int) -> tuple[Array, ...]:
    """Returns the bits that say what a device keeps, one array; nothing where it keeps everything."""
    mask = np.concatenate(kept.units) if isinstance(kept, Channels) else kept.mask(size)
    return () if mask is None else (mask,)


def _read_kept(header: Mapping[str, Plain], arrays: Mapping[str, Array], layout: Layout) -> Kept:
    if header["keep"] == "Whole":
        return Whole()
    count, given = int(str(header["flags"])), int(str(header["set"]))
    if count != layout.flags(int(str(header["size"]))) or not 0 <= given <= count:
        raise ValueError("a mask of another model")
    flags = decode_mask(arrays["mask"].tobytes(), count, given)
    if header["keep"] == "Entries" and not layout.slices:
        return Entries(np.packbits(flags))
    if header["keep"] != "Channels" or not layout.slices:
        raise ValueError("a mask of another model")
    return Channels(tuple(np.split(flags, np.cumsum([group.units for group in layout.groups])[:-1])))


@dataclass(frozen=True)
class Answer:
    """What a node made of a task. of: the SHA-256 of the task's message; compute_s: how long it worked on it, by its own clock.

    moved: whether v_k is another one than before; a device that diverged keeps its old one. spent: what was drawn meanwhile, None where
    the node cannot tell.
    """

    of: str
    result: Update | Score
    compute_s: float
    moved: bool = True
    spent: Spent | None = None

    def encode(self) -> bytes:
        """Returns the message: an update's code where it is rounded, else its values."""
        head: dict[str, Plain] = {"of": self.of, "compute_s": self.compute_s, **as_plain(self.spent)}
        if isinstance(self.result, Score):
            return Sealed(head | {"kind": "score", "correct": self.result.correct, "total": self.result.total}).encode()
        update = self.result
        head |= {
            "kind": "update",
            "moved": self.moved,
            "train_loss": update.train_loss,
            "rounding_error": update.rounding_error,
        }
        code = np.frombuffer(update.code, dtype=np.uint8)
        return Sealed(head, {"code": code} if update.code else {"values": update.shared}).encode()


def read_result(message: Sealed, order: Order, layout: Layout) -> Update | Score:
    """Returns what a node made of a task, as it would be had this process done it; raises ValueError for what cannot be an answer to it."""
    header, task = message.header, order.task
    if header["kind"] == "score" and order.work == "test":
        correct, total = int(str(header["correct"])), int(str(header["total"]))
        if not 0 <= correct <= total or not total:
            raise ValueError("a score that cannot be")
        return Score(task.device, correct, total)
    if header["kind"] != "update" or order.work == "test":
        raise ValueError(f"{header['kind']} is no answer to a {order.work} task")
    mask = sent_mask(task.kept, layout, task.shared.size)
    before = task.shared if mask is None else task.shared[mask]
    if order.attempt is None:
        values = _values(message.arrays, before, task.bits)
    else:
        values = _masked(message.arrays, len(before) if order.attempt else 0)
        values = values if order.attempt else before
    loss, error = (None if header[key] is None else float(str(header[key])) for key in ("train_loss", "rounding_error"))
    code = message.arrays.get("code")
    personal = np.array([task.round + 1], np.float32) if header["moved"] else task.personal
    return Update(task.device, values, personal, loss, values.nbytes if code is None else code.nbytes, error)


def _masked(arrays: Mapping[str, Array], count: int) -> Array:
    """Returns what a device handed in under the masks of a secure sum, in the order of ranks, uint32 [n_k]."""
    values = arrays.get("values", np.zeros(0))
    if arrays.keys() != {"values"} or values.dtype != np.uint32 or values.shape != (count,):
        raise ValueError("masked values of another number or type")
    return values


def _values(arrays: Mapping[str, Array], before: Array, bits: int) -> Array:
    """Returns the kept entries as the server reads them; before: what they were in the broadcast."""
    if arrays.keys() == {"code"} and bits != BITS_PER_PARAM:
        code = arrays["code"]
        if code.dtype != np.uint8 or code.shape != (code_bytes(len(before), bits),):
            raise ValueError("a code of another length")
        return before + dequantize(code.tobytes(), len(before), bits)
    values = arrays.get("values", np.zeros(0))
    if arrays.keys() != {"values"} or values.dtype != np.float32 or values.shape != before.shape:
        raise ValueError("values of another number or type")
    return values


def code_bytes(count: int, bits: int) -> int:
    """Returns the bytes of `count` values on the uplink, as `learn.client.send` counts them."""
    if bits == BITS_PER_PARAM:
        return 4 * count
    return 4 * math.ceil(count / BLOCK) + (2 * count if bits == 16 else math.ceil(count / (8 // bits)))
