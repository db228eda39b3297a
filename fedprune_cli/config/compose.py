"""The command line -> a composed configuration, by Hydra, from conf/ and a folder of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprune_cli import CONF
from fedprune_cli.config.experiment import Branch
from fedprune_cli.config.folder import check_config_dir
from fedprune_cli.config.foreign import offer
from fedprune_cli.config.overrides import check_overrides, parse_override
from fedprune_cli.config.plain import leaves, plain
from fedprune_cli.config.refusals import explain, reason
from fedprune_cli.errors import ConfigError, unknown

__all__ = ["branch_config", "check_config_dir", "check_overrides", "compose_config", "explain"]


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Returns the configuration that the command line's `overrides` select from conf/ and `config_dir`; raises ConfigError."""
    check_overrides(overrides, sweep=False)
    search = []
    if config_dir is not None:
        check_config_dir(config_dir)
        search = [f"hydra.searchpath=[{QuotedString(f'file://{config_dir.resolve()}', Quote.double).with_quotes()}]"]
    offer(overrides, config_dir)
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
