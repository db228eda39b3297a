"""All randomness: named streams of (seed, purpose, ids). No other module makes a generator."""

from __future__ import annotations

import zlib
from typing import Literal, get_args

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
