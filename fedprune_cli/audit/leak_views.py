"""What the server sees of a device's update: as the run sends it, and as it would be sent whole, pruned, rounded, summed or with noise."""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.client import Learner, Task, train
from fedprune_cli.learn.models import build_model
from fedprune_cli.learn.parts import Parts, split_model
from fedprune_cli.learn.prune import Masks, build_masks
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.learn.structured import no_channels
from fedprune_cli.rng import stream
from fedprune_cli.round.setup import Setup, build_learner
from fedprune_cli.store.state import Array, State, ragged
from fedprune_cli.wire.quantize import BITS_PER_PARAM

RATIOS, SUMS, EPSILONS = (0.5, 0.8, 0.9), (3, 5, 20), (8.0, 3.0, 1.0)
DELTA = 1e-3  # of the noise's epsilon
WHAT_IF_BITS = 8  # of a run that rounds nothing


@dataclass(frozen=True)
class View:
    """How an update is seen. whole: the personal part is sent as well; ratio: what is pruned, None for what the device last pruned;

    bits: of a value; devices: how many are summed, the attacked one among them; epsilon: of the run's Gaussian noise, of which the
    device adds its share, as it would under a secure sum of all devices; None for no noise.
    """

    name: str
    whole: bool = False
    ratio: float | None = 0.0
    bits: int = BITS_PER_PARAM
    devices: int = 1
    epsilon: float | None = None


@dataclass(frozen=True)
class Case:
    """What an update is of. samples: how many, None for the device's own round with all of its steps and batches; steps: on them."""

    samples: int | None
    steps: int

    @property
    def name(self) -> str:
        """What it is called in a table."""
        if self.samples is None:
            return "own round"
        return f"{self.samples} sample{'s' * (self.samples > 1)}" + f", {self.steps} steps" * (self.steps > 1)

    @property
    def key(self) -> tuple[int, int]:
        """What tells its random streams from those of others."""
        return self.samples or 0, self.steps


@dataclass(frozen=True)
class Scene:
    """The round that would come next in a run, with one device under attack. bits: of a value in its last round; seed: of all draws."""

    setup: Setup
    state: State
    bits: int
    device: int
    seed: int

    @functools.cached_property
    def learner(self) -> Learner:
        """What does any device's work, as the run does it."""
        return build_learner(self.setup.experiment, self.setup.scenario)

    @functools.cached_property
    def open_learner(self) -> Learner:
        """The same with nothing personal."""
        experiment, dataset = self.setup.experiment, self.setup.scenario.dataset
        parts = split_model(
            build_model(experiment.model, dataset.inputs.shape[1:], dataset.num_classes, experiment.seed), "none"
        )
        return replace(self.learner, parts=parts, layout=no_channels(parts))

    @functools.cached_property
    def open_state(self) -> State:
        """The same state with nothing personal: u and the attacked device's v in one vector."""
        parts = self.learner.parts
        own = np.concatenate([self.state.shared, self.state.personal[self.device]])
        cuts = np.split(own, np.cumsum([size for _, size in parts.names])[:-1])
        piece = {name: cut for (name, _), cut in zip(parts.names, cuts, strict=True)}
        whole = np.concatenate([piece[name] for name, _ in self.open_learner.parts.names])
        nothing = np.zeros(0, dtype=np.float32)
        personal = replace(
            self.state.personal, initial=nothing, place=np.full(len(self.state.personal), -1), stored=nothing, new={}
        )
        return replace(self.state, shared=whole, personal=personal)

    def cast(self, view: View) -> tuple[Learner, State]:
        """Returns who does the work of a view, and from which state."""
        return (self.open_learner, self.open_state) if view.whole else (self.learner, self.state)

    def masks(self, view: View) -> Masks:
        """Returns what the devices keep, by the run's own pruner."""
        learner, state = self.cast(view)
        count, experiment = self.setup.scenario.num_devices, self.setup.experiment
        ratio = state.slots["prune_ratio"] if view.ratio is None else np.full(count, view.ratio)
        return build_masks(experiment.pruner, state, ratio, experiment.seed, learner.layout)


@dataclass(frozen=True)
class Seen:
    """An update as the server sees it. gradient: what it says of the steps' mean gradient, float64 [U], 0 where unknown; known: bool [U];

    start: u m as it was sent out, float32 [U]; parts: the model; samples: the attacked device's, that the update is of; everybody:
    those of all devices in it; steps: on u.
    """

    parts: Parts
    gradient: Array
    known: Array
    start: Array
    samples: Array
    everybody: Array
    steps: int


def find_trained(setup: Setup, asked: str) -> int:
    """Returns the training device of a name, where devices have names, or of a number; raises ConfigError with what there is."""
    count = setup.scenario.num_devices
    names = (setup.scenario.fleet.names or ())[:count]
    if asked in names:
        return names.index(asked)
    if asked.isascii() and asked.isdigit() and len(asked) < 10 and int(asked) < count:
        return int(asked)
    near = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"--device {asked}: no device of this name or number sends an update.{hint} Allowed: 0..{count - 1}"
    )


def views_of(scene: Scene) -> tuple[View, ...]:
    """Returns how the updates of a run are looked at: each way once."""
    setup, state = scene.setup, scene.state
    count, experiment = setup.scenario.num_devices, setup.experiment
    ratio, bits = float(state.slots["prune_ratio"][scene.device]), scene.bits
    personal = experiment.method.personal_part
    sums = [n for n in SUMS if n <= count]
    rounded = sorted({b for b in (*experiment.payload.bits, bits) if b < BITS_PER_PARAM}) or [WHAT_IF_BITS]
    prunes = bool(np.any(state.slots["prune_ratio"] > 0))
    kept = len(state.personal.initial) > 0
    return (
        *([View("nothing personal", whole=True)] if kept else []),
        View(f"personal: {personal}" if kept else "dense"),
        *([View(f"as run: {ratio:.2f}, {bits} bits", ratio=None, bits=bits)] if ratio or bits < BITS_PER_PARAM else []),
        *(View(f"pruned {r:g}", ratio=r) for r in RATIOS),
        *(View(f"{b} bits", bits=b) for b in rounded),
        *(View(f"sum of {n}", devices=n) for n in sums),
        *([View(f"sum of {sums[-1]}, as pruned", ratio=None, devices=sums[-1])] if prunes and sums else []),
        *(View(f"noise, epsilon {e:g}", epsilon=e) for e in EPSILONS),
    )


def noise_multiplier(epsilon: float, rounds: int, delta: float = DELTA) -> float:
    """Returns sigma of the Gaussian noise sigma C that gives `rounds` rounds, with everybody in all of them, (epsilon, delta).

    By zero-concentrated privacy: rho = rounds / (2 sigma^2), epsilon = rho + 2 sqrt(rho ln(1/delta)) (Bun and Steinke, TCC 2016): an
    upper bound of what is spent, so a little more noise than needed.

    >>> round(noise_multiplier(8.0, 20), 2)
    2.57
    """
    root = math.sqrt(math.log(1 / delta))
    rho = (math.sqrt(root**2 + epsilon) - root) ** 2
    return math.sqrt(rounds / (2 * rho))


def observe(scene: Scene, view: View, masks: Masks, case: Case, trial: int) -> Seen:
    """Returns what the server sees; masks: of the view. Samples and devices of a trial are the same ones for all views."""
    learner, state = scene.cast(view)
    size = len(state.shared)
    total, weight = np.zeros(size), np.zeros(size)
    everybody, steps = [], 1
    for device in [scene.device, *_others(scene, trial)[: view.devices - 1]]:
        samples = _samples(scene, case, trial, device)
        schedule = _schedule(scene, view, case, len(samples), device)
        steps = sum(phase.steps for phase in schedule if phase.kind != "personal")
        mask = masks[device]
        total[mask] += len(samples) * _change(learner, Task(
            "attacked update", state.round, device, state.shared, state.personal[device], masks.kept_by(device), schedule, view.bits,
        ), samples, mask)  # fmt: skip
        weight[mask] += len(samples)
        everybody.append(samples)
    known = weight > 0
    change = np.divide(total, weight, out=total, where=known)
    if view.epsilon is not None:
        change[known] += _noise(scene, view.epsilon, case, trial, change)[known]
    start = state.shared * known
    config = scene.setup.experiment.training
    gradient = np.where(known, -change / (config.lr * max(steps, 1)) - config.weight_decay * start, 0.0)
    return Seen(learner.parts, gradient, known, start, everybody[0], np.concatenate(everybody), steps)


def _change(learner: Learner, task: Task, samples: Array, mask: Array) -> Array:
    """Returns by how much the entries that a device sends differ from those that it was sent, float64, after its work on `samples`."""
    nobody = np.zeros(0, dtype=np.int64)
    own = ragged([samples if device == task.device else nobody for device in range(len(learner.train))])
    update = train(replace(learner, train=own), task)
    return update.shared.astype(np.float64) - task.shared[mask]


def _noise(scene: Scene, epsilon: float, case: Case, trial: int, change: Array) -> Array:
    """Returns a device's share of the noise, float64 [U]: sigma C / sqrt(devices), C being the change's own norm: nothing is clipped."""
    setup = scene.setup
    sigma = noise_multiplier(epsilon, setup.experiment.rounds) / math.sqrt(setup.scenario.num_devices)
    rng = stream(scene.seed, "leak_noise", trial, *case.key)
    return rng.normal(0.0, sigma * float(np.linalg.norm(change)), len(change))


def _others(scene: Scene, trial: int) -> list[int]:
    """Returns the other devices in the order in which they are summed with the attacked one."""
    others = [device for device in range(scene.setup.scenario.num_devices) if device != scene.device]
    return stream(scene.seed, "leak_others", trial).permutation(others).tolist()


def _samples(scene: Scene, case: Case, trial: int, device: int) -> Array:
    own = scene.setup.scenario.partition.train[device]
    if case.samples is None:
        return own
    rng = stream(scene.seed, "leak_samples", trial, *case.key, device)
    return rng.choice(own, min(case.samples, len(own)), replace=False)


def _schedule(scene: Scene, view: View, case: Case, samples: int, device: int) -> tuple[LocalPhase, ...]:
    """Returns the device's steps: on all of the samples at once, or those of its own round, on v too unless nothing is personal."""
    if case.samples is not None:
        return (LocalPhase("shared", samples * case.steps, samples),)
    phases = scene.setup.schedule(device)
    if not view.whole:
        return phases
    return tuple(replace(phase, kind="shared") for phase in phases if phase.kind != "personal")
