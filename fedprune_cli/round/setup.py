"""What all rounds of a run share: the experiment, its world, its model's counted cost, and the state before round 1."""

from __future__ import annotations

import math
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
from fedprune_cli.learn.private import require_sample_gradients
from fedprune_cli.learn.prune import least_kept
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.learn.structured import Layout, find_channels, no_channels
from fedprune_cli.privacy.accounting import Budget, plan_budget
from fedprune_cli.privacy.ciphers import require_ciphers
from fedprune_cli.privacy.fixed import point_of
from fedprune_cli.privacy.secure import exchanged_bytes
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
        """Whether the server has to send masks, and the meter counts them. Who is sent only what it keeps of u cannot rank all of u."""
        meter = self.experiment.meter
        counted = meter.mask_overhead and self.experiment.allocator.prunes
        return counted and (meter.unicast or not self.experiment.pruner.derivable)

    def exchanged_bytes(self, num_devices: int) -> tuple[int, int]:
        """Returns the bytes of keys and shares that each of so many devices sends, and that all receive; none without a secure sum."""
        sums = self.experiment.privacy.secure and self.cost.shared_params and num_devices
        return exchanged_bytes(num_devices) if sums else (0, 0)

    def schedule(self, num_samples: int) -> tuple[LocalPhase, ...]:
        """Returns the local phases and steps, per round, of a device with `num_samples` training samples."""
        return self.experiment.training.schedule(self.experiment.method.phases(), num_samples)

    def personal_schedule(self, num_samples: int) -> tuple[LocalPhase, ...]:
        """Returns those of a frozen device, which trains its personalized part alone."""
        return self.experiment.training.schedule(personal_only(self.experiment.method.phases()), num_samples)


@dataclass(frozen=True)
class Setup:
    """What all rounds share. blueprint: the experiment and its model; batched: whether devices train side by side.

    budget: what may be learnt of the devices' data, None where it is not bounded.
    """

    blueprint: Blueprint
    scenario: Scenario
    initial: State
    batched: bool
    budget: Budget | None = None

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
    if experiment.privacy.dp == "example":
        require_sample_gradients(parts, scenario.dataset.inputs.shape[1:], experiment.model.name)
    budget = build_budget(blueprint, scenario)
    if experiment.privacy.secure:
        _require_sums(experiment, scenario, budget)
    side_by_side = batches(parts, experiment.training) and experiment.privacy.dp != "example"
    return Setup(blueprint, scenario, initial, side_by_side, budget)


def build_budget(blueprint: Blueprint, scenario: Scenario) -> Budget | None:
    """Returns the run's privacy budget: of the device, or of the samples of that device, of which each round tells most.

    The noise that follows from a budget lets it last for as many rounds as a device takes part in, on average where they are drawn. Where
    the draw is a secret, all rounds count, and each with the probability that the device is in it.
    """
    experiment = blueprint.experiment
    share = min((experiment.devices.per_round or scenario.num_devices) / scenario.num_devices, 1.0)
    drawn, secret = experiment.participation.rate or share, experiment.secret_draw
    rate, times = (drawn if secret else 1.0), 1
    if experiment.privacy.dp == "example":
        sizes = scenario.partition.train.sizes[: scenario.num_devices].tolist()
        schedules = {size: blueprint.schedule(size) for size in {*sizes}}
        phases = [(phase, size) for size, schedule in schedules.items() for phase in schedule if phase.steps]
        rate = max((phase.batch / size for phase, size in phases), default=1.0)
        times = max(sum(phase.steps for phase in schedule) for schedule in schedules.values())
    return plan_budget(
        experiment.privacy, rate, max(times, 1), math.ceil((1.0 if secret else drawn) * experiment.rounds)
    )


def _require_sums(experiment: Experiment, scenario: Scenario, budget: Budget | None) -> None:
    """Raises ConfigError where no secure sum could be made: before the first round, and not in the middle of a run."""
    require_ciphers()
    privacy, rate = experiment.privacy, experiment.participation.rate
    few = f"an entry is of at least privacy.least + privacy.spare = {privacy.keepers} devices"
    if scenario.num_devices < privacy.keepers:
        raise ConfigError(f"privacy.secure=true: {few}, there are {scenario.num_devices}")
    if rate is not None and rate * scenario.num_devices < privacy.keepers:
        come = f"{rate * scenario.num_devices:g} of {scenario.num_devices} take part on average"
        raise ConfigError(
            f"participation.rate={rate:g}: not with privacy.secure=true: {few}, {come}; let more take part"
        )
    together = experiment.devices.per_round or scenario.num_devices
    if 2 * privacy.needed(together) <= together + privacy.curious:
        could = f"with {privacy.needed(together)} of {together} devices asked in the end they could lay another's change open"
        raise ConfigError(f"privacy.curious={privacy.curious}: {could}; take fewer, or a larger privacy.threshold")
    sizes = scenario.partition.train.sizes[: scenario.num_devices].tolist()
    point_of(privacy, sizes, budget.one.noise if budget else None)


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
