"""`fedprune calibrate`: real step times beside the model's, and fleets made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import configured
from typer.testing import CliRunner

from fedprune_cli.bench import kinds, power
from fedprune_cli.bench.calibrate import _line, parse_ratios
from fedprune_cli.bench.kinds import Probe, Timed, fit
from fedprune_cli.commands.app import app
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.plain import plain
from fedprune_cli.errors import ConfigError, DeviceError, FedpruneError
from fedprune_cli.store.state import Array
from fedprune_cli.world.devices import Devices

QUICK = ("data=digits", "model=mlp", "model.hidden=[256]", "--turns", "2", "--cpu-ghz", "2.5")
SMALL = (*QUICK, "--ratios-only")
TINY_PROBES = (
    Probe("model=mlp model.hidden=[8]", (1, 8, 8), 8),
    Probe("model=mlp model.hidden=[512]", (1, 28, 28), 32),
    Probe("model=mobilenet model.width=0.25", (3, 16, 16), 8),
    Probe("model=cnn model.channels=[32,32] model.hidden=8", (1, 28, 28), 16),
    Probe("model=gru model.hidden=[32]", (6, 1, 10), 16),
)


@pytest.fixture
def tiny_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures few small models, and this machine's watts for no longer than a moment."""
    monkeypatch.setattr(kinds, "FITTED", TINY_PROBES)
    monkeypatch.setattr(kinds, "HELD_OUT", TINY_PROBES[:2])
    monkeypatch.setattr(power, "SPELL_S", 0.01)


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
        (
            ("--class", "a b"),
            "--class a b: must be letters, digits and '_', at most 60, and none of sampled, classes, measured, table",
        ),
        (("--class", "measured"), "--class measured: must be letters"),
        (("--busy-w", "3"), "--idle-w: must be given beside --busy-w"),
        (("--busy-w", "3", "--idle-w", "4"), "--busy-w 3 --idle-w 4: must be in"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(FedpruneError, match=message):
        call(*arguments)
    with pytest.raises(ConfigError):
        parse_ratios("")


def timed(figures: Array, step_s: float, noise: float = 0.0) -> list[Timed]:
    """Returns steps that take what the figures say, up to a noise."""
    rng = np.random.default_rng(0)
    flops = [np.zeros(4), *10.0 ** rng.uniform(6, 9, (30, 4)) * (rng.random((30, 4)) < 0.6)]
    true = [float(figures @ each) + step_s for each in flops]
    return [
        Timed(TINY_PROBES[0], each + 1, s * np.exp(noise * rng.standard_normal()))
        for each, s in zip(flops, true, strict=True)
    ]


def test_figures_by_kind_are_recovered_and_one_figure_is_further_off() -> None:
    figures = np.array([1e-11, 4e-12, 9e-10, 7e-11])
    exact = fit(timed(figures, 3e-4), timed(figures, 3e-4)[1:])
    np.testing.assert_allclose(exact.seconds_per_flop, figures, rtol=1e-5)
    np.testing.assert_allclose([exact.step_s, *exact.scales.values()], [3e-4, 0.4, 90, 7], rtol=1e-5)
    assert max(abs(row["error"]) for row in exact.rows) < 1e-5
    noisy = fit(timed(figures, 3e-4, noise=0.1), timed(figures, 3e-4)[1:])
    np.testing.assert_allclose(noisy.seconds_per_flop, figures, rtol=0.3)
    worst = [max(abs(row[key]) for row in noisy.rows) for key in ("error", "one_figure_error")]
    assert worst[0] < 0.3 < worst[1]
    assert noisy.sentence().startswith("On models that were not fitted, figures by kind of layer are off by up to")


def test_a_figure_that_no_class_may_have_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"calibrate: depthwise_scale comes out as [\d.]+; measure again"):
        fit(timed(np.array([1e-12, 1e-12, 1e-8, 1e-12]), 1e-4), [])


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_probes")
def test_a_class_that_is_written_is_composed_and_used() -> None:
    text = call(*QUICK, "--out", "cal", "--class", "bench_pc", "--busy-w", "12", "--idle-w", "3")
    assert "class bench_pc" in text
    assert "12 W busy, 3 W idle by a meter" in text
    written = json.loads(Path("cal/calibration.json").read_text())["by_kind"]
    assert {*written} == {"class", "power", "held_out"}
    of = written["class"]
    fleet = devices_of("devices=bench_pc", "devices.count=3").draw(0)
    assert fleet.practice
    np.testing.assert_allclose(fleet.cpu_hz, 2.5e9)
    np.testing.assert_allclose(fleet.energy_coefficient, 9 / 2.5e9**3, rtol=1e-4)
    np.testing.assert_allclose(fleet.practice.idle_power_w, 3)
    np.testing.assert_allclose(fleet.practice.step_s, of["step_s"])
    np.testing.assert_allclose(fleet.cycles_per_flop, of["cycles_per_flop"])
    for kind in ("dense", "depthwise", "recurrent"):
        np.testing.assert_allclose(fleet.practice.flop_scale[kind], of[f"{kind}_scale"])
    mixed = devices_of("devices=bench_pc", "devices.mix=[bench_pc,pi5]", "devices.shares=[1,1]").draw(0)
    assert {*mixed.cpu_hz.tolist()} == {2.5e9, 2.4e9}
    built_in = json.loads(json.dumps(plain(configured("devices=measured"))["devices"]))["classes"]
    assert (
        plain(compose_config(["devices=bench_pc"], Path("cal")))["devices"]["classes"][:-1] == built_in
    )  # the same shape
    assert sorted(built_in[0]) == sorted(of)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_probes")
def test_a_second_machine_joins_the_first_also_in_a_table() -> None:
    Path("fleet.csv").write_text("class,gain_db\npi5,-90\n")
    call(*QUICK, "devices=table", "devices.file=fleet.csv", "--out", "cal", "--class", "first")
    call(*QUICK, "--config-dir", "cal", "devices=first", "--out", "cal", "--class", "second", "--cpu-ghz", "1.5")
    Path("fleet.csv").write_text("class,gain_db\nsecond,-90\npi5,-90\nfirst,-90\n")
    np.testing.assert_allclose(devices_of("devices=second").draw(0).cpu_hz, [1.5e9, 2.4e9, 2.5e9])


def devices_of(*overrides: str) -> Devices:
    return build_experiment(compose_config([*overrides], Path("cal"))).devices


def test_watts_are_read_from_counters_that_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "SPELL_S", 0.1)
    now = [0.0]
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:1", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        (tmp_path / zone).mkdir()
        for file, text in (("name", name), ("energy_uj", "900000"), ("max_energy_range_uj", "1000000")):
            (tmp_path / zone / file).write_text(text)
    counter = tmp_path / "intel-rapl:0" / "energy_uj"

    def spend(watts: float) -> None:
        """Passes a tenth of a second."""
        for one in (counter, tmp_path / "intel-rapl-mmio:0" / "energy_uj"):  # the same counter, by another way
            one.write_text(str(int(float(one.read_text()) + watts * 0.1e6) % 1000000))
        now[0] += 0.1

    monkeypatch.setattr(power.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(power.time, "sleep", lambda _: spend(2))
    found = power.measure(lambda: spend(5), tmp_path)
    np.testing.assert_allclose([found.dynamic_w, found.idle_w], [3, 2])
    assert "counters" in found.said

    def lose() -> None:
        now[0] += 0.2
        counter.unlink(missing_ok=True)

    assert power.measure(lose, tmp_path).said.startswith("energy not measured:")
    for broken in (lambda: counter.write_text("x"), counter.unlink):
        broken()
        nothing = power.measure(lambda: spend(5), tmp_path)
        assert (nothing.dynamic_w, nothing.idle_w) == (power.ASSUMED_W, None)
        assert nothing.said.startswith("energy not measured")


@pytest.mark.slow
def test_figures_by_kind_of_this_machine_are_nearer_than_one_figure() -> None:
    of = kinds.measure(build_experiment(configured()), turns=20)
    worst = [max(abs(float(row[key])) for row in of.rows) for key in ("error", "one_figure_error")]
    assert worst[0] < worst[1]
