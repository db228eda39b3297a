"""What a sweep left behind, grouped by what varied: the best configuration, the Pareto front, and one report of them all."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fedprune_cli import plugins
from fedprune_cli.errors import CheckpointError
from fedprune_cli.report import figures
from fedprune_cli.report.comparison import run_figures
from fedprune_cli.report.drawing import Drawing
from fedprune_cli.report.estimate import (
    ACCURACY,
    BELOW_BEST,
    BY_KEY,
    SIMULATED,
    Estimate,
    Estimates,
    csv_cells,
    known,
    mean_over_seeds,
)
from fedprune_cli.report.page import (
    csv_text,
    html_figure,
    html_page,
    html_section,
    html_table,
    latex_table,
    write_files,
)
from fedprune_cli.report.read import Run, read_run
from fedprune_cli.store.files import fits, read_json
from fedprune_cli.terminal import Table

COMBINATION = "member.json"  # the file that each combination of a sweep leaves when it ends
SAME_RESULT = ("seed", "out", "data.root")  # and execution: what may vary within a configuration
GROUP_KEYS = ("accuracy", "accuracy_p10", "fresh_accuracy", "simulated_s", "latency_s", "megabytes_up", "joules")
NOTE = (
    "±: half the 95 % interval over seeds. Points below the best: of the same seeds, paired; where the interval holds 0, the seeds do not "
    "tell the two apart. Final figures are of the last round, never of the best."
)
CAPTIONS = {
    "pareto": "Final accuracy against simulated seconds of the run, means and 95 % intervals; the line is the Pareto front.",
    "heatmap": "Mean final accuracy in %.",
    "heatmap_seconds": "Mean simulated seconds of the whole run.",
}


# --- what is in the folder ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """One combination of a sweep that has ended: its overrides, where its run is kept, and why it failed if it did."""

    overrides: tuple[str, ...]
    run_dir: str
    error: str | None = None
    exit_code: int = 0

    @property
    def values(self) -> dict[str, str]:
        """The overrides by key."""
        pairs = (override.lstrip("+~").partition("=") for override in self.overrides)
        return {key: value for key, _, value in pairs}


def ended(sweep_dir: Path) -> list[Path]:
    """Returns the files that combinations left when they ended."""
    return sorted(sweep_dir.glob(f"*/{COMBINATION}"))


def read_combinations(sweep_dirs: Sequence[Path]) -> list[Combination]:
    """Returns the combinations of the sweeps, one a run folder; raises CheckpointError when a folder holds no sweep."""
    found: dict[str, Combination] = {}
    for sweep_dir in sweep_dirs:
        files = ended(sweep_dir)
        if not files:
            raise CheckpointError(f"{sweep_dir}: no sweep; a folder of `fedprune train -m` is expected")
        for path in sorted(files, key=lambda file: (len(file.parent.name), file.parent.name)):
            value = read_json(path, CheckpointError)
            if not fits(value, {"overrides": [str], "run_dir": str, "error": (str, None), "exit_code": int}):
                raise CheckpointError(f"{path}: damaged (not a sweep's member)")
            ran = Combination(tuple(value["overrides"]), value["run_dir"], value["error"], value["exit_code"])
            found.setdefault(ran.run_dir if ran.error is None else str(path), ran)
    return list(found.values())


# --- groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one configuration, by seed. values: what varied in the sweep; figures: estimates over the seeds, as in a comparison.

    command: what runs it again; below_best: accuracy below the best group's, of the seeds that both have.
    """

    values: Mapping[str, str]
    command: str
    runs: Mapping[int, Run]
    figures: Estimates
    below_best: Estimate | None = None

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "all"

    def mean(self, key: str) -> float:
        """Returns the mean of a figure that every group has."""
        return known(self.figures, key).mean


def varied(combinations: Sequence[Combination]) -> list[str]:
    """Returns the keys in which the combinations differ, in the order typed, apart from those that change no configuration."""
    keys = dict.fromkeys(key for ran in combinations for key in ran.values)
    differing = [key for key in keys if len({ran.values.get(key, "") for ran in combinations}) > 1]
    return [key for key in differing if key not in SAME_RESULT and not key.startswith("execution")]


def build_groups(combinations: Sequence[Combination]) -> list[Group]:
    """Returns the finished runs grouped by what varied; raises CheckpointError when there are none."""
    keys = varied(combinations)
    runs: dict[tuple[str, ...], dict[int, Run]] = {}
    commands: dict[tuple[str, ...], str] = {}
    outside = plugins.options()
    for ran in combinations:
        if ran.error is not None:
            continue
        at = tuple(ran.values.get(key, "") for key in keys)
        run = read_run(Path(ran.run_dir))
        runs.setdefault(at, {})[run.seed] = run
        own = [text for text in ran.overrides if text.lstrip("+~").partition("=")[0] not in ("seed", "out")]
        commands.setdefault(at, shlex.join(["fedprune", "train", *outside, *own]))
    groups = [
        _group(dict(zip(keys, at, strict=True)), commands[at], dict(sorted(by_seed.items())))
        for at, by_seed in runs.items()
    ]
    if not groups:
        raise CheckpointError("no member of the sweep is finished, there is nothing to report")
    best = best_of(groups)
    return [replace(group, below_best=_below(group, best)) for group in groups]


def _group(values: Mapping[str, str], command: str, runs: Mapping[int, Run]) -> Group:
    rows = [run_figures(run, None, None) | {"simulated_s": run.rounds[-1].simulated_s} for run in runs.values()]
    return Group(values, command, runs, {key: mean_over_seeds([row[key] for row in rows]) for key in GROUP_KEYS})


def _below(group: Group, best: Group) -> Estimate | None:
    """Returns how far a group's accuracy is below the best one's, of the seeds that both have."""
    seeds = [seed for seed in group.runs if seed in best.runs]
    return mean_over_seeds([best.runs[seed].final.accuracy - group.runs[seed].final.accuracy for seed in seeds])


def best_of(groups: Sequence[Group]) -> Group:
    """Returns the most accurate group."""
    return max(groups, key=lambda group: group.mean("accuracy"))


def pareto_front(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups that none other beats in accuracy and in simulated seconds at once, the quickest first."""
    kept: list[Group] = []
    for group in sorted(groups, key=lambda group: (group.mean("simulated_s"), -group.mean("accuracy"))):
        if not kept or group.mean("accuracy") > kept[-1].mean("accuracy"):
            kept.append(group)
    return kept


# --- the report -----------------------------------------------------------------------------------------------------


def sweep_headline(combinations: Sequence[Combination], groups: Sequence[Group]) -> str:
    """Returns what the sweep says in a few sentences."""
    best, failed = best_of(groups), sum(ran.error is not None for ran in combinations)
    seeds = {len(group.runs) for group in groups}
    text = (
        f"{len(groups)} configurations, seeds each: {' to '.join(map(str, sorted({min(seeds), max(seeds)})))}. Most accurate: {best}, "
        f"{ACCURACY.cell(known(best.figures, 'accuracy'))} % after {SIMULATED.cell(known(best.figures, 'simulated_s'))} simulated seconds. "
        f"On the Pareto front of accuracy and simulated seconds: {len(pareto_front(groups))}."
    )
    return text + (f" {failed} of {len(combinations)} runs failed and are left out." if failed else "")


def sweep_table(groups: Sequence[Group]) -> Table:
    """Returns the groups for the terminal: their main figures; the page has all of them."""
    front = pareto_front(groups)
    rows = [
        [
            str(group),
            ACCURACY.cell(group.figures["accuracy"]),
            SIMULATED.cell(group.figures["simulated_s"]),
            "yes" if group in front else "",
            BELOW_BEST.cell(group.below_best),
            str(len(group.runs)),
        ]
        for group in groups
    ]
    return Table.of("sweep", ["", ACCURACY.title, "simulated s", "Pareto", "below best", "seeds"], rows)


def sweep_json(combinations: Sequence[Combination], groups: Sequence[Group], page: Path) -> dict[str, object]:
    """Returns the sweep for programs."""
    front = pareto_front(groups)
    return {
        "groups": [
            {
                "values": dict(group.values),
                "seeds": list(group.runs),
                "runs": [str(run.path) for run in group.runs.values()],
                "figures": {key: None if cell is None else asdict(cell) for key, cell in group.figures.items()},
                "below_best": None if group.below_best is None else asdict(group.below_best),
                "pareto": group in front,
                "command": group.command,
            }
            for group in groups
        ],
        "best": str(best_of(groups)),
        "failed": [asdict(ran) for ran in combinations if ran.error is not None],
        "report": str(page),
    }


def write_sweep(combinations: Sequence[Combination], groups: Sequence[Group], out: Path) -> Path:
    """Writes index.html, table.csv and .tex, and the figures as SVG and PDF; returns the page."""
    drawn = dict(_drawings(groups))
    headers = ["configuration", "seeds", *(BY_KEY[key].title for key in GROUP_KEYS), BELOW_BEST.title, "Pareto"]
    rows = _rows(groups)
    files: dict[str, str | bytes] = {
        "index.html": _page(combinations, groups, drawn, html_table(headers, rows)),
        "table.csv": _csv_table(varied(combinations), groups),
        "table.tex": latex_table(headers, rows),
    }
    for name, drawing in drawn.items():
        files |= {f"{name}.svg": drawing.svg(), f"{name}.pdf": drawing.pdf()}
    return write_files(out, files)


def _page(
    combinations: Sequence[Combination], groups: Sequence[Group], drawn: Mapping[str, Drawing], table: str
) -> str:
    front = "".join(
        f"<li>{html.escape(str(group))}: <code>{html.escape(group.command)}</code></li>"
        for group in pareto_front(groups)
    )
    failures = [[" ".join(ran.overrides), ran.run_dir, ran.error] for ran in combinations if ran.error is not None]
    folders = [[str(group), str(seed), str(run.path)] for group in groups for seed, run in group.runs.items()]
    body = [
        f"<p class=answer>{html.escape(sweep_headline(combinations, groups))}</p>",
        f"<p>The most accurate again: <code>{html.escape(best_of(groups).command)}</code></p>",
        *(html_figure(name, drawing, CAPTIONS[name]) for name, drawing in drawn.items()),
        html_section("Configurations", f"{table}<p class=note>{NOTE}</p>"),
        html_section("Pareto front", f"<ul>{front}</ul>"),
        *([html_section("Failed runs", html_table(["overrides", "folder", "error"], failures))] if failures else []),
        html_section("Runs", html_table(["configuration", "seed", "folder"], folders)),
    ]
    return html_page("sweep", body)


def _rows(groups: Sequence[Group]) -> list[list[str]]:
    front = pareto_front(groups)
    return [
        [
            str(group),
            str(len(group.runs)),
            *(BY_KEY[key].cell(group.figures[key]) for key in GROUP_KEYS),
            BELOW_BEST.cell(group.below_best),
            "yes" if group in front else "",
        ]
        for group in groups
    ]


def _csv_table(keys: Sequence[str], groups: Sequence[Group]) -> str:
    """Returns table.csv: what varied, and unrounded means, half widths and counts."""
    parts, front = ("mean", "half_width_95", "seeds"), pareto_front(groups)
    headers = [*keys, *(f"{key} {part}" for key in GROUP_KEYS for part in parts), "pareto"]
    rows = [
        [
            *group.values.values(),
            *(value for key in GROUP_KEYS for value in csv_cells(group.figures[key])),
            group in front,
        ]
        for group in groups
    ]
    return csv_text(headers, rows)


def _drawings(groups: Sequence[Group]) -> Iterator[tuple[str, Drawing]]:
    points = {str(group): (known(group.figures, "simulated_s"), known(group.figures, "accuracy")) for group in groups}
    yield "pareto", figures.pareto_figure(points, [str(group) for group in pareto_front(groups)])
    if len(groups[0].values) != 2:
        return
    y, x = groups[0].values
    rows, columns = ([*dict.fromkeys(group.values[key] for group in groups)] for key in (y, x))
    for name, key, scale, label in (
        ("heatmap", "accuracy", 100, "accuracy (%)"),
        ("heatmap_seconds", "simulated_s", 1, "simulated time (s)"),
    ):
        cells = np.full((len(rows), len(columns)), np.nan)
        for group in groups:
            cells[rows.index(group.values[y]), columns.index(group.values[x])] = scale * group.mean(key)
        yield name, figures.heat_figure(cells, figures.Axis(y, rows), figures.Axis(x, columns), label)
