"""The command line -> a composed configuration, by Hydra, from conf/ and a folder of one's own."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprune_cli import CONF
from fedprune_cli.config.experiment import Branch
from fedprune_cli.config.overrides import check_overrides, parse_override
from fedprune_cli.config.plain import leaves, plain
from fedprune_cli.config.refusals import explain, reason
from fedprune_cli.errors import ConfigError, unknown
from fedprune_cli.store.files import read_yaml

__all__ = ["branch_config", "check_config_dir", "check_overrides", "compose_config", "explain"]

MAX_CONFIG_FILES = 10_000
HYDRA_ALLOWED = (
    r"hydra(\.(output_subdir|(run|sweep)(\.(dir|subdir))?))?"
    r"|defaults\[\d+\]\.override hydra/(job|hydra)_logging|\{'override hydra/(job|hydra)_logging': '(none|disabled|default)'\}"
)


def check_config_dir(folder: Path) -> None:
    """Raises ConfigError when a folder of configuration files holds what could do more than choose an experiment's values.

    Hydra builds its callbacks, launchers and loggers from whatever class its own configuration names, and so would run it.
    """
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {folder}: there is no such folder")
    found = (Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in ["", *names])
    files = list(itertools.islice(found, MAX_CONFIG_FILES + 1))
    if len(files) > MAX_CONFIG_FILES:
        raise ConfigError(f"--config-dir {folder}: more than {MAX_CONFIG_FILES} files")
    for path in files:
        if path.suffix != ".yaml":
            continue
        text = read_yaml(path, ConfigError)
        try:
            created = OmegaConf.create(text)
        except Exception as error:  # whatever OmegaConf makes of it
            raise ConfigError(f"{path}: {reason(error)}") from None
        if not isinstance(created, DictConfig):
            raise ConfigError(f"{path}: must hold keys with their values, such as rounds: 10")
        values = plain(created)
        defaults = values.get("defaults")
        keys = leaves(values) + [str(entry) for entry in (defaults if isinstance(defaults, list) else ())]
        bad = [key for key in keys if "_target_" in key or ("hydra" in key and not re.fullmatch(HYDRA_ALLOWED, key))]
        if bad or path.relative_to(folder).parts[0] == "hydra" or re.search(r"@package.*hydra", text):
            where = bad[0] if bad else "hydra"
            raise ConfigError(
                f"{path}: {where}: not allowed: these files choose an experiment's values, and nothing that is run"
            )


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Returns the configuration that the command line's `overrides` select from conf/ and `config_dir`; raises ConfigError."""
    check_overrides(overrides, sweep=False)
    search = []
    if config_dir is not None:
        check_config_dir(config_dir)
        search = [f"hydra.searchpath=[{QuotedString(f'file://{config_dir.resolve()}', Quote.double).with_quotes()}]"]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=[*overrides, *search])
    except Exception as error:  # Hydra lets ValueError, KeyError and others of its own escape
        raise explain(error) from None


BRANCH_KEYS = ("rounds", "deadline", "out")


def branch_config(config: DictConfig, overrides: Sequence[str], begun: Branch) -> DictConfig:
    """Returns a run's configuration for a branch of it, with `overrides` of how long it goes on and under which deadline.

    Raises ConfigError for a key that would change what the state means.
    """
    branched = config.copy()
    branched.merge_with({"out": None, "branch": dataclasses.asdict(begun)})
    known = [key for key in leaves(plain(config)) if key.split(".")[0] in BRANCH_KEYS]
    for override in overrides:
        parsed = parse_override(override)
        key = parsed.key_or_group
        if key not in known:
            raise unknown("key of a branch", key, known)
        if parsed.is_add() or parsed.is_force_add() or parsed.is_delete():
            raise ConfigError(f"{override}: must be KEY=VALUE")
        try:
            OmegaConf.update(branched, key, parsed.value())
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override}: {reason(error)}") from None
    return branched
