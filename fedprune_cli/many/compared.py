"""What is compared: methods, or an experiment's arms, each on the same seeds; each configuration is checked before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.config.plain import plain
from fedprune_cli.config.words import parse_names
from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.many.side_by_side import Member
from fedprune_cli.runs.life import is_done


def build_members(
    overrides: list[str], config_dir: Path | None, methods: str | None, seeds: Sequence[int]
) -> list[Member]:
    """Returns what is compared, each configuration checked before the first one runs."""

    if any(override.lstrip("+").split("=")[0] in ("method", "seed", "out") for override in overrides):
        raise ConfigError("compare chooses method, seed and out itself: use --methods, --seeds and --out")
    arms = _arms(overrides, config_dir, methods)
    chosen = [(arm, seed) for seed in seeds for arm in arms]
    configs = [compose_config([*overrides, *arms[arm], f"seed={seed}"], config_dir) for arm, seed in chosen]
    experiments = [build_experiment(config) for config in configs]
    experiments[0].devices.draw(experiments[0].seed)  # a bad table is one error, and not one of each member
    return [
        Member(arm, seed, OmegaConf.to_yaml(config, resolve=True), experiment.run_dir, _finished(experiment))
        for (arm, seed), config, experiment in zip(chosen, configs, experiments, strict=True)
    ]


def _finished(experiment: Experiment) -> bool:
    """Whether a member has nothing left to do; a damaged one has, and says so when it is begun."""

    try:
        return is_done(experiment)
    except CheckpointError:
        return False


def _arms(overrides: list[str], config_dir: Path | None, methods: str | None) -> dict[str, list[str]]:
    """Returns what to compare, name -> overrides: the methods named, else the experiment's arms, else the two of the headline."""

    arms = plain(compose_config(overrides, config_dir))["arms"] or {}
    if methods is not None or not arms:
        return {
            name: [f"method={name}"]
            for name in parse_names("proposed,personalized" if methods is None else methods, "--methods")
        }
    if not isinstance(arms, dict) or not all(isinstance(of, list) for of in arms.values()):
        raise ConfigError("arms: must map each name to a list of overrides, such as {tight: [deadline.fraction=0.3]}")
    return {str(name): [str(override) for override in of] for name, of in arms.items() if isinstance(of, list)}
