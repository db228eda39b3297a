"""A configuration as plain values: what YAML can say, without OmegaConf's own kinds."""

from __future__ import annotations

from typing import cast

from omegaconf import DictConfig, OmegaConf

from fedprune_cli.store.files import Plain


def plain(config: DictConfig, *, resolve: bool = False) -> dict[str, Plain]:
    """Returns the values, `${...}` as it stands or resolved; raises what OmegaConf raises."""
    return cast(dict[str, Plain], OmegaConf.to_container(config, resolve=resolve))


def leaves(values: Plain, at: str = "") -> list[str]:
    """Returns the dotted paths of all nested keys."""
    if isinstance(values, list):
        return [path for number, value in enumerate(values) for path in leaves(value, f"{at}[{number}]")]
    if not isinstance(values, dict):
        return []
    here = {f"{at}.{key}" if at else str(key): value for key, value in values.items()}
    return [path for key, value in here.items() for path in [key, *leaves(value, key)]]
