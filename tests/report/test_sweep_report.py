"""What a sweep left behind: groups, their front, and the pages of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import run_to_end
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.errors import CheckpointError
from fedprune_cli.report.estimate import Estimate
from fedprune_cli.report.sweep import (
    Combination,
    Group,
    build_groups,
    pareto_front,
    read_combinations,
    varied,
    write_sweep,
)


def test_what_varied_is_what_the_combinations_differ_in() -> None:
    typed = [("a=1", "b=0", "seed=0", "execution.workers=1"), ("a=1", "b=2", "seed=1", "execution.workers=2", "+c=3")]
    combinations = [Combination(overrides, f"run{i}") for i, overrides in enumerate(typed)]
    assert varied(combinations) == ["b", "c"]
    assert combinations[1].values == {"a": "1", "b": "2", "seed": "1", "execution.workers": "2", "c": "3"}


def make_group(accuracy: float, seconds: float) -> Group:
    figures = {"accuracy": Estimate(accuracy, None, 1), "simulated_s": Estimate(seconds, None, 1)}
    return Group({}, "", {}, figures)


levels = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(levels, levels), min_size=1, max_size=8))
def test_the_front_holds_exactly_what_no_other_beats(points: Sequence[tuple[float, float]]) -> None:
    groups = [make_group(*point) for point in points]
    front = {(of.mean("accuracy"), of.mean("simulated_s")) for of in pareto_front(groups)}
    best = {(a, s) for a, s in points if not any((b >= a and t <= s) and (b > a or t < s) for b, t in points)}
    assert front == best
    seconds = [of.mean("simulated_s") for of in pareto_front(groups)]
    assert seconds == sorted(set(seconds))


def test_groups_pair_their_seeds(tmp_path: Path) -> None:
    combinations = []
    for method in ("proposed", "personalized"):
        for seed in (0, 1):
            place = tmp_path / f"{method}{seed}"
            run_to_end(place, f"method={method}", f"seed={seed}")
            combinations.append(Combination((f"method={method}", f"seed={seed}"), str(place)))
    failed = Combination(("method=fedavg", "seed=0"), "", "it failed", 2)
    groups = build_groups([*combinations, failed])
    finals = {
        method: [
            json.loads((tmp_path / f"{method}{seed}/summary.json").read_text())["final_accuracy"] for seed in (0, 1)
        ]
        for method in ("proposed", "personalized")
    }
    best = max(finals, key=lambda method: np.mean(finals[method]))
    for of in groups:
        assert of.below_best
        expected = np.mean(np.subtract(finals[best], finals[of.values["method"]]))
        np.testing.assert_allclose(of.below_best.mean, expected, atol=1e-12)
    page = write_sweep([*combinations, failed], groups, tmp_path / "out")
    assert "it failed" in page.read_text()
    rows = list(csv.DictReader((page.parent / "table.csv").open()))
    assert [row["method"] for row in rows] == ["proposed", "personalized"]
    np.testing.assert_allclose(
        [float(row["accuracy mean"]) for row in rows], [np.mean(finals[row["method"]]) for row in rows]
    )


def test_two_parameters_give_a_heat_map_and_odd_names_are_text(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    combinations = [
        Combination((f"a=${x}", f"<b>={y}", f"seed={x}{y}"), str(tmp_path / "run")) for x in "12" for y in "34"
    ]
    page = write_sweep(combinations, build_groups(combinations), tmp_path / "out")
    assert (page.parent / "heatmap.svg").exists()
    assert "<b>" not in page.read_text()
    assert "$1" in (page.parent / "heatmap.svg").read_text()


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no", '{"overrides": 1, "run_dir": "a", "error": null, "exit_code": 0}']
)
def test_a_damaged_member_is_one_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0/member.json").write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_combinations([tmp_path])
