"""Out of a run's last state, the model of one device: what the run's own test gave it, and nothing computed anew."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fedprune_cli import __version__
from fedprune_cli.errors import CheckpointError, ConfigError, one_line
from fedprune_cli.learn.client import Learner, Task, evaluate, train
from fedprune_cli.learn.kept import Whole
from fedprune_cli.learn.prune import Masks, masks_of_arrays
from fedprune_cli.round.evaluate import fresh_schedule, fresh_test, own_test
from fedprune_cli.round.setup import Setup, build_learner
from fedprune_cli.runs.life import reopen
from fedprune_cli.store import folder
from fedprune_cli.store.files import MAX_BYTES, read_bytes
from fedprune_cli.store.state import Array, State, ragged, same_form
from fedprune_cli.take_home.description import Description, Input, Origin, Sizes
from fedprune_cli.take_home.network import Network, as_plain, build_network, count_flops

SHARED = "shared"  # the word for a newcomer's model
LOOKS = 5  # at a state that another process replaces meanwhile


@dataclass(frozen=True)
class Finished:
    """A run whose models can be taken home: its setup, its last state, who kept what in it, and the SHA-256 of the state's file."""

    setup: Setup
    state: State
    masks: Masks
    state_sha256: str

    @property
    def names(self) -> tuple[str, ...] | None:
        """What the training devices are called, None where they have numbers only."""
        return self.setup.scenario.fleet.names


@dataclass(frozen=True)
class Taken:
    """A model that was taken: its network, and what is to be said of it."""

    network: Network
    description: Description


@dataclass(frozen=True)
class Samples:
    """Labelled samples that a newcomer trains its own part on: inputs [n, C, H, W] and labels [n]."""

    inputs: Array
    labels: Array


def open_run(run_dir: Path) -> Finished:
    """Returns a run with its last finished round, which need not be the last planned; raises CheckpointError naming what is wrong."""
    folder.check(run_dir)
    if folder.is_pruned(run_dir):
        raise CheckpointError(f"{run_dir}: its checkpoint was pruned, and with it the models")
    setup = reopen(run_dir)
    if setup.experiment.execution.remote:
        raise ConfigError(
            f"{run_dir}: a run on nodes: each has its own model's personalized part, and its data, and they are not here"
        )
    state, sha256 = _settled(run_dir)
    if not same_form(state, setup.initial):
        raise CheckpointError(f"{run_dir / folder.STATE}: damaged checkpoint (of another model or fleet)")
    if not state.round:
        raise CheckpointError(f"{run_dir}: no round is finished, there is no model yet; fedprune resume {run_dir}")
    layout, count = setup.blueprint.layout, setup.scenario.num_devices
    masks = masks_of_arrays(state.masks, layout, count)
    size = len(state.shared)
    whole = (np.rint((1 - state.slots["prune_ratio"]) * size) == size).all()
    if masks is None or (not state.masks and not whole):
        what = (
            "are of another model or fleet"
            if state.masks
            else "are not there: an older fedprune, which did not keep them, made the run"
        )
        raise CheckpointError(
            f"{run_dir}: the masks of round {state.round} {what}; make the run again: fedprune train with its config.yaml's values"
        )
    return Finished(setup, state, masks, sha256)


def _settled(run_dir: Path) -> tuple[State, str]:
    """Returns a run's last state and the SHA-256 of its file, also while another process goes on with the run."""
    for look in range(LOOKS):
        before = _sha256(run_dir)
        try:
            state = folder.read_whole_state(run_dir)
        except CheckpointError:
            if look == LOOKS - 1 or _sha256(run_dir) == before:
                raise
            continue
        if _sha256(run_dir) == before:
            return state, before
    raise CheckpointError(f"{run_dir}: another process replaces its state all the time; wait for it to end")


def _sha256(run_dir: Path) -> str:
    return hashlib.sha256(read_bytes(run_dir / folder.STATE, MAX_BYTES, CheckpointError)).hexdigest()


def find_device(run: Finished, asked: str) -> int:
    """Returns the device of a name, where devices have names, or of a number; raises ConfigError with what there is."""
    names, scenario = run.names or (), run.setup.scenario
    if asked in names:
        return names.index(asked)
    known, trained = len(scenario.partition.train), scenario.num_devices
    if asked.isascii() and asked.isdigit() and len(asked) < 10 and int(asked) < known:
        return int(asked)
    near = difflib.get_close_matches(asked, [*names, SHARED], n=1, cutoff=0.5)
    hint = f" Did you mean {one_line(near[0])!r}?" if near else ""
    fresh = f" ({'' if trained == known - 1 else f'{trained}..'}{known - 1} never trained)" if known > trained else ""
    called = f", or a name such as {one_line(names[0])!r}" if names else ""
    raise ConfigError(
        f"--device {asked}: there is no such device.{hint} Allowed: 0..{known - 1}{fresh}{called}, or {SHARED}"
    )


def take(run: Finished, asked: str, samples: Samples | None = None) -> Taken:
    """Returns the model of a device, or with `shared` of a newcomer, who trains its own part on `samples` where there is one.

    Raises ConfigError for a device that is not there, and where samples are needed and not given, or given and not needed.
    """
    if asked == SHARED and SHARED not in (run.names or ()):
        return _newcomers(run, samples)
    if samples is not None:
        raise ConfigError(f"--data: only a newcomer trains on it, with --device {SHARED}")
    return _devices(run, _learner(run), find_device(run, asked))


def take_all(run: Finished) -> Iterator[Taken]:
    """Yields the models of all devices that train, in order."""
    learner = _learner(run)
    for device in range(run.setup.scenario.num_devices):
        yield _devices(run, learner, device)


def _learner(run: Finished) -> Learner:
    return build_learner(run.setup.experiment, run.setup.scenario)


def _devices(run: Finished, learner: Learner, device: int) -> Taken:
    """Returns a device's model, by its test: what that leaves in the learner's model is what was tested."""
    trained = device < run.setup.scenario.num_devices
    task = own_test(run.state, run.masks, device) if trained else fresh_test(run.setup, run.state, device)
    score = evaluate(learner, task)
    taken = _taken(run, learner, int(run.masks[device].sum()) if trained else len(run.state.shared))
    called = run.names[device] if run.names and device < len(run.names) else str(device)
    return _said(
        taken,
        kind="trained" if trained else "fresh",
        device=device,
        called=called,
        correct=score.correct,
        total=score.total,
    )


def _newcomers(run: Finished, samples: Samples | None) -> Taken:
    """Returns what a device gets that joins after the run: u, and a personal part that it fine-tunes as the run's fresh devices do."""
    setup, state, experiment = run.setup, run.state, run.setup.experiment
    part = f"method={experiment.method.name} personalizes {experiment.method.personal_part}"
    if not len(state.shared):
        raise ConfigError(f"--device {SHARED}: {part}: nothing is shared")
    if not len(state.personal.initial) and samples is not None:
        raise ConfigError(f"--data: {part}: a newcomer has nothing to train, leave it out")
    if len(state.personal.initial) and samples is None:
        raise ConfigError(
            f"--device {SHARED}: {part}, which a newcomer has to train before its model predicts anything: give labelled samples with "
            "--data FILE"
        )
    learner, newcomer = _learner(run), len(setup.scenario.partition.train)
    task = Task("newcomer's training", state.round, newcomer, state.shared, setup.initial.personal.initial, Whole(), ())
    if samples is None:
        task.kept.load(learner.parts, learner.layout, task.shared, task.personal)
    else:
        task = replace(task, schedule=fresh_schedule(setup, len(samples.labels)))
        if not task.steps:
            raise ConfigError(f"--device {SHARED}: evaluation.fresh_steps is 0 in this run: a newcomer trains nothing")
        nobody = [np.zeros(0, dtype=np.int64)] * newcomer
        own = ragged([*nobody, np.arange(len(samples.labels))])
        learner = replace(learner, inputs=samples.inputs, labels=samples.labels, train=own)
        train(learner, task)
    return _said(_taken(run, learner, len(state.shared)), kind=SHARED, called=SHARED)


def _said(taken: Taken, **facts: str | int) -> Taken:
    """Returns the model with facts of its description."""
    said = replace(taken.description, **facts)  # type: ignore[arg-type]
    return replace(taken, description=said)


def describe_input(setup: Setup) -> Input:
    """Returns what the models of a run take."""
    dataset = setup.scenario.dataset
    channels, height, width = dataset.inputs.shape[1:]
    return Input(
        (channels, height, width),
        str(dataset.inputs.dtype),
        dataset.scale,
        dataset.mean,
        dataset.std,
        dataset.source.encoding,
    )


def label_names(setup: Setup) -> tuple[str, ...]:
    """Returns what the classes are called: their names, else their numbers."""
    dataset = setup.scenario.dataset
    return dataset.source.label_names or tuple(map(str, range(dataset.num_classes)))


def _taken(run: Finished, learner: Learner, kept: int) -> Taken:
    """Returns a copy of the model that the learner holds, described but for whose it is; kept: entries of u that are not dropped."""
    setup, experiment, cost = run.setup, run.setup.experiment, run.setup.blueprint.cost
    seen, labels = describe_input(setup), label_names(setup)
    weights = {name: param.detach().cpu().clone() for name, param in learner.parts.model.named_parameters()}
    network = build_network(experiment.model, len(labels), seen, weights)
    own = sum(weights[name].numel() for name, _ in learner.parts.names[len(learner.parts.shared_params) :])
    size = sum(value.numel() for value in weights.values())
    sizes = Sizes(
        shared=size - own,
        personal=own,
        kept=kept + own,
        dense=cost.shared_params + cost.personal_params,
        bytes=4 * size,
        flops=count_flops(network, seen),
    )
    origin = Origin(
        experiment.name, experiment.method.name, experiment.config_hash, experiment.seed, run.state.round, experiment.rounds,
        run.state_sha256, __version__, version("torch"),
    )  # fmt: skip
    model, precision = as_plain(experiment.model), experiment.training.precision
    return Taken(network, Description("", None, "", model, precision, labels, seen, sizes, origin, None, None))
