"""Options of parts from outside the package: what Hydra would else read in conf/."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore

from fedprune_cli import plugins
from fedprune_cli.config.build import GROUPS
from fedprune_cli.config.folder import check_config_dir
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.files import Plain, read_yaml


def offer(overrides: Sequence[str], config_dir: Path | None = None) -> None:
    """Tells Hydra the options of all files that were given, and of the entry points that the overrides or the folder's files name.

    An option's values are those of `conf/GROUP/NAME.yaml` beside the file of its class, or the defaults of its fields. Raises ConfigError.
    """
    files = sorted(config_dir.rglob("*.yaml")) if config_dir is not None else []
    named = {
        word
        for text in (*overrides, *(path.read_text(errors="replace") for path in files))
        for word in re.findall(r"\w+", text)
    }
    for table in GROUPS.values():
        table.check_files()
    for kind in plugins.KINDS:
        for part in plugins.foreign(kind) if kind.group else ():
            if isinstance(part.source, plugins.PluginFile) or part.name in named:
                _store(part, GROUPS[kind.key][part.name])


def _store(part: plugins.Foreign, cls: type) -> None:
    own = Path(str(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")).parent / "conf"
    path = own / part.kind.key / f"{part.name}.yaml"
    values, package = {"name": part.name} | defaults(cls, part), part.kind.key
    if path.is_file():
        check_config_dir(own)
        text = read_yaml(path, ConfigError)

        written = yaml.safe_load(text) or {}
        if re.match(r"#\s*@package\s+_global_", text):
            values, package = written, "_global_"
        else:
            values = values | written
    ConfigStore.instance().store(name=part.name, node=values, group=part.kind.key, package=package, provider=part.where)


def defaults(cls: type, part: plugins.Foreign) -> dict[str, Plain]:
    """Returns the defaults of a class's fields as YAML would have them, `???` for a field without one; raises ConfigError."""
    found: dict[str, Plain] = {}
    for field in dataclasses.fields(cls):
        if field.name == "name":
            continue
        value: object = "???"
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        try:
            found[field.name] = json.loads(json.dumps(value, default=dataclasses.asdict))
        except TypeError:
            raise ConfigError(
                f"{part.where}: the default of {field.name}, {value!r}, is nothing that YAML can say"
            ) from None
    return found
