"""From Python: the same bytes and figures as by the command line, errors as exceptions, and a notebook that runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, composed, fedprune, make_setup, results, run_to_end
from matplotlib.figure import Figure

from fedprune_cli import api
from fedprune_cli.errors import CheckpointError, ConfigError, InfeasibleError
from fedprune_cli.report import drawing
from fedprune_cli.runs import life

NOTEBOOK = Path(__file__).parent.parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture(autouse=True)
def _reports_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny run, and tests/report looks at what is drawn."""
    monkeypatch.setattr(drawing.Drawing, "svg", lambda _: "<svg></svg>")
    monkeypatch.setattr(drawing.Drawing, "pdf", lambda _: b"%PDF")


def test_a_run_from_python_has_the_bytes_of_one_by_the_command_line() -> None:
    experiment = api.compose(*TINY, "out=here")
    run = api.run(experiment)
    assert fedprune("train", *TINY, "out=there", "-q").returncode == 0
    assert results(Path("here")) == results(Path("there"))
    there = Path("there/config.yaml").read_text().replace("out: there", "out: here")
    assert Path("here/config.yaml").read_text() == there
    assert run.finished
    assert run.summary == json.loads(Path("here/summary.json").read_text())
    before = Path("here/state.safetensors").stat().st_mtime_ns
    assert api.run(experiment).content.rounds == run.content.rounds  # read, and not trained again
    assert Path("here/state.safetensors").stat().st_mtime_ns == before


def test_a_run_is_resumed_and_branched(tmp_path: Path) -> None:
    setup = make_setup()
    life.create(setup, composed(), tmp_path / "run")
    rounds = life.run(setup, tmp_path / "run")
    next(rounds)
    rounds.close()
    half = api.load(tmp_path / "run")
    assert (half.finished, half.summary, len(half.content.rounds)) == (False, None, 1)
    run_to_end(tmp_path / "whole")
    assert api.resume(tmp_path / "run").finished
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    branch = api.resume(str(tmp_path / "run"), "rounds=4", f"out={tmp_path / 'branch'}")
    assert (branch.path, len(branch.content.rounds)) == (tmp_path / "branch", 4)


def test_what_is_loaded_is_frozen_and_shows_itself(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    run = api.load(tmp_path / "run")
    with pytest.raises(FrozenInstanceError):
        run.path = tmp_path  # type: ignore[misc]
    figures = run.figures()
    assert [*figures] == ["accuracy", "latency", "allocation", "convergence", "partition"]
    assert all(isinstance(figure, Figure) and figure.axes for figure in figures.values())
    assert "<table>" in run._repr_html_()
    assert run.manifest["method"] == "proposed"


def test_data_frames_hold_the_records(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    lines = run_to_end(tmp_path / "run", "evaluation.every=2")
    run = api.load(tmp_path / "run")
    for key in ("round", "simulated_s", "accuracy", "bytes_up"):
        wanted = np.array([line[key] for line in lines], dtype=float)
        assert np.array_equal(run.rounds[key].to_numpy(dtype=float), wanted, equal_nan=True)
    devices = run.devices
    assert devices["prune_ratio"].tolist() == [ratio for line in lines for ratio in line["devices"]["prune_ratio"]]
    assert devices["round"].tolist() == [line["round"] for line in lines for _ in line["devices"]["id"]]


def test_without_pandas_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_to_end(tmp_path / "run")
    run = api.load(tmp_path / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedprune\[notebook\]'"):
        _ = run.rounds


def test_methods_are_compared_and_a_round_is_allocated() -> None:
    compared = api.compare(*TINY, methods=["proposed", "personalized"], seeds=[0])
    assert {arm: [run.path for run in of] for arm, of in compared.runs.items()} == {
        arm: [api.compose(*TINY, f"method={arm}", "seed=0").run_dir] for arm in ("proposed", "personalized")
    }
    assert compared.headline in compared._repr_html_().replace("&#x27;", "'")
    assert all(isinstance(figure, Figure) for figure in compared.figures().values())
    answer = json.loads(fedprune("allocate", *TINY, "allocator=kkt", "--json").stdout)
    allocated = api.allocate(api.compose(*TINY, "allocator=kkt"))
    assert json.loads(json.dumps(allocated.answer)) == answer
    assert "<table>" in allocated._repr_html_()


def test_mistakes_are_exceptions_with_the_line_and_the_exit_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'partition\.alpha'") as wrong:
        api.compose("partition.alhpa=1")
    assert wrong.value.exit_code == 2
    with pytest.raises(CheckpointError):
        api.load(tmp_path / "nothing")
    with pytest.raises(InfeasibleError):
        api.allocate(api.compose(*TINY, "deadline.seconds=1e-6", "allocator.on_infeasible=fail"))
    for bad in ({"jobs": 0}, {"methods": ["nope"]}):
        with pytest.raises(ConfigError):
            api.compare(*TINY, **bad)  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


def test_the_api_is_imported_without_anything_heavy() -> None:
    heavy = "{'torch', 'numpy', 'hydra', 'cvxpy', 'matplotlib', 'pandas', 'omegaconf'}"
    code = f"import sys, fedprune_cli.api; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert all(hasattr(api, name) for name in api.__all__)


def test_the_notebook_runs_and_is_kept_without_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    assert "Did you mean 'partition.alpha'?" in capsys.readouterr().out
