"""Tracking: each round's figures also go where a team already looks. Each is a frozen dataclass of its configuration.

A tracker never changes a run, and never ends one. It is given every round that is on disk, so that after any interruption it holds
each round once.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, cast

from fedprune_cli.errors import CheckpointError, ConfigError, require
from fedprune_cli.store import folder
from fedprune_cli.store.files import Plain, read_json
from fedprune_cli.store.record import RoundRecord

Log = Callable[[RoundRecord], None]
FOLDER = "tracking"  # in the run's folder
PARAMS_A_BATCH = 100  # MLflow's limit


class Tracking(Protocol):
    """A tracking plug-in."""

    @property
    def name(self) -> str: ...

    def follow(self, run_dir: Path) -> AbstractContextManager[Log]:
        """Returns a context in which the tracker has every round on disk, and a function that gives it the next one's record."""


@dataclass(frozen=True)
class NoTracking:
    """The run's folder is the only record."""

    name: str

    @contextlib.contextmanager
    def follow(self, run_dir: Path) -> Iterator[Log]:
        yield lambda record: None


@dataclass(frozen=True)
class TensorBoard:
    """Event files, begun anew from the records whenever the run is. Their clock, the axis `relative`, is the simulated one."""

    name: str

    @contextlib.contextmanager
    def follow(self, run_dir: Path) -> Iterator[Log]:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        manifest, records = read(run_dir)
        with SummaryWriter(str(fresh(run_dir / FOLDER / self.name))) as writer:

            def log(record: RoundRecord) -> None:
                for key, value in figures(record).items():
                    writer.add_scalar(key, value, record.round, walltime=record.simulated_s)
                writer.flush()

            of_run = {"method": manifest["method"], "seed": manifest["seed"]}
            for summary in hparams(of_run | parameters(manifest), {"accuracy": None}):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(summary)
            for record in records:
                log(record)
            yield log


@dataclass(frozen=True)
class WandB:
    """Weights & Biases. Offline, the run's file is begun anew from the records; online, the server says which rounds it has."""

    name: str
    project: str
    entity: str | None
    mode: str

    def __post_init__(self) -> None:
        require(self.mode in ("offline", "online"), "mode", self.mode, "'offline' or 'online'")

    @contextlib.contextmanager
    def follow(self, run_dir: Path) -> Iterator[Log]:
        import wandb

        manifest, records = read(run_dir)
        fresh(run_dir / FOLDER / "wandb")  # as wandb calls its own folder
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=str(run_dir / FOLDER),
            id=run_id(manifest),
            resume="allow" if self.mode == "online" else None,
            group=manifest["experiment"],
            tags=[manifest["method"], f"seed {manifest['seed']}"],
            config=manifest["config"],
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
        first, exit_code = run.step if run.resumed else 0, 1

        def log(record: RoundRecord) -> None:
            if record.round >= first:
                run.log(figures(record), step=record.round, commit=True)

        try:
            for record in records:
                log(record)
            yield log
            exit_code = 0
        finally:
            run.finish(exit_code=exit_code)


@dataclass(frozen=True)
class MLflow:
    """MLflow, in the run's folder or at `uri`. A run is found again by its tag; its clock is the simulated one."""

    name: str
    uri: str | None

    @contextlib.contextmanager
    def follow(self, run_dir: Path) -> Iterator[Log]:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        manifest, records = read(run_dir)
        (run_dir / FOLDER).mkdir(exist_ok=True)
        with _turn(run_dir.parent):  # two runs of a sweep that make the same database at once would fail
            client = MlflowClient(self.uri or f"sqlite:///{(run_dir / FOLDER / 'mlflow.db').resolve()}")
        with contextlib.suppress(MlflowException):  # it exists, or the next line says what is wrong
            client.create_experiment(manifest["experiment"])
        where = client.get_experiment_by_name(manifest["experiment"]).experiment_id
        of_run = {"method": manifest["method"], "seed": str(manifest["seed"]), "fedprune_run": run_id(manifest)}
        found = client.search_runs([where], f"tags.fedprune_run = '{run_id(manifest)}'")
        run = found[0] if found else client.create_run(where, tags=of_run, run_name=run_id(manifest))
        at = run.info.run_id
        done = {(key, metric.step) for key in run.data.metrics for metric in client.get_metric_history(at, key)}

        def log(record: RoundRecord) -> None:
            clock_ms, step = round(1000 * record.simulated_s), record.round
            new = {key: value for key, value in figures(record).items() if (key, step) not in done}
            if new:
                client.log_batch(at, metrics=[Metric(key, value, clock_ms, step) for key, value in new.items()])

        status = "KILLED"
        client.update_run(at, status="RUNNING")
        try:
            params = [Param(key, _text(value)) for key, value in parameters(manifest).items()]
            for start in range(0, len(params), PARAMS_A_BATCH):
                client.log_batch(at, params=params[start : start + PARAMS_A_BATCH])
            for record in records:
                log(record)
            yield log
            status = "FINISHED"
        finally:
            client.set_terminated(at, status)


TRACKERS: dict[str, type[Tracking]] = {
    "none": NoTracking,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check(tracking: Tracking) -> None:
    """Raises ConfigError when the package of the tracking, which is its name and its extra's, is not installed."""
    found = None if tracking.name == "none" else importlib.util.find_spec(tracking.name)
    if tracking.name != "none" and (found is None or found.origin is None):  # no origin: just a folder of that name
        raise ConfigError(f"tracking={tracking.name} needs its extra: pip install 'fedprune[{tracking.name}]'")


@contextlib.contextmanager
def following(tracking: Tracking, run_dir: Path) -> Iterator[Log]:
    """Yields the function that gives the tracker a round's record; raises ConfigError when its package is missing.

    Whatever else goes wrong with it is one warning on stderr: the run goes on without.
    """
    check(tracking)
    log: Log | None = None
    broken = False

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        nonlocal broken
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the run's results
                yield
        except Exception as error:
            if not broken:
                reason = (str(error).splitlines() or [""])[0] or type(error).__name__
                again = f"the run goes on; `fedprune resume {run_dir}` tracks what is missing"
                print(f"warning: tracking={tracking.name} stopped: {reason}; {again}", file=sys.stderr, flush=True)
            broken = True

    def show(record: RoundRecord) -> None:
        if log and not broken:
            with guard():
                log(record)

    def close(error: BaseException | None) -> None:
        if log:
            with guard():
                tracker.__exit__(type(error) if error else None, error, None)

    tracker = tracking.follow(run_dir)
    with guard():
        log = tracker.__enter__()
    try:
        yield show
    except BaseException as error:
        close(error)
        raise
    close(None)


# --- what trackers are told -----------------------------------------------------------------------------------------


class Manifest(TypedDict):
    """What a run was made of, as far as trackers are told."""

    experiment: str
    method: str
    seed: int
    config_hash: str
    config: Mapping[str, Plain]


def read(run_dir: Path) -> tuple[Manifest, list[RoundRecord]]:
    """Returns the run's manifest, and the records of its finished rounds."""
    manifest = read_json(run_dir / folder.MANIFEST, CheckpointError)
    return cast(Manifest, manifest), folder.read_records(run_dir)


def run_id(manifest: Manifest) -> str:
    """Returns what a run is called everywhere: its configuration's hash and its seed."""
    return f"{manifest['config_hash']}-s{manifest['seed']}"


def figures(record: RoundRecord) -> dict[str, int | float]:
    """Returns the record's numbers by key: not the round's, nor what is null, text or by device."""
    return {key: value for key, value in record.figures().items() if isinstance(value, int | float) and key != "round"}


def parameters(manifest: Manifest) -> dict[str, str | int | float]:
    """Returns the configuration with dotted keys; what is neither text nor a number is JSON."""

    def flat(values: Mapping[str, Plain], prefix: str) -> Iterator[tuple[str, str | int | float]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            elif isinstance(value, str | int | float) and not isinstance(value, bool):
                yield f"{prefix}{key}", value
            else:
                yield f"{prefix}{key}", json.dumps(value)

    return dict(flat(manifest["config"], ""))


def fresh(path: Path) -> Path:
    """Returns the folder, made anew and empty."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Waits until no other process has its turn in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _text(value: str | int | float) -> str:
    return value if isinstance(value, str) else json.dumps(value)
