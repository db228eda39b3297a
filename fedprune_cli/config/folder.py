"""Folders of configuration files of one's own: they choose values, and name nothing that is run."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedprune_cli.config.plain import leaves, plain
from fedprune_cli.config.refusals import reason
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.files import read_yaml

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
