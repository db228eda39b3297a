"""What server and node say to each other of a secure sum: three questions before and after the training, and their answers.

    keys      who is to be summed, how many entries each keeps, and in what fixed point -> the device's public keys, signed
    shares    everybody's signed keys -> a sealed message for each of the others, with shares of this device's seeds
    unmask    who is left, and what the others sealed for this device -> its share of each device's seed

Between them the device trains, and hands in whole numbers under its masks in the place of its update.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedprune_cli.privacy.ciphers import KEY, TAG
from fedprune_cli.privacy.field import ELEMENT
from fedprune_cli.privacy.fixed import FixedPoint
from fedprune_cli.privacy.secure import Terms
from fedprune_cli.store.files import Plain
from fedprune_cli.store.sealed import Sealed

STEPS = ("keys", "shares", "unmask")
KEYS = ("keys", "certificate", "signature")
Parcels = Mapping[str, bytes]  # byte strings by name


@dataclass(frozen=True)
class SignedKeys:
    """What a device announces: its public keys of one sum, its certificate (DER), and the signature of the keys by the certificate's."""

    keys: bytes
    certificate: bytes
    signature: bytes


@dataclass(frozen=True)
class Question:
    """What a device is asked. number: the round, from 0; attempt: which of the round's sums; terms: with the context of that one.

    survivors: who is left, when it is to help to unmask; parcels: what comes with the question; noise: of the sum, over the clip that the
    run's configuration has, None: none.
    """

    step: str
    device: int
    number: int
    attempt: str
    terms: Terms
    point: FixedPoint
    survivors: tuple[int, ...] = ()
    parcels: Parcels = field(default_factory=dict)
    noise: float | None = None

    def encode(self) -> bytes:
        """Returns the message."""
        terms, point = self.terms, self.point
        header: dict[str, Plain] = {
            "kind": "sum", "step": self.step, "device": self.device, "round": self.number, "attempt": self.attempt,
            "devices": [*terms.devices], "counts": [*terms.counts], "threshold": terms.threshold, "least": terms.least,
            "largest": point.largest, "bits": point.bits, "survivors": [*self.survivors], "noise": self.noise,
            "curious": terms.curious,
        }  # fmt: skip
        return _packed(header, _names_asked(self.step, self.device, terms.devices), self.parcels).encode()


def read_question(message: Sealed, run: str) -> Question:
    """Returns what a device of a run is asked; raises ValueError.

    The context, which every key is derived for and every signature is of, is made here: of what this device is told, and not by the server.
    """
    header = message.header
    step, attempt, number = str(header["step"]), str(header["attempt"]), _whole(header["round"])
    point = FixedPoint(float(str(header["largest"])), _whole(header["bits"]))
    devices, counts, curious = _wholes(header["devices"]), _wholes(header["counts"]), _whole(header["curious"])
    if step not in STEPS or len(attempt) > 64 or not 8 <= point.bits <= 24 or not 0 < point.largest < np.inf:
        raise ValueError("not a question of a secure sum")
    if len(devices) != len(counts) or min(number, *devices, *counts) < 0 or not 0 <= curious <= len(devices):
        raise ValueError("not the devices of a secure sum")
    noise = None if header["noise"] is None else float(str(header["noise"]))
    terms = Terms(
        devices, counts, _whole(header["threshold"]), _whole(header["least"]),
        context_of(f"{run}, round {number + 1}".encode(), attempt, point, noise), curious,
    )  # fmt: skip
    survivors, device = _wholes(header["survivors"]), _whole(header["device"])
    parcels = _parcels(message, _names_asked(step, device, devices))
    return Question(step, device, number, attempt, terms, point, survivors, parcels, noise)


def context_of(of_round: bytes, attempt: str, point: FixedPoint, noise: float | None) -> bytes:
    """Returns what names a sum as no other: its run and round, which attempt it is, and what all must have in common, point and noise."""
    noised = "" if noise is None else f", noise {noise!r}"
    return of_round + f", attempt {attempt}, {point.bits} bits of {point.largest!r}{noised}".encode()


@dataclass(frozen=True)
class SumAnswer:
    """What a device answers. of: the SHA-256 of the question's message; compute_s: how long it worked on it, by its own clock.

    parcels: in the order in which they are sent, which the question decides.
    """

    of: str
    step: str
    parcels: Parcels
    compute_s: float

    def encode(self) -> bytes:
        """Returns the message."""
        header: dict[str, Plain] = {"kind": "sum", "of": self.of, "step": self.step, "compute_s": self.compute_s}
        return _packed(header, [*self.parcels], self.parcels).encode()


def read_answer(message: Sealed, question: Question) -> dict[str, bytes]:
    """Returns what a device answered to a question; raises ValueError for what cannot be an answer to it."""
    header, devices = message.header, question.terms.devices
    if header["kind"] != "sum" or header["step"] != question.step:
        raise ValueError(f"{str(header['kind'])[:20]} is no answer to the {question.step} of a sum")
    lengths: dict[str, dict[str, int | None]] = {
        "keys": {"keys": 2 * KEY, "certificate": None, "signature": None},
        "shares": {str(device): 2 * ELEMENT + TAG for device in devices if device != question.device},
        "unmask": {"answer": ELEMENT * len(devices)},
    }
    wanted = lengths[question.step]
    parcels = _parcels(message, [*wanted])
    if any(length not in (None, len(parcels[name])) for name, length in wanted.items()):
        raise ValueError(f"the {question.step} of a sum are not those that were asked for")
    return parcels


def keys_as_parcels(announced: Mapping[int, SignedKeys]) -> Parcels:
    """Returns everybody's signed keys as they are sent."""
    return {f"{device}/{name}": getattr(one, name) for device, one in announced.items() for name in KEYS}


def keys_of_parcels(parcels: Parcels, devices: Sequence[int]) -> dict[int, SignedKeys]:
    """Returns everybody's signed keys."""
    return {device: SignedKeys(*(parcels[f"{device}/{name}"] for name in KEYS)) for device in devices}


def _names_asked(step: str, device: int, devices: Sequence[int]) -> list[str]:
    """Returns what comes with a question, in the order in which it is sent: names on the way would cost as much as a share."""
    if step == "shares":
        return [f"{one}/{name}" for one in devices for name in KEYS]
    return [str(one) for one in devices if one != device] if step == "unmask" else []


def _packed(header: Mapping[str, Plain], names: Sequence[str], parcels: Parcels) -> Sealed:
    """Returns a message with parcels in one array: as arrays of their own, those of one device would cost more than its shares."""
    packed = np.frombuffer(b"".join(parcels[name] for name in names), dtype=np.uint8)
    lengths = [len(parcels[name]) for name in names]
    return Sealed({**header, "lengths": [*lengths] if len({*lengths}) > 1 else []}, {"parcels": packed})


def _parcels(message: Sealed, names: Sequence[str]) -> dict[str, bytes]:
    packed = message.arrays.get("parcels", np.zeros(0, dtype=np.uint8))
    lengths = _wholes(message.header["lengths"]) or (packed.size // max(len(names), 1),) * len(names)  # all alike
    ends = [0, *itertools.accumulate(lengths)]
    if packed.dtype != np.uint8 or packed.ndim != 1 or ends[-1] != packed.size or min(lengths, default=0) < 0:
        raise ValueError("not the bytes of a secure sum")
    if not len({*names}) == len(names) == len(lengths):
        raise ValueError("not the parcels of a secure sum")
    return {name: packed[start:end].tobytes() for name, start, end in zip(names, ends, ends[1:], strict=False)}


def _whole(value: Plain) -> int:
    return int(str(value))


def _wholes(value: Plain) -> tuple[int, ...]:
    return tuple(_whole(one) for one in value) if isinstance(value, list) else ()
