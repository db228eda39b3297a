"""Fleets of real devices: the sources' own figures, and the equality with modelled fleets where nothing was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import configured, make_setup, run_to_end
from torch import nn
from torchvision import models

import fedprune_cli
from fedprune_cli.config.build import build_experiment
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.cost import count_cost
from fedprune_cli.learn.models import Cnn, build_model
from fedprune_cli.learn.parts import split_model
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.meter import Down, Uplink, Wait, build_load, build_problem, measure
from fedprune_cli.world.fleet import Fleet, Practice
from fedprune_cli.world.measured import MeasuredClass, MeasuredFleet
from fedprune_cli.world.rows import FleetTable


def fleet_of(*overrides: str) -> MeasuredFleet:
    devices = build_experiment(configured("devices=measured", *overrides)).devices
    assert isinstance(devices, MeasuredFleet)
    return devices


CLASSES = fleet_of().by_name


def step_s(of: MeasuredClass, flops: dict[str, float]) -> float:
    scale = {"conv": 1.0, "elementwise": 1.0, "dense": of.dense_scale, "depthwise": of.depthwise_scale}
    cycles = of.cycles_per_flop * sum(scale[kind] * count for kind, count in flops.items())
    return cycles / of.cpu_hz + of.step_s


def training_flops(name: str, batch: int) -> dict[str, float]:
    """Returns the FLOPs of a training step of a torchvision model at 224x224, by kind: three times those of its forward pass."""
    flops = dict.fromkeys(("conv", "depthwise", "dense"), 0.0)

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        kind = "dense" if isinstance(layer, nn.Linear) else "depthwise" if layer.groups > 1 else "conv"  # type: ignore[operator]
        flops[kind] += 6 * batch * output.numel() * layer.weight[0].numel()  # type: ignore[index, operator, union-attr]

    with torch.device("meta"):
        model = getattr(models, name)().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        model(torch.zeros(1, 3, 224, 224))
    return flops


@pytest.mark.parametrize(("name", "seconds"), [("resnet18", 5.84), ("resnet50", 16.1), ("mobilenet_v2", 7.2)])
def test_a_pi_5_takes_what_was_measured(name: str, seconds: float) -> None:
    """Embedded Federated Vision's batches of 16: within 25 %."""
    assert abs(step_s(CLASSES["pi5"], training_flops(name, 16)) / seconds - 1) < 0.25


def test_a_cheap_phone_takes_what_was_measured_for_the_leaf_cnn() -> None:
    """FLASH's Redmi Note 8: 588 ms per batch of 10, here by our own counted CNN of LEAF's size."""
    parts = split_model(build_model(Cnn("cnn", "none", (32, 64), 2048, 2), (1, 28, 28), 62, 0), "none")
    shared, _ = count_cost(parts, (1, 28, 28)).flops["shared"]
    assert abs(step_s(CLASSES["phone_low"], {"conv": 10 * shared}) / 0.588 - 1) < 0.25


def test_the_page_says_what_the_references_of_times_cost() -> None:
    """The FLOPs of docs/devices.md are those that are counted, and FLASH's time for the last one gives the class that came of it."""
    text = (Path(fedprune_cli.__file__).parent.parent / "docs" / "devices.md").read_text()
    told = {
        timed: json.loads(re.sub(r"(\w+):", r'"\1":', flops))
        for timed, flops in re.findall(r"\| (.+) \| `({conv.*})` \|", text)
    }
    leaf = told.pop("training of LEAF's CNN on a batch of 10")
    for (timed, flops), name in zip(told.items(), ("mobilenet_v2", "resnet18", "resnet50"), strict=True):
        counted = {kind: count / 3 for kind, count in training_flops(name, 1).items() if count}
        assert flops == pytest.approx(counted, rel=0.03), timed
    cost = count_cost(
        split_model(build_model(Cnn("cnn", "none", (32, 64), 2048, 2), (1, 28, 28), 62, 0), "none"), (1, 28, 28)
    )
    assert sum(leaf.values()) == pytest.approx(10 * cost.flops["shared"][0], rel=0.01)
    Path("flash.csv").write_text("reference_ms,cpu_ghz,tx_power_dbm,gain_db\n588,2,23,-90\n")
    redmi = FleetTable("table", None, 0, 0, None, None, 0, "flash.csv", reference_flops=leaf).draw(0)
    assert redmi.cycles_per_flop[0] == pytest.approx(CLASSES["phone_low"].cycles_per_flop, rel=0.01)


def test_the_upload_of_a_phone_costs_what_its_battery_gives() -> None:
    fleet = fleet_of("devices.mix=[phone_low]", "devices.shares=[1]", "devices.count=2", "devices.fresh=0").draw(0)
    load = build_load(fleet, np.arange(2), [[], []], [count_cost_of(), count_cost_of()])
    figures = {"kept": np.ones(2), "down": Down(0.0, np.zeros(2))}
    sent = measure(load, rate_bps=np.full(2, 8e6), payload_bytes=np.full(2, 34e6 / 8), **figures)
    np.testing.assert_allclose(sent.joules, 2.9 * 34e6 / 8e6)  # LTE's 2.9 W for 4.25 s
    assert (fleet.tx_power_w < 0.2).all()


def count_cost_of() -> object:
    return make_setup().blueprint.cost


def test_scales_of_one_are_a_modelled_fleet_to_the_last_digit() -> None:
    plain = make_setup("devices=sampled").scenario.fleet
    ones = np.ones(len(plain.cpu_hz))
    scale = dict.fromkeys(("conv", "dense", "depthwise", "recurrent", "elementwise"), ones)
    known = replace(plain, practice=Practice(plain.tx_power_w, 0 * ones, 0 * ones, 0 * ones, scale))
    a, b = (problem_of(fleet) for fleet in (plain, known))
    for name in ("shared_compute_s", "payload_bits", "fixed_s", "snr_hz"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-15)
    slower = replace(
        known, practice=Practice(plain.tx_power_w, 0 * ones, 0 * ones, 0.01 * ones, scale | {"dense": 2 * ones})
    )
    c = problem_of(slower)
    np.testing.assert_allclose(c.shared_compute_s, 2 * a.shared_compute_s, rtol=1e-12)  # a perceptron is dense
    steps = 5  # two phases below
    np.testing.assert_allclose(c.fixed_s - 2 * a.fixed_s, 0.01 * steps, rtol=1e-9)


def problem_of(fleet: Fleet) -> object:
    setup = make_setup()
    ids = np.arange(4)
    schedule = by_steps([Phase("personal", 2), Phase("shared", 3)], 100, 8)
    load = build_load(fleet, ids, [schedule] * 4, [setup.blueprint.cost] * 4)
    uplink = Uplink(setup.experiment.channel, setup.scenario.at(0).gain_linear[ids], 100)
    return build_problem(load, uplink, np.ones(4), Wait(0.0), 0.9)


def test_idle_watts_are_drawn_until_the_round_ends_and_change_nothing_else(tmp_path: Path) -> None:
    hard = (
        "devices=measured", "rounds=6", "faults.die=0.3", "participation.freeze_below=0.3", "participation.freeze_window=1",
        "training.lr=0.02", "seed=1",
    )  # fmt: skip
    without, idle = (run_to_end(tmp_path / name, *hard, f"meter.idle={name}") for name in ("false", "true"))
    watts = make_setup(*hard).scenario.fleet.idle_power_w
    died = frozen = 0
    for before, after in zip(without, idle, strict=True):
        rows, dead = after["devices"], after["faults"]["died"]
        waits_s = [
            own if device in dead else after["latency_s"]
            for device, own in zip(rows["id"], rows["latency_s"], strict=True)
        ]
        more = np.array(rows["joules"]) - before["devices"]["joules"]
        np.testing.assert_allclose(more, watts[rows["id"]] * waits_s, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(after["joules"], sum(rows["joules"]))
        died, frozen = died + len(dead), frozen + (after["status"] == "frozen")
        assert {**after, "joules": 0, "devices": {**rows, "joules": 0}} == {
            **before, "joules": 0, "devices": {**before["devices"], "joules": 0},
        }  # fmt: skip
    assert died
    assert frozen
    assert watts.any()


def test_idle_watts_enter_the_identity_only_where_they_are_metered() -> None:
    change = "devices.classes.4.idle_power_w=9"
    for switch, same in (("meter.idle=false", True), ("meter.idle=true", False)):
        a, b = (build_experiment(configured("devices=measured", switch, *more)).identity for more in ((), (change,)))
        assert (a == b) is same
        assert ("idle" in a["meter"]) is ("idle_power_w" in a["devices"]["classes"][4]) is not same


def test_a_class_limits_its_radio_and_the_mix_its_classes() -> None:
    fleet = fleet_of("devices.mix=[mcu_m7,pi5]", "devices.shares=[1,1]", "devices.count=40").draw(0)
    small = fleet.cpu_hz == 0.28e9
    assert 0.2 < small.mean() < 0.8
    assert (fleet.max_bandwidth_hz[small] == 1.08e6).all()
    assert np.isinf(fleet.max_bandwidth_hz[~small]).all()
    for override, words in (
        ("devices.mix=[pi6,pi5,pi4]", "unknown class of devices 'pi6'"),
        ("devices.shares=[1,2,0]", "3 numbers > 0"),
        ("devices.mix=[pi5,pi5,pi4]", "different classes"),
        ("devices.classes.4.cpu_ghz=-1", "class pi5 has cpu_hz=-1e"),
        ("devices.per_round=21", "at most count=20"),
    ):
        with pytest.raises(ConfigError, match=words):
            fleet_of(override)
