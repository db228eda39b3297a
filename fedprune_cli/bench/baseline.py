"""Measures written and read, and compared with those of an earlier run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from fedprune_cli.bench.measure import Better, Kind, Measure, available_cores
from fedprune_cli.errors import ConfigError, RegressionError
from fedprune_cli.store.files import MAX_JSON_BYTES, parse_json, read_bytes
from fedprune_cli.store.folder import writing
from fedprune_cli.terminal import Table

SCHEMA = 1


def parse_share(option: str, text: str) -> float:
    """Returns 0.15 for `15%` and for `0.15`; raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", text.strip())
    value = math.inf if not found else float(found[1]) / (100 if found[2] else 1)
    # a bare 15 would be 1500 %, which nobody means
    if not found or not math.isfinite(value) or (not found[2] and value > 10):
        raise ConfigError(f"{option} {text}: must be a percentage such as 15% or a fraction such as 0.15")
    return value


def parse_limits(exact_limit: str, wall_limit: str) -> dict[Kind, float]:
    """Returns how much worse each kind of measure may be, as fractions; raises ConfigError."""
    return {
        "exact": parse_share("--max-regression", exact_limit),
        "wall": parse_share("--max-wall-regression", wall_limit),
    }


def machine() -> dict[str, str | int]:
    """Returns what the measures were taken on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found[1].strip() if found else cpu
    return {"cpu": cpu, "cores": available_cores(), "python": platform.python_version(), "torch": version("torch")}


def to_json(measures: Sequence[Measure], quick: bool) -> dict[str, object]:
    """Returns the measures and the machine as one JSON object."""
    entries = [dataclasses.asdict(measure) for measure in measures]
    return {"schema": SCHEMA, "machine": machine(), "quick": quick, "measures": entries}


def action_entries(measures: Sequence[Measure], better: Better) -> list[dict[str, object]]:
    """Returns the measures of one direction in github-action-benchmark's custom format."""
    return [
        {"name": m.name, "unit": m.unit, "value": m.value, "range": f"{m.spread:.3g}",
         "extra": m.kind if m.bare is None else f"{m.kind}; bare reference: {m.bare:.6g}"}
        for m in measures if m.better == better
    ]  # fmt: skip


def make_folder(out: Path) -> None:
    """Makes the folder for the results, before minutes of measuring; raises OutputError."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)


def write(out: Path, measures: Sequence[Measure], quick: bool) -> None:
    """Writes bench.json, bench-smaller.json and bench-larger.json into a folder; raises OutputError."""
    contents: dict[str, object] = {"bench.json": to_json(measures, quick)}
    contents |= {f"bench-{better}.json": action_entries(measures, better) for better in get_args(Better)}
    with writing(out):
        for name, content in contents.items():
            (out / name).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_baseline(path: Path, tasks: Sequence[str], quick: bool) -> tuple[Measure, ...]:
    """Returns the measures of the `tasks` in a bench.json; raises ConfigError saying what is wrong with it."""
    try:
        content = parse_json(read_bytes(path, MAX_JSON_BYTES, ConfigError))
    except ConfigError as error:
        raise ConfigError(f"--baseline {error}") from None
    except ValueError:
        raise ConfigError(f"--baseline {path}: not JSON") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConfigError(f"--baseline {path}: not a bench.json of schema {SCHEMA}")
    if content.get("quick", quick) != quick:  # its rounds have other devices, its allocator other sizes
        raise ConfigError(f"--baseline {path}: was measured {'without' if quick else 'with'} --quick")
    entries = content.get("measures")
    if not isinstance(entries, list) or not all(map(_is_measure, entries)):
        raise ConfigError(f"--baseline {path}: its measures are damaged")
    measures = tuple(Measure(**entry) for entry in entries if entry["name"].split("/")[0] in tasks)
    if not measures:
        raise ConfigError(f"--baseline {path}: has no measure of {', '.join(tasks)}")
    return measures


def _is_measure(entry: object) -> bool:
    """Whether a JSON value has a measure's keys and types."""
    if not isinstance(entry, dict) or set(entry) != {field.name for field in dataclasses.fields(Measure)}:
        return False
    words = isinstance(entry["name"], str) and isinstance(entry["unit"], str)
    numbers = [entry["value"], entry["spread"], *([] if entry["bare"] is None else [entry["bare"]])]
    finite = all(type(n) in (int, float) and abs(n) <= sys.float_info.max for n in numbers)
    return words and finite and entry["better"] in get_args(Better) and entry["kind"] in get_args(Kind)


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """A measure that is worse than the baseline's by more than its limit; value and change are None when it is gone."""

    name: str
    baseline: float
    value: float | None
    change: float | None
    limit: float

    def __str__(self) -> str:
        if self.value is None or self.change is None:
            return f"{self.name}: {self.baseline:.6g} in the baseline, not measured now"
        return f"{self.name}: {self.baseline:.6g} -> {self.value:.6g}, {100 * self.change:.1f} % worse (limit {100 * self.limit:g} %)"


def worsening(measure: Measure, baseline: float) -> float:
    """Returns by which share the measure is worse than the baseline, 1 for twice as slow or half as fast; < 0 when better."""
    before, now = (baseline, measure.value) if measure.better == "smaller" else (measure.value, baseline)
    if before == now:
        return 0.0
    return now / before - 1 if before > 0 else math.copysign(math.inf, now - before)


def regressions(
    measures: Sequence[Measure], baseline: Sequence[Measure], limits: Mapping[Kind, float]
) -> tuple[Regression, ...]:
    """Returns the baseline's measures that are now worse by more than their kind's limit, or gone."""
    now = {measure.name: measure for measure in measures}
    found = []
    for old in baseline:
        new = now.get(old.name)
        limit = limits[(new or old).kind]
        change = None if new is None else worsening(new, old.value)
        if change is None or change > limit:
            found.append(Regression(old.name, old.value, new.value if new else None, change, limit))
    return tuple(found)


def check(found: Sequence[Regression], path: Path) -> None:
    """Raises RegressionError naming the measures that regressed, if any."""
    if found:
        names = ", ".join(regression.name for regression in found)
        raise RegressionError(f"{len(found)} {'measure' if len(found) == 1 else 'measures'} worse than {path}: {names}")


def table(measures: Sequence[Measure]) -> Table:
    """Returns the measures for the terminal."""
    headers = ["task", "measure", "value", "unit", "spread", "bare"]
    rows = [
        [
            *m.name.split("/", 1), f"{m.value:.4g}", m.unit, "exact" if m.kind == "exact" else f"{m.spread:.2g}",
            "-" if m.bare is None else f"{m.bare:.4g}",
        ]
        for m in measures
    ]  # fmt: skip
    return Table.of("bench", headers, rows, folding=["measure", "unit"], elsewhere="in --json")
