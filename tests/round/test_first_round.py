"""Allocation by itself: a table of devices is asked the same question as a configuration that has these devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, configured

from fedprune_cli.config.build import build_experiment
from fedprune_cli.report.allocation import allocation_table, answer, write_allocation
from fedprune_cli.round.first import FirstRound, allocate_first_round
from fedprune_cli.round.setup import prepare

PHYSICS = (("1", "23", "-100"), ("2", "20", "-105"), ("0.5", "23", "-95"), ("1.5", "10", "-98"))
HEADER = "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db,samples"


def both_ways(folder: Path, *overrides: str) -> tuple[FirstRound, FirstRound]:
    """Returns the first round of a fleet from a configuration, and of the same fleet and samples given as a table."""
    file = folder / "fleet.csv"
    rows = [f"{ghz},1,{dbm},{db}" for ghz, dbm, db in PHYSICS]
    file.write_text("\n".join(["cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db", *rows]) + "\n")
    tiny = [override for override in TINY if not override.startswith("devices.")]
    experiment = build_experiment(configured(*tiny, "devices=table", f"devices.file={file}", *overrides))
    samples = prepare(experiment).scenario.partition.train.sizes
    file_with_samples = folder / "with_samples.csv"
    lines = [f"{row},{count}" for row, count in zip(rows, samples, strict=True)]
    file_with_samples.write_text("\n".join([HEADER, *lines]) + "\n")
    return allocate_first_round(experiment), allocate_first_round(experiment, file_with_samples)


OPTIONS = (
    (),
    ("payload.bits=[8]",),
    ("payload.bits=[4,8,32]",),
    ("pruner=taylor",),
    ("pruner.granularity=channel", "deadline.fraction=0.2"),
    ("weights=uniform", "meter=paper"),
    ("training.epochs=2", "method=fedsim"),
    ("allocator=minmax",),
)


@pytest.mark.parametrize("overrides", OPTIONS, ids=" ".join)
def test_a_table_of_the_same_devices_gets_the_same_allocation(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    from_config, from_table = both_ways(tmp_path, *overrides)
    assert from_table.bits == from_config.bits
    for key in ("prune_ratio", "bandwidth_hz", "latency_s"):
        np.testing.assert_allclose(
            getattr(from_table.allocation, key), getattr(from_config.allocation, key), rtol=1e-12
        )


@pytest.mark.parametrize("overrides", [("payload.bits=[8]",), ("pruner=taylor",)], ids=" ".join)
def test_what_is_sent_moves_the_objective_of_a_table(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    _, plain = both_ways(tmp_path)
    _, other = both_ways(tmp_path, *overrides)
    assert other.allocation.objective != pytest.approx(plain.allocation.objective, rel=1e-6)


def test_a_table_s_ids_name_its_devices_in_every_answer(tmp_path: Path) -> None:
    file = tmp_path / "fleet.csv"
    rows = ["agv-1,1,1,23,-100,40", "agv-2,1,1,23,-249,40", "press 7,2,1,23,-95,60"]
    file.write_text("\n".join(["id," + HEADER, *rows]) + "\n")
    tiny = [override for override in TINY if not override.startswith("devices.")]
    plain = allocate_first_round(build_experiment(configured(*tiny, "payload.bits=[4,8]")), file)
    assert "agv-2" in plain.allocation.message
    result = answer(plain, of_several=True)
    assert [device["name"] for device in result["devices"]] == ["agv-1", "agv-2", "press 7"]
    shown = allocation_table(result).plain()
    assert "press 7" in shown
    assert f"{plain.bits} bits per value" in shown
    write_allocation(tmp_path / "out", result, [])
    assert (tmp_path / "out" / "allocation.csv").read_text().splitlines()[3].startswith("2,press 7,")
