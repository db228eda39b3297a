"""What is compared: methods, or an experiment's arms, each on the same seeds; each configuration is checked before a run begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from fedprune_cli.store.files import Plain

OWN_KEYS = ("method", "seed", "out")  # what a comparison chooses itself
OF_A_ROUND = re.compile(r"=([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\*round$")


@dataclass(frozen=True)
class Contest:
    """What is compared: the `overrides` that all arms share, the folder of further YAML files, arm -> its own overrides, and the seeds.

    tune: what the configuration says of how arms are tuned first, as it stands there; None where they are compared as they are.
    round_s: seed -> the seconds that `round` stands for in its overrides, 1 on others: sites differ, and no site's seconds suit another.
    """

    overrides: tuple[str, ...]
    config_dir: Path | None
    arms: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    tune: Plain = None
    round_s: Mapping[int, float] = field(default_factory=dict)


def read_contest(
    overrides: Sequence[str], config_dir: Path | None, methods: str | None, seeds: Sequence[int]
) -> Contest:
    """Returns what to compare: the methods named, else the experiment's arms, else the two of the headline; raises ConfigError."""
    if any(override.lstrip("+").split("=")[0] in OWN_KEYS for override in overrides):
        raise ConfigError("compare chooses method, seed and out itself: use --methods, --seeds and --out")
    config = plain(compose_config(overrides, config_dir))
    arms = _arms(config["arms"] or {}, methods)
    return Contest(tuple(overrides), config_dir, arms, tuple(seeds), config["tune"])


def _arms(arms: Plain, methods: str | None) -> dict[str, tuple[str, ...]]:
    if methods is not None or not arms:
        names = parse_names("proposed,personalized" if methods is None else methods, "--methods")
        return {name: (f"method={name}",) for name in names}
    if not isinstance(arms, dict) or not all(isinstance(of, list) for of in arms.values()):
        raise ConfigError("arms: must map each name to a list of overrides, such as {tight: [deadline.fraction=0.3]}")
    return {str(name): tuple(map(str, of)) for name, of in arms.items() if isinstance(of, list)}


def build_members(contest: Contest) -> list[Member]:
    """Returns the runs of all arms and seeds, each configuration checked before the first one runs."""
    chosen = [(arm, seed) for seed in contest.seeds for arm in contest.arms]
    built = [build_member(contest, arm, (), seed) for arm, seed in chosen]
    draw(built[0][1])
    return [member for member, _ in built]


def build_member(contest: Contest, arm: str, setting: Sequence[str], seed: int) -> tuple[Member, Experiment]:
    """Returns the run of an arm on a seed, with further overrides, and what it is; raises ConfigError where it is none."""
    own = _in_seconds((*contest.arms[arm], *setting), contest.round_s.get(seed, 1.0))
    words = [*contest.overrides, *own, f"seed={seed}"]
    config = compose_config(words, contest.config_dir)
    experiment = build_experiment(config)
    yaml = OmegaConf.to_yaml(config, resolve=True)
    return Member(arm, seed, yaml, experiment.run_dir, _finished(experiment)), experiment


def _in_seconds(overrides: Sequence[str], round_s: float) -> list[str]:
    """Returns overrides with what is given in rounds in seconds, to two digits."""

    def seconds(found: re.Match[str]) -> str:
        return f"={float(f'{float(found[1]) * round_s:.2g}'):g}"

    return [OF_A_ROUND.sub(seconds, override) for override in overrides]


def draw(experiment: Experiment) -> None:
    """Draws an experiment's fleet: a bad table is one error, and not one of each member."""
    experiment.devices.draw(experiment.seed)


def unfinished(members: Sequence[Member]) -> list[Member]:
    """Returns the members that have something left to do, each run once: two arms may be one."""
    left = {member.run_dir: member for member in reversed(members) if not member.finished}
    return [*reversed(left.values())]


def _finished(experiment: Experiment) -> bool:
    """Whether a member has nothing left to do; a damaged one has, and says so when it is begun."""

    try:
        return is_done(experiment)
    except CheckpointError:
        return False
