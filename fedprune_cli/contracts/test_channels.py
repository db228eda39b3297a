"""Laws of channels: gains are decided by seed, round and device; outages have their rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import configured, each, has_field
from fedprune_cli.world.channel import Channel
from fedprune_cli.world.fleet import Fleet

each_channel = each("channels")
RECORDED = {"trace": ("gain_db", -100), "uplink": ("uplink_mbps", 200)}  # column, and what it says first


def channel_of(name: str, *overrides: str) -> Channel:
    if name in RECORDED:
        column, first = RECORDED[name]
        rows = [f"{r},{d},{first - r - 2 * d}" for r in range(5) for d in range(60)]
        Path(f"{name}.csv").write_text("\n".join([f"round,device,{column}", *rows]) + "\n")
        overrides = (f"channel.file={name}.csv", *overrides)
    return build_experiment(configured(f"channel={name}", *overrides)).channel


def fleet_of(count: int, *overrides: str, seed: int = 0) -> Fleet:
    return build_experiment(configured(f"devices.count={count}", "devices.fresh=0", *overrides)).devices.draw(seed)


@each_channel
def test_gains_are_finite_positive_and_decided_by_seed_and_round(name: str) -> None:
    channel, fleet = channel_of(name), fleet_of(30)
    gain = channel.gain(3, 1, fleet)
    assert gain.shape == (30,)
    assert (gain > 0).all(), "a gain is not above 0"
    assert np.isfinite(gain).all(), "a gain is not finite"
    np.testing.assert_array_equal(gain, channel.gain(3, 1, fleet))
    if has_field("channels", name, "fading") or name in RECORDED:
        assert (gain != channel.gain(3, 2, fleet)).any(), "two rounds have the same gains"
    if has_field("channels", name, "fading"):
        assert (gain != channel.gain(4, 1, fleet)).any(), "two seeds have the same gains"


@each_channel
def test_more_devices_and_rounds_change_no_earlier_draw(name: str) -> None:
    channel = channel_of(name, *["channel.outage_enter=0.2"] * has_field("channels", name, "outage_enter"))
    few, many = fleet_of(10), fleet_of(50)
    np.testing.assert_array_equal(few.cpu_hz, many.cpu_hz[:10])
    np.testing.assert_array_equal(few.distance_m, many.distance_m[:10])
    np.testing.assert_array_equal(channel.gain(0, 4, few), channel.gain(0, 4, many)[:10])
    np.testing.assert_array_equal(channel.available(0, 20, 10), channel.available(0, 30, 50)[:20, :10])


@each_channel
def test_outages_have_their_rate_and_burst_length(name: str) -> None:
    if not has_field("channels", name, "outage_enter"):
        return  # it has outages of its own, or none
    channel = channel_of(name, "channel.outage_enter=0.1", "channel.outage_leave=0.4")
    lost = ~channel.available(0, 4000, 50)
    assert abs(lost.mean() - 0.2) < 0.01
    starts = (lost[1:] & ~lost[:-1]).sum()
    assert abs(lost[1:].sum() / starts - 1 / 0.4) < 0.1
    assert channel_of(name).available(0, 10, 50).all()
