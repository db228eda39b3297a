"""A run's life: its folder is made, its rounds are run, it is found again, and others branch from it."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from omegaconf import DictConfig, OmegaConf, open_dict

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import branch_config
from fedprune_cli.config.experiment import Branch, Experiment
from fedprune_cli.config.inputs import ROOT
from fedprune_cli.errors import CheckpointError, ConfigError, FedpruneError
from fedprune_cli.execute import Executor, executor, ready
from fedprune_cli.plugins import PluginFile
from fedprune_cli.processor import processor
from fedprune_cli.round.setup import Setup, build_learner, prepare
from fedprune_cli.round.step import round_step
from fedprune_cli.runs.inputs import check_dataset, read_config
from fedprune_cli.runs.machine import another_processor
from fedprune_cli.runs.manifest import build_manifest, summarise
from fedprune_cli.store import folder, lock
from fedprune_cli.store.files import read_json
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.store.state import Saved, State, same_form
from fedprune_cli.track import check, following


class Site(Protocol):
    """Where the work of runs is done that this process cannot do: nodes that keep their data."""

    def executor(self, setup: Setup) -> AbstractContextManager[Executor]:
        """Yields the executor of a run."""

    def measured(self, record: RoundRecord) -> Mapping[str, object]:
        """Returns what was measured of the round that ended with this record, for timings.jsonl."""


def run(setup: Setup, run_dir: Path, *, wait: bool = False, site: Site | None = None) -> Iterator[RoundRecord]:
    """Continues the run in its folder to the last round; yields each record once it and its state are safe on disk.

    wait: for another process that is writing the run, instead of raising CheckpointError; site: where its work is done, None: here.
    """
    experiment = setup.experiment
    with lock.locked(run_dir, wait=wait):
        saved = folder.load(run_dir, experiment.config_hash)
        if not same_form(saved.state, setup.initial):
            raise CheckpointError(f"{run_dir / folder.STATE}: damaged checkpoint (of another model or fleet)")
        if warning := another_processor(run_dir):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        with following(experiment.tracking, run_dir) as log:
            for record in _remaining(setup, run_dir, saved, site):
                log(record)
                yield record
        folder.finish(run_dir, summarise(experiment, run_dir))


def _remaining(setup: Setup, run_dir: Path, saved: Saved, site: Site | None) -> Iterator[RoundRecord]:
    """Runs the rounds after a checkpoint; yields each one's record once it is on disk."""
    experiment = setup.experiment
    if saved.state.round >= experiment.rounds:
        return
    build = functools.partial(build_learner, experiment, setup.scenario)
    with site.executor(setup) if site else executor(experiment.execution, build, [__name__]) as workers:
        while saved.state.round < experiment.rounds:
            started = time.perf_counter()
            state, record = round_step(setup, saved.state, workers)
            wall_s = time.perf_counter() - started
            timing = {"round": state.round, "wall_s": wall_s, "processor": processor()}
            timing |= site.measured(record) if site else {}
            saved = folder.commit(run_dir, saved, state, {folder.RECORDS: record.as_json(), folder.TIMINGS: timing})
            yield record


def create(setup: Setup, config: DictConfig, run_dir: Path) -> None:
    """Makes the folder of a new run, holding its configuration, manifest and first state."""
    check(setup.experiment.tracking)
    if setup.experiment.branch:
        raise ConfigError("branch: is made from a run that is there, with `fedprune resume RUN_DIR KEY=VALUE`")
    if run_dir.exists():  # of another run: no command for this one would continue it
        check_holds(run_dir, setup.experiment)
    _have_what_it_needs(setup)
    folder.create(run_dir, _beginning(setup, config, setup.initial))


def _have_what_it_needs(setup: Setup) -> None:
    """Raises what the rounds would raise for want of processes or temporary space, while nothing is written yet."""
    ready(setup.experiment.execution, functools.partial(build_learner, setup.experiment, setup.scenario))


def _beginning(setup: Setup, config: DictConfig, state: State, origin: Path | None = None) -> folder.Beginning:
    """Returns what a run's folder begins with; paths in its configuration are made absolute, and small inputs are kept."""
    experiment = setup.experiment
    config = config.copy()
    if setup.experiment.privacy.none:  # then its section says nothing
        with open_dict(config):
            config.pop("privacy", None)
    for one in experiment.inputs:
        OmegaConf.update(config, one.key, os.path.abspath(one.path))
    if root := OmegaConf.select(config, ROOT):
        OmegaConf.update(config, ROOT, os.path.abspath(root))
    kept = {one.kept_as: one.content for one in experiment.inputs if one.kept_as and one.content is not None}
    sources = [one.source for one in experiment.chosen_plugins()]
    kept |= {file.kept_as: file.content for file in sources if isinstance(file, PluginFile)}
    return folder.Beginning(OmegaConf.to_yaml(config, resolve=True), build_manifest(setup), state, kept, origin)


def branch(run_dir: Path, overrides: Sequence[str]) -> Setup:
    """Makes the folder of a run that goes on from where the one in `run_dir` is, for longer or under another deadline.

    Returns its setup. The new run's identity says where it comes from; the old one stays as it is. Raises CheckpointError or ConfigError.
    """
    setup = reopen(run_dir)
    state = folder.read_whole_state(run_dir)
    if not state.round:
        raise CheckpointError(f"{run_dir}: no round is finished, there is nothing to branch from")
    old = setup.experiment
    config = branch_config(read_config(run_dir), overrides, Branch(f"{old.config_hash}-s{old.seed}", state.round))
    new = prepare(build_experiment(config))
    folder.create(new.experiment.run_dir, _beginning(new, config, state, run_dir))
    return new


def begin_or_reopen(config: DictConfig) -> Setup:
    """Returns the setup of the run that a configuration asks for, whose folder is made unless it is there.

    Raises CheckpointError when the folder holds another run.
    """
    experiment = build_experiment(config)
    run_dir = experiment.run_dir
    if not run_dir.exists():
        setup = prepare(experiment)
        try:
            create(setup, config, run_dir)
        except FedpruneError:
            if not run_dir.exists():  # else another process made it in the meantime
                raise
        else:
            return setup
    check_holds(experiment.run_dir, experiment)
    return _same_world(run_dir, experiment)


def is_done(experiment: Experiment) -> bool:
    """Whether the run that an experiment asks for is finished; raises CheckpointError when its folder is damaged or holds another one."""
    if not experiment.run_dir.exists():
        return False
    check_holds(experiment.run_dir, experiment)
    return folder.is_finished(experiment.run_dir)


def check_holds(run_dir: Path, experiment: Experiment) -> None:
    """Raises CheckpointError when a folder holds another run than the experiment's."""
    folder.check(run_dir, folder.MANIFEST)
    manifest = read_json(run_dir / folder.MANIFEST, CheckpointError)
    for key, asked in (("config_hash", experiment.config_hash), ("seed", experiment.seed)):
        if manifest.get(key) != asked:
            held = f"{key} {manifest.get(key)!r}, not {asked!r}"
            raise CheckpointError(f"{run_dir}: holds another run ({held}); choose another folder with out=DIR")


def reopen(run_dir: Path) -> Setup:
    """Returns the setup that a run folder was made with; raises CheckpointError naming what differs."""
    folder.check(run_dir, folder.CONFIG, folder.MANIFEST)
    try:
        experiment = build_experiment(read_config(run_dir))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the YAML parser say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{run_dir / folder.CONFIG}: {reason}") from None
    return _same_world(run_dir, experiment)


def _same_world(run_dir: Path, experiment: Experiment) -> Setup:
    """Returns the setup of an experiment that a run folder was made with; raises CheckpointError naming what differs by now."""
    manifest = read_json(run_dir / folder.MANIFEST, CheckpointError)
    check_dataset(experiment, manifest)
    setup = prepare(experiment)
    now = build_manifest(setup)
    for key in sorted(now.keys() - {"versions"}, key=lambda key: (key != "config", key)):
        if now[key] != manifest.get(key):
            differs = f"made with another {_where(key, now[key], manifest.get(key))} than this machine gives"
            raise CheckpointError(f"{run_dir}: {differs}; resume it where it was made")
    return setup


def _where(key: str, now: object, then: object) -> str:
    """Returns the dotted key at which two values of a manifest differ."""
    if not isinstance(now, Mapping) or not isinstance(then, Mapping):
        return key
    inner = next((one for one in now if now[one] != then.get(one)), "")
    return f"{key}.{inner}" if inner else key


def serially(setup: Setup) -> Setup:
    """Returns the setup of the same run in this process alone, for a run that shares the machine with others."""
    experiment = setup.experiment
    serial = replace(experiment, execution=replace(experiment.execution, kind="serial", workers=None))
    return replace(setup, blueprint=replace(setup.blueprint, experiment=serial))
