"""Laws of fleets: columns in SI units, the same devices however many follow, fresh ones last."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import TABLES, configured, each
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array
from fedprune_cli.world.devices import Devices
from fedprune_cli.world.fleet import Fleet

each_fleet = each("devices")


def devices_of(name: str, count: int, *overrides: str) -> Devices:
    if name == "table":
        rows = [f"d{i},{0.5 + i / 1000},1,{20 + i % 4},{0.02 + i / 5000}" for i in range(count)]
        Path("fleet.csv").write_text("\n".join(["id,cpu_ghz,cycles_per_flop,tx_power_dbm,distance_km", *rows]) + "\n")
        return build_experiment(configured("devices=table", "devices.file=fleet.csv", *overrides)).devices
    return build_experiment(
        configured(f"devices={name}", f"devices.count={count}", "devices.fresh=0", *overrides)
    ).devices


def columns_of(fleet: Fleet) -> list[Array]:
    arrays = (field.name for field in dataclasses.fields(fleet) if field.name not in ("names", "practice"))
    return [getattr(fleet, name) for name in arrays]


@each_fleet
def test_a_fleet_is_in_range_and_in_si_units(name: str) -> None:
    devices = devices_of(name, 500)
    fleet = devices.draw(0)
    assert devices.num_devices == 500
    for column in columns_of(fleet):
        assert column.shape == (500,)
    for column in (fleet.cpu_hz, fleet.cycles_per_flop, fleet.tx_power_w, fleet.distance_m):
        assert (column > 0).all(), "a clock, power or distance is not above 0"
        assert np.isfinite(column).all(), "a clock, power or distance is not finite"
    if name not in TABLES["devices"].own:
        return
    real = name == "measured"
    for values, low, high in (
        (fleet.cpu_hz, 0.5e9, 2.4e9 if real else 2e9),
        (fleet.cycles_per_flop, 0.08 if real else 0.5, 2),
        (fleet.tx_power_w, 0.1, 0.2),
        (fleet.distance_m, 20, 500),
        (fleet.energy_coefficient, 1e-28, 1e-27 if real else 1e-28),
    ):
        assert (values >= low * (1 - 1e-12)).all()
        assert (values <= high * (1 + 1e-12)).all()
    assert np.isnan(fleet.path_gain_linear).all()


@each_fleet
def test_more_devices_change_no_earlier_one(name: str) -> None:
    few, many = devices_of(name, 7).draw(3), devices_of(name, 60).draw(3)
    for column, longer in zip(columns_of(few), columns_of(many), strict=True):
        np.testing.assert_array_equal(column, longer[:7])


@each_fleet
def test_fresh_devices_are_the_last_ones(name: str) -> None:
    trained = 8 if name == "table" else 10  # in a table the fresh devices are among its rows
    devices = devices_of(name, 10, "devices.fresh=2")
    assert devices.num_devices == trained
    assert len(devices.draw(0).cpu_hz) == trained + 2


@each_fleet
def test_no_more_devices_a_round_than_there_are(name: str) -> None:
    assert devices_of(name, 10, "devices.per_round=10").draw(0).cpu_hz.shape == (10,)
    with pytest.raises(ConfigError, match=r"devices\.per_round=11: must be at most"):
        devices_of(name, 10, "devices.per_round=11").draw(0)
