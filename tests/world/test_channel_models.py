"""The built-in channels by hand: path loss, line of sight, traces."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import configured

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.test_channels import channel_of, fleet_of
from fedprune_cli.errors import DataError


def test_urban_path_loss_and_fading_by_hand() -> None:
    fleet = fleet_of(50_000)
    plain = channel_of("urban", "channel.shadowing_db=0", "channel.fading=none").gain(0, 0, fleet)
    np.testing.assert_allclose(-10 * np.log10(plain), 128.1 + 37.6 * np.log10(fleet.distance_m / 1000))
    shadowed = channel_of("urban", "channel.fading=none").gain(0, 0, fleet)
    shadowing_db = 10 * np.log10(shadowed / plain)
    assert abs(shadowing_db.mean()) < 0.15
    assert abs(shadowing_db.std() - 8) < 0.1
    faded = channel_of("urban", "channel.shadowing_db=0").gain(0, 0, fleet) / plain
    assert abs(faded.mean() - 1) < 0.02
    assert abs((faded < np.log(2)).mean() - 0.5) < 0.01  # the median of an exponential
    np.testing.assert_array_equal(
        channel_of("urban", "channel.fading=none").gain(0, 7, fleet), shadowed
    )  # shadowing stays, fading goes


# Worked out by hand from 3GPP TR 38.901 table 7.4.1-1 (d2D, los dB, nlos dB) at 3.5 GHz.
# UMi, 10 m and 1.5 m: d3D = hypot(d2D, 8.5), d'BP = 4 * 9 * 0.5 * 3.5e9 / c = 210.15 m
# UMa, 25 m and 1.5 m: d3D = hypot(d2D, 23.5), d'BP = 4 * 24 * 0.5 * 3.5e9 / c = 560.39 m
GOLDEN = [
    ("umi", 100.0, 32.4 + 21 * 2.001563 + 20 * 0.544068, 22.4 + 35.3 * 2.001563 + 21.3 * 0.544068),
    (
        "umi",
        400.0,
        32.4 + 40 * 2.602158 + 10.88136 - 9.5 * np.log10(210.146**2 + 8.5**2),
        22.4 + 35.3 * 2.602158 + 21.3 * 0.544068,
    ),
    ("uma", 100.0, 28 + 22 * 2.011673 + 10.88136, 13.54 + 39.08 * 2.011673 + 10.88136),
    (
        "uma",
        800.0,
        28 + 40 * 2.903277 + 10.88136 - 9 * np.log10(560.388**2 + 23.5**2),
        13.54 + 39.08 * 2.903277 + 10.88136,
    ),
]


@pytest.mark.parametrize(("name", "distance_m", "los_db", "nlos_db"), GOLDEN)
def test_3gpp_path_loss_by_hand(name: str, distance_m: float, los_db: float, nlos_db: float) -> None:
    los, nlos = channel_of(name).path_loss_db(np.array([distance_m]))  # type: ignore[attr-defined]
    assert abs(los[0] - los_db) < 1e-3
    assert abs(nlos[0] - nlos_db) < 1e-3


@pytest.mark.parametrize(("name", "decay_m"), [("umi", 36), ("uma", 63)])
def test_3gpp_line_of_sight_probability(name: str, decay_m: float) -> None:
    channel = channel_of(name)
    probability = channel.los_probability(np.array([5.0, 18.0, 100.0]))  # type: ignore[attr-defined]
    assert probability[:2].tolist() == [1, 1]
    assert abs(probability[2] - (0.18 + np.exp(-100 / decay_m) * 0.82)) < 1e-12
    far = fleet_of(20_000, "devices.min_distance_km=0.1", "devices.radius_km=0.1")
    gain_db = 10 * np.log10(channel_of(name, "channel.fading=none").gain(0, 0, far))
    los, nlos = channel.path_loss_db(np.array([100.0]))  # type: ignore[attr-defined]
    expected = -(probability[2] * los[0] + (1 - probability[2]) * nlos[0])
    assert abs(gain_db.mean() - expected) < 0.3


def test_a_trace_repeats_and_is_checked() -> None:
    channel, fleet = channel_of("trace"), fleet_of(60)
    np.testing.assert_allclose(10 * np.log10(channel.gain(0, 3, fleet)), -103 - 2 * np.arange(60))
    np.testing.assert_array_equal(channel.gain(0, 8, fleet), channel.gain(0, 3, fleet))
    bad = build_experiment(configured("channel=trace", "channel.file=bad.csv")).channel
    for text, message in (
        ("round,device\n0,0\n", "line 1: column gain_db is missing"),
        ("round,device,gain_db\n0,0,x\n", "line 2: gain_db='x'"),
        ("round,device,gain_db\n0,0,-90\n\n0,1,5000\n", r"line 4: gain_db='5000' .* \[-250, 100\]"),
        ("round,device,gain_db\n0,0\n", "line 2: 2 values for 3 columns"),
        ("round,device,gain_db\n0,0,-90\n0,1,-90\n1,0,-90\n1,0,-90\n", "round 1, device 0 stands there twice"),
        ("round,device,gain_db\n0,0,-90\n0,1,-90\n1,0,-90\n", "round 1, device 1 is missing"),
        ("round,device,gain_db\n0,0,-90\n0,1,-90\n3,0,-90\n3,1,-90\n", "round 1, device 0 is missing"),
        ("round,device,gain_db\n9999999,0,-90\n", "round 0, device 0 is missing"),
        ("round,device,gain_db\n0,0,-90\n0,1.5,-90\n", "line 3: device='1.5' .* whole number"),
        ("round,device,gain_db,available\n0,0,-90,2\n", "line 2: available='2'"),
        ("", "line 1: column round is missing"),
    ):
        Path("bad.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            bad.gain(0, 0, fleet_of(2))
    with pytest.raises(DataError, match=r"gone\.csv: No such file"):
        build_experiment(configured("channel=trace", "channel.file=gone.csv")).channel.gain(0, 0, fleet_of(2))


def test_a_trace_may_hold_more_devices_in_any_order_and_outages() -> None:
    Path("out.csv").write_text(
        "device,round,gain_db,available\n9999999,0,-50,1\n1,1,-93,1\n0,1,-92,0\n1,0,-91,0\n0,0,-90,1\n"
    )
    known = build_experiment(configured("channel=trace", "channel.file=out.csv")).channel
    assert known.available(0, 3, 2).tolist() == [[True, False], [False, True], [True, False]]
    np.testing.assert_allclose(10 * np.log10(known.gain(0, 1, fleet_of(2))), [-92, -93])


def test_another_file_of_the_same_name_is_read_anew() -> None:
    channel, fleet = channel_of("trace"), fleet_of(2)
    before = channel.gain(0, 0, fleet)
    Path("other").mkdir()
    Path("other/trace.csv").write_text("round,device,gain_db\n0,0,-50\n0,1,-51\n")
    os.chdir("other")
    np.testing.assert_allclose(channel.gain(0, 0, fleet), [10**-5.0, 10**-5.1])
    assert (before < 1e-9).all()
