"""Parts from outside the package: files that a command line gives with `--plugin`, and entry points of installed distributions.

Which files a process was given stands in one variable of its environment, so that those that it starts have the same ones. A file is
run once in a process, as a module whose name is made from its content: what is pickled here is found there, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast

from fedprune_cli.errors import ConfigError, FedpruneError
from fedprune_cli.store.files import read_bytes

Part = TypeVar("Part", covariant=True)

VARIABLE = "FEDPRUNE_PLUGINS"
MODULE = "fedprune_plugin_"
OWN = f"{__name__.partition('.')[0]}."
MAX_BYTES = 2**20  # of a file
NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)


@dataclass(frozen=True)
class Kind:
    """A kind of part. entry: of the entry points `fedprune.<entry>`; table: what it is called in a file; key: what chooses it."""

    entry: str
    table: str
    key: str

    @property
    def group(self) -> bool:
        """Whether it is chosen by the name of an option of a group, and not by a key of a section."""
        return "." not in self.key


KINDS = (
    Kind("allocators", "ALLOCATORS", "allocator"),
    Kind("pruners", "PRUNERS", "pruner"),
    Kind("methods", "METHODS", "method"),
    Kind("models", "MODELS", "model"),
    Kind("datasets", "DATASETS", "data"),
    Kind("partitions", "PARTITIONS", "partition"),
    Kind("channels", "CHANNELS", "channel"),
    Kind("devices", "FLEETS", "devices"),
    Kind("weights", "WEIGHTS", "weights"),
    Kind("trackers", "TRACKERS", "tracking"),
    Kind("aggregators", "AGGREGATORS", "failsafe.aggregation"),
    Kind("late_policies", "LATE_POLICIES", "failsafe.late"),
    Kind("faults", "FAULTS", "faults.others"),
)
KIND = {kind.entry: kind for kind in KINDS}


@dataclass(frozen=True)
class PluginFile:
    """A file of one's own: where it is, and its content."""

    path: str
    content: bytes

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of its content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def module(self) -> str:
        """The name of the module that it is run as."""
        return MODULE + self.sha256[:16]

    @property
    def kept_as(self) -> str:
        """The name of its copy in a run folder."""
        return f"plugin.{self.sha256[:12]}.{re.sub(r'[^A-Za-z0-9._-]', '_', Path(self.path).name)}"


@dataclass(frozen=True)
class Foreign:
    """A part from outside: its kind, its name, and what gives its class."""

    kind: Kind
    name: str
    source: PluginFile | importlib.metadata.EntryPoint

    @property
    def where(self) -> str:
        """Where it comes from, for a message."""
        if isinstance(self.source, PluginFile):
            return f"{self.source.path}: {self.kind.table}[{self.name!r}]"
        return f"{self.origin}: entry point fedprune.{self.kind.entry} {self.name} = {self.source.value}"

    @property
    def origin(self) -> str:
        """What stands for it in a run's identity: the file's SHA-256, or the distribution's name and version."""
        if isinstance(self.source, PluginFile):
            return f"sha256:{self.source.sha256}"
        dist = self.source.dist
        return f"{dist.name} {dist.version}" if dist else self.source.value

    def load(self, protocol: type) -> type:
        """Returns its class; raises ConfigError, naming where it comes from, unless it is a frozen dataclass with all that is asked."""
        if isinstance(self.source, PluginFile):
            found = _table(self.source, self.kind)[self.name]
        else:
            try:
                found = self.source.load()
            except (Exception, SystemExit) as error:
                raise ConfigError(f"{self.where}: cannot be loaded: {_said(error)}") from None
        if lacks := _lacks(found, protocol):
            raise ConfigError(f"{self.where}: {lacks}")
        return cast(type, found)


@dataclass(frozen=True, eq=False)
class Parts(Mapping[str, type[Part]], Generic[Part]):
    """What can be chosen of a kind: its own table, whose entries are built in, and then what comes from outside, loaded when chosen."""

    entry: str
    own: Mapping[str, type[Part]]
    protocol: type

    def __getitem__(self, name: str) -> type[Part]:
        """Returns the class; raises KeyError, or ConfigError for one that cannot be loaded or has the name of another."""
        kind = KIND[self.entry]
        of_that_name = [one for one in foreign(kind) if one.name == name]
        if name in self.own:
            cls = self.own[name]
            if cls.__module__.startswith(MODULE):
                raise ConfigError(
                    f"{kind.table}[{name!r}]: a file has a table of its own, and does not change fedprune's"
                )
            if of_that_name:
                raise ConfigError(f"{of_that_name[0].where}: {name!r} is built in: choose another name")
            return cls
        if not of_that_name:
            raise KeyError(name)
        if len(of_that_name) > 1:
            raise ConfigError(f"{of_that_name[1].where}: {of_that_name[0].where} has this name already")
        return of_that_name[0].load(self.protocol)

    def check_files(self) -> None:
        """Raises ConfigError when a file that was given has a part of this kind that could not be chosen."""
        for one in foreign(KIND[self.entry]):
            if isinstance(one.source, PluginFile):
                self[one.name]

    def __contains__(self, name: object) -> bool:
        return name in self.own or any(one.name == name for one in foreign(KIND[self.entry]))

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from dict.fromkeys(one.name for one in foreign(KIND[self.entry]) if one.name not in self.own)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read(path: Path) -> PluginFile:
    """Returns a file; raises ConfigError when it cannot be read."""
    return PluginFile(os.path.abspath(path), read_bytes(path, MAX_BYTES, ConfigError))


def give(files: Sequence[PluginFile]) -> None:
    """Gives this process, and those that it starts, these files and no others; raises ConfigError for one that cannot be run."""
    once = list({file.sha256: file for file in files}.values())
    for file in once:
        _run(file)
    os.environ[VARIABLE] = json.dumps([[file.sha256, file.path] for file in once])


def given() -> tuple[PluginFile, ...]:
    """Returns the files that this process was given; in one that was just started, they are run now."""
    return tuple(_given(sha256, path) for sha256, path in json.loads(os.environ.get(VARIABLE) or "[]"))


def _given(sha256: str, path: str) -> PluginFile:
    if module := sys.modules.get(MODULE + sha256[:16]):
        return cast(PluginFile, module.__dict__["__plugin__"])
    file = PluginFile(path, read_bytes(Path(path), MAX_BYTES, ConfigError))
    if file.sha256 != sha256:
        raise ConfigError(f"--plugin {path}: edited since the command began: SHA-256 {file.sha256} now, {sha256} then")
    _run(file)
    return file


def options() -> list[str]:
    """Returns the words of a command line that give the files that this process was given."""
    return [word for file in given() for word in ("--plugin", file.path)]


def _run(file: PluginFile) -> None:
    """Runs a file as a module, unless it was; raises ConfigError, naming the line, for what it raises, and for one that adds nothing."""
    if file.module in sys.modules:
        return
    module = ModuleType(file.module)
    module.__dict__.update(__file__=file.path, __plugin__=file)
    sys.modules[file.module] = module  # where its dataclasses look themselves up
    try:
        exec(compile(file.content, file.path, "exec", dont_inherit=True), module.__dict__)
        if not any(_table(file, kind) for kind in KINDS):
            tables = [kind.table for kind in KINDS]
            raise ConfigError(
                f"--plugin {file.path}: adds nothing: must have a table such as {tables[0]} = {{'mine': Mine}}; "
                f"allowed: {', '.join(tables)}"
            )
    except FedpruneError as error:
        del sys.modules[file.module]
        raise ConfigError(str(error)) from None
    except (Exception, SystemExit) as error:
        del sys.modules[file.module]
        line = error.lineno if isinstance(error, SyntaxError) else _line(error, file)
        raise ConfigError(f"--plugin {file.path}{f', line {line}' if line else ''}: {_said(error)}") from None


def _line(error: BaseException, file: PluginFile) -> int | None:
    lines = [at for frame, at in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file.path]
    return lines[-1] if lines else None


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(text)}{text}"


def _table(file: PluginFile, kind: Kind) -> Mapping[str, object]:
    """Returns what a file adds of a kind, name -> class; nothing where its table is fedprune's own, imported; raises ConfigError."""
    table = sys.modules[file.module].__dict__.get(kind.table, {})
    if any(table is module.__dict__.get(kind.table) for name, module in [*sys.modules.items()] if name.startswith(OWN)):
        return {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"--plugin {file.path}: {kind.table} must be a dictionary, such as {{'mine': Mine}}")
    for name in table:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"--plugin {file.path}: {kind.table}: {name!r} is no name: must be letters, digits and '_'"
            )
    return table


def foreign(kind: Kind) -> list[Foreign]:
    """Returns the parts of a kind that come from outside: of files, which were run, and of entry points, of which only names are read."""
    of_files = [Foreign(kind, name, file) for file in given() for name in _table(file, kind)]
    return of_files + [Foreign(kind, point.name, point) for point in _entry_points().get(kind.entry, ())]


@functools.cache
def _entry_points() -> Mapping[str, Sequence[importlib.metadata.EntryPoint]]:
    points = importlib.metadata.entry_points()
    found = {kind.entry: tuple(points.select(group=f"fedprune.{kind.entry}")) for kind in KINDS}
    return {entry: of for entry, of in found.items() if of}


def names(key: str) -> list[str]:
    """Returns the names of the parts from outside that a key of the configuration may choose."""
    return [one.name for kind in KINDS if kind.key == key for one in foreign(kind)]


def fields_of_files(kind: Kind) -> list[str]:
    """Returns the fields of the parts of a kind that files have: keys of the configuration where one of them is chosen."""
    parts = [_table(file, kind)[name] for file in given() for name in _table(file, kind)] if kind.group else []
    fields = [field.name for part in parts if dataclasses.is_dataclass(part) for field in dataclasses.fields(part)]
    return [name for name in dict.fromkeys(fields) if name != "name"]


def origin(entry: str, name: str) -> Foreign | None:
    """Returns the part from outside that has this name, None where it is built in."""
    return next((one for one in foreign(KIND[entry]) if one.name == name), None)


def members(protocol: type) -> list[str]:
    """Returns what a protocol asks for, methods and values, those of the protocols that it extends first."""
    asked: dict[str, None] = {}
    for cls in reversed(protocol.__mro__):
        if getattr(cls, "_is_protocol", False) and cls.__module__ != "typing":
            asked |= dict.fromkeys([*inspect.get_annotations(cls), *cls.__dict__])
    return [name for name in asked if not name.startswith("_")]


def _lacks(cls: object, protocol: type) -> str:
    """Says what a class has not that its protocol asks for; nothing where it has all."""
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        return f"{getattr(cls, '__name__', repr(cls))} is not a dataclass: must be a class with @dataclass(frozen=True)"
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"{cls.__name__} is not frozen: must be a class with @dataclass(frozen=True)"
    fields = [field.name for field in dataclasses.fields(cls)]
    asked = members(protocol)
    if "name" in asked and "name" not in fields:
        return f"{cls.__name__} lacks the field `name: str`, by which it is chosen"
    for member in asked:
        if member not in fields and not hasattr(cls, member):
            return f"{cls.__name__} lacks {member!r}, which every {protocol.__name__} has"
        wanted, has = inspect.getattr_static(protocol, member, None), inspect.getattr_static(cls, member, None)
        if inspect.isfunction(wanted):
            parameters = list(inspect.signature(wanted).parameters)[1:]
            if not inspect.isfunction(has) or not _takes(has, len(parameters) + 1):
                return f"{cls.__name__}.{member} must be a method that takes ({', '.join(['self', *parameters])})"
    return ""


def _takes(function: Callable[..., object], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True
