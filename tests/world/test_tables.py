"""Tables are read right, or refused on the right line of the file: generated ones whose answer is known by how they were made."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from fedprune_cli.errors import DataError, one_line
from fedprune_cli.world.channel import Trace
from fedprune_cli.world.devices import FleetTable
from fedprune_cli.world.tables import RANGES, UNLIMITED, WHOLE, read_header, read_table

FLEET = ("cpu_ghz", "cycles_per_flop", "tx_power_dbm", "gain_db")
LIMITS = ("min_bandwidth_mhz", "max_bandwidth_mhz", "energy_budget_j")
NOTES = ("", "ok", "roof\nnorth", "roof\r\nnorth", "a,b", 'say "x"', "site\x85A", "a\u2028b\u2029c", "v\x0bf\x0c", "é 北", "a;b\tc",
         "x" * 500, "5'10\"", "nan", "=1+1", "a\rb")  # fmt: skip
NO_NUMBERS = ("", "x", "1_0", "１", "−1", "nan", "inf", "-inf", "1e999", "0x1", "1,5", "1 0", "--1", "1e", ".", "1\n", "1\x85", "٣",
              "9" * 400, "=1", "1e-31", "None", "1.0.0", "1\0", "\u00a01", "1\u2028", "½", "²", "TRUE", "1e1_0")  # fmt: skip
QUOTED = ("\n", "\r", ",", '"')


@dataclass
class Made:
    """A table as it is to be written, and what must come of it: the first bad line and the words about it, or nothing bad."""

    header: list[str]
    rows: list[list[str]]
    values: dict[str, list[float]]
    ends: str = "\n"
    data: bytes = b""
    lines: list[int] = field(default_factory=list)
    line: int | None = None
    words: str = ""


def number(rng: random.Random, name: str) -> tuple[str, float]:
    """Returns a cell of a column and its value."""
    least, most = RANGES[name]
    if name in UNLIMITED and rng.random() < 0.3:
        return rng.choice(("", "  ")), UNLIMITED[name]
    if name in WHOLE:
        value = float(rng.randint(int(least), int(min(most, 10**6))))
        return rng.choice((f"{value:.0f}", f"{value:.1f}", f"{value:.6e}", f"+{value:.0f}")), value
    if name == "min_bandwidth_mhz":
        most = 1.0
    if name == "max_bandwidth_mhz":
        least = 2.0
    value = rng.choice((least, most, rng.uniform(least, most), rng.uniform(max(least, -100), min(most, 10)))) or 0.0
    text = rng.choice((repr(value), repr(value), f"{value!r}".replace("e", "E"), f" {value!r}", f"\t{value!r} "))
    return text, value


def make(rng: random.Random) -> Made:
    """Returns a sound table of a fleet, with columns in any order and more than anybody asks for."""
    named, limits = rng.random() < 0.5, [name for name in LIMITS if rng.random() < 0.4]
    header = [
        *FLEET,
        *limits,
        *(["id"] if named else []),
        *rng.sample(["note", "remark", "", "Höhe"], rng.randint(0, 3)),
    ]
    rng.shuffle(header)
    header += [""] * rng.choice((0, 0, 0, 1, 2))
    values: dict[str, list[float]] = {name: [] for name in (*FLEET, *limits)}
    rows = []
    for at in range(rng.randint(1, 8)):
        row = []
        for name in header:
            if name in values:
                text, value = number(rng, name)
                values[name].append(value)
            else:
                text = rng.choice(NOTES)
                text = f"{text.strip()[:150]} {at}".strip() if name == "id" else text
            row.append(text)
        rows.append(row)
    return Made(header, rows, values, ends=rng.choice(("\n", "\n", "\r\n", "\r")))


def write(rng: random.Random, made: Made, faulty: tuple[int, int] | None = None, raw: str | None = None) -> Made:
    """Returns the table with its bytes and the line of each row; `faulty`: the row (0: the header) and cell whose line is the bad one.

    raw: what stands in that cell instead, without quoting.
    """
    text = "".join(made.ends for _ in range(rng.choice((0, 0, 0, 2))))
    lines, bad = [], made.line
    for number_, row in enumerate([made.header, *made.rows]):
        lines.append(count(text) + 1)
        cells = []
        for at, cell in enumerate(row):
            if faulty == (number_, at):
                bad = count(text + ",".join(cells)) + 1
            if faulty == (number_, at) and raw is not None:
                cells.append(raw)
                continue
            quoted = any(end in cell for end in QUOTED) or (cell and rng.random() < 0.2)
            cells.append('"' + cell.replace('"', '""') + '"' if quoted else cell)
        last = number_ == len(made.rows)
        text += ",".join(cells) + ("" if last and rng.random() < 0.3 else made.ends)
        text += "" if last else "".join(made.ends for _ in range(rng.choice((0, 0, 0, 0, 1, 3))))
    data = rng.choice((b"", b"", b"\xef\xbb\xbf")) + text.encode()
    return replace(made, data=data, lines=lines, line=bad)


def count(text: str) -> int:
    """Returns how many lines have ended: CR LF is one end."""
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def bad_cell(rng: random.Random, made: Made) -> Made:
    name, row = rng.choice(list(made.values)), rng.randrange(len(made.rows))
    at, cell = made.header.index(name), rng.choice(NO_NUMBERS)
    if cell == "" and name in LIMITS:
        cell = "none"
    rows = [list(cells) for cells in made.rows]
    rows[row][at] = cell
    return replace(write(rng, replace(made, rows=rows), (row + 1, at)), words=f"{name}=")


def out_of_range(rng: random.Random, made: Made) -> Made:
    name, row = rng.choice(list(made.values)), rng.randrange(len(made.rows))
    at, (least, most) = made.header.index(name), RANGES[name]
    rows = [list(cells) for cells in made.rows]
    rows[row][at] = repr(rng.choice((least - 1, most * 1.001 + 1, -1e300, 1e300)))
    return replace(write(rng, replace(made, rows=rows), (row + 1, at)), words=f"{name}=")


def ragged(rng: random.Random, made: Made) -> Made:
    row = rng.randrange(len(made.rows))
    rows = [list(cells) for cells in made.rows]
    if rng.random() < 0.5:
        rows[row].append(rng.choice(("", "1")))
    else:
        del rows[row][rng.randrange(len(rows[row]))]
    return replace(
        write(rng, replace(made, rows=rows), (row + 1, 0)),
        words=f"{len(rows[row])} values for {len(made.header)} columns",
    )


def twice(rng: random.Random, made: Made) -> Made:
    name = rng.choice([name for name in made.header if name])
    header, rows = [*made.header, name], [[*row, "1"] for row in made.rows]
    made = replace(made, header=header, rows=rows)
    return replace(write(rng, made, (0, len(header) - 1)), words=f"column {name} stands there twice")


def missing(rng: random.Random, made: Made) -> Made:
    name = rng.choice(FLEET)
    header = [rng.choice((other.upper(), "x" + other)) if other == name else other for other in made.header]
    shown = "distance_km or gain_db" if name == "gain_db" else name
    return replace(write(rng, replace(made, header=header), (0, 0)), words=f"column {shown} is missing")


def never_closed(rng: random.Random, made: Made) -> Made:
    row = rng.randrange(len(made.rows))
    plain = str.maketrans(dict.fromkeys('\n\r",', " "))  # a quotation mark further down would close it
    rows = [[cell.translate(plain) for cell in cells] for cells in made.rows[: row + 1]]
    at = len(made.header) - 1
    made = write(random.Random(0), replace(made, rows=rows), (row + 1, at), raw='"north')
    return replace(made, line=made.lines[row + 1], words="never closed")


def closed_early(rng: random.Random, made: Made) -> Made:
    row, at = rng.randrange(len(made.rows)), rng.randrange(len(made.header))
    return replace(write(rng, made, (row + 1, at), raw='"1"2'), words="a closing quotation mark must end its value")


def no_text(rng: random.Random, made: Made) -> Made:
    row, at = rng.randrange(len(made.rows)), rng.randrange(len(made.header))
    made = write(rng, made, (row + 1, at), raw="BYTE")
    return replace(made, data=made.data.replace(b"BYTE", b"caf\xe9"), words="not a CSV text file in UTF-8")


def another_separator(rng: random.Random, made: Made) -> Made:
    sign = rng.choice(";\t|")
    lines = [sign.join(row) for row in [list(FLEET), ["1", "1", "23", "-90"]]]
    return replace(
        made, data=made.ends.join(lines).encode(), line=1, words=f"columns must be separated by ',', not by {sign!r}"
    )


def too_long(rng: random.Random, made: Made) -> Made:
    made = write(rng, made, (len(made.rows), len(made.header) - 1), raw="y" * 10_001)
    return replace(made, words="at most 10000 are read")


def no_rows(rng: random.Random, made: Made) -> Made:
    made = write(rng, replace(made, rows=[]))
    return replace(made, line=0, words="has no rows")


def same_name(rng: random.Random, made: Made) -> Made:
    header, rows = ["id", *FLEET], [[f"d{at}", "1", "1", "23", "-90"] for at in range(6)]
    row = rng.randrange(1, 6)
    rows[row][0] = rng.choice(("", " ", "d0", "d0 ", "n" * 201))
    return replace(write(rng, replace(made, header=header, rows=rows), (row + 1, 0)), words="id=")


def crossed(rng: random.Random, made: Made) -> Made:
    header, row = [*FLEET, "max_bandwidth_mhz", "min_bandwidth_mhz"], rng.randrange(5)
    rows = [["1", "1", "23", "-90", "2", "3" if at == row else rng.choice(("1", "", "2"))] for at in range(5)]
    return replace(write(rng, replace(made, header=header, rows=rows), (row + 1, 0)), words="min_bandwidth=3 MHz")


FAULTS: tuple[Callable[[random.Random, Made], Made], ...] = (
    bad_cell, bad_cell, bad_cell, out_of_range, out_of_range, ragged, twice, missing, never_closed, closed_early, no_text,
    another_separator, too_long, no_rows, same_name, crossed,
)  # fmt: skip


def fleet_of(path: str) -> FleetTable:
    return FleetTable("table", None, 0, 0.0, None, None, 1e-28, path)


def check_fleet(rng: random.Random) -> None:
    made = make(rng)
    made = rng.choice(FAULTS)(rng, made) if rng.random() < 0.6 else write(rng, made)
    Path("fleet.csv").write_bytes(made.data)
    if not made.words:
        rows = read_table("fleet.csv", FLEET, optional=LIMITS, named=True)
        assert {name: rows[name].tolist() for name in rows} == made.values
        assert rows.lines.tolist() == made.lines[1:]
        assert read_header("fleet.csv") == tuple(made.header)
        names = tuple(row[made.header.index("id")] for row in made.rows) if "id" in made.header else None
        fleet = fleet_of("fleet.csv").draw(0)
        assert rows.names == fleet.names == names
        np.testing.assert_array_equal(fleet.cpu_hz, np.array(made.values["cpu_ghz"]) * 1e9)
        return
    with pytest.raises(DataError) as caught:
        fleet_of("fleet.csv").draw(0)
    text = str(caught.value)
    assert text == one_line(text)
    assert text.startswith(f"fleet.csv, line {made.line}: " if made.line else "fleet.csv: "), (
        text,
        made.line,
        made.data,
    )
    assert made.words in text, (text, made.words)


def check_trace(rng: random.Random) -> None:
    """A trace whose rows come in any order and of which some lack, against the rule of gaps spelled out device by device."""
    rounds, devices, rule = rng.randint(1, 6), rng.randint(1, 5), rng.choice(("refuse", "hold", "outage"))
    table = {(r, d): (rng.uniform(-120, -60), rng.random() < 0.8) for r in range(rounds) for d in range(devices)}
    for key in rng.sample(list(table), min(len(table), rng.choice((0, 0, 1, 2, len(table) // 2)))):
        del table[key]
    rows = [f"{r},{d},{gain!r},{int(there)}" for (r, d), (gain, there) in table.items()]
    rng.shuffle(rows)
    if repeated := bool(rows) and rng.random() < 0.2:
        rows.append(rng.choice(rows))
    Path("trace.csv").write_text("\n".join(["round,device,gain_db,available", *rows]))
    trace = Trace("trace", 20e6, 1e-20, 40.0, 0.0, 0.5, "trace.csv", gaps=rule)
    last = max((r for r, _ in table), default=-1) + 1
    whole = len(table) == last * devices
    begun = all(any((r, d) in table for r in range(last if rule == "outage" else 1)) for d in range(devices))
    if not rows or repeated or not (whole if rule == "refuse" else begun):
        with pytest.raises(DataError) as caught:
            trace.available(0, last, devices)
        text = str(caught.value)
        assert text == one_line(text)
        if rows and repeated:
            assert f"trace.csv, line {len(rows) + 1}: " in text
        return
    available = trace.available(0, last, devices)
    Path("fleet.csv").write_text("\n".join([",".join(FLEET), *["1,1,23,-90"] * devices]))
    drawn = fleet_of("fleet.csv").draw(0)
    for d in range(devices):
        stands = table[min(key for key in table if key[1] == d)]
        for r in range(last):
            stands = table.get((r, d), stands)
            assert np.isclose(trace.gain(0, r, drawn)[d], 10 ** (stands[0] / 10), rtol=1e-12, atol=0)
            assert available[r, d] == (stands[1] and ((r, d) in table or rule != "outage"))


def check_many(count_: int, first: int) -> None:
    for seed in range(first, first + count_):
        rng = random.Random(seed)
        (check_trace if seed % 4 == 0 else check_fleet)(rng)
        assert {path.name for path in Path().iterdir()} <= {"fleet.csv", "trace.csv"}, seed


def test_generated_tables_are_read_right_or_refused_on_their_line() -> None:
    check_many(60, 0)


@pytest.mark.slow
def test_two_thousand_generated_tables_are_read_right_or_refused_on_their_line() -> None:
    check_many(2000, 1000)


def test_an_empty_limit_is_none_and_an_unnamed_column_is_passed_over() -> None:
    Path("a.csv").write_text(
        ",cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db,energy_budget_j\n0,1,1,23,-100,\n1,1,1,23,-90,0.5\n"
    )
    fleet = fleet_of("a.csv").draw(0)
    assert fleet.energy_budget_j.tolist() == [np.inf, 0.5]
    assert fleet.names is None
    assert fleet.take(np.array([1])).energy_budget_j.tolist() == [0.5]


def test_names_go_with_their_devices_and_remarks_may_repeat() -> None:
    Path("a.csv").write_text(
        "id,note,cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db\nsite\x85A,n,1,1,23,-100\nB,n,2,1,23,-90\n"
    )
    fleet = fleet_of("a.csv").draw(0)
    assert fleet.names == ("site\x85A", "B")
    taken = fleet.take(np.array([1, 0, 1]))
    assert taken.names == ("B", "site\x85A", "B")
    assert taken.cpu_hz.tolist() == [2e9, 1e9, 2e9]


def test_a_tables_least_bandwidth_is_held_against_the_configurations_most() -> None:
    Path("a.csv").write_text(
        "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db,min_bandwidth_mhz\n1,1,23,-90,1\n1,1,23,-90,4\n"
    )
    with pytest.raises(
        DataError, match=r"a\.csv, line 3: min_bandwidth=4 MHz is not allowed: must be at most the maximum, 2 MHz"
    ):
        FleetTable("table", None, 0, 0.0, 2e6, None, 1e-28, "a.csv").draw(0)


@pytest.mark.parametrize("gaps", ["hold", "outage"])
def test_gaps_too_many_to_fill_are_refused_at_once(gaps: str) -> None:
    Path("t.csv").write_text("round,device,gain_db\n0,0,-90\n9999999,0,-90\n")
    trace = Trace("trace", 20e6, 1e-20, 40.0, 0.0, 0.5, "t.csv", gaps=gaps)
    with pytest.raises(DataError, match=r"10000000 rounds of 3 devices, at most 20000000"):
        trace.available(0, 1, 3)
