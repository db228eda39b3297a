"""The benchmark's references do the same work, its comparison finds what got worse, and its files are what tools expect."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fedprune

from fedprune_cli import bench
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.bench import allocator, bare, baseline, rounds
from fedprune_cli.bench.measure import Effort, Kind, Measure, Say
from fedprune_cli.commands import app as cli
from fedprune_cli.contracts.problems import literature
from fedprune_cli.errors import ConfigError
from fedprune_cli.execute import executor
from fedprune_cli.round import bill
from fedprune_cli.round.setup import build_learner
from fedprune_cli.round.step import round_step

BITS = Measure("t1/bits_up", "bit", 1000.0, 0.0, "smaller", "exact", None)
SOLVER = Measure("allocator/p1_vs_clarabel", "x Clarabel", 0.02, 0.003, "smaller", "wall", 0.15)
SPEED = Measure("t2/samples_per_cpu_s", "x bare", 1.5, 0.1, "larger", "wall", 2e4)
OBJECTIVE = Measure("allocator/objective", "sum w x", 0.55, 0.0, "larger", "exact", None)
MEASURES = (BITS, SOLVER, SPEED, OBJECTIVE)
LIMITS: dict[Kind, float] = {"exact": 0.15, "wall": 1.0}


def changed(name: str, factor: float) -> tuple[Measure, ...]:
    """Returns the made-up measures with one of them multiplied."""
    return tuple(replace(m, value=m.value * factor) if m.name == name else m for m in MEASURES)


def run_bench(monkeypatch: pytest.MonkeyPatch, measures: Sequence[Measure], *arguments: str) -> int:
    """Runs the command in this process with tasks that return made-up measures; returns its exit code."""

    def task(name: str, effort: Effort, say: Say) -> tuple[Measure, ...]:
        say(f"{name} was easy")
        return tuple(m for m in measures if m.name.startswith(f"{name}/"))

    monkeypatch.setattr(bench, "TASKS", {name: functools.partial(task, name) for name in bench.TASKS})
    monkeypatch.setattr(sys, "argv", ["fedprune", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


# --- the comparison -------------------------------------------------------------------------------------------------


def test_equal_measures_and_noise_within_the_limits_pass() -> None:
    assert bench.regressions(MEASURES, MEASURES, LIMITS) == ()
    for name, factor in (
        (BITS.name, 1.14), (BITS.name, 0.1), (SOLVER.name, 1.9), (SOLVER.name, 0.1),
        (SPEED.name, 0.51), (SPEED.name, 10.0), (OBJECTIVE.name, 0.9),
    ):  # fmt: skip
        assert bench.regressions(changed(name, factor), MEASURES, LIMITS) == (), (name, factor)


@pytest.mark.parametrize(
    ("name", "factor", "change"),
    [(BITS.name, 1.2, 0.2), (SOLVER.name, 3.0, 2.0), (SPEED.name, 0.4, 1.5), (OBJECTIVE.name, 0.8, 0.25)],
)
def test_what_got_worse_is_found_in_its_own_direction(name: str, factor: float, change: float) -> None:
    (found,) = bench.regressions(changed(name, factor), MEASURES, LIMITS)
    assert found.name == name
    assert found.change == pytest.approx(change)


def test_a_measure_that_is_gone_is_a_regression_and_a_new_one_is_not() -> None:
    (found,) = bench.regressions(MEASURES[1:], MEASURES, LIMITS)
    assert (found.name, found.value, found.change) == (BITS.name, None, None)
    assert "not measured now" in str(found)
    assert bench.regressions(MEASURES, MEASURES[1:], LIMITS) == ()


def test_a_figure_that_was_zero_may_stay_zero() -> None:
    zero = replace(BITS, value=0.0)
    assert bench.regressions([zero], [zero], LIMITS) == ()
    assert len(bench.regressions([BITS], [zero], LIMITS)) == 1
    assert bench.regressions([zero], [BITS], LIMITS) == ()
    none = replace(SPEED, value=0.0)
    assert len(bench.regressions([none], [SPEED], LIMITS)) == 1
    assert bench.regressions([SPEED], [none], LIMITS) == ()


@pytest.mark.parametrize(
    ("name", "factor", "figures"),
    [
        (BITS.name, 1.2, "t1/bits_up: 1000 -> 1200, 20.0 % worse (limit 15 %)"),
        (SOLVER.name, 3.0, "allocator/p1_vs_clarabel: 0.02 -> 0.06, 200.0 % worse (limit 100 %)"),
    ],
)
def test_a_planted_regression_is_exit_code_3_and_named(
    name: str, factor: float, figures: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(monkeypatch, MEASURES, "--out", "before") == 0
    assert run_bench(monkeypatch, MEASURES, "--baseline", "before/bench.json") == 0
    capsys.readouterr()
    now = changed(name, factor)
    assert run_bench(monkeypatch, now, "--baseline", "before/bench.json", "--out", "now") == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == [figures, f"error: 1 measure worse than before/bench.json: {name}"]
    assert Path("now/bench.json").exists()  # what was measured is kept
    limits = ("--max-regression", "25%", "--max-wall-regression", "2.5")
    assert run_bench(monkeypatch, now, "--baseline", "before/bench.json", *limits) == 0
    other = "t2" if name != SPEED.name else "t1"
    assert run_bench(monkeypatch, now, "--baseline", "before/bench.json", "--tasks", other) == 0


# --- what comes in and goes out -------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(monkeypatch, MEASURES, "--json", "--out", "here") == 0
    output = capsys.readouterr()
    content = json.loads(output.out)
    assert "t1 was easy" in output.err
    assert content == json.loads(Path("here/bench.json").read_text())
    assert content["schema"] == 1
    assert set(content["machine"]) == {"cpu", "cores", "python", "torch"}
    assert content["measures"][0] == {"name": "t1/bits_up", "unit": "bit", "value": 1000.0, "spread": 0.0,
                                      "better": "smaller", "kind": "exact", "bare": None}  # fmt: skip
    # each task's in the order of the tasks
    read = bench.read_baseline(Path("here/bench.json"), list(bench.TASKS), quick=False)
    assert sorted(read, key=MEASURES.index) == list(MEASURES)
    assert bench.read_baseline(Path("here/bench.json"), ["t2"], quick=False) == (SPEED,)


def test_the_files_are_what_github_action_benchmark_reads() -> None:
    bench.make_folder(Path("out"))
    bench.write(Path("out"), MEASURES, quick=False)
    smaller, larger = (json.loads(Path(f"out/bench-{better}.json").read_text()) for better in ("smaller", "larger"))
    assert [entry["name"] for entry in smaller] == [BITS.name, SOLVER.name]
    assert [entry["name"] for entry in larger] == [SPEED.name, OBJECTIVE.name]
    assert smaller[1] == {"name": "allocator/p1_vs_clarabel", "unit": "x Clarabel", "value": 0.02, "range": "0.003",
                          "extra": "wall; bare reference: 0.15"}  # fmt: skip


@pytest.mark.parametrize(("text", "share"), [("15%", 0.15), ("0.15", 0.15), ("100%", 1.0), ("2", 2.0), ("0", 0.0)])
def test_a_limit_is_a_percentage_or_a_fraction(text: str, share: float) -> None:
    assert baseline.parse_share("--max-regression", text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "15", "-5%", "-0.1", "nan", "inf", "1e3", "a lot", "15 percent", "1,5%"])
def test_any_other_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-regression"):
        baseline.parse_share("--max-regression", text)


GOOD = {"schema": 1, "machine": {}, "quick": False, "measures": [MEASURES[0].__dict__]}


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (("--tasks", "t1,alocator"), None, "error: unknown task 'alocator'. Did you mean 'allocator'?"),
        (("--tasks", ""), None, "error: unknown task ''"),
        (("--repeats", "0"), None, "error: --repeats 0: must be in 1..1000"),
        (("--max-regression", "15"), None, "error: --max-regression 15: must be a percentage"),
        (("--max-wall-regression", "x"), None, "error: --max-wall-regression x: must be a percentage"),
        (("--baseline", "missing.json"), None, "error: --baseline missing.json: No such file"),
        (("--baseline", "bad.json"), "{", "error: --baseline bad.json: not JSON"),
        (("--baseline", "bad.json"), "\udcff", "error: --baseline bad.json: not JSON"),
        (("--baseline", "bad.json"), "[]", "error: --baseline bad.json: not a bench.json of schema 1"),
        (("--baseline", "bad.json"), {**GOOD, "schema": 2}, "error: --baseline bad.json: not a bench.json of schema 1"),
        (("--baseline", "bad.json"), {**GOOD, "quick": True}, "error: --baseline bad.json: was measured with --quick"),
        (("--baseline", "bad.json", "--quick"), GOOD, "error: --baseline bad.json: was measured without --quick"),
        (("--baseline", "bad.json", "--tasks", "t2"), GOOD, "error: --baseline bad.json: has no measure of t2"),
        *(
            (("--baseline", "bad.json"), {**GOOD, "measures": measures}, "error: --baseline bad.json: its measures are")
            for measures in (
                None,
                [1],
                [{"name": "t1/bits_up"}],
                *([{**MEASURES[0].__dict__, **wrong}] for wrong in (
                    {"value": "1"}, {"value": None}, {"value": 10**400}, {"value": True},
                    {"better": "red"}, {"kind": ["exact"]}, {"name": 1}, {"bare": "no"}, {"more": 1},
                )),
            )
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_measured(
    arguments: tuple[str, ...], content: object, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        Path("bad.json").write_bytes(text.encode(errors="surrogateescape"))
    assert run_bench(monkeypatch, MEASURES, *arguments, "--out", "out") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(monkeypatch, MEASURES, "--out", "/proc/nothing") == 8
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)


# --- the references do the same work --------------------------------------------------------------------------------


def test_the_bare_loops_end_where_the_real_rounds_end() -> None:
    overrides = (
        "data=digits", "model=mlp", "model.hidden=[64]", "devices.count=20", "devices.per_round=4",
        "training.batch_size=10",
    )  # fmt: skip
    setup = rounds.fedavg_setup(*overrides)
    training = setup.experiment.training
    data = bare.bare_data(setup.scenario.dataset, training.batch_size, training.lr)
    build = functools.partial(build_learner, setup.experiment, setup.scenario)
    state = setup.initial
    with executor(setup.experiment.execution, build) as workers:
        for number in range(2):
            start, (samples, weights) = rounds.broadcast_params(setup, state), rounds.round_samples(setup, number)
            state, _ = round_step(setup, state, workers)
            ours = rounds.broadcast_params(setup, state)
            for loop in (bare.tuned_round, bare.plain_round):
                plain = loop(bare.bare_mlp(64), data, start, samples, weights)
                for mine, other in zip(ours, plain, strict=True):
                    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_bare_cnn_ends_where_the_real_round_ends_in_one_process_and_in_two() -> None:
    setup = rounds.fedavg_setup(*rounds.CNN, "data.limit=4000", "devices.per_round=5")
    training = setup.experiment.training
    data = bare.bare_data(setup.scenario.dataset, training.batch_size, training.lr)
    build = functools.partial(build_learner, setup.experiment, setup.scenario)
    start, (samples, weights) = rounds.broadcast_params(setup, setup.initial), rounds.round_samples(setup, 0)
    with executor(setup.experiment.execution, build) as workers:
        state, _ = round_step(setup, setup.initial, workers)
    alone = bare.tuned_round(bare.bare_cnn(), data, start, samples, weights)
    with bare.bare_workers(setup, 2) as share_out:
        shared = share_out(start, samples, weights)
    for ours, one, two in zip(rounds.broadcast_params(setup, state), alone, shared, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(one.numpy(), two, rtol=1e-3, atol=1e-5)


def test_the_allocators_scene_is_the_literatures_and_binds() -> None:
    problem, other = allocator.literature_problem(1000), literature(0.1, 0, 1000)
    for name in ("shared_compute_s", "payload_bits", "fixed_s", "weight", "max_ratio"):
        assert getattr(problem, name).mean() == pytest.approx(getattr(other, name).mean(), rel=0.1)
    assert np.log(problem.snr_hz).mean() == pytest.approx(np.log(other.snr_hz).mean(), rel=0.02)
    assert solve_p1(problem)[1] > 0


@pytest.mark.slow
def test_a_quick_run_measures_the_allocator() -> None:
    result = fedprune("bench", "--tasks", "allocator", "--quick", "--json", "--out", "out")
    assert result.returncode == 0, result.stderr
    measures = {entry["name"]: entry for entry in json.loads(result.stdout)["measures"]}
    assert set(measures) == {"allocator/p1_vs_clarabel", "allocator/objective", "allocator/device_s_1e4",
                             "allocator/device_s_1e5", "allocator/exponent", "allocator/blocks_1e3", "allocator/blocks_1e5",
                             "allocator/capped_1e5", "allocator/chosen_1e4", "allocator/selective_20"}  # fmt: skip
    assert 0 < measures["allocator/objective"]["value"] < 1
    assert all(entry["value"] > 0 for entry in measures.values())
    for wall in (entry for entry in measures.values() if entry["kind"] == "wall"):
        assert wall["bare"] > 0


@pytest.mark.slow
def test_a_quick_run_measures_everything() -> None:
    result = fedprune("bench", "--quick", "--json")
    assert result.returncode == 0, result.stderr
    tasks = [entry["name"].split("/")[0] for entry in json.loads(result.stdout)["measures"]]
    assert list(dict.fromkeys(tasks)) == list(bench.TASKS)


@pytest.mark.slow
def test_a_slower_solver_and_a_larger_payload_are_named_by_a_real_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same measurement twice passes; with the solver three times as slow or payloads 20 % larger it exits with 3 and says which."""

    def measured(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedprune", "bench", "--quick", "--tasks", "t2,allocator", "-q", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    assert measured("--out", "before")[0] == 0
    against = ("--baseline", "before/bench.json")
    assert measured(*against) == (0, "")
    with monkeypatch.context() as planted:
        planted.setattr(
            allocator, "solve_p1", lambda problem: (solve_p1(problem), solve_p1(problem), solve_p1(problem))[0]
        )
        code, errors = measured(*against)
    assert code == 3
    assert errors.splitlines()[-1] == "error: 1 measure worse than before/bench.json: allocator/p1_vs_clarabel"
    measure = bill.measure
    with monkeypatch.context() as planted:
        planted.setattr(
            bill, "measure", lambda load, **of: measure(load, **of | {"payload_bytes": 1.2 * of["payload_bytes"]})
        )
        code, errors = measured(*against)
    assert code == 3
    assert "t2/bits_up" in errors.splitlines()[-1]
    assert "20.0 % worse (limit 15 %)" in errors
