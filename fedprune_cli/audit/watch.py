"""A run's key figures while it runs, and the limits that they must keep."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune_cli.errors import CheckpointError, ConfigError, LimitError, unknown
from fedprune_cli.store import folder, lock
from fedprune_cli.store.files import MAX_BYTES, parse_json, read_bytes, read_json
from fedprune_cli.store.record import RoundRecord, parse_record
from fedprune_cli.terminal import Table

LOOK_S = 1.0  # between looks at the folder
ABANDONED_S = 5.0  # without a process that holds an unfinished run, until it is taken for interrupted

# what is watched, and how it is shown
KPIS: dict[str, tuple[str, str]] = {
    "latency_s": ("latency of the round", "{:.4g} s"),
    "simulated_s": ("simulated time so far", "{:.4g} s"),
    "accuracy": ("accuracy, weighted by samples", "{:.4f}"),
    "accuracy_p10": ("accuracy, 10th percentile of devices", "{:.4f}"),
    "fresh_accuracy": ("accuracy on a fresh device", "{:.4f}"),
    "bytes_up": ("bytes sent so far", "{:.4g}"),
    "joules": ("energy so far", "{:.4g} J"),
    "cost": ("cost so far", "{:.4g}"),
}


@dataclass(frozen=True)
class Prices:
    """What a gigabyte sent and a kilowatt-hour cost, in the user's own currency."""

    per_gigabyte: float
    per_kwh: float

    def __post_init__(self) -> None:
        for name, price in (("--price-per-gb", self.per_gigabyte), ("--price-per-kwh", self.per_kwh)):
            if not 0 <= price < float("inf"):
                raise ConfigError(f"{name} {price}: must be >= 0")


@dataclass(frozen=True)
class Limit:
    """A figure and what it must keep.

    since: the first round that is judged; None: every round of an upper limit, the last of a lower one.
    """

    kpi: str
    upper: bool
    value: float
    since: int | None

    def __str__(self) -> str:
        return f"{self.kpi}{'<=' if self.upper else '>='}{self.value:g}" + (
            "" if self.since is None else f"@{self.since}"
        )

    def broken_by(self, figure: float | None, number: int, *, last: bool) -> bool:
        """Whether the figure of round `number` breaks it; one that is missing breaks nothing."""
        judged = number >= self.since if self.since is not None else self.upper or last
        return judged and figure is not None and (figure > self.value if self.upper else figure < self.value)


def parse_limit(text: str) -> Limit:
    """Returns the limit that KPI<=VALUE or KPI>=VALUE[@ROUND] says; raises ConfigError."""
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([^@\s]+)\s*(?:@\s*(\d+))?\s*", text)
    if not found:
        raise ConfigError(f"--limit {text}: must be such as 'accuracy>=0.8', 'accuracy_p10>=0.7@20' or 'latency_s<=2'")
    kpi, sign, value, since = found.groups()
    if kpi not in KPIS:
        raise unknown("figure to watch", kpi, KPIS)
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"--limit {text}: {value} is not a number") from None
    if number != number:
        raise ConfigError(f"--limit {text}: {value} is not a number")
    return Limit(kpi, sign == "<=", number, None if since is None else int(since))


def kpis(records: Sequence[RoundRecord], prices: Prices) -> list[dict[str, float | None]]:
    """Returns the watched figures after each round; accuracies are None in a round that was not tested."""
    sent, joules, rows = 0.0, 0.0, []
    for record in records:
        sent, joules = sent + record.bytes_up, joules + record.joules
        cost = sent / 1e9 * prices.per_gigabyte + joules / 3.6e6 * prices.per_kwh
        shown = ("latency_s", "simulated_s", "accuracy", "accuracy_p10", "fresh_accuracy")
        row: dict[str, float | None] = {key: getattr(record, key) for key in shown}
        rows.append(row | {"bytes_up": sent, "joules": joules, "cost": cost})
    return rows


def broken(rows: Sequence[dict[str, float | None]], limits: Sequence[Limit], *, finished: bool) -> list[str]:
    """Returns which limits are broken, each with its first offence."""
    found = []
    for limit in limits:
        for number, row in enumerate(rows, start=1):
            figure = row[limit.kpi]
            if limit.broken_by(figure, number, last=finished and number == len(rows)):
                found.append(f"{limit} is broken in round {number}: {figure:.6g}")
                break
    return found


@dataclass(frozen=True)
class Look:
    """What one look at a run's folder shows."""

    rows: Sequence[dict[str, float | None]]
    wanted_rounds: int
    finished: bool
    held: bool  # by the process that runs it

    def table(self, limits: Sequence[Limit]) -> Table:
        """Returns the last round's figures beside their limits."""
        last = self.rows[-1] if self.rows else dict.fromkeys(KPIS)
        cells = [
            [
                title,
                "-" if (figure := last[key]) is None else form.format(figure),
                ", ".join(str(limit) for limit in limits if limit.kpi == key),
            ]
            for key, (title, form) in KPIS.items()
        ]
        state = "finished" if self.finished else "running" if self.held else "not running"
        title = f"round {len(self.rows)} of {self.wanted_rounds}, {state}"
        return replace(Table.of_facts(title, cells, ["figure", "now", "limit"]), elsewhere="on your command line")


def look(run_dir: Path, prices: Prices) -> Look:
    """Returns what a run's folder shows now; a line that is being written is not seen yet. Raises CheckpointError."""
    held = lock.is_held(run_dir)
    manifest = read_json(run_dir / folder.MANIFEST, CheckpointError)
    finished = folder.is_finished(run_dir)
    path = run_dir / folder.RECORDS
    lines = read_bytes(path, MAX_BYTES, CheckpointError).split(b"\n")[:-1]
    try:
        records = [record for line in lines if (record := parse_record(parse_json(line)))]
        wanted = int(manifest["config"]["rounds"])
    except (ValueError, KeyError, TypeError):
        records = []
    if len(records) < len(lines):
        raise CheckpointError(f"{path}: damaged (not a run's records)")
    return Look(kpis(records, prices), wanted, finished, held)


def watch(
    run_dir: Path, limits: Sequence[Limit], prices: Prices, *, once: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[Look]:
    """Yields what the folder shows whenever it changes, until the run is finished; raises LimitError as soon as a limit is broken.

    Raises CheckpointError when the run is unfinished and no process holds it any more.
    """
    seen, alone_since = -1, None
    while True:
        now = look(run_dir, prices)
        for limit in limits:
            if limit.since is not None and limit.since > now.wanted_rounds:
                raise ConfigError(
                    f"--limit {limit}: the run has {now.wanted_rounds} rounds, so it would never be judged"
                )
        if len(now.rows) != seen or now.finished:
            seen = len(now.rows)
            yield now
        if found := broken(now.rows, limits, finished=now.finished):
            raise LimitError(f"{run_dir}: {'; '.join(found)}")
        if now.finished or once:
            return
        alone_since = None if now.held else alone_since or clock()
        if alone_since is not None and clock() - alone_since > ABANDONED_S:
            raise CheckpointError(
                f"{run_dir}: interrupted after round {seen}; continue it with `fedprune resume {run_dir}`"
            )
        time.sleep(LOOK_S)
