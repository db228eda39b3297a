"""A node's part in a secure sum. What it must not do twice is on its disk before it answers, so that a restart does not make it forget."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedprune_cli.errors import CheckpointError
from fedprune_cli.nodes.certificates import read_identity
from fedprune_cli.nodes.sum_keys import checked_keys, sign_keys
from fedprune_cli.nodes.sum_messages import KEYS, Parcels, Question, keys_of_parcels
from fedprune_cli.privacy.fixed import FixedPoint
from fedprune_cli.privacy.secure import (
    Member,
    RefusedSumError,
    Secrets,
    Terms,
    draw_secrets,
    hold,
    mask_values,
    meet,
    share_keys,
    unmask,
)
from fedprune_cli.store.files import Plain, read_bytes
from fedprune_cli.store.sealed import Sealed, unseal
from fedprune_cli.store.state import Array
from fedprune_cli.store.write import write_whole, writing

FOLDER, FILE = "sum", "secrets.safetensors"  # a folder that its owner alone can look into
MAX_BYTES = 2**26


@dataclass(frozen=True)
class Memory:
    """What a node remembers of the last sum that it took part in.

    number: its round, from 0; keys: everybody's, once they are checked; masked: the SHA-256 of what it has put under its masks, empty
    before it has; answered: the survivors of this round that it has helped to unmask, empty before it has.
    """

    number: int
    attempt: str
    terms: Terms
    point: FixedPoint
    secrets: Secrets
    keys: Mapping[int, bytes] = field(default_factory=dict)
    masked: str = ""
    answered: tuple[int, ...] = ()

    def member(self, device: int) -> Member:
        """Returns the device with everybody's keys; raises RefusedSumError where it has none yet."""
        return meet(device, self.terms, self.secrets, self.keys)


def answer(folder: Path, question: Question) -> Parcels:
    """Returns a node's answer to a question, of a run's folder of the node; raises RefusedSumError where it would give something away.

    Of one round it helps to unmask one set of survivors only, in whatever attempt: two sums of which one has a device more would tell
    what that one sent. So it does not go back to an earlier round either.
    """
    device, memory = question.device, read_memory(folder)
    if question.step == "keys":
        memory = _begun(memory, question)
        signed = sign_keys(read_identity(folder.parent), memory.terms, memory.secrets.public_keys(memory.terms.context))
        write_memory(folder, memory)
        return {name: getattr(signed, name) for name in KEYS}
    if memory is None or (memory.terms, memory.number) != (question.terms, question.number):
        raise RefusedSumError(f"device {device}: is asked for the {question.step} of a sum that it has not begun")
    if question.step == "shares":
        announced = keys_of_parcels(question.parcels, memory.terms.devices)
        keys = checked_keys(read_identity(folder.parent).ca, memory.terms, announced, frozenset())
        memory = replace(memory, keys=keys)
        messages = share_keys(memory.member(device))
        write_memory(folder, memory)
        return {str(other): message for other, message in messages.items()}
    if not memory.masked:
        raise RefusedSumError(f"device {device}: is asked to unmask a sum that it has sent nothing for")
    survivors = question.survivors
    if memory.answered not in ((), survivors):
        raise RefusedSumError(f"device {device}: has answered for other survivors of round {memory.number + 1} already")
    holder = hold(memory.member(device), {int(sender): sealed for sender, sealed in question.parcels.items()})
    _, told = unmask(holder, survivors)
    write_memory(folder, replace(memory, answered=survivors))
    return {"answer": told}


def _begun(memory: Memory | None, question: Question) -> Memory:
    """Returns what a node remembers of a sum that begins, or has begun and is asked about again."""
    terms, number = question.terms, question.number
    terms.check(terms.devices, question.device)
    if memory is not None and memory.number > number:
        raise RefusedSumError(
            f"device {question.device}: has taken part in round {memory.number + 1} of this run, and does not go back to {number + 1}"
        )
    if memory is not None and (memory.terms, memory.number) == (terms, number):
        return memory
    answered = memory.answered if memory is not None and memory.number == number else ()
    secrets = draw_secrets(terms.threshold, os.urandom)
    return Memory(number, question.attempt, terms, question.point, secrets, answered=answered)


def masked_change(folder: Path, device: int, attempt: str, change: Array, weight: int) -> Array:
    """Returns what a device hands in, uint32 [n_k]: its change in rank order, float64 [n_k], in fixed point times its weight, under masks.

    Raises RefusedSumError for other values under the same masks than before, whose difference would lay both open.
    """
    memory = read_memory(folder)
    if memory is None or not attempt or memory.attempt != attempt or not memory.keys:
        raise RefusedSumError(f"device {device}: is to hand in a change for a sum that it has not begun")
    values = memory.point.whole(change) * weight
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    if memory.masked not in ("", digest):
        raise RefusedSumError(f"device {device}: is asked for other values under the same masks")
    masked = mask_values(memory.member(device), values)
    write_memory(folder, replace(memory, masked=digest))
    return masked


def read_memory(folder: Path) -> Memory | None:
    """Returns what a node remembers, None where there is nothing; raises CheckpointError for what is damaged."""
    path = folder / FOLDER / FILE
    if not path.exists():
        return None
    data = read_bytes(path, MAX_BYTES, CheckpointError)
    try:
        sealed = unseal(data)
        return _memory(sealed.header, sealed.arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def _memory(header: Mapping[str, Plain], arrays: Mapping[str, Array]) -> Memory:
    numbers = {name: tuple(int(value) for value in arrays[name]) for name in ("devices", "counts", "answered")}
    whole = {name: int(str(header[name])) for name in ("number", "threshold", "least", "bits")}
    context = bytes.fromhex(str(header["context"]))
    terms = Terms(numbers["devices"], numbers["counts"], whole["threshold"], whole["least"], context)
    masking, own = (
        tuple(int.from_bytes(row.tobytes(), "little") for row in arrays[name]) for name in ("masking", "own")
    )
    secrets = Secrets(arrays["sealing"].tobytes(), masking, own)
    keys = {device: row.tobytes() for device, row in zip(terms.devices, arrays["keys"], strict=False)}
    point = FixedPoint(float(str(header["largest"])), whole["bits"])
    of = str(header["attempt"]), terms, point, secrets, keys, str(header["masked"]), numbers["answered"]
    return Memory(whole["number"], *of)


def write_memory(folder: Path, memory: Memory) -> None:
    """Writes what a node remembers, whole or not at all, where nobody but its owner can read it."""
    terms, secrets, place = memory.terms, memory.secrets, folder / FOLDER
    header: dict[str, Plain] = {
        "number": memory.number, "attempt": memory.attempt, "context": terms.context.hex(), "threshold": terms.threshold,
        "least": terms.least, "bits": memory.point.bits, "largest": memory.point.largest, "masked": memory.masked,
    }  # fmt: skip
    arrays = {
        "devices": np.array(terms.devices), "counts": np.array(terms.counts), "answered": np.array(memory.answered, dtype=np.int64),
        "sealing": _bytes(secrets.sealing), "masking": _elements(secrets.masking), "own": _elements(secrets.own),
        "keys": np.array([_bytes(memory.keys[device]) for device in terms.devices if device in memory.keys], dtype=np.uint8),
    }  # fmt: skip
    with writing(place):
        place.mkdir(mode=0o700, exist_ok=True)
    write_whole(place / FILE, Sealed(header, arrays).encode())


def _bytes(value: bytes) -> Array:
    return np.frombuffer(value, dtype=np.uint8)


def _elements(values: tuple[int, ...]) -> Array:
    return np.array([_bytes(value.to_bytes(32, "little")) for value in values])
