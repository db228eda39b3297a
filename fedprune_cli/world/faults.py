"""Faults: what goes wrong in a round after its allocation. Outages that are known before it belong to the channel."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array
from fedprune_cli.world.channel import gilbert_elliott

HONEST = "honest"


@dataclass(frozen=True)
class Fates:
    """What befalls the devices of a round [K].

    died, bool, after the share `work` of computing and sending; lost, bool: the update, on the radio; delay: rounds after which it
    arrives, 0 for this one; sends: `honest`, `nan`, `inf`, `misshapen` or `poisoned`.
    """

    died: Array
    work: Array
    lost: Array
    delay: Array
    sends: Array


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong.

    die: probability a round that a device stops in mid-round and what it did is lost. lose_enter, lose_leave: Gilbert-Elliott
    probabilities a round of beginning and ceasing to lose the updates that a device sends, 0 to enter: never. stale: probability that
    an update arrives 1..max_delay rounds later. Shares of the devices, the same ones throughout, send NaN, infinity, a wrong number of
    values, or poison: `sign_flip`, their change of u times -poison_scale, or `noise` of poison_scale times its size.
    clock_error, channel_error: the standard deviation of ln(estimate / truth) of what the server knows of a device's clock, the same
    throughout, and of its gain, drawn anew each round.
    """

    die: float
    lose_enter: float
    lose_leave: float
    stale: float
    max_delay: int
    nan_share: float
    inf_share: float
    misshapen_share: float
    poisoned_share: float
    poison: str
    poison_scale: float
    clock_error: float
    channel_error: float

    def __post_init__(self) -> None:
        for key in ("die", "lose_enter", "stale", "nan_share", "inf_share", "misshapen_share", "poisoned_share"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "in [0, 1]")
        require(0 < self.lose_leave <= 1, "lose_leave", self.lose_leave, "in (0, 1]")
        require(1 <= self.max_delay <= 1000, "max_delay", self.max_delay, "in 1..1000")
        shares = self.nan_share + self.inf_share + self.misshapen_share + self.poisoned_share
        require(shares <= 1 + 1e-9, "poisoned_share", self.poisoned_share, "such that all shares are at most 1")
        require(self.poison in ("sign_flip", "noise"), "poison", self.poison, "'sign_flip' or 'noise'")
        require(0 < self.poison_scale < math.inf, "poison_scale", self.poison_scale, "> 0 and finite")
        for key in ("clock_error", "channel_error"):
            require(0 <= getattr(self, key) <= 10, key, getattr(self, key), "in [0, 10]")

    @property
    def misjudges(self) -> bool:
        """Whether the server's estimates are wrong."""
        return self.clock_error > 0 or self.channel_error > 0

    @property
    def none(self) -> bool:
        """Whether nothing ever goes wrong."""
        shares = self.nan_share + self.inf_share + self.misshapen_share + self.poisoned_share
        return not (self.die or self.lose_enter or self.stale or shares or self.misjudges)

    def draw(self, seed: int, number: int, rounds: int, num_devices: int, ids: Array) -> Fates:
        """Returns the fates of the devices `ids` [K] in round `number` of `rounds`; others' participation changes none of them."""
        none = np.zeros(len(ids), dtype=bool)
        died, work, lost, delay = none, np.ones(len(ids)), none, np.zeros(len(ids), dtype=np.int64)
        if self.die:
            draws = stream(seed, "death", number).random((num_devices, 2))[ids]
            died = draws[:, 0] < self.die
            work = np.where(died, draws[:, 1], 1.0)
        if self.lose_enter:
            lost = _lost(seed, rounds, num_devices, self.lose_enter, self.lose_leave)[number, ids]
        if self.stale:
            draws = stream(seed, "delay", number).random((num_devices, 2))[ids]
            delay = np.where(draws[:, 0] < self.stale, 1 + (draws[:, 1] * self.max_delay).astype(np.int64), 0)
        return Fates(died, work, lost, delay, self.senders(seed, num_devices)[ids])

    def senders(self, seed: int, num_devices: int) -> Array:
        """Returns what each device sends, str [N]: of every kind its share of them, rounded."""
        sends = np.full(num_devices, HONEST, dtype="<U9")
        shares = {
            "nan": self.nan_share,
            "inf": self.inf_share,
            "misshapen": self.misshapen_share,
            "poisoned": self.poisoned_share,
        }
        if any(shares.values()):
            order = np.argsort(stream(seed, "saboteurs").random(num_devices), kind="stable")
            ends = np.rint(np.cumsum(list(shares.values())) * num_devices).astype(int)
            for kind, start, end in zip(shares, [0, *ends], ends, strict=False):
                sends[order[start:end]] = kind
        return sends

    def sent(self, kind: str, values: Array, before: Array, seed: int, number: int, device: int) -> Array:
        """Returns what a device sends in place of its kept entries `values` [n], which were `before`."""
        if kind == "misshapen":
            return np.append(values, np.float32(0))
        if kind in ("nan", "inf"):
            return np.where(np.arange(len(values)) == len(values) // 2, np.float32(kind), values)
        if kind == HONEST:
            return values
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            change = values - before
            if self.poison == "sign_flip":
                return before - np.float32(self.poison_scale) * change
            size = np.sqrt(np.square(change, dtype=np.float64).mean()) if len(change) else 0.0
            noise = stream(seed, "poison", number, device).standard_normal(len(values), dtype=np.float32)
            return before + np.float32(self.poison_scale * size) * noise

    def estimate(self, seed: int, number: int, cpu_hz: Array, gain: Array) -> tuple[Array, Array]:
        """Returns what the server takes for the clocks and the power gains [N] in round `number`."""
        if self.clock_error:
            cpu_hz = cpu_hz * np.exp(self.clock_error * stream(seed, "clock_error").standard_normal(len(cpu_hz)))
        if self.channel_error:
            draws = stream(seed, "channel_error", number).standard_normal(len(gain))
            gain = gain * np.exp(self.channel_error * draws)
        return cpu_hz, gain


@functools.lru_cache(maxsize=1)
def _lost(seed: int, rounds: int, num_devices: int, enter: float, leave: float) -> Array:
    """Returns whose updates are lost, bool [rounds, N]."""
    return gilbert_elliott(
        lambda number: stream(seed, "loss", number).random(num_devices), rounds, num_devices, enter, leave
    )
