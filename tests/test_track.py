"""Trackers hold each round once, and change nothing: laws with planted trackers, and each real one in an environment of its own."""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, composed, extra, make_setup, run_to_end

from fedprune_cli.errors import ConfigError
from fedprune_cli.round.setup import Setup
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.track import TRACKERS, Log, MLflow, TensorBoard, WandB, figures, parameters

REAL = ("tensorboard", "wandb", "mlflow")
BYTES = ("state.safetensors", "rounds.jsonl", "manifest.json", "summary.json")


def same_bytes(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in BYTES)


@dataclass(frozen=True)
class Planted:
    """Tells what it was told, on stdout, until it fails."""

    name: str
    fails: str

    @contextlib.contextmanager
    def follow(self, run_dir: Path) -> Iterator[Log]:
        def log(record: RoundRecord) -> None:
            print("round", record.round)
            if self.fails == f"round {record.round}":
                raise ValueError("no more\nroom")

        if self.fails == "start":
            raise OSError("no server")
        for record in folder.read_records(run_dir):
            log(record)
        yield log
        if self.fails == "end":
            raise RuntimeError


def tracked_by(tracking: Any) -> Setup:
    setup = make_setup()
    experiment = replace(setup.experiment, tracking=tracking)
    return replace(setup, blueprint=replace(setup.blueprint, experiment=experiment))


def planted(fails: str) -> Setup:
    return tracked_by(Planted("none", fails))


@pytest.mark.parametrize(
    ("fails", "rounds", "reason"),
    [("never", 3, ""), ("start", 0, "no server"), ("round 2", 2, "no more"), ("end", 3, "RuntimeError")],
)
def test_a_tracker_that_fails_is_one_warning_and_no_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: str, rounds: int, reason: str
) -> None:
    run_to_end(tmp_path / "plain")
    life.create(planted(fails), composed(), tmp_path / "run")
    assert len(list(life.run(planted(fails), tmp_path / "run"))) == 3
    output = capsys.readouterr()
    told = [line for line in output.err.splitlines() if not line.startswith("warning: ")]
    warnings = [line for line in output.err.splitlines() if line not in told]
    assert told == [f"round {number}" for number in range(1, rounds + 1)]
    assert [line.split("stopped: ")[1].split(";")[0] for line in warnings] == [reason] * bool(reason)
    assert output.out == ""
    assert same_bytes(tmp_path / "run", tmp_path / "plain")


def test_an_interrupted_run_tells_each_round_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    life.create(planted("never"), composed(), tmp_path / "run")
    records = life.run(planted("never"), tmp_path / "run")
    next(records)
    records.close()
    list(life.run(planted("never"), tmp_path / "run"))
    assert capsys.readouterr().err.split() == ["round", "1", "round", "1", "round", "2", "round", "3"]


def test_an_error_of_the_run_is_not_the_trackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    life.create(planted("end"), composed(), tmp_path / "run")
    records = life.run(planted("end"), tmp_path / "run")
    next(records)
    with pytest.raises(KeyError, match="the run's"):
        records.throw(KeyError("the run's"))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "tracking", [TensorBoard("tensorboard"), WandB("wandb", "p", None, "offline"), MLflow("mlflow", None)]
)
def test_a_missing_package_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: TensorBoard
) -> None:
    for name in REAL:
        (tmp_path / "path" / name).mkdir(parents=True)  # as wandb leaves one behind: a folder, not the package
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path")])
    setup = tracked_by(tracking)
    expected = rf"^tracking={tracking.name} needs its extra: pip install 'fedprune\[{tracking.name}\]'$"
    with pytest.raises(ConfigError, match=expected):
        life.create(setup, composed(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_tracker_has_its_extra() -> None:
    assert all(extra(name) for name in TRACKERS if name != "none")


@pytest.mark.slow
def test_training_imports_no_tracker_unless_asked(tmp_path: Path) -> None:
    for name in REAL:
        (tmp_path / f"{name}.py").touch()  # can be imported, so that an import would show
    code = (
        "import atexit, sys; from fedprune_cli.commands.app import main; "
        f"atexit.register(lambda: print('imported', sorted(set({REAL}) & set(sys.modules)))); main()"
    )
    command = [sys.executable, "-c", code, "train", *TINY, "rounds=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported []"


def test_a_server_that_has_some_rounds_is_sent_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B online, against a stand-in for its server: `step` is what comes next, as after a resume."""
    sent: dict[int, dict[str, float]] = {}
    exits = []

    def init(**options: Any) -> Any:
        assert (options["id"], options["mode"]) == (f"{make_setup().experiment.config_hash}-s0", "online")

        def log(values: dict[str, float], step: int, commit: bool) -> None:
            assert step not in sent
            sent[step] = values

        finish = lambda exit_code: exits.append(exit_code)  # noqa: E731
        return types.SimpleNamespace(resumed=bool(sent), step=max(sent, default=-1) + 1, log=log, finish=finish)

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="planted")
    wandb.init, wandb.Settings = init, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    overrides = ("tracking=wandb", "tracking.mode=online")
    life.create(make_setup(*overrides), composed(*overrides), tmp_path / "run")
    records = life.run(make_setup(*overrides), tmp_path / "run")
    next(records)
    next(records)
    records.close()
    del sent[2]  # lost on its way
    list(life.run(life.reopen(tmp_path / "run"), tmp_path / "run"))
    assert sent == {record.round: figures(record) for record in folder.read_records(tmp_path / "run")}
    assert exits == [1, 0]


# --- each tracker for real ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.round.setup import prepare
from fedprune_cli.runs import life
config = compose_config(sys.argv[1:])
setup = prepare(build_experiment(config))
life.create(setup, config, Path("run"))
for record in life.run(setup, Path("run")):
    if record.round == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""

# Each prints, as JSON, the run's method, seed and learning rate as text, and [key, step, value] for all that was logged.
READERS = {
    "tensorboard": """
import json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
events = EventAccumulator("run/tracking/tensorboard", size_guidance={"scalars": 0}).Reload()
start = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
of = start.session_start_info.hparams
assert events.Scalars("accuracy")[0].wall_time == events.Scalars("simulated_s")[0].wall_time < 1
rows = [[tag, e.step, e.value] for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
print(json.dumps([of["method"].string_value, f"{of['seed'].number_value:.0f}", str(of["training.lr"].number_value), rows]))
""",
    "wandb": """
import json, struct
from pathlib import Path
from wandb.proto import wandb_internal_pb2
(path,) = Path("run/tracking/wandb").glob("offline-run-*/run-*.wandb")  # a log in LevelDB's format after a header of 7 bytes
data, at, part, rows = path.read_bytes(), 7, b"", []
while at < len(data):
    left = 32768 - at % 32768
    if left < 7:
        at += left
        continue
    _, size, kind = struct.unpack_from("<IHB", data, at)
    part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
    if kind not in (1, 4):
        continue
    record, part = wandb_internal_pb2.Record.FromString(part), b""
    if record.HasField("run"):
        config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        assert path.name == f"run-{record.run.run_id}.wandb"
        (seed,) = [tag.removeprefix("seed ") for tag in record.run.tags if tag.startswith("seed ")]
        (method,) = [tag for tag in record.run.tags if not tag.startswith("seed ")]
    if record.HasField("history"):
        values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        rows += [[key, values["_step"], value] for key, value in values.items() if not key.startswith("_")]
print(json.dumps([method, seed, str(config["training"]["lr"]), rows]))
""",
    "mlflow": """
import json
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{Path('run/tracking/mlflow.db').resolve()}")
(run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
assert run.info.status == "FINISHED"
metrics = [metric for key in run.data.metrics for metric in client.get_metric_history(run.info.run_id, key)]
rows = [[metric.key, metric.step, metric.value] for metric in metrics]
print(json.dumps([run.data.tags["method"], run.data.tags["seed"], run.data.params["training.lr"], rows]))
""",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_each_tracker_holds_each_round_once(
    name: str, overlay: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its second round, resumed to its end, and resumed once more when there was nothing left to do."""
    for variable in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "true")  # no network
    python = overlay(*extra(name))

    def succeed(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run([str(python), *arguments], capture_output=True, text=True, timeout=3600)
        assert result.returncode == code, result.stderr
        assert "warning" not in result.stderr.lower()
        return result

    succeed("-c", KILLED, *TINY, "seed=1", f"tracking={name}", code=-signal.SIGKILL)
    first = succeed("-m", "fedprune_cli", "resume", "run")
    assert succeed("-m", "fedprune_cli", "resume", "run").stdout == first.stdout
    assert "mlruns" not in {path.name for path in tmp_path.iterdir()} | {path.name for path in Path("run").iterdir()}

    run_to_end(tmp_path / "plain", "seed=1")
    assert same_bytes(Path("run"), tmp_path / "plain")
    records = folder.read_records(Path("run"))
    expected = sorted((key, record.round, value) for record in records for key, value in figures(record).items())
    method, seed, lr, rows = json.loads(succeed("-c", READERS[name]).stdout)
    assert [(key, step) for key, step, _ in sorted(rows)] == [(key, step) for key, step, _ in expected]
    np.testing.assert_allclose([row[2] for row in sorted(rows)], [row[2] for row in expected], rtol=1e-6)
    manifest = json.loads((Path("run") / folder.MANIFEST).read_text())
    assert (method, seed, lr) == ("proposed", "1", str(parameters(manifest)["training.lr"]))
