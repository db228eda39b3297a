"""Every arm at its own best setting: as by hand, on seeds of its own, and refused before the first run where it is unsound."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY as LONGER
from conftest import fedprune, run_to_end

from fedprune_cli import api
from fedprune_cli.errors import ConfigError, FedpruneError
from fedprune_cli.many.compared import Contest, build_member, read_contest
from fedprune_cli.many.one import HIDDEN
from fedprune_cli.many.side_by_side import Failure, Member, run_one_by_one
from fedprune_cli.many.tuning import Tuning, read_tuning, tune
from fedprune_cli.report import drawing
from fedprune_cli.report.comparison import compare
from fedprune_cli.report.estimate import mean_over_seeds
from fedprune_cli.report.read import Run, crossing, held_accuracy, read_run
from fedprune_cli.report.tuning import Trial, best_of, target_of
from fedprune_cli.report.versus import Versus, versus, versus_csv

TINY = (*LONGER, "rounds=2")
ARMS = 'arms={personalized: ["method=personalized"], kkt: ["method=proposed"]}'
TUNE = (
    'tune={seeds: [9], settings: {kkt: ["deadline.fraction=0.9", '
    '"deadline.seconds=0.5*round allocator.on_infeasible=drop"]}}'
)


def contest_of(*overrides: str, seeds: tuple[int, ...] = (0,)) -> Contest:
    return read_contest([*TINY, *overrides], None, None, seeds)


def tuning_of(*overrides: str) -> Tuning:
    tuning = read_tuning(contest_of(*overrides))
    assert tuning is not None
    return tuning


def alone(members: list[Member]) -> list[Failure]:
    return [failure for _, failure in run_one_by_one([one for one in members if not one.finished], HIDDEN) if failure]


def test_each_arm_takes_what_a_choice_by_hand_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.Drawing, "svg", lambda _: "<svg></svg>")  # which takes longer than a tiny run
    contest = contest_of(ARMS, TUNE)
    after, tuned = tune(contest, tuning_of(ARMS, TUNE), alone)
    base = read_run(build_member(contest, "personalized", (), 9)[0].run_dir)
    round_s = np.median([record.latency_s for record in base.rounds])
    settings = [
        ("deadline.fraction=0.9",),
        (f"deadline.seconds={float(f'{0.5 * round_s:.2g}'):g}", "allocator.on_infeasible=drop"),
    ]
    given = [settings[0], ("deadline.seconds=0.5*round", "allocator.on_infeasible=drop")]
    target = held_accuracy(base) - 0.005
    assert (tuned.reference, [*tuned.bases], target_of(tuned.bases[9])) == ("personalized", [9], target)
    runs = [read_run(build_member(contest, "kkt", setting, 9)[0].run_dir) for setting in settings]
    reached = [crossing(run, target) for run in runs]
    seconds = [np.inf if at is None else run.rounds[at].simulated_s for run, at in zip(runs, reached, strict=True)]
    best = min(range(2), key=lambda at: (seconds[at], -runs[at].final.accuracy))
    assert [trial.setting for trial in tuned.trials] == [" ".join(setting) for setting in given]
    assert tuned.chosen == {"kkt": " ".join(given[best])}
    assert after.arms == {"personalized": ("method=personalized",), "kkt": ("method=proposed", *given[best])}
    assert after.round_s[9] == round_s
    assert alone([build_member(after, arm, (), 9)[0] for arm in after.arms]) == []  # these runs are there


@pytest.mark.slow
def test_seconds_in_rounds_are_of_the_seed_that_a_run_is_of() -> None:
    """What suits one site suits no other: its devices are elsewhere."""
    contest = replace(contest_of(ARMS, seeds=(0, 1)), round_s={0: 0.5, 1: 3.0})
    words = ("deadline.seconds=0.25*round", "allocator.on_infeasible=drop")
    built = [build_member(contest, "kkt", words, seed)[1].deadline.seconds for seed in (0, 1, 2)]
    assert built == [0.12, 0.75, 0.25]
    contest, tuned = tune(contest_of(ARMS, TUNE, seeds=(0, 1)), tuning_of(ARMS, TUNE), alone)
    own = {seed: read_run(build_member(contest, "personalized", (), seed)[0].run_dir) for seed in (0, 1, 9)}
    assert contest.round_s == {seed: np.median([one.latency_s for one in run.rounds]) for seed, run in own.items()}
    assert [*tuned.bases] == [9]


def test_the_rule_of_choice_is_time_then_accuracy_then_order(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run", "rounds=1")
    run = read_run(tmp_path / "run")

    def tested(*tests: tuple[float, float], round_s: float = 1.0) -> Run:
        """Returns a run with (simulated seconds, accuracy) after each round."""
        records = tuple(
            replace(run.rounds[0], latency_s=round_s, simulated_s=s, accuracy=a, accuracy_mean=a, accuracy_p10=a)
            for s, a in tests
        )
        return replace(run, rounds=records)

    def trial(name: str, *tests: tuple[float, float]) -> Trial:
        return Trial("arm", name, (tested(*tests),))

    bases = {9: tested((1, 0.8))}  # sets a target of 0.795
    slow, soon = trial("slow", (1, 0.2), (9, 0.9)), trial("soon", (1, 0.2), (3, 0.8))
    as_soon = trial("as soon", (3, 0.8), (4, 0.85))
    missed, closer = trial("missed", (1, 0.2), (2, 0.3)), trial("closer", (1, 0.2), (8, 0.79))
    failed = Trial("arm", "failed", (), "no")
    assert best_of([failed, missed, slow, soon], bases) is soon
    assert best_of([soon, as_soon], bases) is as_soon
    assert best_of([missed, slow], bases) is slow
    assert best_of([missed, closer, failed], bases) is closer
    assert best_of([closer, trial("equal", (1, 0.79))], bases) is closer
    assert best_of([failed], bases) is None

    sites = {8: tested((1, 0.8)), 9: tested((1, 0.8), round_s=100.0)}  # of the second, a second weighs a hundredth
    risky = Trial("arm", "risky", (tested((1, 0.9)), tested((1, 0.3))))
    steady = Trial("arm", "steady", (tested((8, 0.9)), tested((100, 0.9))))
    there = Trial("arm", "there", (tested((7, 0.9)), tested((190, 0.8))))
    assert best_of([risky, steady, there], sites) is there


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("tune=3",), "tune=3: must be null, or seeds and settings"),
        (("tune={seed: 3}",), "key 'tune' has 'seed'. Did you mean 'seeds'?"),
        (("tune={seeds: [3]}",), "tune.settings: missing value"),
        (('tune={seeds: 3, settings: ["rounds=2"]}',), "tune.seeds=3: must be a list of seeds in 0..2^63-1"),
        (('tune={seeds: [], settings: ["rounds=2"]}',), "tune.seeds=[]: must be a list of seeds"),
        (('tune={seeds: [9,-1], settings: ["rounds=2"]}',), "tune.seeds=[9, -1]: must be a list of seeds"),
        (('tune={seeds: [9,0], settings: ["rounds=2"]}',), "--seeds: 0 is of tune.seeds, which choose the settings and are not reported"),
        (('tune={seeds: [9], settings: {ktk: ["rounds=2"]}}',), "arm of tune.settings 'ktk'. Did you mean 'kkt'?"),
        (("tune={seeds: [9], settings: []}",), "tune.settings=[]: must be a list of settings"),
        (("tune={seeds: [9], settings: {kkt: rounds}}",), "tune.settings=rounds: must be a list"),
        (('tune={seeds: [9], settings: ["deadline.fractoin=1"]}',), "tune.settings: personalized, deadline.fractoin=1: unknown"),
        (('tune={seeds: [9], settings: ["deadline.fraction=-1"]}',), "deadline.fraction=-1: must be > 0"),
        (("tune={seeds: [9], settings: {kkt: ['rounds=2 \"']}}",), "no closing quotation"),
        (('tune={seeds: [9], settings: {kkt: ["", "partition.alpha=3"]}}',), "tune.settings: kkt, partition.alpha=3: another partition"),
        (('tune={seeds: [9], settings: ["method=fedavg"]}',), "tune.settings: method=fedavg: no setting chooses method"),
        (('tune={seeds: [9], settings: ["seed=3"]}',), "no setting chooses seed"),
        (('tune={seeds: [9], settings: ["deadline.seconds=1*round"]}',), "personalized measures a round with it"),
    ],
)  # fmt: skip
def test_unsound_tuning_is_refused_before_the_first_run(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_tuning(contest_of(ARMS, *overrides))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("outputs").exists()


def test_a_comparison_without_a_reference_is_not_tuned() -> None:
    with pytest.raises(ConfigError, match="needs an arm with method=personalized"):
        read_tuning(contest_of('arms={kkt: ["method=proposed"]}', TUNE))
    assert read_tuning(contest_of(ARMS)) is None


def test_settings_for_all_are_a_list_and_an_arm_without_is_left_as_it_is() -> None:
    tuning = tuning_of(ARMS, 'tune={seeds: [9], settings: ["", "deadline.fraction=0.3"]}')
    assert tuning.settings == dict.fromkeys(("personalized", "kkt"), ((), ("deadline.fraction=0.3",)))
    assert tuning_of(ARMS, TUNE).settings["personalized"] == ((),)


@pytest.mark.slow
def test_a_setting_that_fails_loses_and_an_arm_of_which_all_fail_is_refused() -> None:
    fails = "deadline.fraction=1e-6 allocator.on_infeasible=fail"
    tuned = 'tune={{seeds: [9], settings: {{kkt: ["{0}", "{1}"]}}}}'
    some = fedprune("compare", *TINY, ARMS, tuned.format(fails, "deadline.fraction=0.5"), "--jobs", "1", "--json")
    assert some.returncode == 0, some.stderr
    assert f"error: kkt, {fails}, seed 9: " in some.stderr
    first, second = json.loads(some.stdout)["tuning"]["trials"]
    assert (first["taken"], first["runs"], second["taken"], second["failure"]) == (False, [], True, None)
    assert "too early" in first["failure"]
    none = fedprune("compare", *TINY, ARMS, tuned.format(fails, fails.replace("6", "7")), "--jobs", "1")
    assert none.returncode == 3
    assert none.stderr.splitlines()[-1] == "error: tune: every setting of kkt failed, see above"


@pytest.mark.slow
def test_a_tuned_comparison_says_what_it_took_and_a_second_one_only_reads() -> None:
    command = ("compare", *TINY, ARMS, TUNE, "--seeds", "1", "--out", "cmp", "--jobs", "1")
    first = fedprune(*command)
    assert first.returncode == 0, first.stderr
    rows = list(csv.DictReader(Path("cmp/tuning.csv").read_text().splitlines()))
    (taken,) = [row["setting"] for row in rows if row["taken"] == "True"]
    assert len(rows) == 2
    assert f"kkt takes {taken}" in first.stderr
    assert first.stdout.startswith("tried on seed 9, to reach ")
    assert all(row["setting"] in first.stdout for row in rows)
    page = Path("cmp/index.html").read_text()
    assert "How each arm was tuned" in page
    assert all(f"<td>{row['setting']}</td>" in page for row in rows)
    compared = [json.loads(path.read_text()) for path in Path("outputs/main").glob("*-s1/manifest.json")]
    assert len(compared) == 2
    before = {path: path.read_bytes() for path in Path("cmp").iterdir()}
    second = fedprune(*command)
    assert "2 of 2 runs were finished before" in second.stderr  # the reference on both seeds, and the others
    assert "ETA" not in second.stderr
    assert {path: path.read_bytes() for path in Path("cmp").iterdir()} == before
    again = api.compare(*TINY, ARMS, TUNE, seeds=[1])
    (mine,) = [one for one in compared if one["method"] == "proposed"]
    assert [run.path for run in again.runs["kkt"]] == [Path("outputs/main") / f"{mine['config_hash']}-s1"]


def test_an_api_call_of_which_the_reference_fails_says_so() -> None:
    arms = 'arms={personalized: ["method=personalized", "allocator.on_infeasible=fail"], kkt: ["method=proposed"]}'
    with pytest.raises(FedpruneError, match="personalized sets the target and failed") as failed:
        api.compare(*TINY, arms, TUNE.replace("0.9", "0.8"), "deadline.fraction=1e-6", seeds=[0])
    assert failed.value.exit_code == 3


def test_arm_against_arm_is_paired_by_seed(tmp_path: Path) -> None:
    runs: list[Run] = []
    for method in ("personalized", "proposed", "fedavg"):
        for seed in (0, 1):
            run_to_end(tmp_path / f"{method}{seed}", f"method={method}", f"seed={seed}", "rounds=2")
            runs.append(read_run(tmp_path / f"{method}{seed}"))
    comparison = compare(runs)
    low = replace(comparison, targets={0: 0.0, 1: 0.0})  # all reach it in their first round
    first_s = {(run.method, run.seed): run.rounds[0].simulated_s for run in runs}
    by_hand = mean_over_seeds([1 - first_s["proposed", seed] / first_s["personalized", seed] for seed in (0, 1)])
    assert versus(low, "proposed", "personalized") == Versus(by_hand, 0)
    end_s = {run.seed: run.rounds[-1].simulated_s for run in runs if run.method == "personalized"}
    high = replace(
        low, runs=low.runs | {"personalized": tuple(_accurate(run, 0.5) for run in low.runs["personalized"])}
    )
    high = replace(high, runs=high.runs | {"proposed": tuple(_accurate(run, 0.9) for run in low.runs["proposed"])})
    never = replace(high, targets={0: 0.4, 1: 0.6})  # which personalized misses on seed 1, and proposed does not
    ends = mean_over_seeds(
        [1 - first_s["proposed", 0] / first_s["personalized", 0], 1 - first_s["proposed", 1] / end_s[1]]
    )
    assert versus(never, "proposed", "personalized") == Versus(ends, 1)
    assert versus(never, "proposed", "personalized").cell().startswith("at least ")
    assert versus(never, "personalized", "proposed") == Versus(None, 0)
    assert versus(never, "personalized", "proposed").cell() == "-"
    rows = list(csv.DictReader(versus_csv(low).splitlines()))
    assert len(rows) == 6
    saved = versus(low, rows[0]["arm"], rows[0]["than"]).saved
    assert saved
    assert float(rows[0]["mean"]) == pytest.approx(saved.mean)


def _accurate(run: Run, accuracy: float) -> Run:
    return replace(run, rounds=tuple(replace(record, accuracy=accuracy) for record in run.rounds))
