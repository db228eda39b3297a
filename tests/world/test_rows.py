"""Tables of devices that are known by more than clock and power: classes, what was measured besides, times and rates as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import configured, make_setup

from fedprune_cli.allocate.inverse import rate
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import FedpruneError, one_line
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.meter import build_load
from fedprune_cli.round.first import ask
from fedprune_cli.world.fleet import Fleet
from fedprune_cli.world.rows import FleetTable

MOBILE = {"conv": 5.4e8, "depthwise": 4e7, "dense": 2.6e6}


def experiment_of(text: str, *overrides: str) -> Experiment:
    Path("fleet.csv").write_text(text)
    return build_experiment(configured("devices=table", "devices.file=fleet.csv", *overrides))


def fleet_of(text: str, *overrides: str) -> Fleet:
    return experiment_of(text, *overrides).devices.draw(0)


def test_a_class_and_a_place_suffice() -> None:
    fleet = fleet_of("class,distance_km\npi5,0.1\nmcu_m7,0.3\npi5,0.2\n")
    assert fleet.practice
    np.testing.assert_array_equal(fleet.cpu_hz, [2.4e9, 0.28e9, 2.4e9])
    np.testing.assert_array_equal(fleet.cycles_per_flop, [0.081, 2.0, 0.081])
    np.testing.assert_allclose(fleet.energy_coefficient, [7.2e-28, 6e-27, 7.2e-28])
    np.testing.assert_array_equal(fleet.practice.radio_power_w, [3.2, 0.4, 3.2])
    np.testing.assert_array_equal(fleet.practice.flop_scale["depthwise"], [94, 1, 94])
    np.testing.assert_array_equal(fleet.practice.idle_power_w, [2.8, 0, 2.8])  # nobody said it of the microcontroller
    np.testing.assert_array_equal(fleet.max_bandwidth_hz, [np.inf, 1.08e6, np.inf])
    alone = build_experiment(configured("devices=measured", "devices.mix=[pi5]", "devices.shares=[1]")).devices.draw(0)
    for name in ("cpu_hz", "cycles_per_flop", "tx_power_w", "energy_coefficient", "radio_power_w", "max_bandwidth_hz"):
        assert getattr(fleet, name)[0] == getattr(alone, name)[0], name


def test_a_row_says_more_than_its_class_and_an_empty_cell_says_nothing() -> None:
    fleet = fleet_of(
        "class,gain_db,cpu_ghz,tx_power_dbm,radio_power_w,step_ms,dense_scale,idle_power_w,max_bandwidth_mhz,energy_coefficient\n"
        "pi5,-90,1.2,,,7,,0.5,,\n,-90,1,30,,,,,5,1e-27\nmcu_m7,-90,,,,,3,,,\n",
        "devices.default_class=phone_low", "devices.max_bandwidth_mhz=0.5",
    )  # fmt: skip
    assert fleet.practice
    np.testing.assert_allclose(fleet.cpu_hz, [1.2e9, 1e9, 0.28e9])
    np.testing.assert_allclose(fleet.cycles_per_flop, [0.081, 1.15, 2.0])
    np.testing.assert_allclose(fleet.tx_power_w, [10**-0.7, 1, 10**-0.7])
    np.testing.assert_allclose(fleet.practice.radio_power_w, [3.2, 2.9, 0.4])
    np.testing.assert_allclose(fleet.practice.step_s, [7e-3, 0, 0])
    np.testing.assert_allclose(fleet.practice.flop_scale["dense"], [0.43, 1, 3])
    np.testing.assert_allclose(fleet.practice.idle_power_w, [0.5, 0, 0])
    np.testing.assert_allclose(fleet.energy_coefficient, [7.2e-28, 1e-27, 6e-27])
    np.testing.assert_array_equal(
        fleet.max_bandwidth_hz, [np.inf, 5e6, np.inf]
    )  # a table's own limits replace all others
    taken = fleet.take(np.array([2, 0]))
    assert taken.practice
    np.testing.assert_allclose(taken.practice.step_s, [0, 7e-3])


def test_what_is_known_besides_needs_no_class() -> None:
    plain = "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db"
    fleet = fleet_of(f"{plain},radio_power_w,radio_circuit_w\n1,1,20,-90,2.9,0.4\n1,1,20,-90,,\n")
    assert fleet.practice
    np.testing.assert_allclose(fleet.radio_power_w, [2.9, 0.1])  # what is radiated, where nobody knows
    np.testing.assert_allclose(fleet.radio_circuit_w, [0.4, 0])
    assert fleet_of(f"{plain}\n1,1,20,-90\n").practice is None


def test_fedscales_times_and_rates_come_back() -> None:
    """A device that takes so many ms for MobileNetV2 takes three times as many per sample to train it, and sends at its rate."""
    chosen = (
        "devices.default_class=phone_high",
        f"devices.reference_flops={MOBILE}".replace("'", ""),
        "channel.fading=none",
    )
    experiment = experiment_of(
        "id,computation,communication\na,34,2209\nb,217,50000\n", *chosen, "devices.measured_mhz=10"
    )
    fleet = experiment.devices.draw(0)
    assert fleet.practice
    scale = {kind: values[0] for kind, values in fleet.practice.flop_scale.items()}
    flops = sum(scale[kind] * count for kind, count in MOBILE.items())
    np.testing.assert_allclose(fleet.cycles_per_flop * flops / fleet.cpu_hz, [0.034, 0.217])
    np.testing.assert_array_equal(fleet.cpu_hz, [2.8e9, 2.8e9])
    gain = experiment.channel.gain(0, 0, fleet)
    sent = rate(np.full(2, 10e6), fleet.tx_power_w * gain / experiment.channel.noise_w_per_hz)
    np.testing.assert_allclose(sent, [2.209e6, 50e6], rtol=1e-9)


def test_a_time_per_batch_is_a_step_of_that_batch() -> None:
    setup = make_setup()
    cost, batch = setup.blueprint.cost, 8
    flops = batch * sum(cost.flops["both"])
    Path("fleet.csv").write_text(
        "reference_ms,cpu_ghz,tx_power_dbm,gain_db,cycles_per_flop\n588,2,23,-90,\n588,2,23,-90,1.5\n"
    )
    fleet = FleetTable("table", None, 0, 0, None, None, 1e-28, "fleet.csv", reference_flops={"dense": flops}).draw(0)
    load = build_load(fleet, np.arange(1), [by_steps((Phase("both", 3),), 100, batch)], [cost])
    np.testing.assert_allclose(load.compute_s(np.ones(1)), 3 * 0.588)
    assert fleet.cycles_per_flop[1] == 1.5  # what a row says of itself counts first


BASIC = "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("class,gain_db\npi5,-90\npi6,-90\n", (), "line 3: class='pi6' is not allowed: unknown class of devices 'pi6'. Did you mean"),
        ("class,gain_db\npi5,-90\n,-90\n", (), "line 3: cpu_ghz is not given, and the row names no class that has it"),
        (f"class,{BASIC}\n,1,1,,-90\n", (), "line 2: tx_power_dbm is not given"),
        (f"{BASIC},step_ms\n1,1,23,-90,-1\n", (), "line 2: step_ms='-1' is not allowed: must be a number in [0, 1000000], or empty"),
        (f"{BASIC},radio_power_w,radio_circuit_w\n1,1,23,-90,1,2\n", (), "line 2: radio_circuit_w=2 is not allowed: must be at most"),
        (f"{BASIC}\n1,,23,-90\n", (), "line 2: cycles_per_flop='' is not allowed: must be a number in [1e-06, 1000000]"),
        ("computation,class,gain_db\n9,pi5,-90\n", (), "fleet.csv has the column computation: devices.reference_flops of devices=table"),
        ("computation,gain_db\n9,-90\n", ("devices.reference_flops={conv: 1e9}",), "line 1: column cpu_ghz is missing"),
        ("computation,class,gain_db\n1e-6,pi5,-90\n", ("devices.reference_flops={conv: 1e12}",), "line 2: its time makes cycles_per_flop="),
        ("class,communication\npi5,9e5\n", (), "line 2: communication=900000 kbit/s is more than 600000, what devices.measured_mhz=20"),
        ("class\npi5\n", (), "column distance_km or gain_db is missing"),
        ("class,gain_db\npi5,-90\n", ("devices.default_class=pi",), "devices.default_class=pi: unknown class of devices 'pi'"),
        ("class,gain_db\npi5,-90\n", ("devices.reference_flops={cnv: 1}",), "unknown kind of layer 'cnv'. Did you mean 'conv'?"),
        ("class,gain_db\npi5,-90\n", ("devices.reference_flops={}",), "FLOPs in 1..1e18 by kind of layer"),
        ("class,gain_db\npi5,-90\n", ("devices.measured_mhz=0",), "devices.measured_mhz=0: must be in"),
        ("class,gain_db\npi5,-90\n", ("devices.classes.0.radio_circuit_w=9",), "class mcu_m7 has radio_circuit_w=9: must be at most"),
        ("class,gain_db\npi5,-90\n", ("devices.classes.0.name=pi4",), "devices: classes: two classes are called 'pi4'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(FedpruneError) as caught:
        fleet_of(text, *overrides)
    assert str(caught.value) == one_line(str(caught.value))
    assert message in str(caught.value)


def test_allocate_reads_the_same_columns_as_a_fleet() -> None:
    text = "class,samples,distance_km,cpu_ghz,step_ms\npi5,120,0.1,,2\nphone_low,80,0.3,1,\n,60,0.2,,\n"
    experiment = experiment_of(text, "devices.default_class=pi4")
    of_table = ask(experiment, Path("fleet.csv")).problem
    drawn = experiment.devices.draw(0)
    np.testing.assert_allclose(of_table.snr_hz, drawn.tx_power_w * experiment.channel.gain(0, 0, drawn) / 10**-20.4)
    sampled = build_experiment(configured("devices=sampled"))
    with pytest.raises(FedpruneError, match="line 2: class='pi5' is not allowed: this configuration has no classes"):
        ask(sampled, Path("fleet.csv"))
    Path("fleet.csv").write_text(text.replace("\n,60", "\npi4,60"))
    measured = build_experiment(configured("devices=measured"))
    for key in ("shared_compute_s", "fixed_s", "snr_hz"):
        np.testing.assert_array_equal(getattr(ask(measured, Path("fleet.csv")).problem, key), getattr(of_table, key))


def test_classes_are_part_of_a_tables_identity_where_a_row_is_one() -> None:
    change = "devices.classes.4.cpu_ghz=2"
    for text, same in ((f"{BASIC}\n1,1,23,-90\n", True), ("class,gain_db\npi5,-90\n", False)):
        a, b = (experiment_of(text, *more).config_hash for more in ((), (change,)))
        assert (a == b) is same
    a = experiment_of(f"{BASIC}\n1,1,23,-90\n")
    assert {"classes", "default_class", "reference_flops", "measured_hz"}.isdisjoint(a.identity["devices"])
    assert a.config_hash != replace(a, devices=replace(a.devices, measured_hz=1e6)).config_hash
