"""One run from where it is to its end: the remaining rounds, then its report. Whoever runs one run or many runs them by this."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  # reports are drawn with it: whether it can be loaded is known before a run begins

from fedprune_cli import plugins, terminal
from fedprune_cli.interrupt import NOTHING, safe
from fedprune_cli.report.run import write_report
from fedprune_cli.round.setup import Setup
from fedprune_cli.runs.life import Site, run
from fedprune_cli.store.record import RoundRecord


@dataclass(frozen=True)
class Display:
    """How a run is shown while it goes on.

    progress: (title, rounds) -> a function that shows each record; status: what is done meanwhile, in words; title: what the run is
    called, its method when empty.
    """

    progress: Callable[[str, int], AbstractContextManager[Callable[[RoundRecord], None]]]
    status: Callable[[str], AbstractContextManager[None]]
    title: str = ""


@contextlib.contextmanager
def _unseen(title: str, rounds: int) -> Iterator[Callable[[RoundRecord], None]]:
    yield lambda record: None


@contextlib.contextmanager
def _unsaid(text: str) -> Iterator[None]:
    yield


SHOWN = Display(terminal.progress, terminal.status)
HIDDEN = Display(_unseen, _unsaid)


@contextlib.contextmanager
def resumable(run_dir: Path) -> Iterator[None]:
    """While inside, an interruption says how this run is continued, once there is something to continue."""
    with safe(
        lambda: (
            f"every finished round is safe: {shlex.join(['fedprune', 'resume', str(run_dir), *plugins.options()])}"
            if run_dir.exists()
            else NOTHING
        )
    ):
        yield


def run_to_end(
    setup: Setup, run_dir: Path, display: Display = HIDDEN, *, wait: bool = False, site: Site | None = None
) -> Path:
    """Takes the begun run in `run_dir` to its last round and writes its report; returns the report's page.

    wait: for another process that is writing the run, instead of raising CheckpointError; site: where its work is done, None: here.
    """
    run_rounds(setup, run_dir, display, wait=wait, site=site)
    with display.status("drawing the report"):
        return write_report(run_dir)


def run_rounds(
    setup: Setup, run_dir: Path, display: Display = HIDDEN, *, wait: bool = False, site: Site | None = None
) -> None:
    """As run_to_end, without the report, which takes as long as many a short run: `fedprune report` writes it when it is wanted."""
    with display.progress(display.title or setup.experiment.method.name, setup.experiment.rounds) as seen:
        for record in run(setup, run_dir, wait=wait, site=site):
            seen(record)
