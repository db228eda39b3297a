"""`fedprune calibrate`: real step times beside the model's, and a fleet made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedprune_cli.bench.calibrate import _line, parse_ratios
from fedprune_cli.commands.app import app
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import ConfigError, FedpruneError

SMALL = ("data=digits", "model=mlp", "model.hidden=[256]", "--turns", "2", "--cpu-ghz", "2.5")


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["calibrate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_model_is_a_line_through_the_origin_and_memory_shrinks_with_the_slice() -> None:
    result = json.loads(call(*SMALL, "--ratios", "0,0.5,0.9", "--json"))
    points = result["points"]
    assert [p["ratio"] for p in points] == [0, 0.5, 0.9]
    for p in points:
        assert np.isclose(p["modelled_s"], p["flops"] * result["cycles_per_flop"] / 2.5e9)
        assert np.isclose(p["error"], p["modelled_s"] / p["measured_s"] - 1)
        assert p["low_s"] <= p["measured_s"] <= p["high_s"]
    for key in ("kept", "flops", "param_bytes", "saved_bytes"):
        assert points[0][key] > points[1][key] > points[2][key]
    assert points[0]["param_bytes"] == 4 * (64 * 256 + 256 + 256 * 10 + 10)
    # images and labels apart, a layer's input, its gate, and its weight are what backward needs
    assert points[2]["saved_bytes"] < 0.5 * points[0]["saved_bytes"]


def test_the_line_with_a_fixed_cost_is_recovered() -> None:
    flops = np.array([1.0, 2.0, 5.0, 10.0])
    fixed_s, error = _line(flops, 3.0 + 0.5 * flops)
    assert np.isclose(fixed_s, 3.0)
    assert error < 1e-9


def test_what_is_written_is_a_fleet_and_a_figure() -> None:
    text = call(*SMALL, "--out", "cal")
    assert "cycles per FLOP" in text
    assert "no fixed cost per step" in text
    assert Path("cal/calibration.svg").read_text().startswith("<svg")
    cycles = json.loads(Path("cal/calibration.json").read_text())["cycles_per_flop"]
    line = next(line for line in text.splitlines() if line.startswith("devices like this machine"))
    devices = build_experiment(compose_config(line.partition(": ")[2].split())).devices
    fleet = devices.draw(0)
    np.testing.assert_allclose(fleet.cycles_per_flop, cycles, rtol=1e-5)
    np.testing.assert_allclose(fleet.cpu_hz, 2.5e9)
    config = CliRunner().invoke(
        app, ["train", "--config-dir", "cal", "devices=calibrated", "--cfg", "job", "-p", "devices"]
    )
    assert f"min_cycles_per_flop: {cycles:.3g}"[:24] in config.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratios", "0,1"), r"--ratios 0,1: '1' must be a number in \[0, 1\)"),
        (("--cpu-ghz", "0"), "--cpu-ghz 0.0"),
        (("method=fedavg",), "method 'fedavg' never prunes"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(FedpruneError, match=message):
        call(*arguments)
    with pytest.raises(ConfigError):
        parse_ratios("")
