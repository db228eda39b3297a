"""A composed configuration -> the checked Experiment. YAML keys carry human units (`_mhz`, `_dbm`, `_km`); the classes see SI."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedprune_cli.allocate import ALLOCATORS
from fedprune_cli.allocate.baselines import Allocator
from fedprune_cli.allocate.deadline import Deadline
from fedprune_cli.allocate.weights import WEIGHTS, Weights
from fedprune_cli.config.combined import refuse_combinations
from fedprune_cli.config.experiment import Branch, Evaluation, Experiment
from fedprune_cli.config.plain import plain
from fedprune_cli.config.refusals import reason
from fedprune_cli.errors import ConfigError, unknown
from fedprune_cli.execute import Execution
from fedprune_cli.learn.client import Training
from fedprune_cli.learn.models import MODELS, ModelConfig
from fedprune_cli.learn.personalize import METHODS, Method
from fedprune_cli.learn.prune import PRUNERS, Pruner
from fedprune_cli.meter import Meter
from fedprune_cli.plugins import Parts
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.serve.failsafe import AGGREGATION, LATE, Failsafe
from fedprune_cli.serve.participation import Participation
from fedprune_cli.store.files import Plain
from fedprune_cli.track import TRACKERS, Tracking
from fedprune_cli.wire.payload import Payload
from fedprune_cli.world.channel import CHANNELS, Channel
from fedprune_cli.world.datasets import DATASETS, DatasetConfig
from fedprune_cli.world.devices import FLEETS, Devices
from fedprune_cli.world.faults import KINDS, Faults
from fedprune_cli.world.partition import PARTITIONS, PartitionConfig

T = TypeVar("T")

# A group is a folder of conf/ whose `name` picks the class; a section is a fixed class.
GROUPS: dict[str, Parts[object]] = {
    "data": Parts("datasets", DATASETS, DatasetConfig),
    "partition": Parts("partitions", PARTITIONS, PartitionConfig),
    "devices": Parts("devices", FLEETS, Devices),
    "channel": Parts("channels", CHANNELS, Channel),
    "model": Parts("models", MODELS, ModelConfig),
    "method": Parts("methods", METHODS, Method),
    "pruner": Parts("pruners", PRUNERS, Pruner),
    "allocator": Parts("allocators", ALLOCATORS, Allocator),
    "weights": Parts("weights", WEIGHTS, Weights),
    "tracking": Parts("trackers", TRACKERS, Tracking),
}
OF_SECTIONS: tuple[Parts[object], ...] = (AGGREGATION, LATE, KINDS)  # parts that keys of a section choose
SECTIONS: dict[str, type] = {
    "training": Training,
    "deadline": Deadline,
    "payload": Payload,
    "participation": Participation,
    "faults": Faults,
    "failsafe": Failsafe,
    "privacy": Privacy,
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
    ("_khz", "_hz", lambda khz: khz * 1e3),
    ("_km", "_m", lambda km: km * 1e3),
)


def _to_si(values: Mapping[str, Plain], where: str) -> dict[str, Plain]:
    """Returns nested `values` with human units converted, and the keys renamed."""
    converted: dict[str, Plain] = {}
    for key, value in values.items():
        suffix, si, convert = next((unit for unit in UNITS if str(key).endswith(unit[0])), ("", "", lambda x: x))
        if suffix and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                value = convert(value)
            except OverflowError:
                raise ConfigError(f"{where}.{key}={value}: too large") from None
        converted[str(key).removesuffix(suffix) + si] = _inner_to_si(value, f"{where}.{key}")
    return converted


def _inner_to_si(value: Plain, where: str) -> Plain:
    if isinstance(value, list):
        return [_inner_to_si(item, f"{where}[{at}]") for at, item in enumerate(value)]
    return _to_si(value, where) if isinstance(value, dict) else value


def _yaml_key(key: str, values: Mapping[str, Plain]) -> str:
    """Returns the key as the user wrote it for the SI name `key`."""
    spellings = [key.removesuffix(si) + suffix for suffix, si, _ in UNITS if key.endswith(si)]
    return next((spelling for spelling in spellings if spelling in values), key)


_hints = functools.cache(get_type_hints)


class _AskError(Exception):
    """A value is for OmegaConf to convert or to refuse."""


def _plainly(value: object, hint: object) -> object:
    """Returns a value as OmegaConf gives it to a field of that type; raises _AskError for one that is not plainly of it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (int, float, bool) and type(value) is hint:
        return value
    if hint is str and type(value) is str and "$" not in value and value != "???":
        return value
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if origin in (UnionType, Union) and NoneType in inner and len(inner) == 2:
        return None if value is None else _plainly(value, next(one for one in inner if one is not NoneType))
    if type(value) is list and (origin is list or (origin is tuple and inner[1:] == (...,))):
        return [_plainly(one, inner[0]) for one in value]
    if type(value) is dict and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        try:
            return hint(**_fields(hint, value))
        except ConfigError:  # perhaps not the first thing that is wrong
            raise _AskError from None
    raise _AskError


def _fields(cls: type, values: Mapping[str, Plain]) -> dict[str, object]:
    """Returns the values of all of a dataclass's fields, given or its defaults, as OmegaConf gives them; raises _AskError."""
    given = {field.name: values.get(field.name, field.default) for field in dataclasses.fields(cls) if field.init}
    if values.keys() - given.keys():
        raise _AskError
    return {name: _plainly(value, _hints(cls)[name]) for name, value in given.items()}


def _checked(cls: type[T], values: Mapping[str, Plain]) -> T:
    """Returns an instance of the dataclass with values in SI; OmegaConf, which takes long, is asked where one is not plain."""
    try:
        fields = _fields(cls, values)
    except _AskError:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values)))
    return cls(**fields)


def _construct(cls: type[T], values: Mapping[str, Plain], where: str) -> T:
    """Returns an instance of the dataclass, its types checked by OmegaConf and its ranges by the class itself."""
    si = _to_si(values, where)
    hints = _hints(cast(type, cls))
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    for key, name in zip(values, si, strict=True):
        if name not in names:
            raise unknown(f"key {where!r} has", str(key), names)
    for field in fields:
        if field.name not in si and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{field.name}: missing value")
    try:
        return _checked(cls, si)
    except ConfigError as error:
        if not error.key:
            raise ConfigError(f"{where}: {error}") from None
        key = _yaml_key(error.key, values)
        raise ConfigError(f"{where}.{key}={values.get(key)}: {_without_value(error)}") from None
    except OmegaConfBaseException as error:
        found = re.match(r"\w+", str(error.full_key or ""))
        name = found[0] if found and found[0] in hints else ""
        key = _yaml_key(name, values)
        at = f"{where}.{key}={values.get(key)}" if name else where
        raise ConfigError(f"{at}: {reason(error, hints.get(name))}") from None
    except OverflowError as error:
        raise ConfigError(f"{where}: {error}".splitlines()[0]) from None


def _without_value(error: ConfigError) -> str:
    """The message without the SI value: the user's own spelling stands before it already."""
    return str(error).split(" is not allowed: ")[-1]


def _missing(values: Plain, at: str = "") -> Iterator[str]:
    """Yields the keys, dotted, whose value is still to be given: `???`."""
    if values == "???":
        yield at
    for key, value in values.items() if isinstance(values, dict) else ():
        yield from _missing(value, f"{at}.{key}" if at else str(key))


def _group(key: str, values: Mapping[str, Plain]) -> dict[str, Plain]:
    """Returns the values under a key; raises ConfigError when it holds something else."""
    group = values[key]
    if not isinstance(group, dict):
        raise ConfigError(f"{key}={group}: must be a group of values, such as {key}.KEY=VALUE")
    return group


def _values(config: DictConfig) -> dict[str, Plain]:
    """Returns the configuration with every key of an Experiment and no other; raises ConfigError."""
    fields = [field.name for field in dataclasses.fields(Experiment)]
    values = plain(config)
    for key in ("hydra", "arms", "tune", "objectives"):  # how runs are launched and compared, not what one of them is
        values.pop(key, None)
    for key in values:
        if key == "experiment":  # where a file's values land that does not say where they belong
            raise ConfigError("experiment: the first line of an experiment's file must be `# @package _global_`")
        if key not in fields:
            raise unknown("configuration key", str(key), fields)
    for key in fields:
        if key == "privacy" and key not in values:  # of a run that was made before there was the section, or needs none
            config = config.copy()
            with open_dict(config):
                config[key] = values[key] = {}
        if key not in values:
            raise ConfigError(f"{key}: missing from the configuration")
        if key in SECTIONS:  # seen before others refer to what is in it
            _group(key, values)
    try:
        resolved = plain(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {reason(error)}") from None
    values = {key: resolved[key] for key in values}
    if missing := next(_missing(values), None):
        raise ConfigError(f"{missing}: missing value, type {missing}=VALUE")
    return values


def build_experiment(config: DictConfig) -> Experiment:
    """Returns the checked experiment; raises ConfigError naming the key, its value and what is allowed."""
    for table in (*GROUPS.values(), *OF_SECTIONS):
        table.check_files()
    values = _values(config)
    parts: dict[str, object] = {}
    for group, table in GROUPS.items():
        chosen = values[group]
        name = str(chosen.get("name") if isinstance(chosen, dict) else chosen)
        if not isinstance(chosen, dict) or name not in table:
            raise unknown(group, name, table)
        parts[group] = _construct(table[name], chosen, group)
    for section, cls in SECTIONS.items():
        parts[section] = _construct(cls, _group(section, values), section)
    branch = values["branch"]
    if branch is not None and not isinstance(branch, dict):
        raise ConfigError(f"branch={branch}: must be null; `fedprune resume RUN_DIR KEY=VALUE` makes branches")
    parts["branch"] = None if branch is None else _construct(Branch, branch, "branch")
    build: Callable[..., Experiment] = Experiment  # whose parts are of the classes of GROUPS and SECTIONS
    scalars = {key: value for key, value in values.items() if key not in parts}
    try:
        checked = vars(_checked(_Scalars, scalars))
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        raise ConfigError(f"{key}={values.get(key)}: {reason(error, _hints(_Scalars).get(key))}") from None
    try:
        experiment = build(**checked, **parts)
    except ConfigError as error:
        if error.key is None:  # of two keys that do not go together, which it names
            raise
        raise ConfigError(f"{error.key}={values.get(error.key)}: {_without_value(error)}") from None
    refuse_combinations(experiment)
    return experiment


@dataclass(frozen=True)
class _Scalars:
    """The types of the top-level values, for OmegaConf."""

    name: str
    seed: int
    rounds: int
    out: str | None
