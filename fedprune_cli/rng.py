"""All randomness: named streams of (seed, purpose, ids), and of a secret on real devices. No other module makes a generator."""

from __future__ import annotations

import hashlib
import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np

Purpose = Literal[
    "allocator",  # random baseline allocator
    "batch",  # minibatch order of (round, device, phase)
    "channel_error",  # of the server's gains of (round)
    "clock_error",  # of the server's clocks
    "death",  # who dies in mid-round of (round), and when
    "delay",  # whose update is late by rounds, of (round)
    "evaluation",  # which devices are tested, when not all
    "fading",  # block fading of (round)
    "fleet",  # clocks, powers and distances
    "importance",  # random pruner, of (round)
    "init",  # initial model parameters
    "leak_chance",  # labels and samples of (trial, case) that were not there
    "leak_dummies",  # what gradient matching begins with, of (trial, case)
    "leak_noise",  # Gaussian noise on an attacked update of (trial, case)
    "leak_others",  # devices of (trial) that are summed with the attacked one
    "leak_samples",  # samples of (trial, case, device) that an attacked update is of
    "los",  # line-of-sight state of each device
    "loss",  # Gilbert-Elliott state of lost updates of (round)
    "outage",  # Gilbert-Elliott state of (round)
    "participants",  # devices of (round)
    "partition",  # which device owns which sample
    "poison",  # noise sent by (round, device)
    "privacy_noise",  # of differential privacy, of (round), or of (round, device)
    "rounding",  # stochastic rounding of the payload of (round, device)
    "saboteurs",  # which devices send what they should not
    "secure_sum",  # keys and shares of (configuration, round, device): no secret in a simulation
    "selective",  # fading by resource block of (round)
    "shadowing",  # log-normal shadowing of each device
    "split",  # train and test samples of (device)
    "takes_part",  # which devices take part in (round), each by itself
]
_KEYS = {purpose: zlib.crc32(purpose.encode()) for purpose in get_args(Purpose)}


def stream(seed: int, purpose: Purpose, *ids: int) -> np.random.Generator:
    """Returns the generator of one purpose; equal arguments give equal draws, anything else independent ones.

    A vector over devices is drawn in device-id order, so that more devices extend it and never change it.

    >>> bool((stream(0, "fleet").random(3) == stream(0, "fleet").random(9)[:3]).all())
    True
    >>> bool(stream(0, "batch", 1, 2).random() == stream(0, "batch", 2, 1).random())
    False
    """
    # as plain entropy, (seed, purpose) and (seed, purpose, 0) would be the same: trailing zeros do not count there
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_KEYS[purpose], *ids))))


class Draws(Protocol):
    """What noise and batches are drawn from: a `numpy.random.Generator`, or a `SecretStream`."""

    def random(self, size: int, /) -> np.ndarray:
        """Returns numbers in [0, 1), float64 [size]."""

    def standard_normal(self, size: int | tuple[int, ...], dtype: type, /) -> np.ndarray:
        """Returns Gaussians of this shape."""


@dataclass(frozen=True)
class SecretStream:
    """Draws that nobody can foretell from others of them who lacks the key: SHAKE-256 of the key and how often it was asked.

    Equal keys give equal draws. Gaussians are by Box and Muller, in float64 before they are rounded to the type.

    >>> one, same, other = SecretStream(b"a"), SecretStream(b"a"), SecretStream(b"b")
    >>> bool((one.random(4) == same.random(4)).all()), bool((one.random(4) == other.random(4)).any())
    (True, False)
    """

    key: bytes
    asked: Iterator[int] = field(default_factory=itertools.count)

    def random(self, size: int, /) -> np.ndarray:
        """Returns numbers in [0, 1), float64 [size], each of 53 bits."""
        place = next(self.asked).to_bytes(8, "little")
        words = np.frombuffer(hashlib.shake_256(place + self.key).digest(8 * size), dtype="<u8")
        return (words >> np.uint64(11)) * 2.0**-53

    def standard_normal(self, size: int | tuple[int, ...], dtype: type = np.float64, /) -> np.ndarray:
        """Returns Gaussians of this shape and type."""
        count = math.prod(size) if isinstance(size, tuple) else size
        radius, angle = self.random(2 * count).reshape(2, count)
        values: np.ndarray = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
        return values.reshape(size).astype(dtype)
