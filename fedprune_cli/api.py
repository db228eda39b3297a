"""fedprune from Python and notebooks: the same code as the command line, and values instead of files and screens.

>>> from fedprune_cli import api
>>> experiment = api.compose("data=digits", "rounds=3", "devices.count=4")
>>> experiment.config_hash == api.compose("rounds=3", "devices.count=4").config_hash
True

    run = api.run(experiment)              # trains, or reads the run where it is finished
    run.rounds                             # a pandas DataFrame, a row a round
    run.figures()["accuracy"]              # a matplotlib figure

What a user can mend is raised as an `errors.FedpruneError`, whose text is the line that the command line prints.
"""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune_cli.errors import ConfigError, FedpruneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from omegaconf import DictConfig
    from pandas import DataFrame

    from fedprune_cli.config.experiment import Experiment
    from fedprune_cli.many.one import Display
    from fedprune_cli.many.side_by_side import Failure, Member
    from fedprune_cli.report.allocation import Answer
    from fedprune_cli.report.comparison import Comparison
    from fedprune_cli.report.read import Run
    from fedprune_cli.report.tables import Rows
    from fedprune_cli.round.setup import Setup

__all__ = [
    "Allocated", "ComparedRuns", "Composed", "FedpruneError", "FinishedRun", "allocate", "compare", "compose", "load", "plugin", "resume",
    "run",
]  # fmt: skip


@dataclass(frozen=True)
class Composed:
    """A checked experiment: `experiment` holds its parts, `yaml` the configuration that a run folder keeps."""

    experiment: Experiment
    yaml: str

    @property
    def config_hash(self) -> str:
        """The first 12 hexadecimal digits of its identity's SHA-256: the same experiment has the same."""
        return self.experiment.config_hash

    @property
    def run_dir(self) -> Path:
        """Where its run is kept."""
        return self.experiment.run_dir


def plugin(*files: Path | str) -> None:
    """Gives this process the parts in files of one's own, which are run, in place of those given before: the command line's --plugin.

    Raises ConfigError for a file that cannot be run.
    """
    from fedprune_cli import plugins

    plugins.give([plugins.read(Path(file)) for file in files])


def compose(*overrides: str, config_dir: Path | str | None = None) -> Composed:
    """Returns the experiment that Hydra `overrides` select, as `fedprune train` does; config_dir: a folder of further YAML files.

    Raises ConfigError naming the key, its value and what is allowed.
    """
    from omegaconf import OmegaConf

    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config

    config = compose_config(overrides, None if config_dir is None else Path(config_dir))
    return Composed(build_experiment(config), OmegaConf.to_yaml(config, resolve=True))


def run(experiment: Composed, *, show: bool = False) -> FinishedRun:
    """Returns the finished run of an experiment: one that is there is read, an interrupted one continued, and else it is trained.

    show: say on stderr how far it is. Raises CheckpointError when its folder holds another run, and what training may raise.
    """
    from fedprune_cli.runs.life import begin_or_reopen, is_done

    if not is_done(experiment.experiment):
        _finish(begin_or_reopen(_config(experiment.yaml)), experiment.run_dir, show=show)
    return load(experiment.run_dir)


def resume(run_dir: Path | str, *overrides: str, show: bool = False) -> FinishedRun:
    """Returns a run after its remaining rounds; with overrides (rounds, deadline.*, out) a branch of it, which is another run.

    Raises CheckpointError when the folder is none of a run, is damaged, or cannot be continued here.
    """
    from fedprune_cli.runs.life import branch, reopen

    setup = branch(Path(run_dir), overrides) if overrides else reopen(Path(run_dir))
    where = setup.experiment.run_dir if overrides else Path(run_dir)
    _finish(setup, where, show=show)
    return load(where)


def _config(yaml: str) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf

    return DictConfig(OmegaConf.create(yaml))


def _finish(setup: Setup, run_dir: Path, *, show: bool) -> None:
    from fedprune_cli.many.one import run_to_end

    run_to_end(setup, run_dir, _display(show))


def _display(show: bool) -> Display:
    from fedprune_cli.many.one import HIDDEN, SHOWN

    return SHOWN if show else HIDDEN


@dataclass(frozen=True)
class FinishedRun:
    """What a run left in its folder, as far as it got: `rounds` and `devices` as data frames, figures, and the facts in its files."""

    path: Path
    content: Run

    @property
    def rounds(self) -> DataFrame:
        """A row a round, with the figures of docs/run-folder.md; NaN where a figure does not exist. Needs pandas."""
        from fedprune_cli.report.tables import round_table

        return _frame(round_table(self.content))

    @property
    def devices(self) -> DataFrame:
        """A row a device and round. Needs pandas."""
        from fedprune_cli.report.tables import device_table

        return _frame(device_table(self.content))

    @property
    def finished(self) -> bool:
        """Whether it has had its last round."""
        return self.content.summary is not None

    @property
    def summary(self) -> Mapping[str, object] | None:
        """summary.json, None while the run is unfinished."""
        return self.content.summary

    @property
    def manifest(self) -> Mapping[str, object]:
        """manifest.json: identity, versions, data, model."""
        return self.content.manifest

    def figures(self) -> dict[str, Figure]:
        """Returns the report's figures by name: accuracy, latency, allocation, convergence, partition."""
        from fedprune_cli.report.run import drawings

        return {name: drawing.figure() for name, drawing in drawings(self.content).items()}

    def facts(self) -> list[list[str]]:
        """Returns the figures of the run as a whole, each with its name, in words."""
        from fedprune_cli.report.run import facts

        return facts(self.content)

    def _repr_html_(self) -> str:
        from fedprune_cli.report.page import html_table

        title = f"{self.content.method}, seed {self.content.seed}"
        return f"<b>{html.escape(title)}</b>{html_table(['figure', 'value'], self.facts())}"


def load(run_dir: Path | str) -> FinishedRun:
    """Returns a run's content; raises CheckpointError when the folder is none of a run or damaged, or no round was tested yet."""
    from fedprune_cli.report.read import read_run

    return FinishedRun(Path(run_dir), read_run(Path(run_dir)))


def _frame(table: Rows) -> DataFrame:
    headers, rows = table
    if importlib.util.find_spec("pandas") is None:
        raise ConfigError(
            "data frames need pandas: pip install 'fedprune[notebook]'; `fedprune rounds RUN` prints the same as CSV"
        )
    import pandas as pd

    return pd.DataFrame(rows, columns=headers)


@dataclass(frozen=True)
class ComparedRuns:
    """Runs on the same data, devices and channel draws: `runs` by method or arm, in the order of the seeds, and what each gains."""

    content: Comparison

    @property
    def runs(self) -> dict[str, tuple[FinishedRun, ...]]:
        """The runs."""
        return {arm: tuple(FinishedRun(one.path, one) for one in of) for arm, of in self.content.runs.items()}

    @property
    def headline(self) -> str:
        """The answer in words."""
        from fedprune_cli.report.comparison import headline

        return headline(self.content)

    @property
    def table(self) -> DataFrame:
        """A row a method and quantity: the mean over seeds, half a 95 % interval (NaN for one seed), and how many seeds. Needs pandas."""
        rows: list[list[object]] = [
            [arm, quantity, *((None, None, 0) if of is None else (of.mean, of.half_width, of.count))]
            for arm, estimates in self.content.figures.items()
            for quantity, of in estimates.items()
        ]
        return _frame((["method", "quantity", "mean", "half_interval", "seeds"], rows))

    def figures(self) -> dict[str, Figure]:
        """Returns the comparison's figures by name."""
        from fedprune_cli.report.comparison_page import drawings

        return {name: drawing.figure() for name, drawing in drawings(self.content).items()}

    def _repr_html_(self) -> str:
        from fedprune_cli.report.comparison_page import comparison_table
        from fedprune_cli.report.page import html_table

        table = comparison_table(self.content)
        return f"<p>{html.escape(self.headline)}</p>{html_table(table.headers, table.rows)}"


def compare(
    *overrides: str,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    config_dir: Path | str | None = None,
    jobs: int = 1,
    show: bool = False,
) -> ComparedRuns:
    """Returns methods, or the arms of an experiment, on the same seeds, as `fedprune compare` runs them: what is finished is read.

    jobs: runs at the same time, each in a process of its own; a script then needs `if __name__ == "__main__":`. Raises the first
    run's failure, with the exit code that it would have; the others go on, and are there the next time. Where the experiment tunes its
    arms, each is compared at the setting that it took.
    """
    from fedprune_cli.many.compared import build_members, read_contest
    from fedprune_cli.many.tuning import read_tuning, tune
    from fedprune_cli.report.comparison import compare as build
    from fedprune_cli.report.read import read_run

    if jobs < 1:
        raise ConfigError(f"jobs={jobs}: must be at least 1")
    names = None if methods is None else ",".join(methods)
    contest = read_contest(overrides, None if config_dir is None else Path(config_dir), names, seeds)
    if tuning := read_tuning(contest):
        contest, _ = tune(contest, tuning, lambda members: _run_members(members, jobs, show=show))
    members = build_members(contest)
    if failures := _run_members(members, jobs, show=show):
        error = FedpruneError(str(failures[0]))
        error.exit_code = failures[0].exit_code
        raise error
    return ComparedRuns(build([read_run(member.run_dir) for member in members], [member.arm for member in members]))


def _run_members(members: Sequence[Member], jobs: int, *, show: bool) -> list[Failure]:
    from fedprune_cli.many.compared import unfinished
    from fedprune_cli.many.side_by_side import run_members, run_one_by_one

    left = unfinished(members)
    ended = run_members(left, jobs) if jobs > 1 else run_one_by_one(left, _display(show))
    return [failure for _, failure in ended if failure is not None]


@dataclass(frozen=True)
class Allocated:
    """One round's allocation: `answer` is what `fedprune allocate --json` prints."""

    answer: Answer

    @property
    def devices(self) -> DataFrame:
        """A row a device: pruning ratio, bandwidth, rate, latency, which limit binds. Needs pandas."""
        rows: list[dict[str, object]] = [{**device} for device in self.answer["devices"]]
        headers = list(rows[0]) if rows else []
        return _frame((headers, [list(row.values()) for row in rows]))

    def _repr_html_(self) -> str:
        from fedprune_cli.report.allocation import allocation_table
        from fedprune_cli.report.page import html_table

        table = allocation_table(self.answer)
        return html_table(table.headers, table.rows)


def allocate(experiment: Composed, *, devices: Path | str | None = None) -> Allocated:
    """Returns every device's pruning ratio and bandwidth in the first round, without training; devices: a CSV table of others.

    Another objective is another allocator: compose("allocator=minlatency") and compose("allocator=minmax"). Raises InfeasibleError when
    the deadline cannot be met and the policy is `fail`.
    """
    from fedprune_cli.report.allocation import answer
    from fedprune_cli.round.first import allocate_first_round

    first = allocate_first_round(experiment.experiment, None if devices is None else Path(devices))
    return Allocated(answer(first, of_several=len(experiment.experiment.payload.bits) > 1))
