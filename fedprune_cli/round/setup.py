"""What all rounds of a run share: the experiment, its world, its model's counted cost, and the state before round 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.batched import batches
from fedprune_cli.learn.client import Learner
from fedprune_cli.learn.cost import ModelCost, count_cost
from fedprune_cli.learn.models import Shape, build_model, require_tokens
from fedprune_cli.learn.parts import Parts, split_model, to_device
from fedprune_cli.learn.personalize import personal_only
from fedprune_cli.learn.prune import least_kept
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.learn.structured import Layout, find_channels, no_channels
from fedprune_cli.round.memory import first_slots
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.state import State, untrained
from fedprune_cli.world.band import Radio
from fedprune_cli.world.channel import radio_of
from fedprune_cli.world.scenario import Scenario, World, build_scenario


@dataclass(frozen=True)
class Blueprint:
    """What an allocation needs to know of a run before there is any data or device: configuration, model cost, and how it is pruned."""

    experiment: Experiment
    cost: ModelCost
    layout: Layout

    @property
    def max_ratio(self) -> float:
        """The most a device may drop: rho_max, or what the smallest slice of the model leaves."""
        return min(self.experiment.pruner.max_ratio, 1 - least_kept(self.layout))

    @property
    def sends_masks(self) -> bool:
        """Whether the server has to send masks, and the meter counts them."""
        counted = self.experiment.meter.mask_overhead and self.experiment.allocator.prunes
        return counted and not self.experiment.pruner.derivable

    def schedule(self, num_samples: int) -> tuple[LocalPhase, ...]:
        """Returns the local phases and steps, per round, of a device with `num_samples` training samples."""
        return self.experiment.training.schedule(self.experiment.method.phases(), num_samples)

    def personal_schedule(self, num_samples: int) -> tuple[LocalPhase, ...]:
        """Returns those of a frozen device, which trains its personalized part alone."""
        return self.experiment.training.schedule(personal_only(self.experiment.method.phases()), num_samples)


@dataclass(frozen=True)
class Setup:
    """What all rounds share. blueprint: the experiment and its model; batched: whether devices train side by side."""

    blueprint: Blueprint
    scenario: Scenario
    initial: State
    batched: bool

    @property
    def experiment(self) -> Experiment:
        """The experiment."""
        return self.blueprint.experiment

    @property
    def radio(self) -> Radio:
        """What of the channel carries the uplink."""
        return radio_of(self.experiment.channel)

    def schedule(self, device: int) -> tuple[LocalPhase, ...]:
        """Returns a device's phases and steps per round."""
        return self.blueprint.schedule(len(self.scenario.partition.train[device]))

    def personal_schedule(self, device: int) -> tuple[LocalPhase, ...]:
        """Returns a device's phases and steps per round once it is frozen."""
        return self.blueprint.personal_schedule(len(self.scenario.partition.train[device]))


def prepare(experiment: Experiment) -> Setup:
    """Returns the setup of an experiment; raises DataError or ConfigError when its world cannot be built.

    Nodes keep v_k themselves: in its place the state has the round that the device's is of, of which it has one for each.
    """
    if experiment.execution.remote != (experiment.data.name == "nodes"):
        raise ConfigError(
            "data=nodes and execution.kind=nodes or flower go together: nodes that keep their data do the work themselves"
        )
    world = World(
        experiment.data,
        experiment.partition,
        experiment.devices,
        experiment.channel,
        experiment.evaluation.test_fraction,
    )
    scenario = build_scenario(world, experiment.seed, experiment.rounds)
    parts = build_parts(experiment, scenario)
    blueprint = build_blueprint(experiment, parts, scenario.dataset.inputs.shape[1:])
    slots = first_slots(experiment, Sizes(scenario.num_devices, blueprint.cost.shared_params))
    own = np.zeros(1, np.float32) if experiment.execution.remote else parts.personal.numpy().copy()
    personal = untrained(own, scenario.num_devices)
    initial = State(0, parts.shared.numpy().copy(), personal, slots)
    return Setup(blueprint, scenario, initial, batches(parts, experiment.training))


def build_parts(experiment: Experiment, scenario: Scenario) -> Parts:
    """Returns the initial model, split by the method's personalized part."""
    dataset = scenario.dataset
    model = build_model(experiment.model, dataset.inputs.shape[1:], dataset.num_classes, experiment.seed)
    require_tokens(model, dataset.inputs, (dataset.scale, dataset.mean, dataset.std) == (1.0, (0.0,), (1.0,)))
    return split_model(model, experiment.method.personal_part)


def build_blueprint(experiment: Experiment, parts: Parts, shape: Shape) -> Blueprint:
    """Returns the blueprint of a split model for inputs of a shape; raises ConfigError where its channels cannot be left out."""
    cost = count_cost(parts, shape)
    if experiment.pruner.granularity != "channel" or not experiment.allocator.prunes:
        return Blueprint(experiment, cost, no_channels(parts))
    try:
        return Blueprint(experiment, cost, find_channels(parts, cost))
    except ConfigError as error:
        raise ConfigError(f"pruner.granularity=channel with model={experiment.model.name}: {error}") from None


def build_learner(experiment: Experiment, scenario: Scenario) -> Learner:
    """Returns what a worker needs; every worker builds its own, since a model is scratch memory."""
    dataset, partition, parts = scenario.dataset, scenario.partition, build_parts(experiment, scenario)
    layout = build_blueprint(experiment, parts, dataset.inputs.shape[1:]).layout
    return Learner(
        experiment.seed, experiment.training, to_device(parts, experiment.training.device), dataset.inputs, dataset.labels,
        dataset.scale, dataset.mean, dataset.std, partition.train, partition.test, layout,
    )  # fmt: skip
