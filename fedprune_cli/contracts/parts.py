"""What laws are run on: the parts of the table, or those that pytest's `--plugin` names; and small experiments that choose them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprune_cli import CONF, plugins
from fedprune_cli.config.build import GROUPS, OF_SECTIONS, build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.config.overrides import parse_override
from fedprune_cli.errors import unknown
from fedprune_cli.execute import executor
from fedprune_cli.round.bill import charge
from fedprune_cli.round.plan import plan_round
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import Setup, build_learner, prepare
from fedprune_cli.round.step import round_step
from fedprune_cli.round.work import assign, train_round
from fedprune_cli.serve.deliver import Sent
from fedprune_cli.store.memory import Outcome
from fedprune_cli.store.record import FaultLog, RoundRecord
from fedprune_cli.store.state import Array, State

INSTALLED = "FEDPRUNE_CONTRACTS"  # the distributions that `--plugin` names, in the environment

TINY = (
    "rounds=3", "devices.count=4", "devices.fresh=1", "model.hidden=[16]", "training.batch_size=8",
    "training.shared_steps=3", "training.personal_steps=2", "evaluation.fresh_steps=2", "execution.kind=serial",
)  # fmt: skip
TABLES: Mapping[str, plugins.Parts[object]] = {table.entry: table for table in (*GROUPS.values(), *OF_SECTIONS)}


def check(installed: Sequence[str]) -> None:
    """Notes the distributions that laws are to be run on; raises ConfigError for one without parts, or a part that cannot be chosen."""
    os.environ[INSTALLED] = "\n".join(installed)
    every = [one for kind in plugins.KINDS for one in plugins.foreign(kind)]
    for name in installed:
        if not any(one.origin.startswith(f"{name} ") for one in every):
            raise unknown("plug-in", name, {one.origin.split(" ")[0] for one in every if " " in one.origin})
    for one in every:
        if _asked(one):
            TABLES[one.kind.entry][one.name]


def _asked(one: plugins.Foreign) -> bool:
    named = os.environ.get(INSTALLED, "").split("\n")
    return isinstance(one.source, plugins.PluginFile) or one.origin.split(" ")[0] in named


def parts(entry: str, without: Sequence[str] = ()) -> list[object]:
    """Returns the names of a kind for `parametrize`: those asked about, marked `foreign`, or else those built in."""
    own = TABLES[entry].own
    of = [name for name in names(entry) if name not in without]
    return [name if name in own else pytest.param(name, marks=pytest.mark.foreign) for name in of]


def names(entry: str) -> list[str]:
    """Returns the names of a kind: those asked about, or else those built in."""
    return [one.name for one in plugins.foreign(plugins.KIND[entry]) if _asked(one)] or [*TABLES[entry].own]


def each(entry: str, without: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Returns the mark of a law on every part of a kind."""
    return pytest.mark.parametrize("name", parts(entry, without))


def has_field(entry: str, name: str, field: str) -> bool:
    """Whether a part is configured by a field of that name."""
    return any(one.name == field for one in dataclasses.fields(TABLES[entry][name]))  # type: ignore[arg-type]


def configured(*overrides: str) -> DictConfig:
    """Returns the configuration that overrides select: what `compose_config` gives, in a tenth of its time.

    As Hydra does it, the options of groups come first, here once for all that choose the same ones, and values on top of them.
    """
    values = [text for text in overrides if re.match(r"[a-z_]+\.(?!.*[$?])|(rounds|seed|name|out)=", text)]
    options = tuple(text for text in overrides if text not in values)
    if all((CONF / f"{text.replace('=', '/', 1)}.yaml").is_file() for text in options):
        config = _chosen(options).copy()
        with contextlib.suppress(OmegaConfBaseException):  # said below, in our own words
            for parsed in map(_parsed, values):
                OmegaConf.update(config, parsed.key_or_group, parsed.value(), merge=True)
            return config
    return compose_config(overrides)


@functools.cache
def _chosen(options: tuple[str, ...]) -> DictConfig:
    return compose_config(options)


_parsed = functools.cache(parse_override)


def composed(*overrides: str) -> DictConfig:
    """Returns the configuration of a tiny experiment with some values changed."""
    return configured(*TINY, *overrides)


def make_experiment(*overrides: str) -> Experiment:
    """Returns a tiny experiment with some values changed."""
    return build_experiment(composed(*overrides))


@functools.cache
def make_setup(*overrides: str) -> Setup:
    """Returns the setup of a tiny experiment, built once."""
    return prepare(make_experiment(*overrides))


@dataclass(frozen=True)
class Step:
    """A round: its state before and after it, and its record."""

    before: State
    record: RoundRecord
    after: State


def sent_by(setup: Setup, state: State, training: Array | None = None) -> Sent:
    """Returns what the devices send in the round that begins at `state`: those that the draw took, or the given ones [A] in their place."""
    roster = choose_roster(setup, state.round, state.slots)
    if training is not None:
        roster = replace(roster, training=training)
    build = functools.partial(build_learner, setup.experiment, setup.scenario)
    with executor(setup.experiment.execution, build) as workers:
        plan = plan_round(setup, roster, state.slots)
        work = assign(setup, state, roster, plan)
        made = train_round(setup, work, workers)
        bill = charge(setup, roster, plan, work, made)
    return Sent(
        made.updates, work.masks, work.fates, work.moment, bill.training.latency_s, plan.deadline_s, work.expected
    )


def steps_of(setup: Setup, count: int) -> list[Step]:
    """Returns the first rounds of an experiment, in memory."""
    state, steps = setup.initial, []
    build = functools.partial(build_learner, setup.experiment, setup.scenario)
    with executor(setup.experiment.execution, build) as workers:
        for _ in range(count):
            before = state
            state, record = round_step(setup, state, workers)
            steps.append(Step(before, record, state))
    return steps


def outcome(devices: Sequence[int] | Array = (), number: int = 0, **facts: Any) -> Outcome:
    """Returns the facts of round `number` in which `devices` trained the shared part, with some of them given."""
    ids, ones = np.array(devices, dtype=int), np.ones(len(devices))
    plain: dict[str, Any] = {
        "simulated_s": 0.0, "bits": 32, "rounding_error": None, "prune_ratio": 0 * ones, "pruning_error": 0 * ones,
        "latency_s": ones, "train_loss": ones.tolist(), "deadline_s": 1.0, "log": FaultLog(),
    }  # fmt: skip
    return Outcome(number=number, devices=ids, **plain | facts)
