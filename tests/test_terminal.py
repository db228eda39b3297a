"""Tables at every width: numbers stay whole, what has no room is named, and what is not a terminal gets whole lines."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import fedprune, run_to_end
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from fedprune_cli import terminal
from fedprune_cli.audit.listing import Listed, runs_table
from fedprune_cli.audit.verify import Findings
from fedprune_cli.audit.watch import KPIS, Look, parse_limit
from fedprune_cli.bench import baseline, calibrate
from fedprune_cli.bench.measure import Measure
from fedprune_cli.report.allocation import Rung, allocation_table, ladder_table
from fedprune_cli.report.comparison import EQUAL_SUFFIX, Comparison
from fedprune_cli.report.comparison_page import comparison_table
from fedprune_cli.report.estimate import QUANTITIES, Estimate
from fedprune_cli.report.read import Run
from fedprune_cli.report.run import run_table
from fedprune_cli.report.sweep import Group, sweep_table
from fedprune_cli.store.record import DeviceRows, RoundRecord
from fedprune_cli.terminal import Table

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
ARMS = ("proposed", "personalized", f"personalized{EQUAL_SUFFIX}", "proposed few bits", "fedavg")


def shown(table: Table, width: int, encoding: str = "utf-8") -> str:
    """Returns what a terminal of `width` columns shows."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, force_terminal=True, no_color=True, width=width, legacy_windows=False).print(table)
    stream.flush()
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]


# --- every table of the program, of figures of any size ---------------------------------------------------------------

Size = Callable[[], float]


def sizes(seed: int) -> Size:
    """Returns a source of figures of every magnitude."""
    random = np.random.default_rng(seed)
    return lambda: float(10 ** random.uniform(-7, 9))


def train_table(size: Size, seeds: int) -> Table:
    unknown = dict.fromkeys(field.name for field in fields(RoundRecord))
    figures = {
        "accuracy": 0.92, "accuracy_mean": 0.9, "accuracy_p10": 0.8, "simulated_s": size(), "latency_s": size(), "mean_ratio": 0.3,
        "max_ratio": 0.9, "bytes_up": size(), "joules": size(),
    }  # fmt: skip
    record = RoundRecord(**(unknown | figures | {"devices": DeviceRows()}))  # type: ignore[arg-type]
    config = {"pruner": {"granularity": "weight"}, "branch": {"run": "outputs/main/a562868aefad-s0", "round": 12}}
    manifest = {"method": "proposed", "seed": 123, "config": config, "histogram": [], "fresh_devices": 0}
    return run_table(Run(Path("run"), manifest, (record,) * seeds, None))  # type: ignore[arg-type]


def estimates(size: Size, seeds: int) -> dict[str, Estimate | None]:
    keys = [*(quantity.key for quantity in QUANTITIES), "simulated_s"]
    return {key: Estimate(size(), None if seeds == 1 else size(), seeds) for key in keys}


def compare_table(size: Size, seeds: int) -> Table:
    return comparison_table(Comparison({}, "personalized", {}, {arm: estimates(size, seeds) for arm in ARMS}))


def swept_table(size: Size, seeds: int) -> Table:
    cells = [
        {"method": method, "partition.alpha": alpha} for method in ("proposed", "fedavg") for alpha in ("0.1", "1")
    ]
    below = Estimate(size(), None if seeds == 1 else size(), seeds)
    return sweep_table([Group(values, "", {}, estimates(size, seeds), below) for values in cells])


def allocate_table(size: Size, seeds: int) -> Table:
    device = {
        "prune_ratio": 0.5,
        "bandwidth_hz": size(),
        "rate_bps": size(),
        "latency_s": size(),
        "binds": "max_bandwidth",
    }
    devices = [device | {"id": at} for at in (0, 99_999)]
    certificate = {"residual": size(), "gap": 1e-16} if seeds > 1 else None
    return allocation_table(
        {"status": "optimal", "deadline_s": size(), "message": "", "certificate": certificate, "devices": devices}
    )


def ladders_table(size: Size, seeds: int) -> Table:
    names = ("kkt", "minmax", "equal", "uniform", "alternating")
    met: dict[str, tuple[float, float] | None] = dict.fromkeys(names, (0.123, 0.456))
    return ladder_table([Rung(0.5, size(), met), Rung(0.5, size(), met | {"minmax": None})])


def list_table(size: Size, seeds: int) -> Table:
    statuses = ("finished", "interrupted", "damaged")
    return runs_table(
        [
            Listed("outputs/main/0a5a9d4e9191-s10", status, "proposed", 0, 123, 1000, 0.9123, size(), int(size()))  # type: ignore[arg-type]
            for status in statuses
        ]
    )


def verify_table(size: Size, seeds: int) -> Table:
    return Findings(120, 10, 1000, True, 12345, 678, 110, size(), size(), 11, 2, size(), ("x",) * (seeds - 1)).table()


def watch_table(size: Size, seeds: int) -> Table:
    limits = [parse_limit(text) for text in ("latency_s<=2.5", "accuracy>=0.825@20")]
    return Look([{key: size() for key in KPIS}] * seeds, 100, False, True).table(limits)


def bench_table(size: Size, seeds: int) -> Table:
    names = ("t1/samples per CPU second", "allocator/time a device at 1000000 devices", "startup/--help")
    kinds = ("wall", "exact", "wall")
    return baseline.table(
        [
            Measure(name, "samples/s", size(), size(), "smaller", kind, size())  # type: ignore[arg-type]
            for name, kind in zip(names, kinds, strict=True)
        ]
    )


def calibrate_table(size: Size, seeds: int) -> Table:
    points = [
        calibrate.Point(ratio, 1 - ratio, size(), int(size()), int(size()), size(), size(), size(), size(), size())
        for ratio in (0.0, 0.25, 0.9)
    ]
    return calibrate.table(calibrate.Calibration("cnn", 2.6e9, size(), size(), size(), tuple(points)))


TABLES = (
    train_table, compare_table, swept_table, allocate_table, ladders_table, list_table, verify_table, watch_table, bench_table,
    calibrate_table,
)  # fmt: skip


def check_shown(table: Table, width: int) -> None:
    """Checks that nothing is wider than the terminal, no number is on two lines, and what is left out is named."""
    text = shown(table, width)
    assert max(map(cell_len, text.splitlines())) <= width
    count = len(table.fit(width))
    numbers = {number for row in table.rows for cell in row[:count] for number in NUMBER.findall(cell)}
    found = {number for line in text.splitlines() for number in NUMBER.findall(line)}
    assert numbers <= found
    for at in range(1, count):
        if table.headers[at] not in table.folding:
            assert all(re.search(rf"[│┃|] *{re.escape(row[at])} [│┃|]", text) for row in table.rows if row[at])
    below = " ".join(text.partition("not shown at")[2].split())
    left_out = table.headers[count:]
    assert bool(below) == bool(left_out)
    if left_out:
        assert below == f"{width} columns: {', '.join(left_out)}; all are {table.elsewhere}"
    assert count >= min(table.always, 2)


@pytest.mark.parametrize("build", TABLES, ids=lambda build: build.__name__)
@given(seed=st.integers(0, 10**6), width=st.integers(40, 200), seeds=st.sampled_from((1, 5)))
def test_no_number_folds_and_nothing_is_wider_than_the_terminal(
    build: Callable[[Size, int], Table], seed: int, width: int, seeds: int
) -> None:
    check_shown(build(sizes(seed), seeds), width)


@pytest.mark.parametrize("build", TABLES, ids=lambda build: build.__name__)
def test_a_wide_terminal_shows_everything(build: Callable[[Size, int], Table]) -> None:
    table = build(lambda: 0.5, 1)
    assert len(table.fit(200)) == len(table.headers)
    lines = shown(table, 200).splitlines()
    assert all(any(all(cell in line for cell in row) for line in lines) for row in table.rows)


@given(st.integers(40, 120), st.integers(1, 150))
def test_a_name_stays_whole_while_it_can_and_is_never_cut(width: int, length: int) -> None:
    """A path that has room is on one line; a longer one is broken, and leaves room for figures."""
    name = "outputs/" + "x" * length
    text = shown(Table.of("", ["run", "seconds"], [[name, "1.234"]]), width)
    pieces = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(pieces) == name
    if len(name) + 4 <= width:
        assert pieces == [name]
    else:
        assert "1.234" in text


# --- what is not a terminal, and characters that an encoding lacks ------------------------------------------------------


@pytest.mark.parametrize("build", TABLES, ids=lambda build: build.__name__)
def test_a_pipe_gets_whole_rows(
    build: Callable[[Size, int], Table], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = build(lambda: 0.123, 5)
    terminal.show(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(table.title.splitlines()) + 1 + len(table.rows)
    for line, row in zip(lines[-len(table.rows) :], table.rows, strict=True):
        assert line.split() == " ".join(row).split()


def test_a_sentence_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal.show("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def test_an_encoding_without_the_characters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table.of("±", ["name", "seconds"], [["é", "1.5 ± 0.25"]])
    text = shown(table, 60, "ascii")
    assert "1.5 +- 0.25" in text
    assert "│" not in text
    assert "+---" in text
    latin = shown(table, 60, "latin-1")
    assert "1.5 ± 0.25" in latin
    assert "é" in latin
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.hold_streams()
    terminal.show(table)
    terminal.show("± é")
    assert stream.buffer.getvalue().decode("ascii").splitlines() == [  # type: ignore[attr-defined]
        "+-", "name      seconds", "?     1.5 +- 0.25", "+- ?",
    ]  # fmt: skip


def ascii_stdout() -> None:
    sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_command_prints_whole_rows_into_a_pipe_whatever_the_encoding(tmp_path: Path) -> None:
    for method in ("proposed", "personalized"):
        for seed in (0, 1):
            run_to_end(tmp_path / f"{method}{seed}", f"method={method}", f"seed={seed}")
    runs = [f"{method}{seed}" for method in ("proposed", "personalized") for seed in (0, 1)]
    plain = fedprune("report", *runs).stdout
    assert len([line for line in plain.splitlines() if line.startswith(("proposed  ", "personalized"))]) == 3
    ascii_only = fedprune("report", *runs, before=ascii_stdout)
    assert (ascii_only.returncode, ascii_only.stderr) == (0, "")
    assert ascii_only.stdout.split() == plain.replace("±", "+-").split()
