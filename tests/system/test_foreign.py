"""Parts of one's own file at large: the same bytes in every process and after a kill, held to the laws, and from a wheel."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import foreign_parts
import numpy as np
import pytest
from conftest import TINY, extra, results
from nodes.fleet import free_port
from test_surface import JSON_OF, write_samples

from fedprune_cli import plugins
from fedprune_cli.commands.app import app

ROOT = Path(__file__).parent.parent.parent
CHOSEN = ("allocator=cautious", "data=rings", "model=narrow")
SMALL = (*(text for text in TINY if not text.startswith(("model.", "execution."))), *CHOSEN, "rounds=6")
LAWS = (
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "fedprune_cli.contracts.options",
    "--pyargs",
    "fedprune_cli.contracts",
)
pytestmark = pytest.mark.slow


def run(command: Sequence[str], code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    """Returns what a command gives; it must end with the exit code."""
    result = subprocess.run([*command], capture_output=True, text=True, timeout=3600, **options)  # type: ignore[call-overload]
    assert result.returncode == code, f"{shlex.join(command)}: {result.stdout}{result.stderr}"
    return result


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return Path(shutil.copy(foreign_parts.__file__, tmp_path / "mine.py"))


def train(python: str, mine: Path, *words: str) -> list[str]:
    return [python, "-m", "fedprune_cli", *words, "--plugin", str(mine), *SMALL]


def test_the_bytes_are_the_same_wherever_it_runs(mine: Path, tmp_path: Path, overlay: Callable[..., Path]) -> None:
    """In this process, in workers, side by side in a comparison, and in a sweep that joblib launches."""
    python = sys.executable
    run(train(python, mine, "train", "execution.kind=serial", "out=serial"))
    run(train(python, mine, "train", "execution.kind=processes", "execution.workers=2", "out=processes"))
    whole = results(tmp_path / "serial")
    assert results(tmp_path / "processes") == whole
    run(train(python, mine, "compare", "--jobs", "2"))
    members = [results(path.parent) for path in (tmp_path / "outputs" / "main").glob("*/summary.json")]
    assert len(members) == 2
    assert whole in members
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    launched = ["-m", "hydra/launcher=cores", "hydra.launcher.n_jobs=2", "allocator.step=0.1,0.2", "--json"]
    answer = json.loads(run(train(str(overlay(*extra("joblib"))), mine, "train", *launched), cwd=sweep).stdout)
    assert answer["failed"] == []
    swept = [results(sweep / path) for group in answer["groups"] for path in group["runs"]]
    assert len(swept) == 2
    assert whole in swept
    assert all(f"--plugin {mine}" in group["command"] for group in answer["groups"])


def test_a_killed_run_is_resumed_to_the_same_bytes_with_its_file_only(mine: Path, tmp_path: Path) -> None:
    for kind in ("serial", "processes"):
        where = (f"execution.kind={kind}", "execution.workers=2", "rounds=40")
        run(train(sys.executable, mine, "train", *where, f"out={kind}"))
        killed = tmp_path / f"killed-{kind}"
        process = subprocess.Popen(
            train(sys.executable, mine, "train", *where, f"out={killed}"), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while not (killed / "rounds.jsonl").exists() or (killed / "rounds.jsonl").read_bytes().count(b"\n") < 3:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "summary.json").exists()
        resume = [sys.executable, "-m", "fedprune_cli", "resume", str(killed)]
        refused = run(resume, code=5).stderr
        assert refused.count("\n") == 1
        assert "add --plugin mine.py (SHA-256 " in refused
        (tmp_path / "edited.py").write_text(mine.read_text() + "# edited\n")
        refused = run([*resume, "--plugin", str(tmp_path / "edited.py")], code=5).stderr
        assert refused.count("\n") == 1
        assert "edited since the run was made: SHA-256 " in refused
        run([*resume, "--plugin", str(mine)])
        assert results(killed) == results(tmp_path / kind)
        verified = run([sys.executable, "-m", "fedprune_cli", "verify", str(killed), "--plugin", str(mine)])
        assert "sound" in verified.stdout
    own, took = ("--plugin", str(mine)), [sys.executable, "-m", "fedprune_cli"]
    run([*took, "export", "serial", "--device", "1", "--out", "own.safetensors", *own])
    np.savez("points.npz", inputs=np.zeros((3, 2, 1, 1), np.float32))
    assert "no labels: there is no accuracy" in run([*took, "predict", "own.safetensors", "points.npz", *own]).stdout
    for command in (["export", "serial", "--device", "1"], ["predict", "own.safetensors", "points.npz"]):
        refused = run([*took, *command], code=5 if command[0] == "export" else 6).stderr
        assert refused.count("\n") == 1, refused


def test_its_parts_are_held_to_every_law_and_a_broken_one_is_named(mine: Path, tmp_path: Path) -> None:
    summary = run([sys.executable, *LAWS, "--plugin", str(mine)]).stdout
    assert "law broken" not in summary
    assert " passed" in summary
    text = mine.read_text()
    breaks = {
        "cautious: every allocation is feasible": ("(1 - self.step)", "(1 + self.step)"),
        "rings: it is the same each time and its hash says so": ("np.random.PCG64(7)", "np.random.PCG64()"),
        "model=narrow: the parts are a disjoint cover and views of the model": (
            "body=body,",
            "body=body, again=body[1],",
        ),
        "once_each: everybody agreeing is the result and nobody is what was": (
            "np.where(count > 0, total",
            "np.where(count > 0, 1 + total",
        ),
        "settling: who else takes part changes no fate": ("moment.number <", "len(moment.ids) > 9 +"),
    }
    for law, (sound, broken) in breaks.items():
        assert sound in text
        (tmp_path / "broken.py").write_text(text.replace(sound, broken))
        asked = ["--plugin", str(tmp_path / "broken.py"), "-k", law.partition(": ")[2].replace(" ", "_")]
        assert f"law broken by {law}" in run([sys.executable, *LAWS, *asked], code=1).stdout


def test_what_new_writes_keeps_every_law(tmp_path: Path) -> None:
    for kind in ("allocator", "model", "dataset", "pruner", "aggregator", "partition"):
        run([sys.executable, "-m", "fedprune_cli", "new", kind, f"my_{kind}"])
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_my_pruner.py")])
    every = [word for path in sorted(tmp_path.glob("my_*.py")) for word in ("--plugin", str(path))]
    run([sys.executable, *LAWS, *every])


# --- from a wheel, outside the checkout -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, overlay: Callable[..., Path]) -> Path:
    """Returns the folder of programs of an environment that has fedprune from its wheel, and the heavy packages of this one."""
    place = tmp_path_factory.mktemp("bare")
    wheel = ["-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet", "-w", str(place)]
    run([str(overlay("hatchling")), *wheel])
    (built,) = place.glob("fedprune-*.whl")
    home = place / "env"
    run([sys.executable, "-m", "venv", "--without-pip", str(home)])
    own = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (own / "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(built)]
    run([str(home / "bin" / "python"), *install], env=outside())
    return home / "bin"


@functools.cache
def outside() -> dict[str, str]:
    """Returns this environment without what leads to the checkout."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", plugins.VARIABLE)}


def a_pilot(program: str) -> dict[str, tuple[str, ...]]:
    """Makes a run of two nodes, and revokes one of them; returns the commands that it took."""
    at = f"127.0.0.1:{free_port()}"
    data = ("data=digits", "devices.count=2", "devices.fresh=0")
    first = ("pilot", "init", "site", "0", "1", "--host", "127.0.0.1")
    enroll = ("enroll", "site", "1", "--revoke")
    join = ("join", "site/device-0", at, "--part", "0", *data)
    serve = ("serve", "site", "--listen", at, "rounds=1", "out=piloted")
    run([program, *first], env=outside())
    nodes = [
        subprocess.Popen(
            [program, "join", f"site/device-{part}", at, "--part", f"{part}", *data],
            env=outside(),
            stderr=subprocess.PIPE,
        )
        for part in (0, 1)
    ]
    try:
        run([program, *serve], env=outside())
        assert [node.wait(60) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    run([program, *enroll], env=outside())
    return {"pilot": first, "enroll": enroll, "join": join, "serve": serve}


def test_every_command_works_from_a_wheel(bare: Path, tmp_path: Path) -> None:
    where = "import fedprune_cli; print(fedprune_cli.__file__)"
    assert str(bare.parent) in run([str(bare / "python"), "-c", where], env=outside(), cwd=tmp_path).stdout
    done = {"completion": ("completion",), "new": ("new", "allocator", "mine"), "rounds": ("rounds", "run")}
    write_samples()
    for name, arguments in {**JSON_OF, **done}.items():
        spread = [str(path) for text in arguments for path in (sorted(Path().glob(text)) if "*" in text else [text])]
        run([str(bare / "fedprune"), *spread], env=outside())
        done[name.split()[0]] = arguments
    done |= a_pilot(str(bare / "fedprune"))
    assert {*done} >= {command.callback.__name__ for command in app.registered_commands if command.callback}


def test_a_file_of_ones_own_works_with_a_wheel(bare: Path, mine: Path, tmp_path: Path) -> None:
    fedprune = str(bare / "fedprune")
    given = ["--plugin", str(mine)]
    run([fedprune, "train", *given, *SMALL, "out=run"], env=outside())
    for words in (("verify", "run"), ("report", "run"), ("resume", "run"), ("compare", "--jobs", "2", *SMALL)):
        run([fedprune, *words, *given], env=outside())
    laws = ["-m", "pytest", "-q", "--pyargs", "fedprune_cli.contracts", *given]
    assert "law broken" not in run([str(bare / "python"), *laws], env=outside()).stdout
    mine.write_text(mine.read_text().replace("(1 - self.step)", "(1 + self.step)"))
    assert "edited since" in run([fedprune, "verify", "run", *given], code=5, env=outside()).stderr
    broken = run([str(bare / "python"), *laws, "-k", "feasible"], code=1, env=outside()).stdout
    assert "law broken by cautious: every allocation is feasible: " in broken
