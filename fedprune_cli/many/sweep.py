"""A sweep: Hydra's multirun over runs that are skipped when finished and continued when broken.

A sweep's folder is named by what was asked, so that the same command finds it again; its runs lie where each would lie alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import explained, unknown
from fedprune_cli.execute import end_when_orphaned
from fedprune_cli.many.one import HIDDEN, SHOWN, run_to_end
from fedprune_cli.report.run import write_report
from fedprune_cli.report.sweep import COMBINATION, Combination
from fedprune_cli.runs.life import begin_or_reopen, is_done, serially
from fedprune_cli.store import folder

OBJECTIVES = ("final_accuracy", "simulated_s")  # of a sweeper that searches


def sweep_dir(arguments: Sequence[str]) -> Path:
    """Returns the folder of the sweep that the command line asks for, whatever launches it and in whatever order it was typed."""
    asked = sorted(
        text for text in arguments if text.split(".")[0] not in ("hydra", "execution") and "/launcher=" not in text
    )
    return Path("outputs/sweeps") / hashlib.sha256("\n".join(asked).encode()).hexdigest()[:12]


def run_combination(config: DictConfig) -> float | list[float] | None:
    """Takes one combination of a sweep to its end, wherever the launcher put it; returns the objectives, None when it failed.

    A failure is written down and not raised: the others go on.
    """
    hydra = HydraConfig.get()
    overrides, place = tuple(hydra.overrides.task), Path(hydra.runtime.output_dir)
    in_turn = str(hydra.launcher._target_).endswith("BasicLauncher")
    if not in_turn:
        end_when_orphaned()
    run_dir = ""
    try:
        experiment = build_experiment(config)
        run_dir = str(experiment.run_dir)
        names = config.get("objectives") or OBJECTIVES
        if not is_done(experiment):
            setup = begin_or_reopen(config)
            if not in_turn and not any(override.startswith("execution") for override in overrides):
                setup = serially(setup)  # combinations already share the machine
            shown = replace(SHOWN if in_turn else HIDDEN, title=" ".join(overrides))
            run_to_end(setup, experiment.run_dir, shown, wait=True)
        if not (experiment.run_dir / "report" / "index.html").exists():
            write_report(experiment.run_dir)
        ran, values = Combination(overrides, run_dir), objectives(experiment, names)
    except Exception as raised:
        error = explained(raised)
        ran, values = Combination(overrides, run_dir, str(error), error.exit_code), None
        print(f"error: {' '.join(overrides)}: {error}", file=sys.stderr, flush=True)
    with folder.writing(place):
        place.mkdir(parents=True, exist_ok=True)
        (place / COMBINATION).write_text(json.dumps(asdict(ran)) + "\n")
    return values


def objectives(experiment: Experiment, names: Sequence[str]) -> float | list[float]:
    """Returns what a sweeper searches for: figures of the finished run's summary; a list of several, a number of one."""
    summary = folder.read_summary(experiment.run_dir) or {}
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    for name in names:
        if name not in numbers:
            raise unknown("objective", str(name), numbers)
    values = [float(numbers[name]) for name in names]
    return values if len(values) > 1 else values[0]
