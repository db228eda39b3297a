"""The radio against 3GPP's tables and by hand: blocks, guard bands, duplex, retransmissions, power control, selective fading."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import composed, configured, make_experiment, make_setup, run_to_end
from omegaconf import open_dict

from fedprune_cli.allocate.inverse import rate
from fedprune_cli.allocate.problem import latency
from fedprune_cli.allocate.whole import Blocks
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.config.build import GROUPS, build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.contracts.test_channels import channel_of, fleet_of
from fedprune_cli.errors import ConfigError, DataError
from fedprune_cli.meter import Down, Uplink, Wait, build_load, build_problem, downlink_s, measure
from fedprune_cli.round.first import allocate_first_round
from fedprune_cli.world.band import BLOCKS, Radio, width_hz
from fedprune_cli.world.channel import Channel, Urban, radio_of
from fedprune_cli.world.power import PowerControl, snr_of
from fedprune_cli.world.recorded import UplinkTrace
from fedprune_cli.world.selective import block_fading

# 3GPP TS 38.101-1, table 5.3.3-1, another table than the one that is transcribed: the least guard band in kHz, by numerology, for
# carriers of 5, 10, ... 50 MHz and then of 60 to 100 MHz. It is (carrier - blocks - one subcarrier) / 2.
GUARDS_KHZ = {
    0: (242.5, 312.5, 382.5, 452.5, 522.5, 592.5, 572.5, 552.5, 712.5, 692.5),
    1: (505, 665, 645, 805, 785, 945, 925, 905, 1065, 1045, 825, 965, 925, 885, 845),
    2: (1010, 990, 1330, 1310, 1290, 1630, 1610, 1590, 1570, 1530, 1490, 1450, 1410, 1370),
}


@functools.cache
def urban() -> Urban:
    channel = channel_of("urban")
    assert isinstance(channel, Urban)
    return channel


@pytest.mark.parametrize("numerology", BLOCKS)
def test_blocks_leave_the_guard_bands_of_3gpp(numerology: int) -> None:
    held, spacing_khz = BLOCKS[numerology], 15 * 2**numerology
    guards = [(1e3 * mhz - 12 * spacing_khz * count - spacing_khz) / 2 for mhz, count in held.items()]
    assert tuple(guards) == GUARDS_KHZ[numerology]
    for mhz, count in held.items():
        radio = radio_of(replace(urban(), bandwidth_hz=mhz * 1e6, numerology=numerology))
        assert radio == Radio(count * 12 * spacing_khz * 1e3, 12 * spacing_khz * 1e3)


def test_20_mhz_and_the_presets() -> None:
    usable = [radio_of(replace(urban(), numerology=mu)).band_hz / 1e6 for mu in BLOCKS]
    assert usable == [19.08, 18.36, 17.28]
    assert radio_of(urban()) == Radio(20e6)
    assert radio_of(channel_of("lte")) == Radio(100 * 180e3, 180e3, 1.0, 0.1)
    assert radio_of(channel_of("nr")) == Radio(273 * 360e3, 360e3, 0.25, 0.1)
    assert radio_of(channel_of("lte_m")) == Radio(1.08e6, 180e3, 0.375, 0.1)
    assert radio_of(channel_of("nb_iot")) == Radio(180e3, 180e3, 0.25, 0.1)


def test_a_channel_from_outside_need_not_know_of_it() -> None:
    class Bare:
        name, bandwidth_hz, noise_w_per_hz, bs_power_w = "bare", 5e6, 1e-20, 1.0
        gain = available = None

    bare: Channel = Bare()  # type: ignore[assignment]
    assert radio_of(bare) == Radio(5e6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["channel.numerology=1", "channel.bandwidth_mhz=7"], r"bandwidth_mhz=7: must be a 5G carrier of 5, 10, .*nearest is 5"),
        (["channel.numerology=0", "channel.bandwidth_mhz=100"], r"of 5, 10, .* 50 MHz \(the nearest is 50\)"),
        (["channel.numerology=2", "channel.bandwidth_mhz=5"], r"the nearest is 10"),
        (["channel.numerology=3"], r"channel.numerology=3: must be 0, 1 or 2"),
        (["channel.blocks=3"], r"channel.blocks=3: must be null, unless a numerology"),
        (["channel.numerology=1", "channel.blocks=56"], r"channel.blocks=56: must be in 1..55, what the band holds"),
        (["channel.uplink_share=0"], r"channel.uplink_share=0: must be in"),
        (["channel.uplink_share=1.5"], r"channel.uplink_share=1.5: must be in"),
        (["channel.block_error=1"], r"channel.block_error=1: must be in \[0, 0.99\]"),
        (["channel.loss_1km_db=-1"], r"channel.loss_1km_db=-1: must be in"),
        (["channel=uplink", "channel.file=a.csv", "channel.measured_mhz=0"], r"channel.measured_mhz=0: must be at least"),
    ],
)  # fmt: skip
def test_what_no_carrier_is_like_is_refused_by_its_key(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_experiment(compose_config(overrides))


def test_a_later_key_at_its_default_leaves_the_identity_as_it_was() -> None:
    plain, blocks = make_experiment(), make_experiment("allocator=blocks")
    assert {*plain.identity["channel"]} == {
        "name", "bandwidth_hz", "noise_w_per_hz", "bs_power_w", "outage_enter", "outage_leave", "fading", "shadowing_db",
    }  # fmt: skip
    assert blocks.identity["allocator"]["block_hz"] == 180e3
    named = replace(blocks, allocator=Blocks("blocks", "stretch", 180e3))
    assert named.config_hash == blocks.config_hash
    hashes = [plain.config_hash] + [
        replace(plain, channel=replace(urban(), **{key: value})).config_hash
        for key, value in {"numerology": 1, "uplink_share": 0.5, "block_error": 0.1, "loss_1km_db": 120.9}.items()
    ]
    hashes += [replace(one, channel=replace(urban(), numerology=0)).config_hash for one in (blocks, named)]
    assert len({*hashes, blocks.config_hash}) == len(hashes) + 1


IN_FILES = {"p0_w": "p0_dbm", "coherence_hz": "coherence_mhz"}  # as users give them


def test_a_later_field_has_the_default_of_the_yaml() -> None:
    """Without the key, as an older run folder has it, the part is the same."""
    for group, name in (
        ("channel", "urban"),
        ("channel", "umi"),
        ("channel", "uma"),
        ("channel", "trace"),
        ("allocator", "blocks"),
    ):
        given = configured(f"{group}={name}", *["channel.file=t.csv"] * (name == "trace"))
        cls = GROUPS[group][name]
        later = [one for one in cls.__dataclass_fields__.values() if one.metadata.get("later")]  # type: ignore[attr-defined]
        assert later or group == "allocator"
        known = build_experiment(given)
        with open_dict(given):
            for one in later:
                del given[group][IN_FILES.get(one.name, one.name)]
        assert build_experiment(given) == known


# --- the share of the time, and what is sent again ------------------------------------------------------------------


def round_of(*overrides: str, kept: float = 1.0) -> tuple[np.ndarray, ...]:
    """Returns the problem's latency and joules of sending a whole payload on 1 MHz each, and the meter's seconds, joules and bytes."""
    setup = make_setup("devices.energy_budget_j=1000", *overrides)
    channel, ids = setup.experiment.channel, np.arange(4)
    load = build_load(setup.scenario.fleet, ids, [()] * 4, [setup.blueprint.cost] * 4, radio_of(channel))
    gain, b = setup.scenario.at(0).gain_linear[ids], np.full(4, 1e6)
    problem = build_problem(load, Uplink(channel, gain, 1000), np.ones(4), Wait(0.0), 0.9)
    planned_s = latency(problem, np.full(4, kept), b)
    assert problem.limits
    bill = measure(
        load, rate_bps=rate(b, problem.snr_hz), kept=np.full(4, kept), payload_bytes=np.full(4, 4000 * kept),
        down=Down(0.0, np.zeros(4)),
    )  # fmt: skip
    return planned_s, problem.limits.tx_power_w * planned_s, bill.uplink_s, bill.joules, bill.bytes_up


def test_a_share_of_the_time_takes_longer_and_costs_the_same() -> None:
    whole, half = round_of(), round_of("channel.uplink_share=0.25")
    np.testing.assert_allclose(half[0], 4 * whole[0], rtol=1e-14)
    np.testing.assert_allclose(half[1], whole[1], rtol=1e-14)
    np.testing.assert_allclose(half[2], half[0], rtol=1e-14)  # the bill is what was planned
    np.testing.assert_allclose(half[3], whole[3], rtol=1e-14)
    np.testing.assert_array_equal(half[4], whole[4])


def test_what_is_sent_again_counts_in_bytes_seconds_and_joules() -> None:
    once, again = round_of(), round_of("channel.block_error=0.2")
    for at in range(5):
        np.testing.assert_allclose(again[at], once[at] / 0.8, rtol=1e-14)
    few = round_of("channel.block_error=0.3", kept=0.5)
    assert few[4].tolist() == [math.floor(2000 / 0.7)] * 4  # whole bytes
    assert (few[2] <= few[0]).all()  # and never later than was planned
    tried = np.random.Generator(np.random.PCG64(0)).geometric(0.7, 200_000)  # until a block is received
    assert abs(tried.mean() - Radio(1.0, block_error=0.3).attempts) < 0.01


def test_the_downlink_has_the_rest_of_the_time() -> None:
    gain = np.array([1e-11])
    wait_s = {
        share: downlink_s(make_experiment().meter, replace(urban(), uplink_share=share), gain, 1e6)
        for share in (1, 0.25, 0.75)
    }
    assert np.isclose(wait_s[0.25], wait_s[1] / 0.75)
    assert np.isclose(wait_s[0.75], wait_s[1] / 0.25)


@pytest.mark.parametrize("allocator", ["kkt", "blocks"])
def test_a_run_on_5g_is_audited(allocator: str, tmp_path: Path) -> None:
    overrides = ("channel=nr", f"allocator={allocator}", "rounds=2", "faults=flaky", "devices.energy_budget_j=5")
    lines = run_to_end(tmp_path / "run", *overrides)
    setup = make_setup(*overrides)
    assert not verify_run(setup, tmp_path / "run", 0).failures
    plain = run_to_end(tmp_path / "plain", *overrides, "channel.block_error=0", "channel.uplink_share=1")
    for line, other in zip(lines, plain, strict=True):
        counts = np.array(line["devices"]["bandwidth_hz"]) / 360e3
        assert counts.sum() <= 273 * (1 + 1e-12)
        assert allocator != "blocks" or np.array_equal(counts, np.rint(counts))
        assert line["bytes_up"] > other["bytes_up"]
        assert line["latency_s"] > other["latency_s"]


def test_whole_blocks_are_those_of_the_channel_unless_the_allocator_says_otherwise() -> None:
    def allocated(*overrides: str) -> np.ndarray:
        asked = ["devices.count=5", "meter=paper", "deadline.seconds=0.003", "allocator=blocks", *overrides]
        found = allocate_first_round(build_experiment(composed(*asked))).allocation
        assert found.certificate
        assert found.certificate.holds
        return found.bandwidth_hz / found.block_hz

    own = allocated("channel.numerology=1")
    assert own.sum() <= 51
    np.testing.assert_array_equal(own, allocated("allocator.block_khz=360", "allocator.count=51"))
    assert allocated("channel.numerology=1", "allocator.block_khz=180").sum() > 51
    problem = allocate_first_round(make_experiment("channel.numerology=2")).problem
    assert Blocks("blocks", "stretch").grid(problem).block_hz == width_hz(2)
    assert Blocks("blocks", "stretch").grid(problem).count == 24
    assert problem.take(np.arange(2)).block_hz == width_hz(2)


# --- power control --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p0_dbm", "alpha", "loss_db", "mu", "blocks", "dbm"),
    [  # TS 38.213, 7.1.1 by hand, in dB
        (-90, 0.8, 100, 1, 51, -90 + 10 * math.log10(2 * 51) + 80),  # 10.1 dBm
        (-76, 1.0, 90, 0, 1, 14.0),
        (-106, 1.0, 100, 0, 106, -106 + 20.2530587 + 100),
        (-90, 0.8, 130, 1, 51, 23.0),  # out of power
        (-20, 0.0, 130, 2, 24, -20 + 10 * math.log10(4 * 24)),  # whatever the loss
    ],
)
def test_power_control_in_decibels(
    p0_dbm: float, alpha: float, loss_db: float, mu: int, blocks: int, dbm: float
) -> None:
    control = PowerControl(10 ** (p0_dbm / 10 - 3), alpha)
    watts = control.radiated_w(
        np.array([10 ** (-loss_db / 10)]), np.array([blocks * width_hz(mu)]), np.array([10 ** (23 / 10 - 3)])
    )
    assert abs(10 * math.log10(watts[0]) + 30 - dbm) < 1e-6


def test_power_control_is_a_cap_on_the_ratio_of_signal_to_noise() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    control, noise = PowerControl(10 ** (-96 / 10 - 3), 0.8), 4e-21
    path_gain = 10 ** -rng.uniform(6, 13, 100)
    gain, most_w, b = path_gain * rng.exponential(size=100), np.full(100, 0.2), 10 ** rng.uniform(3, 8, 100)
    really = rate(b, control.radiated_w(path_gain, b, most_w) * gain / noise)
    snr = np.minimum(control.max_snr(path_gain, gain, noise), most_w * gain / noise / b)
    np.testing.assert_allclose(really, b * np.log2(1 + snr), rtol=1e-12)
    assert len({*(control.max_snr(path_gain, gain, noise) * b < most_w * gain / noise).tolist()}) == 2  # both kinds
    full = PowerControl(10 ** (-96 / 10 - 3), 1.0)  # all are received alike, apart from fading
    np.testing.assert_allclose(full.max_snr(path_gain, path_gain, noise), 10 ** (-96 / 10 - 3) / (180e3 * noise))


def test_power_control_goes_by_the_gain_without_fading() -> None:
    channel, fleet = channel_of("urban"), fleet_of(20)
    mean = np.mean([channel.gain(0, number, fleet) for number in range(3000)], axis=0)
    np.testing.assert_allclose(mean, channel.path_gain(0, fleet), rtol=0.1)  # type: ignore[attr-defined]
    still = channel_of("urban", "channel.fading=none")
    np.testing.assert_array_equal(still.gain(0, 5, fleet), channel.path_gain(0, fleet))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "full_kbps", "kbps"), [("lte_m", 1000, 375), ("nb_iot", 250, 62.5)]
)  # a transport block of 1000 bits in 1 ms, and in 4 ms
def test_peaks_of_modems_as_a_cap_on_the_ratio_of_signal_to_noise(name: str, full_kbps: float, kbps: float) -> None:
    radio = radio_of(channel_of(name))
    snr = snr_of(full_kbps * 1e3 / radio.band_hz)
    peak_bps = radio.uplink_share * rate(np.array(radio.band_hz), np.array(snr * radio.band_hz))
    assert np.isclose(peak_bps, kbps * 1e3)


@pytest.mark.parametrize("name", ["lte_m", "nb_iot"])
@pytest.mark.parametrize("allocator", ["kkt", "blocks", "dense_equal"])
def test_no_device_exceeds_its_modems_peak(name: str, allocator: str) -> None:
    blocks = ["allocator.block_khz=15"] if allocator == "blocks" else []
    experiment = make_experiment(f"channel={name}", f"allocator={allocator}", "devices.radius_km=0.1", *blocks)
    first, peak = allocate_first_round(experiment), {"lte_m": 0.926, "nb_iot": 1.389}[name]
    b, r = first.allocation.bandwidth_hz, first.allocation.rate_bps
    assert (r <= peak * b * (1 + 1e-12)).all()
    assert (r >= peak * b * (1 - 1e-12)).any()  # so near, Shannon's rate would be more


def test_a_controlled_device_sends_and_draws_as_its_power_says(tmp_path: Path) -> None:
    overrides = ("channel.p0_dbm=-92", "channel.path_loss_alpha=0.9", "devices=measured", "rounds=1")
    line = run_to_end(tmp_path / "run", *overrides)[0]
    setup, rows = make_setup(*overrides), line["devices"]
    ids, b = np.array(rows["id"]), np.array(rows["bandwidth_hz"])
    fleet, channel = setup.scenario.fleet, setup.scenario.channel
    assert isinstance(channel, Urban)
    control = PowerControl(10 ** (-92 / 10 - 3), 0.9)
    assert channel.control == control
    full_w, gain = fleet.tx_power_w[ids], setup.scenario.at(0).gain_linear[ids]
    watts = control.radiated_w(channel.path_gain(0, fleet)[ids], b, full_w)
    assert len({*(watts < full_w).tolist()}) == 2  # both kinds
    uplink_s = 8 * np.array(rows["bytes_up"]) / rate(b, watts * gain / channel.noise_w_per_hz)
    np.testing.assert_allclose(rows["uplink_s"], uplink_s, rtol=1e-9)
    assert not verify_run(setup, tmp_path / "run", 0).failures
    drawn_w = fleet.drawn_w(np.ones(len(fleet.cpu_hz)))[ids] - fleet.drawn_w(np.zeros(len(fleet.cpu_hz)))[ids]
    spent_j = np.array(rows["joules"]) - fleet.energy_coefficient[ids] * fleet.cpu_hz[ids] ** 3 * np.array(
        rows["compute_s"]
    )
    np.testing.assert_allclose(spent_j, (fleet.radio_circuit_w[ids] + drawn_w * watts / full_w) * uplink_s, rtol=1e-6)


def test_keys_at_their_defaults_are_no_part_of_a_configuration() -> None:
    given = make_experiment("channel.p0_dbm=null", "channel.path_loss_alpha=1.0", "channel.max_bits_per_hz=null")
    assert given.config_hash == make_experiment().config_hash
    assert not {"p0_w", "path_loss_alpha", "max_bits_per_hz"} & {*given.identity["channel"]}
    assert allocate_first_round(make_experiment()).problem.max_snr is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["channel.p0_dbm=40"], r"channel.p0_dbm=40: must be in -202..24 dBm"),
        (["channel.p0_dbm=-90", "channel.path_loss_alpha=1.2"], r"channel.path_loss_alpha=1.2: must be in \[0, 1\]"),
        (["channel.path_loss_alpha=0.8"], r"channel.path_loss_alpha=0.8: must be 1.0, unless p0_dbm is given"),
        (["channel.max_bits_per_hz=0"], r"channel.max_bits_per_hz=0: must be in \[0.001, 60\], or null"),
        (
            ["channel=uplink", "channel.file=up.csv", "channel.p0_dbm=-90"],
            r"channel.p0_dbm=-90: must be null: what was measured",
        ),
    ],
)
def test_caps_that_are_none_are_refused_by_name(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_experiment(*overrides)


def test_a_table_of_signals_has_a_peak_and_no_power_control(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    table.write_text("shared_compute_s,payload_bits,fixed_s,snr_hz,weight\n0.01,4e5,0,3e9,1\n0.01,4e5,0,4e7,1\n")
    first = allocate_first_round(make_experiment("channel.max_bits_per_hz=2"), table)
    assert (first.allocation.rate_bps <= 2 * first.allocation.bandwidth_hz * (1 + 1e-12)).all()
    with pytest.raises(
        ConfigError, match=r"channel.p0_dbm: must be null, for .*own.csv gives signals and no path loss"
    ):
        allocate_first_round(make_experiment("channel.p0_dbm=-90"), table)


def test_a_measured_uplink_is_no_faster_than_its_modem(tmp_path: Path) -> None:
    file = tmp_path / "up.csv"
    file.write_text("round,device,uplink_mbps\n" + "".join(f"0,{device},30\n" for device in range(3)))
    channel = channel_of("uplink", f"channel.file={file}", "channel.max_bits_per_hz=1.4")
    with pytest.raises(DataError, match=r"1.5 bits per second and Hz: must be at most 1.4"):
        channel.gain(0, 0, fleet_of(3))


# --- selective fading -----------------------------------------------------------------------------------------------


def test_selective_fading_has_mean_one_and_halves_its_correlation_over_the_coherence_bandwidth() -> None:
    gain = block_fading(0, 3, (40_000, 24), 4.0)
    assert abs(gain.mean() - 1) < 0.01
    assert (np.abs(gain.mean(axis=0) - 1) < 0.03).all()
    assert abs((gain < math.log(2)).mean() - 0.5) < 0.01  # an exponential's median
    correlation = np.corrcoef(gain.T)
    for apart in (1, 2, 4, 8, 16):
        assert abs(np.diagonal(correlation, apart).mean() - 0.5 ** (apart / 4)) < 0.02, apart


def test_selective_fading_is_decided_by_seed_round_and_device() -> None:
    gain = block_fading(1, 2, (6, 10), 3.0)
    np.testing.assert_array_equal(gain, block_fading(1, 2, (9, 10), 3.0)[:6])
    assert (gain != block_fading(1, 3, (6, 10), 3.0)).all()
    assert (gain != block_fading(2, 2, (6, 10), 3.0)).all()
    flat = block_fading(1, 2, (6, 10), math.inf)
    np.testing.assert_array_equal(flat, np.repeat(flat[:, :1], 10, axis=1))
    apart = np.corrcoef(block_fading(0, 0, (20_000, 2), 1e-3).T)[0, 1]
    assert abs(apart) < 0.03


# --- measured uplinks -----------------------------------------------------------------------------------------------


def test_a_measured_uplink_is_the_models_rate_on_the_band_of_the_measurement() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    mbps = 10 ** rng.uniform(-3, 2, (5, 8))
    rows = [f"{r},{d},{float(mbps[r, d])!r}" for r in range(5) for d in range(8)]
    Path("up.csv").write_text("\n".join(["round,device,uplink_mbps", *rows]) + "\n")
    fleet = fleet_of(8)
    for overrides, band_hz in (
        ((), 20e6),
        (("channel.measured_mhz=100",), 100e6),
        (("channel.numerology=1",), 51 * 360e3),
    ):
        channel = channel_of(
            "uplink", "channel.uplink_share=0.25", "channel.block_error=0.1", *overrides, "channel.file=up.csv"
        )
        assert isinstance(channel, UplinkTrace)
        for number in range(7):
            snr_hz = fleet.tx_power_w * channel.gain(0, number, fleet) / channel.noise_w_per_hz
            got_bps = 0.25 * (1 - 0.1) * rate(np.full(8, band_hz), snr_hz)
            np.testing.assert_allclose(got_bps, 1e6 * mbps[number % 5], rtol=1e-10)
        mean = np.mean([channel.gain(0, number, fleet) for number in range(5)], axis=0)
        np.testing.assert_allclose(channel.path_gain(0, fleet), mean)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("0,0,0", r"up\.csv, line 2: uplink_mbps='0' is not allowed: .* \[1e-06, 1000000\].*available=0"),
        ("0,0,x", r"line 2: uplink_mbps='x'"),
        ("0,0,2000", r"up\.csv: uplink_mbps=2000 over 20 MHz are 100 bits per second and Hz: must be at most 60"),
    ],
)
def test_an_uplink_that_no_band_carries_is_refused(row: str, words: str) -> None:
    Path("up.csv").write_text(f"round,device,uplink_mbps\n{row}\n")
    channel = build_experiment(configured("channel=uplink", "channel.file=up.csv")).channel
    with pytest.raises(DataError, match=words):
        channel.gain(0, 0, fleet_of(1))
