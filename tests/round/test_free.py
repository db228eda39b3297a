"""Rounds in which each device has bits, or blocks, of its own: what is sent, recorded, resumed and audited."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Line, composed, forge, make_experiment, make_setup, read_lines, results, run_to_end, steps_of

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.errors import ConfigError, DataError
from fedprune_cli.round.first import allocate_first_round
from fedprune_cli.round.plan import plan_round
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.runs import life

PICKED = ("allocator=selective", "channel.numerology=1", "channel.coherence_mhz=1", "deadline.fraction=0.4")
OWN_BITS = ("payload.bits=[2,8,32]", "payload.per_device=true", "deadline.fraction=0.15", "devices.radius_km=2")
HARD = ("faults.die=0.2", "faults.channel_error=0.3", "participation.freeze_below=0.3", "participation.freeze_window=1",
        "training.lr=0.02", "rounds=5")  # fmt: skip


def failures_of(run_dir: Path) -> tuple[str, ...]:
    return verify_run(life.reopen(run_dir), run_dir, every=2).failures


@pytest.mark.parametrize("overrides", [pytest.param(PICKED, marks=pytest.mark.slow), OWN_BITS], ids=["blocks", "bits"])
def test_a_run_is_the_same_from_every_executor_and_after_a_stop_and_is_sound(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    whole, workers, stopped = tmp_path / "whole", tmp_path / "workers", tmp_path / "stopped"
    lines = run_to_end(whole, *overrides, *HARD)
    assert len({record["frozen"] for record in lines}) > 1
    run_to_end(workers, *overrides, *HARD, "execution.kind=processes", "execution.workers=2")
    assert {**results(workers), "manifest.json": b""} == {**results(whole), "manifest.json": b""}
    config = composed(*overrides, *HARD)
    life.create(make_setup(*overrides, *HARD), config, stopped)
    records = life.run(life.reopen(stopped), stopped)
    next(records)
    records.close()  # type: ignore[attr-defined]
    list(life.run(life.reopen(stopped), stopped))
    assert results(stopped) == results(whole)
    assert failures_of(whole) == ()
    assert verify_run(life.reopen(whole), whole, every=0).open_gap == max(
        line["gap"] for line in lines if line["gap"] is not None
    )


def others(bits: list[int]) -> list[int]:
    return [2 if one == 8 else 8 for one in bits]


CHANGES: dict[str, tuple[tuple[str, ...], Callable[[Line], Any], str]] = {
    "gap": (PICKED, lambda line: line.update(gap=line["gap"] / 2), "the bound gives"),
    "blocks": (PICKED, lambda line: line["devices"]["blocks"].reverse(), "allocation is not what"),
    "no blocks": (PICKED, lambda line: line["devices"].pop("blocks"), "allocation is not what"),
    "bits": (
        OWN_BITS,
        lambda line: line["devices"].update(bits=others(line["devices"]["bits"])),
        "allocation is not what",
    ),
    "odd bits": (OWN_BITS, lambda line: line["devices"]["bits"].__setitem__(0, 16), "must be one of 2, 8, 32"),
    "no bits": (OWN_BITS, lambda line: line["devices"].pop("bits"), "allocation is not what"),
    "one for all": (OWN_BITS, lambda line: line.update(bits=8), "allocation is not what"),
    "bytes": (OWN_BITS, lambda line: line["devices"]["bytes_up"].__setitem__(0, 7), "sent 7 bytes"),
}


@pytest.fixture(scope="module", name="finished")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    found = {}
    for overrides in (PICKED, OWN_BITS):
        found[overrides] = tmp_path_factory.mktemp("run") / "run"
        run_to_end(found[overrides], *overrides)
    return found


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_record_is_found(finished: dict[tuple[str, ...], Path], name: str, tmp_path: Path) -> None:
    overrides, change, words = CHANGES[name]
    shutil.copytree(finished[overrides], tmp_path / "run")
    records = copy.deepcopy(read_lines(tmp_path / "run"))
    change(records[1])
    forge(tmp_path / "run", records=records)
    assert words in "".join(failures_of(tmp_path / "run"))


def test_each_device_sends_as_many_bytes_as_its_own_bits_say() -> None:
    setup = make_setup(*OWN_BITS)
    size, seen = setup.blueprint.cost.shared_params, set()
    for step in steps_of(setup, 3):
        rows = step.record.devices
        assert step.record.bits is None
        assert rows.bits is not None
        for ratio, bits, sent in zip(rows.prune_ratio, rows.bits, rows.bytes_up, strict=True):
            kept = round((1 - ratio) * size)
            assert sent == (4 * kept if bits == 32 else 4 * -(-kept // 1024) + -(-kept * bits // 8))
        seen |= {*rows.bits}
        # omega L^2 is remembered, of whatever bits it was measured with
        levels = np.array([(2 ** (bits - 1) - 1.0) ** 2 for bits in rows.bits if bits != 32])
        if len(levels):
            wanted = (step.record.rounding_error or 0) / np.mean(1 / levels)
            assert step.after.slots["rounding"] == pytest.approx(wanted)
    assert len(seen) > 1


def test_a_list_of_one_number_of_bits_is_that_number_for_all() -> None:
    alone, each = (make_setup("payload.bits=[8]", f"payload.per_device={word}") for word in ("false", "true"))
    for one, other in zip(steps_of(alone, 2), steps_of(each, 2), strict=True):
        assert other.record.devices.bits == [8] * 4
        np.testing.assert_allclose(other.record.devices.prune_ratio, one.record.devices.prune_ratio, rtol=1e-9)
        assert other.record.devices.bytes_up == one.record.devices.bytes_up
        assert other.record.gap == pytest.approx(0, abs=1e-9)


def test_blocks_carry_what_their_own_gains_say() -> None:
    """Rates, seconds and the record of a round by hand, where the server misjudges the gains."""
    setup = make_setup(*PICKED, "faults.channel_error=0.5")
    channel, fleet = setup.scenario.channel, setup.scenario.fleet
    step = steps_of(setup, 1)[0]
    roster = choose_roster(setup, 0, step.before.slots)
    plan, rows = plan_round(setup, roster, step.before.slots), step.record.devices
    assert rows.blocks == plan.blocks
    assert rows.blocks is not None
    assert sorted(block for blocks in rows.blocks for block in blocks) == [*range(51)]
    assert roster.block_gain is not None
    np.testing.assert_allclose(roster.block_gain.mean(1), 1)
    for at, device in enumerate(rows.id):
        assert rows.bandwidth_hz[at] == len(rows.blocks[at]) * 360e3
        gain = roster.gain_linear[device] * roster.block_gain[device, list(rows.blocks[at])]
        density = fleet.tx_power_w[device] / (51 * 360e3)  # the same on every block, whatever their number
        rate_bps = (360e3 * np.log2(1 + density * gain / channel.noise_w_per_hz)).sum()
        assert rows.uplink_s[at] == pytest.approx(8 * rows.bytes_up[at] / rate_bps)


def test_other_allocators_see_a_devices_mean_gain() -> None:
    flat, steep = make_setup("channel.numerology=1"), make_setup("channel.numerology=1", "channel.coherence_mhz=1")
    conditions, path = steep.scenario.at(1), steep.scenario.channel.path_gain(0, steep.scenario.fleet)  # type: ignore[attr-defined]
    assert flat.scenario.at(1).block_gain is None
    assert conditions.block_gain is not None
    fading = conditions.gain_linear[:, None] * conditions.block_gain / path[:, None]
    np.testing.assert_allclose(fading.mean(1), conditions.gain_linear / path)
    assert 0 < np.corrcoef(fading[:, :-1].ravel(), fading[:, 1:].ravel())[0, 1] < 1
    first = allocate_first_round(steep.experiment)
    assert first.allocation.certificate is not None
    assert first.allocation.owner is None


def test_kkt_in_whole_blocks_is_the_allocator_of_whole_blocks(tmp_path: Path) -> None:
    spelled = {"named": "allocator=blocks", "asked": "allocator.blocks=true"}
    for name, override in spelled.items():
        run_to_end(tmp_path / name, override, "channel.numerology=1")
    named, asked = (results(tmp_path / name) for name in spelled)
    assert named["rounds.jsonl"] == asked["rounds.jsonl"]
    assert failures_of(tmp_path / "asked") == ()


def test_later_keys_at_their_defaults_leave_the_identity_as_it_was() -> None:
    identity = make_experiment("payload.bits=[4,8]").identity
    assert identity["payload"] == {"bits": [4, 8]}
    assert "coherence_hz" not in identity["channel"]
    assert {*identity["allocator"]} == {"name", "on_infeasible"}
    hashes = {make_experiment(*one).config_hash for one in ((), ("allocator.blocks=true",), PICKED[1:2], PICKED[1:3])}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["payload.per_device=true", "allocator=minmax"],
            r"payload.per_device=true: not with allocator=minmax, only with",
        ),
        (["payload.per_device=true", "allocator=selective"], "not with allocator=selective"),
        (["payload.per_device=true", "allocator.clock=chosen"], "not together with allocator.clock=chosen"),
        (["payload.per_device=true", "allocator.blocks=true"], "not together with allocator.blocks=true"),
        (["channel.coherence_mhz=1"], r"channel.coherence_mhz=1: must be null, unless channel.numerology"),
        (["channel.coherence_mhz=1", "channel.numerology=1", "channel.fading=none"], "channel.fading=rayleigh"),
        (["channel.coherence_mhz=0", "channel.numerology=1"], r"channel.coherence_mhz=0: must be > 0"),
        (["allocator=selective", "allocator.on_infeasible=wait"], "must be 'stretch', 'drop' or 'fail'"),
        (
            ["meter.unicast=true", "allocator.clock=chosen"],
            "meter.unicast=true: not with allocator.clock=chosen: it would",
        ),
        (
            ["meter.unicast=true", "meter.downlink=false"],
            "must be false where meter.downlink=false: nothing of it is counted",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        make_experiment(*overrides)
    assert not str(refused.value).startswith("None")


@pytest.mark.parametrize("limit", ["devices.energy_budget_j=0.01", "devices.max_bandwidth_mhz=5"])
def test_limits_are_not_offered_beside_blocks_of_their_own(limit: str) -> None:
    with pytest.raises(ConfigError, match=r"allocator=selective: not together with devices.energy_budget_j"):
        allocate_first_round(make_experiment(*PICKED, limit))


HEADER = "shared_compute_s,payload_bits,fixed_s,snr_hz,weight"
ROWS = ("0.02,400000,0.004,3e8,0.4", "0.05,400000,0.002,4e7,0.2")


def write_table(path: Path, *cells: str) -> Path:
    """Writes a table of the problem's own columns with further ones: a header, and a cell of each row."""
    path.write_text("\n".join(",".join(pair) for pair in zip((HEADER, *ROWS), cells, strict=True)) + "\n")
    return path


def test_a_table_has_gains_of_blocks_as_columns(tmp_path: Path) -> None:
    file = write_table(tmp_path / "own.csv", "gain_0,gain_1,gain_2", "1,0,0", "0,1,1")
    first = allocate_first_round(make_experiment("allocator=selective", "deadline.fraction=1.5"), file)
    assert first.allocation.owner is not None
    assert first.allocation.owner.tolist() == [0, 1, 1]
    assert first.allocation.block_hz == pytest.approx(20e6 / 3)


@pytest.mark.parametrize(
    ("cells", "overrides", "words"),
    [
        (("gain_0,gain_2", "1,1", "1,1"), (), r"line 1: column gain_1 is missing"),
        (("gain_0,gain_1", "1,1", "1,1"), ("channel.numerology=1",), r"2 columns gain_0, gain_1 ... for the channel's 51 blocks"),
        (("gain_0,gain_1", "1,-1", "1,1"), (), r"line 2: gain_1='-1' is not allowed: must be a number in"),
        (("more", "1", "1"), PICKED[1:3], r"coherence_mhz draws no gains for snr_hz; give columns gain_0"),
    ],
)  # fmt: skip
def test_gains_that_are_not_sound_are_refused_in_a_line(
    tmp_path: Path, cells: tuple[str, ...], overrides: tuple[str, ...], words: str
) -> None:
    file = write_table(tmp_path / "own.csv", *cells)
    with pytest.raises((ConfigError, DataError), match=words):
        allocate_first_round(make_experiment("allocator=selective", *overrides), file)


def test_a_table_that_says_what_is_sent_leaves_no_bits_to_choose(tmp_path: Path) -> None:
    file = write_table(tmp_path / "own.csv", "more", "1", "1")
    with pytest.raises(ConfigError, match=r"payload.per_device=true: column payload_bits of .*own.csv says already"):
        allocate_first_round(make_experiment(*OWN_BITS[:2]), file)
