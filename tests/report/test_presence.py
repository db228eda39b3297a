"""Who took part is counted by hand, and whoever was left out for good is named where the run and the comparison end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import configured, fedprune, run_to_end

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.report.comparison import compare
from fedprune_cli.report.comparison_page import comparison_json, comparison_table, write_comparison
from fedprune_cli.report.presence import left_out, presence
from fedprune_cli.report.read import Run, read_run
from fedprune_cli.report.run import facts, run_json
from fedprune_cli.runs import life
from fedprune_cli.store.record import DeviceRows

SLOW = "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db\n" + "1,1,23,-90\n" * 3 + "0.001,1,23,-90\n" + "1,1,23,-90\n"
LEFT_OUT = ("devices=table", "devices.file=fleet.csv", "devices.fresh=1", "deadline.seconds=0.01", "rounds=2")
SMALL = ("model.hidden=[16]", "training.batch_size=8", "training.shared_steps=3", "training.personal_steps=2",
         "evaluation.fresh_steps=2", "execution.kind=serial")  # fmt: skip


def attended(run: Run, rounds: list[list[int]]) -> Run:
    """Returns a run in whose rounds these devices trained."""
    records = [replace(run.rounds[0], devices=DeviceRows(id=ids)) for ids in rounds]
    return replace(run, rounds=tuple(records))


def test_presence_is_counted_by_hand(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run", "rounds=1")
    run = read_run(tmp_path / "run")
    everybody = presence(attended(run, [[0, 1, 2, 3]] * 3))
    assert (everybody.rounds, str(everybody)) == ((3, 3, 3, 3), "")
    some = presence(attended(run, [[0, 1], [], [0]]))
    assert (some.rounds, some.never, some.gone) == ((2, 1, 0, 0), ("2", "3"), ())
    late = attended(run, [[0, 1, 3], *[[0, 3]] * 10])
    assert (presence(late).never, presence(late).gone) == (("2",), ("1",))
    assert str(presence(late)) == "devices 2 never took part; devices 1 took part in none of the last 10 rounds"
    config = run.manifest["config"] | {"devices": run.manifest["config"]["devices"] | {"per_round": 2}}
    by_chance = replace(late, manifest=run.manifest | {"config": config})
    assert (presence(by_chance).never, presence(by_chance).gone) == (("2",), ())
    assert left_out([late]) == f"seed 0: {presence(late)}"
    assert ["left out for good", str(presence(late))] in facts(late)
    assert run_json(late, Path("p"))["presence"] == {"least_rounds": 0, "never": ["2"], "gone": ["1"]}


def test_a_device_left_out_for_good_is_named_wherever_the_comparison_is_shown(tmp_path: Path) -> None:
    Path("fleet.csv").write_text(SLOW)
    base = (*SMALL, *LEFT_OUT)
    arms = 'arms={personalized: ["method=personalized"], drop: ["method=personalized", "allocator.on_infeasible=drop"]}'
    result = fedprune("compare", *base, arms, "--jobs", "1", "--out", "cmp")
    assert result.returncode == 0, result.stderr
    assert "left out for good by drop: seed 0: devices 3 never took part" in result.stdout
    assert "left out for good by personalized" not in result.stdout
    assert "least rounds" in result.stdout
    text = Path("cmp/index.html").read_text()
    assert "Who took part" in text
    assert "<td>drop</td><td>3.0</td><td>0 of 2</td><td>seed 0: devices 3 never took part</td>" in text
    runs = [read_run(path) for path in sorted(Path("outputs/main").glob("*-s0"))]
    labels = ["drop" if presence(run).never else "personalized" for run in runs]
    comparison = compare(runs, labels)
    assert comparison_json(comparison, Path("p"), [])["presence"]["drop"][0]["never"] == ["3"]  # type: ignore[index]
    for run in runs:
        assert verify_run(life.reopen(run.path), run.path, 1).failures == ()


def test_a_comparison_of_whole_fleets_has_no_column_for_who_was_there(tmp_path: Path) -> None:
    run_to_end(tmp_path / "a", "method=personalized", "rounds=2")
    comparison = compare([read_run(tmp_path / "a")])
    assert "least rounds" not in comparison_table(comparison).headers
    page = write_comparison(comparison, tmp_path / "out").read_text()
    assert "<td>2 of 2</td><td>nobody</td>" in page


EQUALS = "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db\n" + "".join(f"1000,1,23,-{90 + at}\n" for at in range(5))


@pytest.mark.parametrize("allocator", ["kkt", "dense"])
def test_turns_leave_nobody_out_of_a_run_and_can_be_audited(allocator: str, tmp_path: Path) -> None:
    """Four devices on a channel that stays, and a deadline with room for some of them; the table's last row is the fresh device."""
    Path("fleet.csv").write_text(EQUALS)
    scarce = (*SMALL, "rounds=4", "devices=table", "devices.file=fleet.csv", "devices.fresh=1", "channel.fading=none",
              "channel.shadowing_db=0", "channel.bandwidth_mhz=1", "deadline.seconds=0.006", f"allocator={allocator}",
              "allocator.on_infeasible=drop", "pruner.max_ratio=0.05")  # fmt: skip
    found = []
    for turns in ("false", "true"):
        config = configured(*scarce, f"participation.rotation={turns}", f"out={tmp_path}/{turns}")
        setup = life.begin_or_reopen(config)
        for _ in life.run(setup, tmp_path / turns):
            pass
        found.append(presence(read_run(tmp_path / turns)))
        assert verify_run(setup, tmp_path / turns, 2).failures == ()
    without, with_turns = found
    assert without.never
    assert max(without.rounds) == 4
    assert (with_turns.never, with_turns.rounds) == ((), (2, 2, 2, 2))
