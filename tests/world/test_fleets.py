"""The built-in fleets: places, classes, ranges and tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import configured

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.contracts.test_devices import devices_of
from fedprune_cli.errors import ConfigError, DataError
from fedprune_cli.world.devices import DeviceClass, FleetOfClasses


def test_places_are_uniform_in_the_disk() -> None:
    distance = devices_of("sampled", 50_000).draw(0).distance_m
    assert abs((distance < 250).mean() - (250**2 - 20**2) / (500**2 - 20**2)) < 0.01


def test_clocks_are_log_uniform() -> None:
    cpu_hz = devices_of("sampled", 50_000).draw(0).cpu_hz
    assert abs((cpu_hz < 1e9).mean() - 0.5) < 0.01  # 1 GHz is the geometric mean of 0.5 and 2 GHz


def test_classes_come_in_their_shares_and_whole() -> None:
    kinds = (DeviceClass("a", 3, 1e9, 0.5, 0.1), DeviceClass("b", 1, 2e9, 0.7, 0.2))
    fleet = FleetOfClasses("classes", None, 0, 0, None, None, 40_000, 20, 500, 0, kinds).draw(0)
    first = fleet.cpu_hz == 1e9
    assert abs(first.mean() - 0.75) < 0.01
    np.testing.assert_array_equal(fleet.cycles_per_flop, np.where(first, 0.5, 0.7))
    np.testing.assert_array_equal(fleet.tx_power_w, np.where(first, 0.1, 0.2))


def test_a_table_is_read_row_by_row() -> None:
    Path("fleet.csv").write_text("note,tx_power_dbm,cpu_ghz,cycles_per_flop,gain_db\nx,30,1.5,2,-90\n,0,0.5,1,-100\n")
    fleet = build_experiment(configured("devices=table", "devices.file=fleet.csv")).devices.draw(0)
    np.testing.assert_allclose(fleet.cpu_hz, [1.5e9, 0.5e9])
    np.testing.assert_allclose(fleet.tx_power_w, [1, 1e-3])
    np.testing.assert_allclose(fleet.path_gain_linear, [1e-9, 1e-10])
    urban = build_experiment(configured("channel.fading=none")).channel
    np.testing.assert_allclose(urban.gain(0, 0, fleet), [1e-9, 1e-10])  # stands in for path loss and shadowing
    faded = build_experiment(configured()).channel
    assert (faded.gain(0, 0, fleet) != faded.gain(0, 1, fleet)).all()


HEADER = "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cpu_ghz,cycles_per_flop,tx_power_dbm\n1,1,23\n", "column distance_km or gain_db is missing"),
        (HEADER.encode() + b"1,1,23,-90\n0,1,23,-90\n", r"line 3: cpu_ghz='0' is not allowed: must be a number in \["),
        (HEADER.encode() + b"1,1,nan,-90\n", "line 2: tx_power_dbm='nan'"),
        (HEADER.encode() + b"1,1,9000,-90\n", r"line 2: tx_power_dbm='9000' .* \[-100, 100\]"),
        (HEADER.encode() + b"1,1,23\n", "line 2: 3 values for 4 columns"),
        (HEADER.encode(), "has no rows"),
        (b"\x00\x01", r"fleet\.csv"),
        (b"\xff\xfe\x00", "not a CSV text file"),
        (None, r"fleet\.csv: No such file"),
    ],
)
def test_a_table_names_its_bad_line(text: bytes | None, message: str) -> None:
    if text is not None:
        Path("fleet.csv").write_bytes(text)
    devices = build_experiment(configured("devices=table", "devices.file=fleet.csv")).devices
    with pytest.raises(DataError, match=message) as caught:
        devices.draw(0)
    assert "\n" not in str(caught.value)


def test_a_table_of_fresh_devices_only_is_refused() -> None:
    with pytest.raises(DataError, match=r"2 devices, of which devices\.fresh=2 never train"):
        devices_of("table", 2, "devices.fresh=2").draw(0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["devices=sampled", "devices.max_cpu_ghz=0.1"], "devices.max_cpu_ghz=0.1: must be at least its minimum"),
        (["devices=sampled", "devices.min_cpu_ghz=nan"], "devices.min_cpu_ghz=nan"),
        (["devices.per_round=21"], "devices.per_round=21: must be at most count=20"),
        (["devices.per_round=0"], "devices.per_round=0: must be >= 1 or null"),
        (["devices.count=0"], "devices.count=0"),
        (["devices.fresh=-1"], "devices.fresh=-1"),
        (["devices.radius_km=inf"], "devices.radius_km=inf"),
        (["devices.min_distance_km=1e-9"], "devices.min_distance_km=1e-0?9: must be in "),
        (["devices=sampled", "devices.tx_power_dbm=inf"], "devices.tx_power_dbm=inf"),
        (["devices=sampled", "devices.tx_power_dbm=200"], r"devices.tx_power_dbm=200: must be in -100..100 dBm"),
        (["devices=sampled", "devices.energy_coefficient=-1"], "devices.energy_coefficient=-1"),
        (["devices=classes", "devices.classes=[]"], "at least one class"),
        (
            [
                "devices=classes",
                "devices.classes=[{name: a, share: 0, cpu_ghz: 1, cycles_per_flop: 1, tx_power_dbm: 9}]",
            ],
            "class 'a' has 0",
        ),
    ],
)
def test_ranges_are_checked_in_the_users_units(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_experiment(compose_config(overrides))
    assert "\n" not in str(caught.value)
