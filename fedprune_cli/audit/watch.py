"""A run's key figures while it runs, on a pilot also how its nodes stand, and the limits that both must keep."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedprune_cli.audit.fleet import COUNTS, GRACE_S, Fleet, fleet_beside, fleet_of, is_pilot, posted_by
from fedprune_cli.errors import CheckpointError, ConfigError, LimitError, unknown
from fedprune_cli.store import folder, lock
from fedprune_cli.store.files import MAX_BYTES, parse_json, read_bytes, read_json
from fedprune_cli.store.record import RoundRecord, parse_record
from fedprune_cli.terminal import Table

LOOK_S = 1.0  # between looks at the folder
ABANDONED_S = 5.0  # without a process that holds an unfinished run, until it is taken for interrupted
UNSERVED_S = 60.0  # the same before a pilot's run has begun: it is prepared between its roster and its first round

# what is watched, and how it is shown
KPIS: dict[str, tuple[str, str]] = {
    "latency_s": ("latency of the round", "{:.4g} s"),
    "simulated_s": ("simulated time so far", "{:.4g} s"),
    "mean_ratio": ("mean pruning ratio", "{:.3f}"),
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

    since: the first round that is judged; None: every round of an upper limit, the last of a lower one. Of nodes what is now is judged,
    whichever limit it is.
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
    if kpi not in KPIS and kpi not in COUNTS:
        raise unknown("figure to watch", kpi, [*KPIS, *COUNTS])
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
        shown = ("latency_s", "simulated_s", "mean_ratio", "accuracy", "accuracy_p10", "fresh_accuracy")
        row: dict[str, float | None] = {key: getattr(record, key) for key in shown}
        rows.append(row | {"bytes_up": sent, "joules": joules, "cost": cost})
    return rows


def broken(rows: Sequence[dict[str, float | None]], limits: Sequence[Limit], *, finished: bool) -> list[str]:
    """Returns which limits are broken, each with its first offence."""
    found = []
    for limit in (one for one in limits if one.kpi in KPIS):
        for number, row in enumerate(rows, start=1):
            figure = row[limit.kpi]
            if limit.broken_by(figure, number, last=finished and number == len(rows)):
                found.append(f"{limit} is broken in round {number}: {figure:.6g}")
                break
    return found


def broken_now(fleet: Fleet, number: int, limits: Sequence[Limit]) -> list[str]:
    """Returns which limits of nodes are broken after round `number`, and by which nodes; where nobody serves them none is."""
    counts = fleet.counts(GRACE_S) if fleet.served else {}
    return [
        f"{limit} is broken after round {number}: {counts[limit.kpi]} ({fleet.culprits(limit.kpi)})"
        for limit in limits
        if limit.kpi in counts and limit.broken_by(counts[limit.kpi], number, last=True)
    ]


@dataclass(frozen=True)
class Look:
    """What one look at a run's folder, or at a pilot's, shows. run_dir: None where a pilot has no run yet; broken: the limits that were.

    fleet: the nodes that it is on, None for a simulation.
    """

    rows: Sequence[dict[str, float | None]]
    wanted_rounds: int
    finished: bool
    held: bool  # by the process that runs it
    run_dir: Path | None = None
    fleet: Fleet | None = None
    broken: tuple[str, ...] = field(default=(), compare=False)

    @property
    def news(self) -> tuple[object, ...]:
        """Returns what is another after something happened."""
        fleet = self.fleet
        return len(self.rows), self.finished, self.broken, fleet and (fleet.served, fleet.nodes, self.run_dir)

    def state(self) -> str:
        """Returns how far it is, in words."""
        if not self.run_dir:
            return "no run yet: the server waits for its nodes"
        state = "finished" if self.finished else "running" if self.held else "not running"
        return f"round {len(self.rows)} of {self.wanted_rounds}, {state}"

    def words(self) -> str:
        """Returns how far it is, its key figures and its nodes, in words."""
        last = self.rows[-1] if self.rows else {}
        chosen = {"accuracy": "accuracy", "simulated_s": "simulated", "mean_ratio": "ratio"}
        said = [f"{name} {KPIS[key][1].format(last[key])}" for key, name in chosen.items() if last.get(key) is not None]
        return "; ".join([self.state(), *said, *([self.fleet.words()] if self.fleet else [])])

    def figures(self, limits: Sequence[Limit]) -> list[list[str]]:
        """Returns the last round's figures beside their limits, a row of text each."""
        last: dict[str, float | None] = self.rows[-1] if self.rows else dict.fromkeys(KPIS)
        counts = self.fleet.counts() if self.fleet else {}
        shown = {key: (title, last[key], form) for key, (title, form) in KPIS.items()}
        shown |= {key: (COUNTS[key], count, "{}") for key, count in counts.items()}
        return [
            [
                title,
                "-" if figure is None else form.format(figure),
                ", ".join(str(limit) for limit in limits if limit.kpi == key),
            ]
            for key, (title, figure, form) in shown.items()
        ]

    def table(self, limits: Sequence[Limit]) -> Table:
        """Returns the last round's figures beside their limits; on a pilot a row for each node, under the figures."""
        if self.fleet is None:
            facts = Table.of_facts(self.state(), self.figures(limits), ["figure", "now", "limit"])
            return replace(facts, elsewhere="on your command line")
        kept = f"\nlimits: {', '.join(map(str, limits))}" if limits else ""
        return self.fleet.table(self.words() + kept + "".join(f"\n{line}" for line in self.broken))

    def lines(self, before: Look | None) -> list[str]:
        """Returns what happened on a pilot since another look, a line each."""
        changed = [] if self.fleet is None else self.fleet.changes(before.fleet if before else None)
        new = [line for line in self.broken if before is None or line not in before.broken]
        same = before is not None and before.words() == self.words()
        return ([] if same else [self.words()]) + changed + new

    def plain(self) -> dict[str, object]:
        """Returns it for programs."""
        last = self.rows[-1] if self.rows else {}
        figures = {"round": len(self.rows), "finished": self.finished, **last}
        return figures | ({} if self.fleet is None else {"served": self.fleet.served, "nodes": self.fleet.plain()})


def look(path: Path, prices: Prices) -> Look:
    """Returns what a run's folder, or a pilot's and that of its run, shows now; raises CheckpointError."""
    if not is_pilot(path):
        return look_at_run(path, prices)
    posted = posted_by(path)
    run_dir = Path(posted.run_dir) if posted.run_dir and (Path(posted.run_dir) / folder.MANIFEST).exists() else None
    fleet = fleet_of(path, posted, run_dir)
    if run_dir is None:
        return Look([], 0, finished=False, held=fleet.served, fleet=fleet)
    return replace(look_at_run(run_dir, prices), fleet=fleet)


def look_at_run(run_dir: Path, prices: Prices) -> Look:
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
    return Look(kpis(records, prices), wanted, finished, held, run_dir, fleet_beside(run_dir, manifest))


def check_limits(limits: Sequence[Limit], now: Look) -> None:
    """Raises ConfigError for a limit that would never be judged."""
    for limit in limits:
        if limit.since is not None and limit.since > now.wanted_rounds and now.run_dir:
            raise ConfigError(f"--limit {limit}: the run has {now.wanted_rounds} rounds, so it would never be judged")
        if limit.kpi in COUNTS and now.fleet is None:
            raise ConfigError(f"--limit {limit}: this run has no nodes that are served, so it would never be judged")


def watch(
    path: Path,
    limits: Sequence[Limit],
    prices: Prices,
    *,
    once: bool,
    go_on: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Look]:
    """Yields what the folder of a run or of a pilot shows whenever it changes, until the run is finished.

    Raises LimitError as soon as a limit is broken, at the end where it is to `go_on`. Raises CheckpointError when the run is unfinished
    and no process holds it any more.
    """
    seen, alone_since, told = None, None, dict[str, str]()
    while True:
        now = look(path, prices)
        check_limits(limits, now)
        of_nodes = broken_now(now.fleet, len(now.rows), limits) if now.fleet and not now.finished else []
        for line in (*broken(now.rows, limits, finished=now.finished), *of_nodes):
            told.setdefault(line.split()[0], line)
        now = replace(now, broken=tuple(told.values()))
        if now.news != seen or now.finished:
            seen = now.news
            yield now
        if told and (now.finished or once or not go_on):
            raise LimitError(f"{path}: {'; '.join(told.values())}")
        if now.finished or once:
            return
        alone_since = None if now.held else alone_since or clock()
        if alone_since is not None and clock() - alone_since > (ABANDONED_S if now.run_dir else UNSERVED_S):
            raise CheckpointError(f"{path}: {_abandoned(now)}")
        time.sleep(LOOK_S)


def _abandoned(now: Look) -> str:
    """Returns how a run that nobody runs any more is continued."""
    if now.fleet is None:
        return f"interrupted after round {len(now.rows)}; continue it with `fedprune resume {now.run_dir}`"
    again = f"`fedprune serve {now.fleet.pilot}`, as it was called before, goes on"
    return f"interrupted after round {len(now.rows)}; {again}" if now.run_dir else f"nobody serves this pilot; {again}"
