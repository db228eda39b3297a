"""The meter: codes that come back, and figures by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import make_setup, run_to_end
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.learn.client import Score
from fedprune_cli.meter import Down, accuracies, build_load, downlink_s, measure, unicast_s_per_bit
from fedprune_cli.wire.masks import decode_mask, encode_mask


@given(size=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 20))
def test_a_mask_survives_its_code_which_is_never_longer_than_a_bitmap(size: int, share: float, seed: int) -> None:
    mask = np.random.Generator(np.random.PCG64(seed)).random(size) < share
    code = encode_mask(mask)
    assert len(code) <= 1 + -(-size // 8)
    np.testing.assert_array_equal(decode_mask(code, size, int(mask.sum())), mask)


def test_a_sparse_mask_is_cheap() -> None:
    mask = np.random.Generator(np.random.PCG64(0)).random(100_000) < 0.02
    entropy_bytes = 100_000 * (0.02 * np.log2(1 / 0.02) + 0.98 * np.log2(1 / 0.98)) / 8
    assert len(encode_mask(mask)) < 1.1 * entropy_bytes


def test_seconds_joules_and_flops_by_hand() -> None:
    setup = make_setup("devices=sampled")
    ids = np.array([0, 2])
    load = build_load(setup.scenario.fleet, ids, [setup.schedule(k) for k in ids], [setup.blueprint.cost] * 2)
    kept, sent, rate_bps = np.array([0.5, 0.0]), np.array([100.0, 0.0]), np.array([400.0, 0.0])
    result = measure(load, rate_bps=rate_bps, kept=kept, payload_bytes=sent, down=Down(10.0, np.full(len(kept), 0.25)))
    fleet = setup.scenario.fleet
    u, v = (
        8 * (2 * 2048 + 3 * 4096),
        8 * (2 * 640 + 3 * 640),
    )  # batch * (personal steps * forward + shared steps * both), head 16x10
    np.testing.assert_allclose(load.shared_flops, u)
    np.testing.assert_allclose(load.personal_flops, v)
    cycles = fleet.cycles_per_flop[ids] * (kept * u + v)
    np.testing.assert_allclose(result.compute_s, cycles / fleet.cpu_hz[ids])
    np.testing.assert_allclose(result.uplink_s, [2.0, 0.0])
    np.testing.assert_allclose(result.latency_s, 0.25 + result.compute_s + result.uplink_s)
    np.testing.assert_allclose(
        result.joules, 1e-28 * fleet.cpu_hz[ids] ** 2 * cycles + fleet.tx_power_w[ids] * [2.0, 0.0]
    )
    assert result.bytes_down == 10


def test_the_downlink_runs_at_the_worst_devices_rate() -> None:
    experiment = make_setup().experiment
    channel, gain = experiment.channel, np.array([1e-9, 1e-11])
    snr = channel.bs_power_w * 1e-11 / (channel.noise_w_per_hz * channel.bandwidth_hz)
    assert np.isclose(downlink_s(experiment.meter, channel, gain, 1e6), 1e6 / (channel.bandwidth_hz * np.log2(1 + snr)))
    assert downlink_s(make_setup("meter=paper").experiment.meter, channel, gain, 1e6) == 0


def test_copies_divide_the_band_equally_and_within_the_devices_own() -> None:
    setup = make_setup("devices=sampled", "devices.count=3")
    meter, channel, fleet = setup.experiment.meter, setup.experiment.channel, setup.scenario.fleet.take(np.arange(3))
    gain = np.array([1e-9, 1e-11, 0.0])
    snr = channel.bs_power_w * gain / (channel.noise_w_per_hz * channel.bandwidth_hz)
    half = channel.bandwidth_hz / 2 * np.log2(1 + snr[:2])  # nobody sends to the third
    np.testing.assert_allclose(unicast_s_per_bit(meter, channel, fleet, gain), [*(1 / half), 0.0])
    narrow = replace(fleet, max_bandwidth_hz=channel.bandwidth_hz * np.array([1.0, 0.1, 1.0]))
    np.testing.assert_allclose(unicast_s_per_bit(meter, channel, narrow, gain), [1 / half[0], 1 / (0.2 * half[1]), 0.0])
    wide = replace(fleet, min_bandwidth_hz=channel.bandwidth_hz * np.array([2.0, 2.0, 2.0]))  # more than there is
    np.testing.assert_allclose(unicast_s_per_bit(meter, channel, wide, gain), [*(1 / half), 0.0])
    assert not unicast_s_per_bit(make_setup("meter=paper").experiment.meter, channel, fleet, gain).any()


def test_an_allocation_that_knows_of_copies_ends_its_round_when_it_says(tmp_path: Path) -> None:
    """What a device waits for goes with what it keeps; planned is a bitmap for its mask, and its code is never longer."""
    first = run_to_end(tmp_path / "run", "meter.unicast=true", "deadline.fraction=0.6", "rounds=1")[0]
    kept = [
        4 * round((1 - ratio) * 1040) for ratio in first["devices"]["prune_ratio"]
    ]  # of 64 x 16 weights and 16 biases
    masks = np.subtract(first["devices"]["bytes_down"], kept)
    assert (masks > 0).all()
    assert (masks <= 1 + 1040 / 8).all()
    assert first["bytes_down"] == sum(first["devices"]["bytes_down"])
    assert 0.99 < first["latency_s"] / first["deadline_s"] < 1.001  # whole entries are kept
    dense = run_to_end(tmp_path / "dense", "meter.unicast=true", "method=personalized", "rounds=1")[0]
    assert dense["bytes_down"] == 4 * 1040 * 4
    assert np.isclose(dense["latency_s"], dense["dense_latency_s"])


def test_only_masks_that_devices_cannot_derive_are_sent() -> None:
    assert not make_setup().blueprint.sends_masks
    assert make_setup("pruner=taylor").blueprint.sends_masks
    assert not make_setup("pruner=taylor", "method=personalized").blueprint.sends_masks
    assert not make_setup("pruner=taylor", "meter=paper").blueprint.sends_masks
    assert make_setup("meter.unicast=true").blueprint.sends_masks  # who is sent a part of u cannot rank the whole


def test_accuracies_are_weighted_unweighted_and_low() -> None:
    scores = {0: Score(0, 1, 10), 1: Score(1, 10, 10)}
    figures = accuracies(scores, np.array([30, 10]))
    assert np.isclose(figures["accuracy"], 0.75 * 0.1 + 0.25 * 1.0)
    assert np.isclose(figures["accuracy_mean"], 0.55)
    assert np.isclose(figures["accuracy_p10"], 0.1 + 0.1 * 0.9)
