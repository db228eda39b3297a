"""A sweep: Hydra's multirun over runs that are skipped when finished and continued when broken, and one report of them all.

A sweep's folder is named by what was asked, so that the same command finds it again; its runs lie where each would lie alone.
"""

from __future__ import annotations

import hashlib
import html
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import CheckpointError, explained, unknown
from fedprune_cli.execute import end_when_orphaned
from fedprune_cli.report import figures
from fedprune_cli.report.all import COLUMNS, Estimate, Run, estimate, raw, read_run, run_figures, write_report
from fedprune_cli.report.page import csv_text, figure, html_table, latex_table, page, section, terminal_table, write
from fedprune_cli.runs.life import begin_or_reopen, check_holds, run, serially
from fedprune_cli.store import folder
from fedprune_cli.store.files import fits, read_json
from fedprune_cli.terminal import progress

MEMBER = "member.json"
OBJECTIVES = ("final_accuracy", "simulated_s")  # of a sweeper that searches
SAME_RESULT = ("seed", "out", "data.root")  # and execution: what may vary within a configuration


@dataclass(frozen=True)
class Member:
    """One combination of a sweep: its overrides, where its run is kept, and why it failed if it did."""

    overrides: tuple[str, ...]
    run_dir: str
    error: str | None = None
    exit_code: int = 0

    @property
    def values(self) -> dict[str, str]:
        """The overrides by key."""
        pairs = (override.lstrip("+~").partition("=") for override in self.overrides)
        return {key: value for key, _, value in pairs}


# --- running --------------------------------------------------------------------------------------------------------


def sweep_dir(arguments: Sequence[str]) -> Path:
    """Returns the folder of the sweep that the command line asks for, whatever launches it and in whatever order it was typed."""
    asked = sorted(
        text for text in arguments if text.split(".")[0] not in ("hydra", "execution") and "/launcher=" not in text
    )
    return Path("outputs/sweeps") / hashlib.sha256("\n".join(asked).encode()).hexdigest()[:12]


def ended(folder_of_sweep: Path) -> list[Path]:
    """Returns the files that members leave when they end."""
    return sorted(folder_of_sweep.glob(f"*/{MEMBER}"))


def run_member(config: DictConfig) -> float | list[float] | None:
    """Takes one combination of a sweep to its end, wherever the launcher put it; returns the objectives, None when it failed.

    A failure is written down and not raised: the others go on.
    """
    hydra = HydraConfig.get()
    overrides, place = tuple(hydra.overrides.task), Path(hydra.runtime.output_dir)
    alone = str(hydra.launcher._target_).endswith("BasicLauncher")
    if not alone:
        end_when_orphaned()
    run_dir = ""
    try:
        experiment = build_experiment(config)
        run_dir = str(experiment.run_dir)
        names = config.get("objectives") or OBJECTIVES
        if not (experiment.run_dir / folder.SUMMARY).exists():
            _run_to_end(config, shown=alone, serial=not alone and not any(o.startswith("execution") for o in overrides))
        else:
            check_holds(experiment)
        if not (experiment.run_dir / "report" / "index.html").exists():
            write_report(experiment.run_dir)
        member, values = Member(overrides, run_dir), objectives(experiment, names)
    except Exception as raised:
        error = explained(raised)
        member, values = Member(overrides, run_dir, str(error), error.exit_code), None
        print(f"error: {' '.join(overrides)}: {error}", file=sys.stderr, flush=True)
    with folder.writing(place):
        place.mkdir(parents=True, exist_ok=True)
        (place / MEMBER).write_text(json.dumps(asdict(member)) + "\n")
    return values


def _run_to_end(config: DictConfig, *, shown: bool, serial: bool) -> None:
    """Begins or continues a run; `serial` where members already share the machine."""
    setup = begin_or_reopen(config)
    run_dir = setup.experiment.run_dir
    if serial:
        setup = serially(setup)
    records = run(setup, run_dir, wait=True)
    if not shown:
        for _ in records:
            pass
        return
    with progress(setup.experiment.method.name, setup.experiment.rounds) as show:
        for record in records:
            show(record)


def objectives(experiment: Experiment, names: Sequence[str]) -> float | list[float]:
    """Returns what a sweeper searches for: figures of the finished run's summary; a list of several, a number of one."""
    summary = folder.read_summary(experiment.run_dir) or {}
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    for name in names:
        if name not in numbers:
            raise unknown("objective", str(name), numbers)
    values = [float(numbers[name]) for name in names]
    return values if len(values) > 1 else values[0]


# --- reading --------------------------------------------------------------------------------------------------------


def read_members(folders: Sequence[Path]) -> list[Member]:
    """Returns the members of the sweeps, one a run folder; raises CheckpointError when a folder holds no sweep."""
    members: dict[str, Member] = {}
    for of in folders:
        files = ended(of)
        if not files:
            raise CheckpointError(f"{of}: no sweep; a folder of `fedprune train -m` is expected")
        for path in sorted(files, key=lambda file: (len(file.parent.name), file.parent.name)):
            value = read_json(path, CheckpointError)
            if not fits(value, {"overrides": [str], "run_dir": str, "error": (str, None), "exit_code": int}):
                raise CheckpointError(f"{path}: damaged (not a sweep's member)")
            member = Member(tuple(value["overrides"]), value["run_dir"], value["error"], value["exit_code"])
            members.setdefault(member.run_dir if member.error is None else str(path), member)
    return list(members.values())


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one configuration, by seed. values: what varied in the sweep; figures: estimates over the seeds, as in a comparison.

    command: what runs it again; below_best: accuracy below the best group's, of the seeds that both have.
    """

    values: Mapping[str, str]
    command: str
    runs: Mapping[int, Run]
    figures: Mapping[str, Estimate | None]
    below_best: Estimate | None = None

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "all"

    def mean(self, key: str) -> float:
        """Returns the mean of a figure."""
        of = self.figures[key]
        assert of
        return of.mean


GROUP_COLUMNS = ("accuracy", "accuracy_p10", "fresh_accuracy", "simulated_s", "latency_s", "megabytes_up", "joules")
TITLES = {key: (title, text) for key, title, text in COLUMNS} | {
    "simulated_s": ("simulated seconds", lambda value: f"{value:.4g}")
}


def varied(members: Sequence[Member]) -> list[str]:
    """Returns the keys in which the members differ, in the order typed, apart from those that change no configuration."""
    keys = dict.fromkeys(key for member in members for key in member.values)
    differing = [key for key in keys if len({member.values.get(key, "") for member in members}) > 1]
    return [key for key in differing if key not in SAME_RESULT and not key.startswith("execution")]


def group(members: Sequence[Member]) -> list[Group]:
    """Returns the finished runs grouped by what varied."""
    keys = varied(members)
    runs: dict[tuple[str, ...], dict[int, Run]] = {}
    commands: dict[tuple[str, ...], str] = {}
    for member in members:
        if member.error is not None:
            continue
        at = tuple(member.values.get(key, "") for key in keys)
        run_of = read_run(Path(member.run_dir))
        runs.setdefault(at, {})[run_of.seed] = run_of
        own = [text for text in member.overrides if text.lstrip("+~").partition("=")[0] not in ("seed", "out")]
        commands.setdefault(at, shlex.join(["fedprune", "train", *own]))
    groups = [
        _group(dict(zip(keys, at, strict=True)), commands[at], dict(sorted(of.items()))) for at, of in runs.items()
    ]
    if not groups:
        raise CheckpointError("no member of the sweep is finished, there is nothing to report")
    best = best_of(groups)
    return [replace(of, below_best=_below(of, best)) for of in groups]


def _group(values: Mapping[str, str], command: str, runs: Mapping[int, Run]) -> Group:
    rows = [run_figures(of, None, None) | {"simulated_s": of.rounds[-1]["simulated_s"]} for of in runs.values()]
    return Group(values, command, runs, {key: estimate([row[key] for row in rows]) for key in GROUP_COLUMNS})


def _below(of: Group, best: Group) -> Estimate | None:
    """Returns how far a group's accuracy is below the best one's, of the seeds that both have."""
    seeds = [seed for seed in of.runs if seed in best.runs]
    final = [[figures.tested(runs[seed].rounds)[-1]["accuracy"] for seed in seeds] for runs in (best.runs, of.runs)]
    return estimate([a - b for a, b in zip(*final, strict=True)]) if seeds else None


def best_of(groups: Sequence[Group]) -> Group:
    """Returns the most accurate group."""
    return max(groups, key=lambda of: of.mean("accuracy"))


def front(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups that none other beats in accuracy and in simulated seconds at once, the quickest first."""
    kept: list[Group] = []
    for of in sorted(groups, key=lambda of: (of.mean("simulated_s"), -of.mean("accuracy"))):
        if not kept or of.mean("accuracy") > kept[-1].mean("accuracy"):
            kept.append(of)
    return kept


# --- the report -----------------------------------------------------------------------------------------------------


def answer(members: Sequence[Member], groups: Sequence[Group]) -> str:
    """Returns what the sweep says in a few sentences."""
    best, failed = best_of(groups), sum(member.error is not None for member in members)
    seeds = {len(of.runs) for of in groups}
    accuracy, seconds_of = (best.figures[key] for key in ("accuracy", "simulated_s"))
    assert accuracy
    assert seconds_of
    text = (
        f"{len(groups)} configurations, seeds each: {' to '.join(map(str, sorted({min(seeds), max(seeds)})))}. Most accurate: {best}, "
        f"{accuracy.text(lambda v: f'{100 * v:.2f}')} % after {seconds_of.text(lambda v: f'{v:.4g}')} simulated seconds. "
        f"{len(front(groups))} are on the Pareto front of accuracy and simulated seconds."
    )
    return text + (f" {failed} of {len(members)} runs failed and are left out." if failed else "")


def _rows(groups: Sequence[Group]) -> list[list[str]]:
    best_ones = front(groups)
    return [
        [
            str(of),
            str(len(of.runs)),
            *("-" if (cell := of.figures[key]) is None else cell.text(TITLES[key][1]) for key in GROUP_COLUMNS),
            "-" if of.below_best is None else of.below_best.text(lambda v: f"{100 * v:.2f}"),
            "yes" if of in best_ones else "",
        ]
        for of in groups
    ]


def sweep_table(groups: Sequence[Group]) -> Any:
    """Returns the groups for the terminal: their main figures; the page has all of them."""
    rows = [[row[0], *row[1:3], row[5], *row[-2:]] for row in _rows(groups)]
    return terminal_table(
        "sweep", ["", "seeds", "acc. %", "simulated s", "below best", "Pareto"], rows, folds_first=True
    )


def to_json(members: Sequence[Member], groups: Sequence[Group], report: Path) -> dict[str, Any]:
    """Returns the sweep for programs."""
    best_ones = front(groups)
    return {
        "groups": [
            {
                "values": dict(of.values),
                "seeds": list(of.runs),
                "runs": [str(of_run.path) for of_run in of.runs.values()],
                "figures": {key: None if cell is None else asdict(cell) for key, cell in of.figures.items()},
                "below_best": None if of.below_best is None else asdict(of.below_best),
                "pareto": of in best_ones,
                "command": of.command,
            }
            for of in groups
        ],
        "best": str(best_of(groups)),
        "failed": [asdict(member) for member in members if member.error is not None],
        "report": str(report),
    }


def write_sweep(members: Sequence[Member], groups: Sequence[Group], out: Path) -> Path:
    """Writes index.html, table.csv and .tex, and the figures as SVG and PDF; returns the page."""
    drawn = dict(_drawings(groups))
    best, failed = best_of(groups), [member for member in members if member.error is not None]
    rows = _rows(groups)
    headers = ["configuration", "seeds", *(TITLES[key][0] for key in GROUP_COLUMNS), "points below the best", "Pareto"]
    captions = {
        "pareto": "Final accuracy against simulated seconds of the run, means and 95 % intervals; the line is the Pareto front.",
        "heatmap": "Mean final accuracy in %.",
        "heatmap_seconds": "Mean simulated seconds of the whole run.",
    }
    fronts = "".join(f"<li>{html.escape(str(of))}: <code>{html.escape(of.command)}</code></li>" for of in front(groups))
    failures = [[" ".join(member.overrides), member.run_dir, str(member.error)] for member in failed]
    folders = [[str(of), str(seed), str(of_run.path)] for of in groups for seed, of_run in of.runs.items()]
    body = [
        f"<p class=answer>{html.escape(answer(members, groups))}</p>",
        f"<p>The most accurate again: <code>{html.escape(best.command)}</code></p>",
        *(figure(name, drawing, captions[name]) for name, drawing in drawn.items()),
        section("Configurations", html_table(headers, rows) + f"<p class=note>{SWEEP_NOTE}</p>"),
        section("Pareto front", f"<ul>{fronts}</ul>"),
        *([section("Failed runs", html_table(["overrides", "folder", "error"], failures))] if failed else []),
        section("Runs", html_table(["configuration", "seed", "folder"], folders)),
    ]
    parts = ("mean", "half_width_95", "seeds")
    raw_headers = [*varied(members), *(f"{key} {part}" for key in GROUP_COLUMNS for part in parts), "pareto"]
    best_ones = front(groups)
    raw_rows = [
        [*of.values.values(), *(value for key in GROUP_COLUMNS for value in raw(of.figures[key])), of in best_ones]
        for of in groups
    ]
    files: dict[str, str | bytes] = {
        "index.html": page("sweep", body),
        "table.csv": csv_text(raw_headers, raw_rows),
        "table.tex": latex_table(headers, rows),
    }
    for name, drawing in drawn.items():
        files |= {f"{name}.svg": drawing.svg(), f"{name}.pdf": drawing.pdf()}
    return write(out, files)


SWEEP_NOTE = (
    "±: half the 95 % interval over seeds. Points below the best: of the same seeds, paired; where the interval holds 0, the seeds do not "
    "tell the two apart. Final figures are of the last round, never of the best."
)


def _drawings(groups: Sequence[Group]) -> Iterator[tuple[str, figures.Drawing]]:
    points = {
        str(of): tuple((cell.mean, cell.half_width) for key in ("simulated_s", "accuracy") if (cell := of.figures[key]))
        for of in groups
    }
    yield "pareto", figures.pareto_figure(points, [str(of) for of in front(groups)])
    keys = list(groups[0].values)
    if len(keys) == 2:
        first, second = ([*dict.fromkeys(of.values[key] for of in groups)] for key in keys)
        for name, key, scale, label in (
            ("heatmap", "accuracy", 100, "accuracy (%)"),
            ("heatmap_seconds", "simulated_s", 1, "simulated time (s)"),
        ):
            cells = np.full((len(first), len(second)), np.nan)
            for of in groups:
                cells[first.index(of.values[keys[0]]), second.index(of.values[keys[1]])] = scale * of.mean(key)
            yield name, figures.heat_figure(cells, first, second, keys[0], keys[1], label)
