"""A configuration as plain values: what YAML can say, without OmegaConf's own kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, overload

from omegaconf import DictConfig, ListConfig, OmegaConf

from fedprune_cli.store.files import Plain


@overload
def plain(config: DictConfig, *, resolve: bool = False) -> dict[str, Plain]: ...
@overload
def plain(config: DictConfig | ListConfig, *, resolve: bool = False) -> Plain: ...
def plain(config: DictConfig | ListConfig, *, resolve: bool = False) -> Plain:
    """Returns the values, `${...}` as it stands or resolved; raises what OmegaConf raises."""
    return cast(Plain, OmegaConf.to_container(config, resolve=resolve))


def merged(config: DictConfig, changes: Mapping[str, object]) -> DictConfig:
    """Returns the configuration with some of its values changed; raises what OmegaConf raises where a type does not fit."""
    return cast(DictConfig, OmegaConf.merge(config, changes))


def leaves(values: Plain, at: str = "") -> list[str]:
    """Returns the dotted paths of all nested keys."""
    if isinstance(values, list):
        return [path for number, value in enumerate(values) for path in leaves(value, f"{at}[{number}]")]
    if not isinstance(values, dict):
        return []
    here = {f"{at}.{key}" if at else str(key): value for key, value in values.items()}
    return [path for key, value in here.items() for path in [key, *leaves(value, key)]]
