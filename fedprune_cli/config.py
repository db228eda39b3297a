"""Hydra's configuration -> one frozen, checked Experiment. Every configuration error is born here.

YAML keys carry human units (`_mhz`, `_dbm`, `_km`); the classes see SI (`_hz`, `_w`, `_m`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprune_cli import CONF
from fedprune_cli.allocate import ALLOCATORS, Allocator
from fedprune_cli.allocate.weights import WEIGHTS, Weights
from fedprune_cli.errors import ConfigError, DeviceError, FedpruneError, require, unknown
from fedprune_cli.execute import Execution
from fedprune_cli.failsafe import Failsafe
from fedprune_cli.files import read_yaml
from fedprune_cli.learn.client import EVALUATION_BATCH, Training
from fedprune_cli.learn.models import MODELS, ModelConfig
from fedprune_cli.learn.personalize import METHODS, Method
from fedprune_cli.learn.prune import PRUNERS, Pruner
from fedprune_cli.meter import Meter, Payload
from fedprune_cli.state import Array
from fedprune_cli.track import TRACKERS, Tracking
from fedprune_cli.world.channel import CHANNELS, Channel
from fedprune_cli.world.datasets import DATASETS, DatasetConfig
from fedprune_cli.world.devices import FLEETS, Devices
from fedprune_cli.world.faults import Faults
from fedprune_cli.world.partition import PARTITIONS, PartitionConfig

MAX_OVERRIDE = 10_000  # characters
MAX_CONFIG_FILES = 10_000
HYDRA_ALLOWED = (
    r"hydra(\.(output_subdir|(run|sweep)(\.(dir|subdir))?))?"
    r"|defaults\[\d+\]\.override hydra/(job|hydra)_logging|\{'override hydra/(job|hydra)_logging': '(none|disabled|default)'\}"
)


@dataclass(frozen=True)
class Deadline:
    """The round's latency threshold T: a fraction of its latency-optimal dense time, seconds, or a share of a total budget.

    last_fraction: where the fraction ends, in a straight line over the rounds; None keeps it.
    seconds takes the place of the fraction, and total_seconds, the simulated time for the whole run, of both.
    """

    fraction: float | None
    last_fraction: float | None
    seconds: float | None
    total_seconds: float | None

    def __post_init__(self) -> None:
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        require(
            bool({*given} - {"last_fraction"}),
            "fraction",
            self.fraction,
            "a number when seconds and total_seconds are null",
        )
        require(
            self.last_fraction is None or self.fraction is not None,
            "last_fraction",
            self.last_fraction,
            "null without a fraction",
        )
        for name in given:
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "> 0")

    def at(self, number: int, rounds: int, elapsed_s: float, dense_s: float) -> float:
        """Returns T of round `number` (from 0) of `rounds`, `elapsed_s` into the run, whose dense optimum takes `dense_s`.

        A total budget gives each round an equal share of what is left; once it is spent T is 0 and the policy for
        infeasible rounds decides.
        """
        if self.total_seconds is not None:
            return max(self.total_seconds - elapsed_s, 0.0) / (rounds - number)
        if self.seconds is not None:
            return self.seconds
        assert self.fraction is not None
        last = self.fraction if self.last_fraction is None else self.last_fraction
        return dense_s * (self.fraction + (last - self.fraction) * number / max(rounds - 1, 1))


@dataclass(frozen=True)
class Participation:
    """When a device stops training the shared part.

    freeze_below: the relative fall of a device's training loss over `freeze_window` of its rounds under which it stops for good; None:
    never. The fall is that of the straight line through its last freeze_window + 1 losses: single losses are noisy.
    """

    freeze_below: float | None
    freeze_window: int

    def __post_init__(self) -> None:
        below = self.freeze_below
        require(below is None or 0 < below < 1, "freeze_below", below, "in (0, 1) or null")
        require(1 <= self.freeze_window <= 1000, "freeze_window", self.freeze_window, "in 1..1000")

    def slots(self, num_devices: int) -> dict[str, Array]:
        """Returns what is remembered before round 1: who is `frozen`, uint8 [N], and each one's last losses, NaN where not known."""
        if self.freeze_below is None:
            return {}
        losses = np.full((num_devices, self.freeze_window + 1), np.nan)
        return {"frozen": np.zeros(num_devices, dtype=np.uint8), "recent_loss": losses}

    def next_slots(self, slots: Mapping[str, Array], ids: Array, losses: Sequence[float | None]) -> dict[str, Array]:
        """Returns what is remembered after a round in which the devices `ids` [K] trained the shared part, with these losses."""
        if self.freeze_below is None:
            return {}
        frozen, recent = slots["frozen"].copy(), slots["recent_loss"].copy()
        recent[ids] = np.column_stack([recent[ids, 1:], np.array(losses, dtype=float)])
        time = np.arange(self.freeze_window + 1) - self.freeze_window / 2
        fall = -(recent[ids] * time).sum(1) * self.freeze_window / np.square(time).sum()
        first = recent[ids].mean(1) + fall / 2  # where the line begins
        frozen[ids] = fall <= self.freeze_below * first  # False for NaN
        return {"frozen": frozen, "recent_loss": recent}


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
    """One run, complete and checked. What `execution`, `tracking`, `out` and `data.root` say does not change its numbers."""

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

    @property
    def faulty(self) -> bool:
        """Whether anything goes wrong, or the server does other than it would if nothing did."""
        return not (self.faults.none and self.failsafe.none)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the run's numbers, apart from the seed: the configuration and the numerics."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for key in ("seed", "out", "execution", "tracking"):
            del fields[key]
        fields["data"].pop("root", None)
        if self.branch is None:
            del fields["branch"]
        if not self.faulty:  # then they decide nothing
            del fields["faults"], fields["failsafe"]
        numerics = {
            "torch": version("torch"),
            "threads": 1,
            "evaluation_batch": EVALUATION_BATCH,
        }
        return fields | {"numerics": numerics}

    @functools.cached_property
    def config_hash(self) -> str:
        """The first 12 hexadecimal digits of the identity's SHA-256."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def run_dir(self) -> Path:
        """Where the run is kept: `out`, or outputs/<name>/<config hash>-s<seed>."""
        return Path(self.out) if self.out else Path("outputs") / self.name / f"{self.config_hash}-s{self.seed}"


# A group is a folder of conf/ whose `name` picks the class; a section is a fixed class.
GROUPS: dict[str, Mapping[str, type]] = {
    "data": DATASETS,
    "partition": PARTITIONS,
    "devices": FLEETS,
    "channel": CHANNELS,
    "model": MODELS,
    "method": METHODS,
    "pruner": PRUNERS,
    "allocator": ALLOCATORS,
    "weights": WEIGHTS,
    "tracking": TRACKERS,
}
SECTIONS: dict[str, type] = {
    "training": Training,
    "deadline": Deadline,
    "payload": Payload,
    "participation": Participation,
    "faults": Faults,
    "failsafe": Failsafe,
    "evaluation": Evaluation,
    "meter": Meter,
    "execution": Execution,
}

# Human units, longest suffix first, and how they become SI.
UNITS: tuple[tuple[str, str, Callable[[float], float]], ...] = (
    ("_dbm_per_hz", "_w_per_hz", lambda dbm: 10 ** (dbm / 10 - 3)),
    ("_dbm", "_w", lambda dbm: 10 ** (dbm / 10 - 3)),
    ("_ghz", "_hz", lambda ghz: ghz * 1e9),
    ("_mhz", "_hz", lambda mhz: mhz * 1e6),
    ("_km", "_m", lambda km: km * 1e3),
)


def _to_si(values: Any, where: str) -> Any:
    """Returns nested `values` with human units converted, and the keys renamed."""
    if isinstance(values, list):
        return [_to_si(value, f"{where}[{i}]") for i, value in enumerate(values)]
    if not isinstance(values, dict):
        return values
    converted = {}
    for key, value in values.items():
        suffix, si, convert = next((unit for unit in UNITS if str(key).endswith(unit[0])), ("", "", lambda x: x))
        if suffix and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                value = convert(value)
            except OverflowError:
                raise ConfigError(f"{where}.{key}={value}: too large") from None
        converted[str(key).removesuffix(suffix) + si] = _to_si(value, f"{where}.{key}")
    return converted


def _yaml_key(key: str, values: Mapping[str, Any]) -> str:
    """Returns the key as the user wrote it for the SI name `key`."""
    spellings = [key.removesuffix(si) + suffix for suffix, si, _ in UNITS if key.endswith(si)]
    return next((spelling for spelling in spellings if spelling in values), key)


def _construct(cls: type, values: dict[str, Any], where: str) -> Any:
    """Returns an instance of the dataclass, its types checked by OmegaConf and its ranges by the class itself."""
    si = _to_si(values, where)
    names = [field.name for field in dataclasses.fields(cls)]
    for key, name in zip(values, si, strict=True):
        if name not in names:
            raise unknown(f"key {where!r} has", str(key), names)
    for name in names:
        if name not in si:
            raise ConfigError(f"{where}.{name}: missing value")
    try:
        instance = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), si))
    except ConfigError as error:
        if not error.key:
            raise ConfigError(f"{where}: {error}") from None
        key = _yaml_key(error.key, values)
        raise ConfigError(f"{where}.{key}={values.get(key)}: {_without_value(error)}") from None
    except OmegaConfBaseException as error:
        key = _yaml_key(str(error.full_key or "").split(".")[0].split("[")[0], values)
        reason = str(error).splitlines()[0]
        if "is not a ListConfig" in reason:
            reason = f"must be a list, such as {where}.{key}=[{values.get(key)}]"
        raise ConfigError(f"{where}.{key}: {reason}") from None
    except OverflowError as error:
        raise ConfigError(f"{where}: {error}".splitlines()[0]) from None
    return instance


def _without_value(error: ConfigError) -> str:
    """The message without the SI value: the user's own spelling stands before it already."""
    return str(error).split(" is not allowed: ")[-1]


def build_experiment(config: DictConfig) -> Experiment:
    """Returns the checked experiment; raises ConfigError naming the key, its value and what is allowed."""
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    for key in ("hydra", "arms", "objectives"):  # how runs are launched and compared, not what one of them is
        values.pop(key, None)
    fields = [field.name for field in dataclasses.fields(Experiment)]
    for key in values:
        if key not in fields:
            raise unknown("configuration key", str(key), fields)
    for key in fields:
        if key not in values:
            raise ConfigError(f"{key}: missing from the configuration")
    parts = {}
    for group, table in GROUPS.items():
        chosen = values[group]
        name = str(chosen.get("name") if isinstance(chosen, dict) else chosen)
        if not isinstance(chosen, dict) or name not in table:
            raise unknown(group, name, table)
        parts[group] = _construct(table[name], chosen, group)
    for section, cls in SECTIONS.items():
        if not isinstance(values[section], dict):
            raise ConfigError(f"{section}={values[section]}: must be a group of values, such as {section}.KEY=VALUE")
        parts[section] = _construct(cls, values[section], section)
    branch = values["branch"]
    if branch is not None and not isinstance(branch, dict):
        raise ConfigError(f"branch={branch}: must be null; `fedprune resume RUN_DIR KEY=VALUE` makes branches")
    parts["branch"] = None if branch is None else _construct(Branch, branch, "branch")
    scalars = {key: value for key, value in values.items() if key not in parts}
    checked = OmegaConf.structured(_Scalars)
    try:
        merged = OmegaConf.merge(checked, scalars)
        scalars = OmegaConf.to_container(merged, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    try:
        return Experiment(**scalars, **parts)
    except ConfigError as error:
        raise ConfigError(f"{error.key}={values.get(error.key)}: {_without_value(error)}") from None


@dataclass(frozen=True)
class _Scalars:
    """The types of the top-level values, for OmegaConf."""

    name: str
    seed: int
    rounds: int
    out: str | None


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ConfigError for what Hydra's parser would take minutes over or what no file can hold."""
    for override in overrides:  # and for folders of configuration files that `check_config_dir` does not see
        if len(override) > MAX_OVERRIDE:
            raise ConfigError(f"{override[:40]}...: {len(override)} characters, at most {MAX_OVERRIDE} are read")
        if "\0" in override or (not override.isascii() and override != override.encode(errors="replace").decode()):
            raise ConfigError(f"{override!r}: is not text")
        if "_target_" in override:  # Hydra would build, and so run, whatever it names
            raise ConfigError(f"{override}: not allowed: no override names what is run")
        if override.lstrip("+~").startswith(("hydra.searchpath", "-cd", "-cp", "--config")):  # Hydra's spellings
            raise ConfigError(f"{override}: a folder of configuration files is given with --config-dir DIR")


def check_config_dir(folder: Path) -> None:
    """Raises ConfigError when a folder of configuration files holds what could do more than choose an experiment's values.

    Hydra builds its callbacks, launchers and loggers from whatever class its own configuration names, and so would run it.
    """
    found = (Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in ["", *names])
    files = list(itertools.islice(found, MAX_CONFIG_FILES + 1))
    if len(files) > MAX_CONFIG_FILES:
        raise ConfigError(f"--config-dir {folder}: more than {MAX_CONFIG_FILES} files")
    for path in files:
        if path.suffix != ".yaml":
            continue
        text = read_yaml(path, ConfigError)
        try:
            values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        except Exception as error:  # whatever OmegaConf makes of it
            raise ConfigError(f"{path}: {explain(error)}") from None
        keys = _leaves(values)
        keys += [str(entry) for entry in (values.get("defaults") or () if isinstance(values, dict) else ())]
        bad = [key for key in keys if "_target_" in key or ("hydra" in key and not re.fullmatch(HYDRA_ALLOWED, key))]
        if bad or path.relative_to(folder).parts[0] == "hydra" or re.search(r"@package.*hydra", text):
            where = bad[0] if bad else "hydra"
            raise ConfigError(
                f"{path}: {where}: not allowed: these files choose an experiment's values, and nothing that is run"
            )


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration that the command line `overrides` select from conf/; raises ConfigError."""
    check_overrides(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=list(overrides))
    except Exception as error:  # Hydra lets ValueError, KeyError and others of its own escape
        raise explain(error) from None


EXTRAS = {
    "joblib": "joblib",
    "submitit_slurm": "submitit",
    "submitit_local": "submitit",
    "ray": "ray",
    "optuna": "optuna",
}


def explain(error: Exception) -> FedpruneError:
    """Returns an error of Hydra's composition, or of a launcher, as one line, with the nearest valid name."""
    text = str(error) or type(error).__name__
    if type(error).__module__.split(".")[0] in ("joblib", "submitit", "ray"):
        return DeviceError(f"the launcher lost a run ({text.splitlines()[0]}); the same command continues the sweep")
    found = re.search(r"Could not load 'hydra/(launcher|sweeper)/(?P<name>\w+)'", text)
    if found and (extra := EXTRAS.get(found["name"])):
        return ConfigError(f"{found[1]} {found['name']} needs an extra: pip install 'fedprune[{extra}]'")
    if found := re.search(
        r"Could not find '(?P<group>[^']+)/(?P<name>[^'/]+)'\n\nAvailable options in '[^']*':\n(?P<options>(\t.*\n)*)",
        text,
    ):
        return unknown(f"{found['group']} option", found["name"], found["options"].split())
    if found := re.search(r"Could not override '(?P<key>[^']+)'", text):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            keys = list(_leaves(OmegaConf.to_container(compose("config"), resolve=False)))
        near = difflib.get_close_matches(found["key"], keys, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else " `fedprune train --cfg job` shows all keys."
        return ConfigError(f"unknown configuration key {found['key']!r}.{hint}")
    return ConfigError(text.splitlines()[0])


BRANCH_KEYS = ("rounds", "deadline", "out")


def branch_config(config: DictConfig, overrides: Sequence[str], begun: Branch) -> DictConfig:
    """Returns a run's configuration for a branch of it, with `overrides` of how long it goes on and under which deadline.

    Raises ConfigError for a key that would change what the state means.
    """
    check_overrides(overrides)
    branched = OmegaConf.merge(config, {"out": None, "branch": dataclasses.asdict(begun)})
    known = [key for key in _leaves(OmegaConf.to_container(config)) if key.split(".")[0] in BRANCH_KEYS]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: must be KEY=VALUE")
        if key not in known:
            raise unknown("key of a branch", key, known)
        try:
            branched = OmegaConf.merge(branched, OmegaConf.from_dotlist([override]))
        except Exception as error:  # whatever the YAML parser makes of a value
            raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from None
    assert isinstance(branched, DictConfig)
    return branched


def _leaves(values: Any, at: str = "") -> list[str]:
    """Returns the dotted paths of all nested keys."""
    if isinstance(values, list):
        return [path for number, value in enumerate(values) for path in _leaves(value, f"{at}[{number}]")]
    if not isinstance(values, dict):
        return []
    here = {f"{at}.{key}" if at else str(key): value for key, value in values.items()}
    return [path for key, value in here.items() for path in [key, *_leaves(value, key)]]
