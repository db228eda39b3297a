"""A node's part in a secure sum. What it must not do twice is on its disk before it answers, so that a restart does not make it forget."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedprune_cli.errors import CheckpointError
from fedprune_cli.nodes.certificates import read_identity
from fedprune_cli.nodes.spent import Purse
from fedprune_cli.nodes.sum_keys import checked_keys, sign_keys
from fedprune_cli.nodes.sum_messages import KEYS, Parcels, Question, keys_of_parcels
from fedprune_cli.privacy.accounting import Release
from fedprune_cli.privacy.field import ELEMENT
from fedprune_cli.privacy.fixed import LEAST_NOISE, SIGMAS, WORD, FixedPoint
from fedprune_cli.privacy.noised import clipped, noise_steps, with_share
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
from fedprune_cli.rng import SecretStream
from fedprune_cli.store.files import Plain, read_bytes
from fedprune_cli.store.sealed import Sealed, unseal
from fedprune_cli.store.state import Array
from fedprune_cli.store.write import private_folder, write_durable

FOLDER, FILE = "sum", "secrets.safetensors"  # a folder that its owner alone can look into
MAX_BYTES = 2**26


@dataclass(frozen=True)
class Helped:
    """What a node has helped to unmask: the survivors, of which devices at which threshold, and the SHA-256 of its own part in it."""

    survivors: tuple[int, ...]
    devices: tuple[int, ...]
    threshold: int
    masked: str


@dataclass(frozen=True)
class Memory:
    """What a node remembers of the last sum that it took part in.

    number: its round, from 0; keys: everybody's, once they are checked; masked: the SHA-256 of what it has put under its masks, empty
    before it has; earlier: the same of another sum of this round that was begun before; helped: the first sum of this round that it has
    helped to unmask; noise: of the sum over the clip, None: none.
    """

    number: int
    attempt: str
    terms: Terms
    point: FixedPoint
    secrets: Secrets
    keys: Mapping[int, bytes] = field(default_factory=dict)
    masked: str = ""
    helped: Helped | None = None
    noise: float | None = None
    earlier: str = ""

    def member(self, device: int) -> Member:
        """Returns the device with everybody's keys; raises RefusedSumError where it has none yet."""
        return meet(device, self.terms, self.secrets, self.keys)


@dataclass(frozen=True)
class Part:
    """What a device has to hand in: its change in rank order, float64 [n_k], and the samples it has; for which round and attempt.

    purse: what of it the run's configuration protects, which decides what the change counts, and how it is clipped and noised; origin: by
    what the change was asked for.
    """

    device: int
    number: int
    attempt: str
    change: Array
    samples: int
    purse: Purse
    origin: str = ""


def answer(folder: Path, question: Question) -> Parcels:
    """Returns a node's answer to a question, of a run's folder of the node; raises RefusedSumError where it would give something away.

    Two sums of one round, of which one has a device more or another value of one, would tell what that one sent. So a node that has helped
    to unmask one helps with no other survivors, puts nothing else under its masks, and begins another sum of the same devices only, or of
    those that survived: any two majorities of them have a node in common. It does not go back to an earlier round either.
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
    survivors, helped = question.survivors, memory.helped
    if helped is not None and helped.survivors != survivors:
        raise RefusedSumError(f"device {device}: has answered for other survivors of round {memory.number + 1} already")
    holder = hold(memory.member(device), {int(sender): sealed for sender, sealed in question.parcels.items()})
    _, told = unmask(holder, survivors)
    helped = helped or Helped(survivors, memory.terms.devices, memory.terms.threshold, memory.masked)
    write_memory(folder, replace(memory, helped=helped))
    return {"answer": told}


def _begun(memory: Memory | None, question: Question) -> Memory:
    """Returns what a node remembers of a sum that begins, or has begun and is asked about again."""
    terms, number, device = question.terms, question.number, question.device
    terms.check(terms.devices, device)
    if memory is not None and memory.number > number:
        raise RefusedSumError(
            f"device {device}: has taken part in round {memory.number + 1} of this run, and does not go back to {number + 1}"
        )
    if memory is not None and (memory.terms, memory.number) == (terms, number):
        return memory
    same_round = memory if memory is not None and memory.number == number else None
    helped, earlier = (same_round.helped, same_round.masked or same_round.earlier) if same_round else (None, "")
    same = helped and (terms.devices, terms.threshold) == (helped.devices, helped.threshold)
    if helped and not same and terms.devices != helped.survivors:
        raise RefusedSumError(f"device {device}: has helped with a sum of other devices of round {number + 1} already")
    secrets = draw_secrets(terms.threshold, os.urandom)
    return Memory(
        number, question.attempt, terms, question.point, secrets, helped=helped, noise=question.noise, earlier=earlier
    )


def masked_change(folder: Path, part: Part) -> Array:
    """Returns what a device hands in, uint32 [n_k]: its change in fixed point times what it counts, or with its noise, under its masks.

    Raises RefusedSumError for other values than before in the same round, under the same masks or others: where the others' values are
    what they were, the difference would lay both open.
    """
    memory, device = read_memory(folder), part.device
    begun = memory is not None and (memory.attempt, memory.number) == (part.attempt, part.number)
    if memory is None or not begun or not memory.keys:
        raise RefusedSumError(f"device {device}: is to hand in a change for a sum that it has not begun")
    values = _whole(memory, part)
    digest = hashlib.sha256(f"{memory.point}, {part.origin}: ".encode() + values.tobytes()).hexdigest()
    if {memory.masked, memory.earlier, memory.helped.masked if memory.helped else ""} - {"", digest}:
        raise RefusedSumError(f"device {device}: is asked for other values of round {part.number + 1} than before")
    masked = mask_values(memory.member(device), values)
    write_memory(folder, replace(memory, masked=digest))
    return masked


def _whole(memory: Memory, part: Part) -> Array:
    """Returns the change as whole numbers, int64 [n_k]; where the device is protected clipped, and with its share of the sum's noise.

    Raises RefusedSumError where the noise would not hide it, or its budget is spent.
    """
    point, privacy, terms = memory.point, part.purse.privacy, memory.terms
    weaker = terms.threshold < privacy.needed(len(terms.devices)) or terms.least < privacy.least
    other = terms.curious != privacy.curious or (memory.noise is None) == (privacy.dp == "client")
    if weaker or other:  # what all have signed is what they were told, and not what their run promises
        raise RefusedSumError(f"device {part.device}: is to hand in a change for a sum that is not its run's")
    if privacy.dp != "client":
        return point.whole(part.change) * int(privacy.weight(part.samples))
    if memory.noise is None or privacy.clip is None or point.largest != privacy.clip:
        raise RefusedSumError(f"device {part.device}: is to hand in a change of another clip")
    # of further entries, however many others are said to keep, nothing is of this device
    counts = tuple(min(count, len(part.change)) for count in terms.counts)
    steps = noise_steps(replace(terms, counts=counts), point, memory.noise)
    if (steps < LEAST_NOISE).any():
        raise RefusedSumError(
            f"device {part.device}: its share of the noise is below {LEAST_NOISE:g} steps of the fixed point"
        )
    count = len(terms.devices)
    # else it would wrap to nothing
    if not point.most * count + SIGMAS * float(steps.max(initial=0.0)) * math.sqrt(count) <= WORD:
        raise RefusedSumError(f"device {part.device}: the noise of the sum does not fit the sum's whole numbers")
    change = clipped(part.change, privacy.clip)
    told = f"{memory.noise!r} {privacy.clip!r} {point} {replace(terms, context=b'')} {part.origin}".encode()
    # by what is asked, and not by what comes of it
    part.purse.spend(Release(memory.noise, 1.0, 1), hashlib.sha256(told).hexdigest())
    key = part.purse.key(b"sum %d" % part.number + hashlib.sha256(told + change.tobytes()).digest())
    return with_share(point, change, steps, SecretStream(key))


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
        told = f"{error}; without it the node forgets which sums it has helped with"
        raise CheckpointError(f"{path}: {told}") from None


def _memory(header: Mapping[str, Plain], arrays: Mapping[str, Array]) -> Memory:
    kept = ("devices", "counts", "helped_survivors", "helped_devices")
    numbers = {name: tuple(int(value) for value in arrays[name]) for name in kept}
    whole = {
        name: int(str(header[name])) for name in ("number", "threshold", "least", "bits", "helped_threshold", "curious")
    }
    context = bytes.fromhex(str(header["context"]))
    terms = Terms(numbers["devices"], numbers["counts"], whole["threshold"], whole["least"], context, whole["curious"])
    masking, own = (
        tuple(int.from_bytes(row.tobytes(), "little") for row in arrays[name]) for name in ("masking", "own")
    )
    secrets = Secrets(arrays["sealing"].tobytes(), masking, own)
    keys = {device: row.tobytes() for device, row in zip(terms.devices, arrays["keys"], strict=False)}
    point = FixedPoint(float(str(header["largest"])), whole["bits"])
    own_part, helped = str(header["helped_masked"]), None
    if numbers["helped_survivors"]:
        helped = Helped(numbers["helped_survivors"], numbers["helped_devices"], whole["helped_threshold"], own_part)
    noise = None if header.get("noise") is None else float(str(header["noise"]))
    of = (
        str(header["attempt"]),
        terms,
        point,
        secrets,
        keys,
        str(header["masked"]),
        helped,
        noise,
        str(header["earlier"]),
    )
    return Memory(whole["number"], *of)


def write_memory(folder: Path, memory: Memory) -> None:
    """Writes what a node remembers, whole or not at all, where nobody but its owner can read it."""
    terms, secrets, place = memory.terms, memory.secrets, folder / FOLDER
    helped = memory.helped or Helped((), (), 0, "")
    header: dict[str, Plain] = {
        "number": memory.number, "attempt": memory.attempt, "context": terms.context.hex(), "threshold": terms.threshold,
        "least": terms.least, "curious": terms.curious, "bits": memory.point.bits, "largest": memory.point.largest, "masked": memory.masked,
        "helped_threshold": helped.threshold, "helped_masked": helped.masked, "noise": memory.noise, "earlier": memory.earlier,
    }  # fmt: skip
    arrays = {
        "devices": np.array(terms.devices), "counts": np.array(terms.counts),
        "helped_survivors": np.array(helped.survivors, dtype=np.int64), "helped_devices": np.array(helped.devices, dtype=np.int64),
        "sealing": _bytes(secrets.sealing), "masking": _elements(secrets.masking), "own": _elements(secrets.own),
        "keys": np.array([_bytes(memory.keys[device]) for device in terms.devices if device in memory.keys], dtype=np.uint8),
    }  # fmt: skip
    private_folder(place)
    write_durable(place / FILE, Sealed(header, arrays).encode())


def _bytes(value: bytes) -> Array:
    return np.frombuffer(value, dtype=np.uint8)


def _elements(values: tuple[int, ...]) -> Array:
    return np.array([_bytes(value.to_bytes(ELEMENT, "little")) for value in values])
