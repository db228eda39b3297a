"""What a node's machine draws: from made-up folders of sysfs, and in a run on nodes in this process."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes.fleet import InProcessSite, begin, deal, result, simulate
from safetensors.numpy import save

from fedprune_cli.nodes import energy
from fedprune_cli.nodes.energy import (
    Counter,
    Sample,
    Spent,
    metering,
    read_batteries,
    read_board,
    read_counters,
    read_row,
    read_spent,
    spent_between,
    take,
)
from fedprune_cli.nodes.protocol import read_from_node
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.sealed import KEY, Sealed

RANGE_J = 262143.32885  # as Intel's processors have it
GARBAGE = ("", "x", "1.5.2", "nan", "-", "9" * 5000, "\xff\x00", "12 34")


def lay(place: Path, **files: object) -> Path:
    """Writes a folder of sysfs, a value a file, each at once, as whoever meters may be reading it."""
    place.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (place / f"{name}.new").write_text(f"{value}\n", encoding="latin-1")
        (place / f"{name}.new").replace(place / name)
    return place


def zone(root: Path, number: str, name: str, energy_uj: object = 5_000_000) -> Path:
    """Makes a zone of RAPL."""
    most = round(RANGE_J * 1e6)
    return lay(root / "class" / "powercap" / number, name=name, energy_uj=energy_uj, max_energy_range_uj=most)


def jetson(root: Path, **files: object) -> Path:
    """Makes the power monitor of a Jetson Orin NX: 5 V, 2.4 A."""
    own = {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": 5000, "curr1_input": 2400,
           "in2_label": "VDD_CPU_GPU_CV", "in2_input": 5000, "curr2_input": 900}  # fmt: skip
    lay(root / "class" / "hwmon" / "hwmon0", name="thermal", temp1_input=40000)
    return lay(root / "class" / "hwmon" / "hwmon1", **{**own, **files})


def battery(root: Path, name: str = "BAT0", **files: object) -> Path:
    """Makes a battery that gives 9 W."""
    own = {"type": "Battery", "status": "Discharging", "power_now": 9_000_000}
    return lay(root / "class" / "power_supply" / name, **{**own, **files})


def counted(*joules: Mapping[str, float], most_j: float | None = RANGE_J, every_s: float = 1.0) -> list[Sample | None]:
    """Returns samples of counters, so many seconds apart."""
    return [
        Sample("rapl", at * every_s, {name: Counter(value, most_j) for name, value in one.items()})
        for at, one in enumerate(joules)
    ]


def drawn(root: Path, **later: object) -> Spent | None:
    """Returns what is measured while the counter of package 0 goes on to another value."""
    with metering(root) as samples:
        lay(root / "class" / "powercap" / "intel-rapl:0", **later)
    return spent_between(samples)


# --- RAPL -----------------------------------------------------------------------------------------------------------------


def test_packages_are_added_and_their_parts_and_second_ways_to_them_are_not(tmp_path: Path) -> None:
    for number, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core"),
                         ("intel-rapl:0:2", "dram"), ("intel-rapl-mmio:0", "package-0")):  # fmt: skip
        zone(tmp_path, number, name)
    found = read_counters(tmp_path / "class" / "powercap", "package")
    assert found == {f"package-{k}": Counter(5.0, RANGE_J) for k in (0, 1)}
    assert drawn(tmp_path, energy_uj=7_500_000) == Spent(2.5, "rapl")
    assert spent_between(counted({"package-0": 1, "package-1": 10}, {"package-0": 3, "package-1": 15})) == Spent(
        7, "rapl"
    )


def test_the_platform_is_taken_for_the_packages_where_it_counts_at_least_as_much(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:1", "psys")
    assert {*take(tmp_path, "rapl").counters} == {"package-0", "psys"}  # type: ignore[union-attr]
    both = [{"package-0": 1.0, "psys": 5.0}, {"package-0": 3.0, "psys": 9.0}]
    assert spent_between(counted(*both)) == Spent(4.0, "psys")
    assert spent_between(counted(both[0], {"package-0": 3.0, "psys": 5.5})) == Spent(2.0, "rapl")  # it is not wired
    assert spent_between(counted({"psys-1": 5.0}, {"psys-1": 9.0})) == Spent(4.0, "psys")
    assert spent_between(counted({"psys": 5.0}, {"psys": 5.0})) is None


@given(st.floats(0, RANGE_J), st.lists(st.floats(0.001, 5000), min_size=1, max_size=20))
def test_a_counter_that_starts_again_has_counted_all_the_same(start_j: float, steps_j: list[float]) -> None:
    """However often it starts again, where it is read before it can do so twice."""
    readings = [start_j % RANGE_J]
    for step_j in steps_j:
        readings.append((readings[-1] + step_j) % RANGE_J)
    spent = spent_between(counted(*({"package-0": one} for one in readings)))
    assert spent is not None
    assert spent.joules == pytest.approx(sum(steps_j), abs=1e-5)


def test_a_counter_that_was_set_back_is_not_measured() -> None:
    """As after a suspend: 262 kJ are in no second. Nor is one that does not say where it starts again."""
    assert spent_between(counted({"package-0": 200_000}, {"package-0": 5})) is None
    assert spent_between(counted({"package-0": 200_000}, {"package-0": 5}, most_j=None)) is None
    assert spent_between(counted({"package-0": 5}, {"package-0": 7}, most_j=None)) == Spent(2.0, "rapl")
    assert spent_between(counted({"package-0": 5}, {"package-0": 100_000})) is None
    assert spent_between(counted({"package-0": 5}, {"package-0": 100_000}, every_s=60)) is not None


def test_a_counter_that_stood_still_is_no_zero(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    assert drawn(tmp_path) is None


@pytest.mark.parametrize("text", [*GARBAGE, "-5", str(round(RANGE_J * 1e6) + 1)])
def test_a_counter_that_says_something_else_is_not_measured(tmp_path: Path, text: str) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    assert drawn(tmp_path, energy_uj=text) is None  # in the middle of the work
    zone(tmp_path, "intel-rapl:0", "package-0", text)
    assert take(tmp_path, "rapl") is None


def test_half_of_the_packages_are_not_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that only root may read, as it is by default, is as none; this test may be root's, so reading is refused by hand."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    theirs = zone(tmp_path, "intel-rapl:1", "package-1") / "energy_uj"
    assert take(tmp_path, "rapl") is not None
    whole = Path.read_text

    def read_text(path: Path, *args: Any) -> str:
        if path == theirs:
            raise PermissionError(13, "Permission denied")
        return whole(path, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert take(tmp_path, "rapl") is None
    assert drawn(tmp_path, energy_uj=7_500_000) is None
    zone(tmp_path, "intel-rapl:2", "psys")
    assert {*take(tmp_path, "rapl").counters} == {"psys"}  # type: ignore[union-attr]
    monkeypatch.undo()
    theirs.unlink()
    assert {*take(tmp_path, "rapl").counters} == {"psys"}  # type: ignore[union-attr]


# --- a Jetson's board, and batteries --------------------------------------------------------------------------------------


def test_the_rail_that_feeds_all_is_found_by_its_label(tmp_path: Path) -> None:
    assert read_board(tmp_path / "class" / "hwmon") is None
    chip = jetson(tmp_path)
    assert read_board(tmp_path / "class" / "hwmon") == pytest.approx(12.0)
    jetson(tmp_path, in1_label="VDD_GPU", in3_label="VDD_IN", in3_input=19000, curr3_input=1000)
    assert read_board(tmp_path / "class" / "hwmon") == pytest.approx(19.0)
    jetson(tmp_path, in1_label="VDD_GPU_SOC", in3_label="VIN_SYS_5V0")
    assert read_board(tmp_path / "class" / "hwmon") is None  # as on an AGX: parts, and no total
    for name in ("in1_label", "in2_label", "in3_label"):
        (chip / name).unlink()
    assert read_board(tmp_path / "class" / "hwmon") is None  # nobody says what the channels feed


@pytest.mark.parametrize("name", ["in1_input", "curr1_input", "name", "in1_label"])
def test_a_board_that_is_half_there_or_says_something_else_is_not_measured(tmp_path: Path, name: str) -> None:
    for text in GARBAGE:
        jetson(tmp_path, **{name: text})
        assert read_board(tmp_path / "class" / "hwmon") is None
    (jetson(tmp_path) / name).unlink()
    assert read_board(tmp_path / "class" / "hwmon") is None


def test_batteries_are_read_while_they_discharge(tmp_path: Path) -> None:
    supplies = tmp_path / "class" / "power_supply"
    own = battery(tmp_path)
    lay(supplies / "AC", type="Mains", online=0)
    battery(tmp_path, "mouse", scope="Device", power_now=50_000)
    assert read_batteries(supplies) == pytest.approx(9.0)
    battery(tmp_path, "BAT1", status="Not charging", power_now=0)
    assert read_batteries(supplies) == pytest.approx(9.0)
    battery(tmp_path, "BAT1")
    assert read_batteries(supplies) == pytest.approx(18.0)
    (supplies / "BAT1" / "power_now").unlink()
    assert read_batteries(supplies) is None  # of two batteries one does not say
    lay(supplies / "BAT1", current_now=-500_000, voltage_now=8_000_000)
    assert read_batteries(supplies) == pytest.approx(13.0)  # drivers differ in the sign
    (supplies / "BAT1" / "voltage_now").unlink()
    assert read_batteries(supplies) is None
    battery(tmp_path, "BAT1", status="Full")
    for status in ("Charging", "Full", "Unknown", "", "x"):
        lay(own, status=status)
        assert read_batteries(supplies) is None


@pytest.mark.parametrize("text", GARBAGE)
def test_a_battery_that_says_something_else_is_not_measured(tmp_path: Path, text: str) -> None:
    battery(tmp_path, power_now=text)
    assert read_batteries(tmp_path / "class" / "power_supply") is None


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.1, 1000)), min_size=2, max_size=20))
def test_watts_are_integrated_by_trapezoids(steps: list[tuple[float, float]]) -> None:
    """Exact for watts that rise evenly: their mean times the time."""
    at_s = [0.0]
    for step_s, _ in steps:
        at_s.append(at_s[-1] + step_s)
    slope = steps[0][1] / at_s[-1]
    spent = spent_between([Sample("board", at, watts=1 + slope * at) for at in at_s])
    assert spent is not None
    assert spent.of == "board"
    assert spent.joules == pytest.approx(at_s[-1] * (1 + slope * at_s[-1] / 2))


@pytest.mark.parametrize("watts", [0.0, -5.0, 1e5, float("inf"), float("nan")])
def test_watts_that_cannot_be_are_not_measured(watts: float) -> None:
    """Zero too: a battery's gauge that says so has not looked yet."""
    samples = [Sample("battery", float(at), watts=9.0) for at in range(3)]
    assert spent_between(samples) == Spent(18.0, "battery")
    assert spent_between([samples[0], Sample("battery", 1.0, watts=watts), samples[2]]) is None
    assert spent_between([samples[0], None, samples[2]]) is None
    assert spent_between(samples[:1]) is None
    assert spent_between([]) is None


# --- the metering ---------------------------------------------------------------------------------------------------------


def test_watts_are_read_while_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn in its middle is seen, though not at its ends; nothing goes on when the work is over, or has failed."""
    monkeypatch.setitem(energy.PERIODS_S, "board", 0.01)
    jetson(tmp_path)
    with metering(tmp_path) as samples:
        jetson(tmp_path, curr1_input=24_000)
        until_s = time.monotonic() + 5
        while not any(one and one.watts == 120.0 for one in samples) and time.monotonic() < until_s:
            time.sleep(0.01)
        time.sleep(0.05)
        jetson(tmp_path)
    spent = spent_between(samples)
    assert spent is not None
    assert samples[0]
    assert samples[-1]
    assert spent.joules > 2 * 12.0 * (samples[-1].at_s - samples[0].at_s)
    threads = threading.active_count()
    with metering(tmp_path):
        assert threading.active_count() == threads + 1
    with pytest.raises(KeyError), metering(tmp_path):
        raise KeyError
    assert threading.active_count() == threads


def test_a_battery_that_is_plugged_in_meanwhile_is_not_measured(tmp_path: Path) -> None:
    battery(tmp_path)
    with metering(tmp_path) as samples:
        battery(tmp_path, status="Charging")
    assert spent_between(samples) is None


def test_counters_come_first_then_the_board_then_a_battery(tmp_path: Path) -> None:
    def source() -> str | None:
        with metering(tmp_path) as samples:
            return samples[0].of if samples and samples[0] else None

    assert source() is None
    battery(tmp_path)
    assert source() == "battery"
    jetson(tmp_path)
    assert source() == "board"
    zone(tmp_path, "intel-rapl:0", "package-0")
    assert source() == "rapl"


# --- what is said of it ---------------------------------------------------------------------------------------------------


SCORE = {"kind": "score", "of": "x", "compute_s": 1.0, "correct": 1, "total": 2}


@pytest.mark.parametrize(("joules", "of"), [(-1.0, "rapl"), (0.0, "rapl"), (0, "board"), (1.0, None), (None, "rapl"), (1.0, "guess"),
                                            (True, "rapl"), ("1", "rapl"), (10**400, "rapl"), (1.0, 3), ([1], "rapl")])  # fmt: skip
def test_joules_that_nobody_can_have_measured_are_refused(joules: Any, of: Any) -> None:
    for read in (read_spent, read_row, lambda header: read_from_node(Sealed({**SCORE, **header}).encode())):
        with pytest.raises(ValueError, match=r"joules that cannot be|not a message"):
            read({"joules": joules, "joules_of": of})


def test_an_answer_says_that_nothing_was_measured() -> None:
    with pytest.raises(ValueError, match="not a message"):
        read_from_node(Sealed(SCORE).encode())  # type: ignore[arg-type]
    for number in ("NaN", "Infinity", "1e999"):  # which `Sealed` does not write
        header = json.dumps({**SCORE, "joules": 0, "joules_of": "rapl"}).replace(" 0,", f" {number},")
        with pytest.raises(ValueError, match="damaged"):
            read_from_node(save({}, {KEY: hashlib.sha256(header.encode()).hexdigest() + header}))
    message = read_from_node(Sealed({**SCORE, "joules": None, "joules_of": None}).encode())  # type: ignore[arg-type]
    assert read_spent(message.header) is None


def nodes_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of nodes in timings.jsonl."""
    return [row for line in (run_dir / folder.TIMINGS).read_text().splitlines() for row in json.loads(line)["nodes"]]


def test_what_nodes_draw_stands_in_timings_and_nowhere_else(tmp_path: Path) -> None:
    """With a source and without: records and u are the simulator's bytes, and what was not measured is null."""
    few = ["rounds=2", "devices.count=2", "devices.fresh=0"]
    places = deal(simulate(tmp_path / "simulated", *few), tmp_path)
    jetson(tmp_path / "sys")
    for name, sys in (("measured", tmp_path / "sys"), ("not", tmp_path / "nowhere")):
        setup, config = begin(tmp_path, tmp_path / name, few)
        list(life.run(setup, tmp_path / name, site=InProcessSite(places, config, sys=sys)))
        assert result(tmp_path / name) == result(tmp_path / "simulated")
        folder.check(tmp_path / name)
    measured, without = nodes_rows(tmp_path / "measured"), nodes_rows(tmp_path / "not")
    records = [json.loads(line)["devices"] for line in (tmp_path / "not" / folder.RECORDS).read_text().splitlines()]
    modelled = [joules for one in records for joules in one["joules"]]
    assert len(measured) == len(without) == len(modelled) > 0
    assert [row["modelled"]["joules"] for row in measured] == [row["modelled"]["joules"] for row in without] == modelled
    assert all(row["joules"] > 0 and row["joules_of"] == "board" for row in measured)
    assert all(row["test_joules"] > 0 and row["test_joules_of"] == "board" for row in measured)
    for key in ("joules", "joules_of", "test_joules", "test_joules_of"):
        assert {row[key] for row in without} == {None}
