"""The command line -> a composed configuration, by Hydra; and Hydra's refusals as one line each."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from fedprune_cli import CONF
from fedprune_cli.config.experiment import Branch
from fedprune_cli.errors import ConfigError, DeviceError, FedpruneError, explained, unknown
from fedprune_cli.store.files import read_yaml

MAX_OVERRIDE = 10_000  # characters
MAX_CONFIG_FILES = 10_000
HYDRA_ALLOWED = (
    r"hydra(\.(output_subdir|(run|sweep)(\.(dir|subdir))?))?"
    r"|defaults\[\d+\]\.override hydra/(job|hydra)_logging|\{'override hydra/(job|hydra)_logging': '(none|disabled|default)'\}"
)


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
    if isinstance(error, OSError | ImportError | MemoryError) and type(error).__module__ == "builtins":
        return explained(error)  # the system's refusals are not about the configuration
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
