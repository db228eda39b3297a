"""The page on where the joint choice pays is written from the tables that are kept, and says of made-up ones what they show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import make_setup

from fedprune_cli.report.estimate import Estimate
from fedprune_cli.report.page import csv_text
from fedprune_cli.report.versus import Versus

ROOT = Path(__file__).parent.parent.parent


def pays() -> ModuleType:
    """Returns the module that goes through the settings and writes the page."""
    spec = importlib.util.spec_from_file_location("pays", ROOT / ".ci" / "pays.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["pays"] = module  # where its dataclasses look themselves up
    sys.path.insert(0, str(ROOT / ".ci"))  # where the module that it imports is
    spec.loader.exec_module(module)
    return module


PAYS = pays()
BOUND = sys.modules["bound"]
ARMS = ("personalized", *PAYS.RIVALS, *PAYS.JOINT)


def result(sooner: dict[tuple[str, str], tuple[float, float]], missing: tuple[str, ...] = ()) -> object:
    """Returns a made-up result: every arm takes 10 s but those that miss the target; pairs that are not given are as soon as each other."""
    time_s = Estimate(10.0, 1.0, 5)
    estimates = {arm: {"time_to_target_s": None if arm in missing else time_s} for arm in ARMS}
    pairs = {
        (arm, other): Versus(None if arm in missing else Estimate(*sooner.get((arm, other), (0.0, 0.1)), 5), other in missing)
        for arm in ARMS for other in ARMS if arm != other
    }  # fmt: skip
    return PAYS.Result(estimates, pairs, {"kkt": "deadline.fraction=0.2"}, Estimate(0.1, 0.01, 5))


def ahead(arm: str, *others: str, by: tuple[float, float] = (0.3, 0.1)) -> dict[tuple[str, str], tuple[float, float]]:
    return {(arm, other): by for other in others}


def test_the_page_is_what_the_tables_give() -> None:
    assert PAYS.PAGE.read_text() == PAYS.page(), "run `python .ci/pays.py page`"


def test_it_pays_where_one_joint_arm_beats_both_by_enough() -> None:
    everybody = ahead("kkt", *PAYS.NEEDED)
    assert PAYS.verdict(result(everybody)) == "pays (kkt)"
    assert PAYS.verdict(result(ahead("blocks", *PAYS.NEEDED))) == "pays (blocks)"
    assert PAYS.verdict(result(everybody | ahead("kkt", "equal", by=(0.3, 0.31)))) == "not against equal (kkt)"
    assert PAYS.verdict(result(everybody | ahead("kkt", "fixed", by=(0.14, 0.01)))) == "not against fixed (kkt)"
    assert PAYS.verdict(result({})) == "not against equal and fixed (kkt)"


def test_who_misses_the_target_decides_nothing_and_is_beaten_by_the_least_that_it_needs() -> None:
    two = ahead("kkt", *PAYS.NEEDED)
    assert PAYS.verdict(result(two, missing=("equal",))) == "pays (kkt)"
    assert PAYS.cell(result(two, missing=("equal",)), "kkt", "equal") == "at least 30.0 ± 10.0"
    nobody = result(two, missing=("kkt", "blocks", "proportional", "equal"))
    assert PAYS.verdict(nobody) == "not against equal and fixed (kkt)"
    assert PAYS.cell(nobody, "kkt", "equal") == "kkt misses"


def test_kept_tables_stand_on_the_page(tmp_path: Path) -> None:
    name = PAYS.SETTINGS[0].name
    figures = ["time_to_target_s", "time_reduction", "accuracy"]
    rows = [[key, *(cell for _ in ARMS for cell in (0.25, 0.125, 5))] for key in figures]
    header = ["figure", *(f"{arm} {part}" for arm in ARMS for part in ("mean", "half_width_95", "seeds"))]
    (tmp_path / f"{name}-table.csv").write_text(csv_text(header, rows))
    pairs = [[arm, other, 0.5, 0.25, 5, 0] for arm in ARMS for other in ARMS if arm != other]
    (tmp_path / f"{name}-versus.csv").write_text(
        csv_text(["arm", "than", "mean", "half_width_95", "seeds", "others_miss"], pairs)
    )
    tried = [["kkt", "deadline.fraction=0.1", False], ["kkt", "deadline.fraction=0.2", True]]
    (tmp_path / f"{name}-tuning.csv").write_text(csv_text(["arm", "setting", "taken"], tried))
    (tmp_path / f"{name}-bound.csv").write_text(csv_text(["seed", "room"], [[0, 0.125], [1, 0.125]]))
    page = PAYS.page(tmp_path)
    assert f"**It pays on 1 of 1 settings: {PAYS.SETTINGS[0].title}.**\n" in page
    assert f"| {PAYS.SETTINGS[0].title} |{' 50.0 ± 25.0 |' * 3} 12.5 ± 0.0 | pays (kkt) |" in page
    assert "| kkt | `deadline.fraction=0.2` | 0.25 ± 0.125 | 25.0 ± 12.5 | - | 25.00 ± 12.50 | - | - | - |" in page
    assert page.count("Not run yet.") == len(PAYS.SETTINGS) - 1


def test_a_setting_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert PAYS.main(["run", "nowhere"]) == 2
    assert "error: no setting 'nowhere'; there are measured_20, " in capsys.readouterr().err
    assert PAYS.main(["runs"]) == 2


def test_nothing_keeps_as_much_sooner_than_the_joint_choice_and_equal_bandwidth_leaves_room() -> None:
    """The bound is met by who reaches it, and it is no more than what was there to save."""
    rounds = ("rounds=3", "devices.count=6", "deadline.fraction=0.4")
    room = {name: BOUND.room(make_setup(*rounds, f"allocator={name}")) for name in ("kkt", "equal")}
    assert abs(room["kkt"]) < 1e-9
    assert 0.02 < room["equal"] < 0.9
