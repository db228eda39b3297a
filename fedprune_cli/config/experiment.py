"""One run, complete and checked: the frozen Experiment and its sections."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedprune_cli import plugins
from fedprune_cli.allocate.baselines import Allocator, ChoosesBits
from fedprune_cli.allocate.deadline import Deadline
from fedprune_cli.allocate.weights import Weights
from fedprune_cli.allocate.whole import BLOCK_HZ
from fedprune_cli.config.inputs import TABLES, Input, dataset_sha256, read_input
from fedprune_cli.errors import ConfigError, require
from fedprune_cli.execute import Execution
from fedprune_cli.learn.client import EVALUATION_BATCH, Training
from fedprune_cli.learn.models import ModelConfig
from fedprune_cli.learn.personalize import Method
from fedprune_cli.learn.prune import Pruner
from fedprune_cli.meter import Meter
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.sections import as_before
from fedprune_cli.serve.failsafe import Failsafe
from fedprune_cli.serve.participation import Participation
from fedprune_cli.store.files import Plain
from fedprune_cli.track import Tracking
from fedprune_cli.wire.payload import Payload
from fedprune_cli.world.channel import Channel, radio_of
from fedprune_cli.world.datasets import DatasetConfig
from fedprune_cli.world.devices import Devices
from fedprune_cli.world.faults import Faults
from fedprune_cli.world.measured import MeasuredClass, MeasuredFleet
from fedprune_cli.world.partition import PartitionConfig
from fedprune_cli.world.rows import FleetTable

# Raised by a change that gives a configuration other numbers. 1: a batch could be larger than a device's data; 2: a device's numbers
# depended on its place among those that train side by side, for widths that are no multiple of 4.
ARITHMETIC = 3


@dataclass(frozen=True)
class Evaluation:
    """How models are tested: each device's test share, every how many rounds, on how many devices (None: all), a fresh one's steps."""

    test_fraction: float
    every: int
    devices: int | None
    fresh_steps: int
    target_accuracy: float | None

    def __post_init__(self) -> None:
        require(0 < self.test_fraction < 1, "test_fraction", self.test_fraction, "in (0, 1)")
        require(self.every >= 1, "every", self.every, ">= 1")
        require(self.devices is None or self.devices >= 1, "devices", self.devices, ">= 1 or null")
        require(0 <= self.fresh_steps <= 10**6, "fresh_steps", self.fresh_steps, "in 0..1000000")
        target = self.target_accuracy
        require(target is None or 0 < target <= 1, "target_accuracy", target, "in (0, 1] or null")


@dataclass(frozen=True)
class Branch:
    """Where a run that began in the middle of another one left it: that run (configuration's hash and seed), and its last round."""

    run: str
    round: int

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[0-9a-f]{12}-s\d{1,19}", self.run)), "run", self.run, "<config hash>-s<seed>")
        require(1 <= self.round < 10**6, "round", self.round, "in 1..999999")


@dataclass(frozen=True)
class Experiment:
    """One run, complete and checked. What `execution`, `tracking` and `out` say does not change its numbers, nor where its files lie."""

    name: str
    seed: int
    rounds: int
    out: str | None
    branch: Branch | None
    data: DatasetConfig
    partition: PartitionConfig
    devices: Devices
    channel: Channel
    model: ModelConfig
    method: Method
    pruner: Pruner
    allocator: Allocator
    weights: Weights
    training: Training
    deadline: Deadline
    payload: Payload
    participation: Participation
    faults: Faults
    failsafe: Failsafe
    privacy: Privacy
    evaluation: Evaluation
    meter: Meter
    execution: Execution
    tracking: Tracking

    def __post_init__(self) -> None:
        pattern = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
        require(
            bool(re.fullmatch(pattern, self.name)), "name", self.name, "letters, digits, '.', '_' and '-', at most 100"
        )
        require(0 <= self.seed < 2**63, "seed", self.seed, "in 0..2^63-1")
        require(1 <= self.rounds <= 10**6, "rounds", self.rounds, "in 1..1000000")
        begun = self.branch.round if self.branch else 0
        require(self.rounds > begun, "rounds", self.rounds, f"more than the {begun} that the run branches from")
        if self.payload.per_device and not isinstance(self.allocator, ChoosesBits):
            raise ConfigError(
                f"payload.per_device=true: not with allocator={self.allocator.name}, only with allocator=kkt"
            )
        beside = [
            f"allocator.{key}={word}"
            for key, word in (("clock", "chosen"), ("power", "chosen"), ("blocks", True))
            if getattr(self.allocator, key, None) == word
        ]
        if self.payload.per_device and beside:
            raise ConfigError(f"payload.per_device=true: not together with {beside[0].lower()}")
        if self.meter.unicast and getattr(self.allocator, "clock", "fixed") == "chosen":
            slower = "not with allocator.clock=chosen: it would have what a device waits for its copy go with its clock; take fixed"
            raise ConfigError(f"meter.unicast=true: {slower}")
        wanted, rate = self.devices.per_round, self.participation.rate
        if wanted is not None and rate is not None:
            both = f"not with devices.per_round={wanted}: either draws who takes part; set one of them to null"
            raise ConfigError(f"participation.rate={rate:g}: {both}")

    @property
    def faulty(self) -> bool:
        """Whether anything goes wrong, or the server does other than it would if nothing did."""
        return not (self.faults.none and self.failsafe.none)

    @property
    def secret_draw(self) -> bool:
        """Whether privacy counts on it that nobody can tell from u who took part in a round: then nothing in u may depend on that."""
        return self.privacy.dp == "client" and self.participation.rate is not None

    @functools.cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The tables that the run reads; raises DataError when one cannot be read."""
        parts = {key: getattr(self, key.split(".")[0]) for key in TABLES}
        return tuple(read_input(key, part.file) for key, part in parts.items() if hasattr(part, "file"))

    def chosen_plugins(self) -> Iterator[plugins.Foreign]:
        """Yields the parts from outside the package that decide the run's numbers: all that are chosen, but trackers."""
        for kind in plugins.KINDS:
            of = operator.attrgetter(kind.key)(self)
            names = [of.name] if kind.group else [of] if isinstance(of, str) else of
            found = (plugins.origin(kind.entry, name) for name in names)
            yield from (one for one in found if one is not None and kind.entry != "trackers")

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the run's numbers, apart from the seed: the configuration, what it reads, and the numerics.

        What is read, and the file of a plug-in, stands there by the SHA-256 of its content; an installed plug-in by its version.
        Raises DataError when it cannot be read.
        """
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for key in ("seed", "out", "execution", "tracking"):
            del fields[key]
        fields["data"].pop("root", None)
        if sha256 := dataset_sha256(self.data):
            fields["data"]["sha256"] = sha256
        for one in self.inputs:
            fields[one.key.split(".")[0]]["file"] = f"sha256:{one.sha256}"
        for key in fields:
            for name in as_before(getattr(self, key)):
                del fields[key][name]
        if isinstance(self.devices, MeasuredFleet | FleetTable):
            fields["devices"] |= {"classes": [self._identity_of(entry) for entry in self.devices.classes]}
        if isinstance(self.devices, FleetTable) and not self.devices.classed:
            del fields["devices"]["classes"]
        if fields["allocator"].get("block_hz", 0) is None and radio_of(self.channel).block_hz is None:
            fields["allocator"]["block_hz"] = BLOCK_HZ  # which it was called before a channel could say it
        if self.branch is None:
            del fields["branch"]
        if self.privacy.none:  # then the section decides nothing
            del fields["privacy"]
        if not self.faults.others:
            del fields["faults"]["others"]
        if chosen := {f"{one.kind.key}={one.name}": one.origin for one in self.chosen_plugins()}:
            fields["plugins"] = chosen
        if not self.faulty:  # then they decide nothing
            del fields["faults"], fields["failsafe"]
        numerics = {
            "torch": version("torch"),
            "threads": 1,
            "evaluation_batch": EVALUATION_BATCH,
            "arithmetic": ARITHMETIC,
        }
        if self.privacy.dp == "example":
            numerics["noise"] = "float64, on a lattice"  # was float32 before
        if self.privacy.secure:
            numerics["shares"] = "2^127 - 1"  # the field was of 2^255 - 19 before, in twice the bytes
        return fields | {"numerics": numerics}

    def _identity_of(self, entry: MeasuredClass) -> dict[str, Plain]:
        """Returns what of a class decides the run's numbers: its idle watts where they are metered."""
        left_out = {*as_before(entry), *(() if self.meter.idle else ("idle_power_w",))}
        return {name: value for name, value in dataclasses.asdict(entry).items() if name not in left_out}

    @functools.cached_property
    def config_hash(self) -> str:
        """The first 12 hexadecimal digits of the identity's SHA-256."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def run_dir(self) -> Path:
        """Where the run is kept: `out`, or outputs/<name>/<config hash>-s<seed>."""
        return Path(self.out) if self.out else Path("outputs") / self.name / f"{self.config_hash}-s{self.seed}"
