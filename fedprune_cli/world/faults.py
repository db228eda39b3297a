"""Faults: what goes wrong in a round after its allocation. Outages that are known before it belong to the channel."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.plugins import Parts
from fedprune_cli.rng import stream
from fedprune_cli.sections import part_of
from fedprune_cli.store.state import Array
from fedprune_cli.world.band import gilbert_elliott


@dataclass(frozen=True)
class Moment:
    """Who is asked about, and when: the devices `ids` [K] of `num_devices`, in round `number` (from 0) of `rounds`."""

    seed: int
    number: int
    rounds: int
    num_devices: int
    ids: Array


class Forger(Protocol):
    """What a device puts in the place of its update. poisons: the values can pass for an update, so that only the log knows."""

    @property
    def poisons(self) -> bool: ...

    def forge(self, values: Array, before: Array, moment: Moment, device: int) -> Array:
        """Returns what is sent in place of the kept entries `values` [n], which were `before` [n] in the broadcast."""


@dataclass(frozen=True)
class Fates:
    """What befalls the devices of a round [K].

    died, bool, after the share `work` of computing and sending; lost, bool: the update, on the radio; delay: rounds after which it
    arrives, 0 for this one; forgers: who sends something else in its place, None for the honest.
    """

    died: Array
    work: Array
    lost: Array
    delay: Array
    forgers: Sequence[Forger | None]


class Fault(Protocol):
    """A kind of fault: a frozen dataclass whose fields are configuration keys of `faults`.

    delays: whether it makes updates arrive in later rounds, so that the server has to remember which are under way.
    """

    delays: ClassVar[bool]

    @property
    def active(self) -> bool:
        """Whether it ever happens."""

    def befall(self, fates: Fates, moment: Moment) -> Fates:
        """Returns the fates with what this kind adds; who else takes part changes no device's own."""


@dataclass(frozen=True)
class Death:
    """A device stops in mid-round with probability `die` per round, and what it did is lost."""

    die: float
    delays: ClassVar[bool] = False

    @property
    def active(self) -> bool:
        return self.die > 0

    def befall(self, fates: Fates, moment: Moment) -> Fates:
        draws = stream(moment.seed, "death", moment.number).random((moment.num_devices, 2))[moment.ids]
        died = draws[:, 0] < self.die
        return replace(fates, died=fates.died | died, work=np.where(died, draws[:, 1], fates.work))


@dataclass(frozen=True)
class BurstLoss:
    """Updates are lost on the radio in bursts: a Gilbert-Elliott chain per device, entered and left with these probabilities per round."""

    lose_enter: float
    lose_leave: float
    delays: ClassVar[bool] = False

    @property
    def active(self) -> bool:
        return self.lose_enter > 0

    def befall(self, fates: Fates, moment: Moment) -> Fates:
        lost = _lost(moment.seed, moment.rounds, moment.num_devices, self.lose_enter, self.lose_leave)
        return replace(fates, lost=fates.lost | lost[moment.number, moment.ids])


@dataclass(frozen=True)
class Staleness:
    """An update arrives 1..max_delay rounds later, with probability `stale`."""

    stale: float
    max_delay: int
    delays: ClassVar[bool] = True

    @property
    def active(self) -> bool:
        return self.stale > 0

    def befall(self, fates: Fates, moment: Moment) -> Fates:
        draws = stream(moment.seed, "delay", moment.number).random((moment.num_devices, 2))[moment.ids]
        delay = np.where(draws[:, 0] < self.stale, 1 + (draws[:, 1] * self.max_delay).astype(np.int64), 0)
        return replace(fates, delay=np.maximum(fates.delay, delay))


@dataclass(frozen=True)
class Garbler:
    """Sends one value that is `nan` or `inf`, or, `misshapen`, one value too many."""

    kind: str
    poisons: ClassVar[bool] = False

    def forge(self, values: Array, before: Array, moment: Moment, device: int) -> Array:
        if self.kind == "misshapen":
            return np.append(values, np.float32(0))
        return np.where(np.arange(len(values)) == len(values) // 2, np.float32(self.kind), values)


@dataclass(frozen=True)
class Poisoner:
    """Sends its change of u times -scale (`sign_flip`), or noise of `scale` times its size (`noise`)."""

    kind: str
    scale: float
    poisons: ClassVar[bool] = True

    def forge(self, values: Array, before: Array, moment: Moment, device: int) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            change = values - before
            if self.kind == "sign_flip":
                return before - np.float32(self.scale) * change
            size = np.sqrt(np.square(change, dtype=np.float64).mean()) if len(change) else 0.0
            noise = stream(moment.seed, "poison", moment.number, device).standard_normal(len(values), dtype=np.float32)
            return before + np.float32(self.scale * size) * noise


@dataclass(frozen=True)
class Sabotage:
    """Shares of the devices, the same ones throughout, send what they should not."""

    nan_share: float
    inf_share: float
    misshapen_share: float
    poisoned_share: float
    poison: str
    poison_scale: float
    delays: ClassVar[bool] = False

    @property
    def active(self) -> bool:
        return self.nan_share + self.inf_share + self.misshapen_share + self.poisoned_share > 0

    def befall(self, fates: Fates, moment: Moment) -> Fates:
        forger_of = self.forgers(moment.seed, moment.num_devices)
        forgers = [
            forger_of.get(device, before) for device, before in zip(moment.ids.tolist(), fates.forgers, strict=True)
        ]
        return replace(fates, forgers=forgers)

    def forgers(self, seed: int, num_devices: int) -> dict[int, Forger]:
        """Returns the devices that forge what they send, and how: of every kind its share of them, rounded."""
        kinds: tuple[tuple[Forger, float], ...] = (
            (Garbler("nan"), self.nan_share),
            (Garbler("inf"), self.inf_share),
            (Garbler("misshapen"), self.misshapen_share),
            (Poisoner(self.poison, self.poison_scale), self.poisoned_share),
        )
        order = np.argsort(stream(seed, "saboteurs").random(num_devices), kind="stable")
        ends = np.rint(np.cumsum([share for _, share in kinds]) * num_devices).astype(int)
        spans = zip(kinds, [0, *ends], ends, strict=False)
        return {int(device): forger for (forger, _), start, end in spans for device in order[start:end]}


FAULTS: dict[str, type[Fault]] = {"death": Death, "burst_loss": BurstLoss, "staleness": Staleness, "sabotage": Sabotage}
KINDS: Parts[Fault] = Parts("faults", FAULTS, Fault)


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong.

    die: probability per round that a device stops in mid-round and what it did is lost. lose_enter, lose_leave: Gilbert-Elliott
    probabilities per round of beginning and ceasing to lose the updates that a device sends, 0 to enter: never. stale: probability that
    an update arrives 1..max_delay rounds later. Shares of the devices, the same ones throughout, send NaN, infinity, a wrong number of
    values, or poison: `sign_flip`, their change of u times -poison_scale, or `noise` of poison_scale times its size.
    clock_error, channel_error: the standard deviation of ln(estimate / truth) of what the server knows of a device's clock, the same
    throughout, and of its gain, drawn anew each round. others: kinds of faults from outside the package
    that happen too.
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
    others: tuple[str, ...] = ()

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
        outside = [name for name in KINDS if name not in FAULTS]
        known = len({*self.others}) == len(self.others) and all(name in outside for name in self.others)
        allowed = f"each once, of {', '.join(outside)}" if outside else "[]: no plug-in has a fault"
        require(known, "others", list(self.others), allowed)

    @property
    def misjudges(self) -> bool:
        """Whether the server's estimates are wrong."""
        return self.clock_error > 0 or self.channel_error > 0

    @functools.cached_property
    def kinds(self) -> tuple[Fault, ...]:
        """The kinds that ever happen, in the order of their table."""
        classes = [*FAULTS.values(), *(KINDS[name] for name in self.others)]
        return tuple(fault for cls in classes if (fault := part_of(self, cls)).active)

    @property
    def none(self) -> bool:
        """Whether nothing ever goes wrong."""
        return not self.kinds and not self.misjudges

    @property
    def delays(self) -> bool:
        """Whether updates may arrive in later rounds."""
        return any(fault.delays for fault in self.kinds)

    def draw(self, moment: Moment) -> Fates:
        """Returns the fates of a moment's devices."""
        count = len(moment.ids)
        none = np.zeros(count, dtype=bool)
        fates = Fates(none, np.ones(count), none, np.zeros(count, dtype=np.int64), [None] * count)
        for fault in self.kinds:
            fates = fault.befall(fates, moment)
        return fates

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
