"""Parts from outside the package: chosen as built-in ones, refused in one line, known by content, and never run unasked."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import foreign_parts
import pytest
from conftest import TINY, fedprune, make_experiment

from fedprune_cli import plugins
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.commands import completion
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.foreign import offer
from fedprune_cli.contracts.parts import TABLES
from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.plugins import KINDS, Parts, PluginFile
from fedprune_cli.report.read import read_run
from fedprune_cli.round.setup import prepare
from fedprune_cli.runs import life
from fedprune_cli.store import folder

MINE = Path(foreign_parts.__file__)
CHOSEN = ("allocator=cautious", "allocator.step=0.2", "data=rings", "model=narrow")
SMALL = (*(text for text in TINY if not text.startswith("model.")), *CHOSEN)
HEAD = "from dataclasses import dataclass\nfrom typing import ClassVar\n"
ALLOCATOR = """
@dataclass(frozen=True)
class Own:
    name: str
    prunes: ClassVar[bool] = True
    def solve(self, problem, seed, number): ...
"""
Give = Callable[..., PluginFile]


@pytest.fixture
def give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Give]:
    """Gives this process a file of that text, the whole of foreign_parts.py by default, and takes it back after the test."""
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setenv(plugins.VARIABLE, "[]")

    def write(text: str | None = None, name: str = "mine.py") -> PluginFile:
        path = tmp_path / name
        path.write_text(MINE.read_text() if text is None else text)
        file = plugins.read(path)
        plugins.give([file])
        return file

    yield write
    for module in [name for name in sys.modules if name.startswith(plugins.MODULE)]:
        del sys.modules[module]


def begin(run_dir: Path, *overrides: str) -> Path:
    config = compose_config([*SMALL, *overrides])
    life.create(prepare(build_experiment(config)), config, run_dir)
    return run_dir


def exported(said: str) -> None:
    """Sets the variable, as a shell's `export` would have."""
    os.environ[plugins.VARIABLE] = said


def chosen(give: Give, text: str) -> None:
    """Does what a command does that composes."""
    give(text)
    compose_config([])
    make_experiment()


# --- chosen as what is built in ---------------------------------------------------------------------------------------


def test_parts_are_chosen_and_configured_as_built_in_ones(give: Give) -> None:
    give()
    experiment = build_experiment(compose_config(SMALL))
    assert experiment.allocator.step == 0.2  # type: ignore[attr-defined]
    assert experiment.model.width == 16  # type: ignore[attr-defined]
    assert compose_config(["data=rings"]).data == {"name": "rings", "samples": 300}
    with pytest.raises(ConfigError, match=r"unknown allocator option 'cautios'. Did you mean 'cautious'"):
        compose_config(["allocator=cautios"])
    with pytest.raises(ConfigError, match=r"Did you mean 'allocator.step'"):
        compose_config(["allocator=cautious", "allocator.stpe=1"])
    with pytest.raises(ConfigError, match=r"allocator.step=x: must be a number"):
        build_experiment(compose_config(["allocator=cautious", "allocator.step=x"]))
    assert completion.complete_override("allocator=cau") == ["allocator=cautious"]
    assert completion.complete_override("allocator.st") == ["allocator.step="]
    with pytest.raises(ConfigError, match=r"failsafe.aggregation=first: must be one of .*once_each"):
        make_experiment("failsafe.aggregation=first")
    with pytest.raises(ConfigError, match=r"faults.others=\['dust'\]: must be each once, of settling"):
        make_experiment("faults.others=[dust]")


def test_its_yaml_may_lie_beside_it(give: Give, tmp_path: Path) -> None:
    (tmp_path / "conf" / "allocator").mkdir(parents=True)
    (tmp_path / "conf" / "data").mkdir()
    (tmp_path / "conf" / "allocator" / "cautious.yaml").write_text("step: 0.3 # of the band\n")
    (tmp_path / "conf" / "data" / "rings.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: narrow\ndata:\n  name: rings\n  samples: 60\n"
    )
    give()
    config = compose_config(["allocator=cautious", "data=rings"])
    assert config.allocator == {"name": "cautious", "on_infeasible": "stretch", "step": 0.3}
    assert (config.data.samples, config.model.name) == (60, "narrow")
    (tmp_path / "conf" / "allocator" / "cautious.yaml").write_text("_target_: os.getcwd\n")
    with pytest.raises(ConfigError, match="_target_: not allowed"):
        compose_config(["allocator=cautious"])


def test_a_field_without_a_default_is_asked_for_in_the_users_units(give: Give) -> None:
    give(
        HEAD
        + ALLOCATOR.replace("name: str\n", "name: str\n    reach_m: float\n").replace("...", "...\n")
        + "ALLOCATORS = {'own': Own}"
    )
    with pytest.raises(ConfigError, match=r"allocator.reach_m: missing value, type allocator.reach_m=VALUE"):
        build_experiment(compose_config(["allocator=own"]))
    assert build_experiment(compose_config(["allocator=own", "allocator.reach_m=2"])).allocator.reach_m == 2  # type: ignore[attr-defined]


def test_nothing_from_outside_changes_what_is_built_in(give: Give) -> None:
    before = make_experiment().config_hash, make_experiment("faults=flaky", "failsafe.late=drop").config_hash
    assert "others" not in make_experiment("faults=flaky").identity["faults"]
    give()
    assert before == (make_experiment().config_hash, make_experiment("faults=flaky", "failsafe.late=drop").config_hash)
    assert all([*table.own] == [name for name in table if name in table.own] for table in TABLES.values())


# --- refused in one line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1 / 0\n", r"--plugin .*mine.py, line 1: ZeroDivisionError: division by zero"),
        ("def f(:\n", r"--plugin .*mine.py, line 1: SyntaxError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
        ("", "adds nothing: must have a table such as ALLOCATORS"),
        ("from fedprune_cli.allocate import ALLOCATORS\n", "adds nothing"),
        ("ALLOCATORS = 3\n", "ALLOCATORS must be a dictionary"),
        ("ALLOCATORS = {'a b': 3}\n", "'a b' is no name"),
        ("ALLOCATORS = {'own': 3}\n", r"ALLOCATORS\['own'\]: 3 is not a dataclass"),
        (HEAD + ALLOCATOR + "ALLOCATORS = {'kkt': Own}\n", "'kkt' is built in: choose another name"),
        (HEAD + ALLOCATOR.replace("frozen=True", "") + "ALLOCATORS = {'own': Own}\n", "Own is not frozen"),
        (HEAD + ALLOCATOR.replace("solve", "sovle") + "ALLOCATORS = {'own': Own}\n", "Own lacks 'solve', which every Allocator has"),
        (HEAD + ALLOCATOR.replace("prunes", "prune") + "ALLOCATORS = {'own': Own}\n", "Own lacks 'prunes'"),
        (HEAD + ALLOCATOR.replace("name", "title") + "ALLOCATORS = {'own': Own}\n", "lacks the field `name: str`"),
        (HEAD + ALLOCATOR.replace(", number", "") + "ALLOCATORS = {'own': Own}\n",
         r"Own.solve must be a method that takes \(self, problem, seed, number\)"),
        (HEAD + ALLOCATOR + "AGGREGATORS = {'own': Own}\n", "Own lacks 'needs', which every Aggregator has"),
        (HEAD + ALLOCATOR.replace("name: str", "name: str\n    odd: object = range(3)") + "ALLOCATORS = {'own': Own}\n",
         "the default of odd"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(text: str, message: str, give: Give) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        chosen(give, text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_changes_the_packages_own_table_is_refused(give: Give) -> None:
    from fedprune_cli.allocate import ALLOCATORS

    try:
        give(
            HEAD
            + ALLOCATOR
            + "from fedprune_cli import allocate\nallocate.ALLOCATORS['sly'] = Own\nPRUNERS = {}\nMODELS = {'x': Own}"
        )
        with pytest.raises(ConfigError, match=r"ALLOCATORS\['sly'\]: a file has a table of its own"):
            Parts("allocators", ALLOCATORS, TABLES["allocators"].protocol)["sly"]
    finally:
        ALLOCATORS.pop("sly", None)


def test_two_files_with_the_same_name_are_refused_and_the_same_file_twice_is_one(give: Give, tmp_path: Path) -> None:
    first = give()
    (tmp_path / "other.py").write_text(MINE.read_text() + "# edited\n")
    plugins.give([first, first])
    assert plugins.given() == (first,)
    plugins.give([first, plugins.read(tmp_path / "other.py")])
    with pytest.raises(ConfigError, match=r"other.py: .*/mine.py: .* has this name already"):
        compose_config([])


def test_the_command_line_alone_says_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a variable of the environment nor a folder of configuration files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nALLOCATORS = {{}}\n")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "own.yaml").write_text("seed: 3\n")
    said = json.dumps([[plugins.read(tmp_path / "mine.py").sha256, str(tmp_path / "mine.py")]])
    result = fedprune(
        "train",
        "--cfg",
        "job",
        "-p",
        "seed",
        "--config-dir",
        "conf",
        cwd=str(tmp_path),
        before=functools.partial(exported, said),
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "ran").exists()
    result = fedprune("train", "--plugin", "gone.py", cwd=str(tmp_path))
    assert (result.returncode, result.stderr) == (2, "error: gone.py: No such file or directory\n")


# --- known by content -------------------------------------------------------------------------------------------------


def test_a_run_keeps_a_copy_and_needs_the_file_again(
    give: Give, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = give()
    run_dir = begin(tmp_path / "run")
    setup = life.reopen(run_dir)
    list(life.run(setup, run_dir))
    assert setup.experiment.identity["plugins"] == {
        f"{key}": f"sha256:{file.sha256}" for key in ("allocator=cautious", "model=narrow", "data=rings")
    }
    copy = run_dir / folder.INPUTS / file.kept_as
    assert copy.read_bytes() == file.content
    assert verify_run(setup, run_dir, every=0).failures == ()
    monkeypatch.setenv(plugins.VARIABLE, "[]")
    for look in (life.reopen, read_run, lambda path: life.branch(path, ["rounds=5"])):
        with pytest.raises(
            CheckpointError, match=rf"is of the plug-in mine.py, .* add --plugin mine.py \(SHA-256 {file.sha256}"
        ) as caught:
            look(run_dir)
        assert "\n" not in str(caught.value)
        assert str(copy) in str(caught.value)
    edited = give(MINE.read_text() + "# edited\n")
    for look in (life.reopen, read_run):
        with pytest.raises(
            CheckpointError, match=rf"mine.py: edited since .* SHA-256 {edited.sha256} now, {file.sha256} then"
        ):
            look(run_dir)
    assert build_experiment(compose_config(SMALL)).config_hash != setup.experiment.config_hash
    shutil.copy(copy, tmp_path / "elsewhere.py")  # what it is called, and where it lies, does not matter
    plugins.give([plugins.read(tmp_path / "elsewhere.py")])
    assert life.reopen(run_dir).experiment.config_hash == setup.experiment.config_hash
    assert read_run(run_dir).summary is not None


def test_parts_of_sections_work_in_runs(give: Give, tmp_path: Path) -> None:
    give()
    run_dir = begin(tmp_path / "run", "failsafe.aggregation=once_each", "faults.others=[settling]")
    records = list(life.run(life.reopen(run_dir), run_dir))
    lost = [len(record.faults.lost) for record in records if record.faults is not None]
    assert lost == [4, 0, 0]
    experiment = life.reopen(run_dir).experiment
    assert {"failsafe.aggregation=once_each", "faults.others=settling"} <= {*experiment.identity["plugins"]}
    assert verify_run(life.reopen(run_dir), run_dir, every=0).failures == ()


# --- entry points -----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a distribution `factory`, of a version, with the parts of foreign_parts.py and entry points of that text."""

    def install(
        version: str = "1.2", points: str = "[fedprune.allocators]\ncautious = factory_parts:Cautious\n"
    ) -> None:
        site = tmp_path / f"dist-{version}"
        info = site / f"factory-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: factory\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(points)
        (site / "factory_parts.py").write_text(MINE.read_text())
        monkeypatch.setattr(
            sys,
            "path",
            [str(site), *(path for path in sys.path if "dist-" not in Path(path).name or path == str(site))],
        )
        plugins._entry_points.cache_clear()
        sys.modules.pop("factory_parts", None)

    monkeypatch.setenv(plugins.VARIABLE, "[]")
    yield install
    plugins._entry_points.cache_clear()


def test_an_installed_part_is_imported_when_it_is_chosen_and_known_by_its_version(
    installed: Callable[..., None], tmp_path: Path
) -> None:
    installed()
    assert "cautious" in [*TABLES["allocators"]]
    make_experiment()
    assert "factory_parts" not in sys.modules
    run_dir = tmp_path / "run"
    config = compose_config([*TINY, "allocator=cautious"])
    life.create(prepare(build_experiment(config)), config, run_dir)
    assert "factory_parts" in sys.modules
    assert life.reopen(run_dir).experiment.identity["plugins"] == {"allocator=cautious": "factory 1.2"}
    installed("1.3")
    with pytest.raises(
        CheckpointError, match=r"allocator=cautious is of the plug-in factory 1.2 and not of factory 1.3"
    ):
        life.reopen(run_dir)
    installed("1.4", points="")
    with pytest.raises(CheckpointError, match=r"is of the plug-in factory 1.2, which is not installed"):
        life.reopen(run_dir)


@pytest.mark.parametrize(
    ("points", "chosen", "message"),
    [
        ("cautious = factory_parts:Missing", "cautious",
         r"factory 1.2: entry point fedprune.allocators cautious = .*: cannot be loaded: AttributeError"),
        ("cautious = no_such:Cautious", "cautious", "cannot be loaded: ModuleNotFoundError"),
        ("cautious = factory_parts:Rings", "cautious", "Rings lacks 'prunes', which every Allocator has"),
        ("kkt = factory_parts:Cautious", "kkt", "factory 1.2: entry point .*'kkt' is built in: choose another name"),
        ("cautious = factory_parts:Cautious", "cautios", "Did you mean 'cautious'"),
    ],
)  # fmt: skip
def test_an_installed_part_that_cannot_be_had_is_one_line(
    installed: Callable[..., None], points: str, chosen: str, message: str
) -> None:
    installed(points=f"[fedprune.allocators]\n{points}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        make_experiment(f"allocator={chosen}")
    assert "\n" not in str(caught.value)


# --- beginning one ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_new_writes_parts_that_work_and_overwrites_nothing(tmp_path: Path, give: Give) -> None:
    kinds = {
        "allocator": "allocator",
        "model": "model",
        "dataset": "data",
        "pruner": "pruner",
        "partition": "partition",
        "aggregator": "failsafe.aggregation",
    }
    from fedprune_cli.commands.new import TEMPLATES, new

    assert {path.stem for path in TEMPLATES.glob("*.py")} == {*kinds, "__init__"}
    for kind in kinds:
        new(kind, f"my_{kind}", tmp_path)
    plugins.give([plugins.read(tmp_path / f"my_{kind}.py") for kind in kinds])
    offer([])
    experiment = build_experiment(compose_config([f"{key}=my_{kind}" for kind, key in kinds.items()]))
    assert type(experiment.allocator).__name__ == "MyAllocator"
    assert [*experiment.identity["plugins"]] == [
        f"{kind.key}=my_{kind.entry[:-1]}" for kind in KINDS if kind.entry[:-1] in kinds
    ]
    written = (tmp_path / "my_model.py").read_text()
    with pytest.raises(Exception, match=r"my_model.py exists, and is not overwritten"):
        new("model", "my_model", tmp_path)
    assert (tmp_path / "my_model.py").read_text() == written
    for kind, name, message in (
        ("modle", "x", "Did you mean 'model'"),
        ("model", "mlp", "is a built-in model"),
        ("model", "A b", "small letters"),
    ):
        with pytest.raises(ConfigError, match=message):
            new(kind, name, tmp_path)
