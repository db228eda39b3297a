"""What every command of the tests would do anew, done once: the server that they are forked from imports this module last."""

from __future__ import annotations

import copy
import functools
import gc
from pathlib import Path
from typing import IO, Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from fedprune_cli import CONF
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config

UNCHANGED = (f"{CONF.resolve()}/", f"{Path(hydra.__file__).resolve().parent}/")  # no test changes a file in there
load = OmegaConf.load


@functools.cache
def _loaded(path: str) -> DictConfig | ListConfig:
    return load(path)


def _load(file_: str | Path | IO[Any]) -> DictConfig | ListConfig:
    """As OmegaConf.load; a file that no test changes is parsed once, and copied each time: that is half of composing a configuration."""
    path = str(getattr(file_, "name", file_))
    return copy.deepcopy(_loaded(path)) if path.startswith(UNCHANGED) else load(file_)


OmegaConf.load = staticmethod(_load)  # type: ignore[method-assign]
build_experiment(compose_config([]))  # parses most of those files, and fills the tables of Hydra's parser
gc.collect()
gc.freeze()  # a full collection would go through everything imported, in each process, and copy its pages
