"""Every arm of every experiment in conf/experiment runs: one small round on small data, and the heavy ones as they are."""

from __future__ import annotations

import functools
import json
import math

import pytest
from conftest import configured, steps_of

from fedprune_cli import CONF
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import DataError
from fedprune_cli.round.setup import prepare
from fedprune_cli.store.record import RoundRecord, parse_record

SMALL = (
    "rounds=1", "devices.count=4", "devices.fresh=1", "training.batch_size=8", "training.shared_steps=1",
    "training.personal_steps=1", "evaluation.fresh_steps=1", "execution.kind=serial",
)  # fmt: skip
NATURAL = {  # experiments whose small round needs something else, such as those whose devices a package's data names
    "watch": ("partition=dirichlet",),
    "shakespeare": ("partition=dirichlet", "data.roles=4", "devices.per_round=null"),
    "privacy_cost": ("devices.count=5",),  # of whose devices an entry of a secure sum must be five
    "privacy_cost_fmnist": ("devices.count=5",),
    "privacy_cost_watch": ("partition=dirichlet", "devices.count=5"),
}
HEAVY = (
    "colour",
    "headline_fmnist",
    "privacy_by_devices",
    "privacy_cost_fmnist",
    "shakespeare",
)  # whose data and models are large: slow tests, with `headline`'s arms
LIGHT = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem not in HEAVY)
RUN: dict[str, RoundRecord] = {}  # arms that several experiments share run once


@functools.cache
def arms_of(name: str) -> dict[str, list[str]]:
    """Returns an experiment's arms, name -> overrides; itself where it has none."""
    return {str(arm): [*of] for arm, of in (configured(f"experiment={name}").arms or {name: []}).items()}


def run_arm(experiment: Experiment) -> RoundRecord:
    """Returns the record of the one round of an arm."""
    key = json.dumps({**experiment.identity, "name": ""}, sort_keys=True)
    if key not in RUN:
        (step,) = steps_of(prepare(experiment), 1)
        RUN[key] = step.record
    return RUN[key]


def check(record: RoundRecord) -> None:
    """Raises AssertionError where a round did not do what a round does."""
    assert parse_record(json.loads(json.dumps(record.as_json()))) == record
    assert record.accuracy is not None
    assert record.fresh_accuracy is not None
    if record.devices.id:
        assert record.simulated_s > 0
        assert record.joules > 0
        assert record.train_loss is None or 0 < record.train_loss < math.inf


def skip_without_data(experiment: Experiment) -> None:
    """Skips the test where the package that holds the data is not on this machine."""
    try:
        experiment.data.load()
    except DataError as error:
        if "cannot be had" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_every_heavy_arm_is_sound_and_asks_something_of_its_own(name: str) -> None:
    arms = [build_experiment(configured(f"experiment={name}", *of)) for of in arms_of(name).values()]
    assert len({experiment.config_hash for experiment in arms}) == len(arms)


def small(name: str, arm: str) -> Experiment:
    """Returns an arm of an experiment, small."""
    return build_experiment(configured(f"experiment={name}", *SMALL, *NATURAL.get(name, ()), *arms_of(name)[arm]))


@pytest.mark.parametrize("name", LIGHT)
def test_every_experiment_runs_a_round(name: str) -> None:
    """Its last arm; all of them are a slow test."""
    arms = [small(name, [*arms_of(name)][-1])]
    if name in NATURAL:
        skip_without_data(arms[0])
    records = [run_arm(experiment) for experiment in arms]
    for record in records:
        check(record)
    assert any(record.train_loss is not None for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT)
def test_every_arm_runs_a_round_and_asks_something_of_its_own(name: str) -> None:
    arms = [small(name, arm) for arm in arms_of(name)]
    if name in NATURAL:
        skip_without_data(arms[0])
    assert len({experiment.config_hash for experiment in arms}) == len(arms)
    for experiment in arms:
        check(run_arm(experiment))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name in HEAVY for arm in arms_of(name)])
def test_every_heavy_arm_runs_a_round(name: str, arm: str) -> None:
    """On its own data and model; where the data is not on this machine, on digits, or not at all where its devices are the data's."""
    experiment = small(name, arm)
    if name in NATURAL:
        skip_without_data(experiment)
    try:
        experiment.data.load()
    except DataError:
        experiment = build_experiment(configured(f"experiment={name}", *SMALL, *arms_of(name)[arm], "data=digits"))
    check(run_arm(experiment))
