"""What is watched of a run, and the limits it must keep."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
from conftest import composed, fedprune, make_setup, run_to_end
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.audit import watch
from fedprune_cli.audit.watch import Limit, Prices, parse_limit
from fedprune_cli.errors import CheckpointError, ConfigError, LimitError
from fedprune_cli.runs import life
from fedprune_cli.store import folder

FREE = Prices(0.0, 0.0)


@given(st.sampled_from(sorted(watch.KPIS)), st.booleans(), st.floats(-1e9, 1e9), st.none() | st.integers(0, 10**6))
def test_a_limit_says_what_it_was_read_from(kpi: str, upper: bool, value: float, since: int | None) -> None:
    limit = Limit(kpi, upper, float(f"{value:g}"), since)
    assert parse_limit(str(limit)) == limit


@pytest.mark.parametrize(
    ("text", "message"),
    [("accuracy=1", "must be such as"), ("acuracy>=1", "Did you mean 'accuracy'"), ("joules<=x", "not a number"),
     ("joules<=nan", "not a number"), ("", "must be such as"), ("joules<=1@x", "must be such as")],
)  # fmt: skip
def test_a_wrong_limit_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_limit(text)


def test_totals_grow_and_costs_follow_them(tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "run")
    rows = watch.kpis(folder.read_records(tmp_path / "run"), Prices(2.0, 3.0))
    assert [row["bytes_up"] for row in rows] == list(itertools.accumulate(r["bytes_up"] for r in records))
    last, sent, joules = rows[-1], sum(r["bytes_up"] for r in records), sum(r["joules"] for r in records)
    assert last["cost"] == pytest.approx(2 * sent / 1e9 + 3 * joules / 3.6e6)
    assert last["accuracy"] == records[-1]["accuracy"]


def test_upper_limits_hold_in_every_round_and_lower_ones_at_the_end_or_from_a_round_on() -> None:
    rows = [
        {"accuracy": value, "latency_s": latency}
        for value, latency in ((0.1, 1.0), (0.5, 3.0), (None, 1.0), (0.9, 1.0))
    ]

    def found(text: str, *, finished: bool = True) -> list[str]:
        return watch.broken(rows, [parse_limit(text)], finished=finished)

    assert found("accuracy>=0.9") == []
    assert found("accuracy>=0.95") == ["accuracy>=0.95 is broken in round 4: 0.9"]
    assert found("accuracy>=0.95", finished=False) == []
    assert found("accuracy>=0.6@2") == ["accuracy>=0.6@2 is broken in round 2: 0.5"]
    assert found("accuracy>=0.6@3", finished=False) == []
    assert found("latency_s<=2") == ["latency_s<=2 is broken in round 2: 3"]
    assert found("latency_s<=2@3") == []


def test_a_finished_run_is_seen_once(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    (seen,) = watch.watch(tmp_path / "run", [], FREE, once=False)
    assert (len(seen.rows), seen.finished) == (3, True)
    with pytest.raises(LimitError, match="accuracy>=1 is broken in round 3"):
        list(watch.watch(tmp_path / "run", [parse_limit("accuracy>=1")], FREE, once=False))


def test_a_run_is_watched_while_it_runs_and_found_when_it_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    monkeypatch.setattr(watch, "ABANDONED_S", 0.05)
    place = tmp_path / "run"
    life.create(make_setup(), composed(), place)
    records = life.run(make_setup(), place)
    next(records)
    with (place / "rounds.jsonl").open("ab") as log:
        log.write(b'{"half a line')  # as one that is being written
    seen = watch.watch(place, [], FREE, once=False)
    first = next(seen)
    assert (len(first.rows), first.finished, first.held) == (1, False, True)
    records.close()
    with pytest.raises(CheckpointError, match="interrupted after round 1; continue it with `fedprune resume"):
        list(seen)
    rest = threading.Thread(target=lambda: list(life.run(make_setup(), place)))
    rest.start()
    assert [*watch.watch(place, [], FREE, once=False)][-1].finished
    rest.join()


def test_the_command_ends_with_its_own_code(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    kept = fedprune("watch", "run", "--limit", "accuracy>=0.01", "--limit", "latency_s<=100", "--json")
    assert kept.returncode == 0, kept.stderr
    assert json.loads(kept.stdout)["round"] == 3
    broken = fedprune("watch", "run", "--limit", "joules<=0")
    assert broken.returncode == 9
    assert broken.stderr.startswith("error: run: joules<=0 is broken in round 1:")
    assert fedprune("watch", "nowhere").returncode == 5
    (tmp_path / "run" / folder.SUMMARY).unlink()
    assert fedprune("watch", "run", "--once").returncode == 0


def test_a_limit_that_would_never_be_judged_is_refused(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    ran = fedprune("watch", str(tmp_path / "run"), "--limit", "accuracy>=0.8@20", "--once")
    assert ran.returncode == 2
    assert "the run has 3 rounds, so it would never be judged" in ran.stderr
