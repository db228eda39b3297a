"""The documentation says what the program does: its reference is current, its commands are accepted, its links lead somewhere."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
import yaml
from conftest import composed, run_to_end
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from test_architecture import LAYERS

from fedprune_cli import CONF, errors, plugins
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.commands.app import app
from fedprune_cli.commands.new import new
from fedprune_cli.config.build import GROUPS, SECTIONS, build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn import prune
from fedprune_cli.round import memory
from fedprune_cli.round.setup import prepare
from fedprune_cli.runs import life
from fedprune_cli.serve import aggregate
from fedprune_cli.store import folder
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.state import State, untrained
from fedprune_cli.world import faults

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = [page for page in PAGES if page.parent.name == "guide"]
README_COLUMNS = 100
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- the reference --------------------------------------------------------------------------------------------------


def reference() -> ModuleType:
    """Returns the module that writes the reference."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / ".ci" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


WRITER = reference()


@pytest.mark.parametrize("name", ["commands.md", "groups.md", "keys.md"])
def test_the_reference_is_what_the_program_says(name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == WRITER.pages()[name], "run `make reference`"


def test_the_reference_has_every_command_group_and_key() -> None:
    pages = WRITER.pages()
    assert all(f"## fedprune {name}\n" in pages["commands.md"] for name in COMMANDS)
    for path in CONF.rglob("*.yaml"):
        if path.parent != CONF:
            assert f"`{path.parent.relative_to(CONF)}={path.stem}`" in pages["groups.md"]
    config = build_experiment(compose_config([])).identity
    keys = {f"{section}.{key}" for section, values in config.items() if isinstance(values, dict) for key in values}
    by_si = {WRITER.si_name(key) for key in re.findall(r"^\| `([\w.]+)`", pages["keys.md"], re.MULTILINE)}
    assert {key for key in keys if not key.startswith("numerics.") and not key.endswith(".name")} <= by_si


def test_every_key_says_what_it_means() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", WRITER.pages()["keys.md"], re.MULTILINE)
    assert [key for key, meaning in rows if not meaning.strip()] == []


def test_what_the_reference_allows_is_what_the_program_allows() -> None:
    """Some ranges by hand: in the keys' own units, by helpers, in loops, and of one choice of several."""
    said = dict(re.findall(r"^\| `([\w.]+)` \|[^|]*\|[^|]*\| ([^|]*) \|", WRITER.pages()["keys.md"], re.MULTILINE))
    assert said["seed"] == "in 0..2^63-1"
    assert said["devices.min_cpu_ghz"] == "in [1e-06, 1e+06]"
    assert said["devices.radius_km"] == "at least its minimum and at most 10000"
    assert said["faults.die"] == "in [0, 1]"
    assert said["channel.noise_dbm_per_hz"] == "any finite number"
    assert said["failsafe.aggregation"] == "one of mean, median, trimmed_mean"
    assert said["model.hidden"].startswith("a list of at most 100 widths in 1..100000 (mlp); in 1..100000 (cnn, cnn1d)")
    for bad in ("devices.min_cpu_ghz=1e-7", "devices.radius_km=10001", "faults.die=1.1", "failsafe.aggregation=mode"):
        with pytest.raises(ConfigError):
            build_experiment(compose_config([bad]))


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A command of a page: its words, the error that the page shows below it, if any, and whether it only stands in a sentence."""

    page: Path
    words: tuple[str, ...]
    error: str | None
    mentioned: bool

    def __str__(self) -> str:
        return f"{name_of(self.page)}: {shlex.join(self.words)}"


def examples(page: Path) -> Iterator[Example]:
    """Yields the fedprune commands of a page, those in fenced blocks and those in the text."""
    text = page.read_text()
    for block in re.findall(r"^```(?:bash|console)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
            if line.removeprefix("$ ").startswith("fedprune "):
                words = tuple(shlex.split(line.removeprefix("$ "), comments=True))
                yield Example(page, words[1:], following if following.startswith("error: ") else None, False)
    for inline in re.findall(r"`(fedprune [^`]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        yield Example(page, tuple(shlex.split(inline))[1:], None, True)


EXAMPLES = [example for page in PAGES if page.parent.name != "reference" for example in examples(page)]


def one_of(override: Override) -> str:
    """Returns an override with one value, the first one of a sweep's."""
    sweep = override.value()
    if override.is_choice_sweep():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    if override.is_range_sweep():
        return f"{override.get_key_element()}={sweep.start}"
    if override.is_interval_sweep():
        return f"{override.get_key_element()}={sweep.start}"
    return str(override.input_line)


@functools.cache
def accept(overrides: tuple[str, ...], given: tuple[str, ...]) -> None:
    """Raises what the command line would of overrides beside the plug-ins that are given: those of many commands are the same."""
    build_experiment(compose_config(overrides))


def check(words: tuple[str, ...]) -> None:
    """Raises what the command line would of a command that it does not accept; runs nothing."""
    name, *rest = words
    if name.startswith("--"):  # an option of fedprune itself
        assert name in ("--help", "--version", "--install-completion")
        return
    assert name in COMMANDS, f"no command {name!r}"
    if "--plugin" in rest and not Path("thrifty.py").exists():
        new("allocator", "thrifty")  # the file of the guide
    context = COMMANDS[name].make_context(name, rest)
    overrides = context.params.get("overrides") or []
    if name == "resume":
        assert all(
            override.split("=")[0].split(".")[0] in ("rounds", "deadline", "out", "KEY") for override in overrides
        )
        overrides = [override for override in overrides if not override.startswith("KEY")]
    if context.params.get("config_dir"):  # a folder that only its reader has
        return
    chosen = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = str(override.key_or_group)
        if key in ("hydra/launcher", "hydra/sweeper"):
            assert (CONF / key / f"{override.value()}.yaml").exists()
        elif not key.startswith("hydra.") and key not in ("KEY", "GROUP"):  # what stands for any
            chosen.append(one_of(override))
    accept(tuple(chosen), tuple(file.sha256 for file in plugins.given()))
    for method in (context.params.get("methods") or "").split(","):
        assert not method or method in GROUPS["method"]


SLOW_PAGES = ("results",)  # as many commands as the guides together, and seldom edited


@pytest.mark.parametrize(
    "example",
    [pytest.param(one, marks=[pytest.mark.slow] * (one.page.parent.name in SLOW_PAGES)) for one in EXAMPLES],
    ids=str,
)
def test_every_command_in_the_documentation_is_accepted(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "[]")
    if example.error is None:
        try:
            check(example.words)
        except Exception as error:  # a sentence may leave out what a command needs, and not name what it has not
            if not example.mentioned or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
                raise
            known = {option for param in COMMANDS[example.words[0]].params for option in param.opts}
            assert {word for word in example.words if word.startswith("-")} <= known
    else:
        with pytest.raises(errors.FedpruneError) as raised:
            check(example.words)
        assert f"error: {raised.value}" == example.error


def test_a_command_that_is_not_accepted_is_found() -> None:
    for bad in ("trian", "train --config", "train partition.alhpa=1", "compare --method fedavg", "train data=fmnits"):
        with pytest.raises((AssertionError, Exception)) as raised:
            check(tuple(bad.split()))
        assert type(raised.value).__name__ in ("AssertionError", "NoSuchOption", "ConfigError"), bad


def test_every_table_of_parts_is_in_the_guide_to_them() -> None:
    text = (DOCS / "guide" / "your-own-parts.md").read_text()
    code = "\n".join(path.read_text() for path in (ROOT / "fedprune_cli").rglob("*.py"))
    tables = {*re.findall(r"^([A-Z][A-Z_]*): dict\[str, (?:type|Callable)\[", code, re.MULTILINE)}
    assert len(tables) > 10
    assert [table for table in tables if f"`{table}`" not in text] == []


def example_of(heading: str, kind: str) -> str:
    """Returns the first block of a kind below a heading of the guide to one's own parts."""
    text = (DOCS / "guide" / "your-own-parts.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return str(re.findall(rf"^```{kind}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[0])


def class_of(heading: str, module: ModuleType) -> type:
    """Returns the class of an example, which sees what the module that it belongs to sees."""
    scope = {**vars(module)}
    exec(example_of(heading, "python"), scope)
    return next(value for name, value in scope.items() if name not in vars(module) and isinstance(value, type))


def test_the_example_of_a_pruner_works() -> None:
    cls = class_of("A pruner", prune)
    pruner = cls(**yaml.safe_load(example_of("A pruner", "yaml")))
    state = State(0, np.array([1, 5, 6], dtype=np.float32), untrained(np.zeros(1, dtype=np.float32), 1), {})
    assert pruner.importance(state, 0).tolist() == [3, 1, 2]
    assert pruner.slots(Sizes(1, 3)) == {}
    with pytest.raises(ConfigError):
        cls("distance", 2.0, "weight")


def test_the_examples_of_an_aggregator_a_fault_and_a_memory_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damped = class_of("An aggregator", aggregate)
    one = aggregate.Contribution(np.array([True, False]), np.array([4], np.float32), 1.0, 0.1)
    assert damped(0.25).combine(np.zeros(2, np.float32), [one])[0].tolist() == [3, 0]
    monkeypatch.setitem(aggregate.AGGREGATORS, "damped", damped)
    monkeypatch.setitem(faults.FAULTS, "settling", class_of("A fault", faults))
    turns = class_of("A memory", memory)
    monkeypatch.setitem(memory.MEMORIES, "turns", lambda experiment: turns())
    config = composed("rounds=3", "failsafe.aggregation=damped", "failsafe.trim=0.1")
    setup = prepare(build_experiment(config))
    life.create(setup, config, tmp_path / "run")
    records = list(life.run(setup, tmp_path / "run"))
    lost = [list(record.faults.lost) for record in records if record.faults is not None]
    assert lost == [list(records[0].devices.id), list(records[1].devices.id), []]
    trained = np.concatenate([record.devices.id for record in records])
    slots = folder.read_whole_state(tmp_path / "run").slots
    assert slots["turns"].tolist() == np.bincount(trained, minlength=len(slots["turns"])).tolist()
    assert verify_run(life.reopen(tmp_path / "run"), tmp_path / "run", every=0).failures == ()


def test_examples_say_fedprune() -> None:
    assert len(EXAMPLES) > 50
    for page in PAGES:
        assert not re.search(r"\.venv/bin/(?!activate)|python -m fedprune", page.read_text()), name_of(page)


def test_every_command_and_group_is_in_a_guide() -> None:
    text = "\n".join(page.read_text() for page in GUIDES)
    assert [name for name in COMMANDS if f"fedprune {name}" not in text] == []
    groups = {*GROUPS, *SECTIONS, *(path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))} - {"."}
    assert [group for group in groups if f"`{group}`" not in text and f"{group}=" not in text] == []
    experiments = [path.stem for path in (CONF / "experiment").glob("*.yaml")]
    assert [name for name in experiments if f"`{name}`" not in text] == []


# --- what the program writes and says -------------------------------------------------------------------------------


def test_the_page_of_the_run_folder_names_every_file_and_key(tmp_path: Path) -> None:
    page = (DOCS / "run-folder.md").read_text()
    named = {*re.findall(r"`([\w.-]+)`", page)}
    run_dir = tmp_path / "run"
    hard = ("participation.freeze_below=0.5", "faults=flaky", "payload.bits=[8]")
    records = run_to_end(run_dir, *hard)
    of_devices = {key for record in records for key in record["devices"]}
    of_faults = {key for record in records for key in record["faults"]}
    assert {key for record in records for key in record} | of_devices | of_faults <= named
    assert {*json.loads((run_dir / "summary.json").read_text())} <= named
    files = {re.sub(r"(personal|masks)-\d+", r"\1-N", path.name) for path in run_dir.iterdir()}
    assert files <= named


def test_the_page_of_errors_has_every_exit_code() -> None:
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", (DOCS / "errors.md").read_text(), re.MULTILINE)}
    kinds = WRITER.kinds_of_error()
    assert rows == {0, 130, 143, *(cls.exit_code for cls in kinds)}
    assert [cls for cls in kinds if cls.exit_code == errors.FedpruneError.exit_code] == []


def test_no_command_ends_with_the_exit_code_of_the_base_of_all_errors() -> None:
    """Where it is made, to speak of several runs, it is given the code of the first of them that failed."""
    for path in sorted((ROOT / "fedprune_cli").rglob("*.py")):
        lines = path.read_text().splitlines()
        for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
            if re.search(r"\bFedpruneError\(", line) and not line.startswith("class "):
                assert re.search(r"error\.exit_code = fail\w+\[0\]\.exit_code", following), f"{path}: {line}"


def test_docstrings_cite_sections_of_the_model_that_are_there() -> None:
    sections = {int(number) for number in re.findall(r"^## (\d+)\. ", (DOCS / "model.md").read_text(), re.MULTILINE)}
    cited = 0
    for path in sorted((ROOT / "fedprune_cli").rglob("*.py")):
        for numbers in re.findall(r"model\.md,? sections? (\d+(?: and \d+)?)", path.read_text()):
            assert {int(number) for number in numbers.split(" and ")} <= sections, path
            cited += 1
    assert cited > 10


def test_the_page_of_the_architecture_shows_the_layers_that_are_tested() -> None:
    rows = [" ".join(row) for row in reversed(LAYERS)]
    shown = re.findall(r"^```text\n(.*?)^```$", (DOCS / "architecture.md").read_text(), re.MULTILINE | re.DOTALL)
    assert rows in [[" ".join(line.split()) for line in block.splitlines()] for block in shown]


def test_the_page_of_the_architecture_names_modules_that_are_there() -> None:
    package = ROOT / "fedprune_cli"
    named = {*re.findall(r"\b[\w/]+\.py\b", (DOCS / "architecture.md").read_text())}
    assert len(named) > 20
    assert [name for name in named if not (package / name).exists() and not (package / "round" / name).exists()] == []
    rooms = {path.name for path in package.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert [room for room in rooms if f"  {room}/" not in (DOCS / "architecture.md").read_text()] == []


# --- links and looks ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Returns what a link may name of a page, as GitHub and the site make it of the headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target
            assert page.parent == ROOT or DOCS in (found, *found.parents), f"{target}: not on the site"


def test_the_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert max(map(len, lines)) <= README_COLUMNS
    assert len(lines) <= 125
    assert len([line for line in lines if re.fullmatch(r"\|(-+\|)+", line.replace(" ", ""))]) == 1
    assert len([line for line in lines if line.startswith("![")]) == 1


def test_every_page_is_in_the_menu() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, dict):
            entry = [*entry.values()]
        return [file for each in entry for file in files(each)] if isinstance(entry, list) else [str(entry)]

    menu = yaml.safe_load((ROOT / ".ci" / "mkdocs.yml").read_text())["nav"]
    assert sorted(files(menu)) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if page.parent != ROOT)


def test_the_site_is_built_strictly_and_asks_nothing_of_a_network(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra: pip install 'fedprune[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / ".ci" / "mkdocs.yml")]
    built = subprocess.run([*command, "-d", str(tmp_path / "site")], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for page in pages:
        fetched = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?([^\"\s>]+)", page.read_text()
        )
        assert fetched
        assert [url for url in fetched if re.match(r"(?:https?:)?//", url)] == [], page.name


# --- your data ------------------------------------------------------------------------------------------------------


def test_the_sensor_table_of_the_guide_is_trained_on_as_it_says() -> None:
    """The guide's own table, its refusal to the letter, and its run, audited."""
    text = (DOCS / "guide" / "your-data.md").read_text()
    section = text.split("\n## A sensor table, from file to a trained run\n")[1].split("\n## ")[0]
    exec(re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[0], {})
    lines = section.replace("\\\n", " ").splitlines()
    refused, trained, verified = [shlex.split(line)[1:] for line in lines if line.startswith("fedprune ")]
    said = re.findall(r"^```text\nerror: (.*?)\n```$", section, re.MULTILINE)
    with pytest.raises(errors.DataError) as raised:
        life.begin_or_reopen(compose_config(refused[1:]))
    assert [str(raised.value)] == said
    small = [word for word in trained[1:] if not word.startswith("rounds=")]
    setup = life.begin_or_reopen(compose_config([*small, "rounds=2", "model.hidden=[8]"]))
    assert len(list(life.run(setup, Path(verified[1])))) == 2
    assert setup.scenario.fleet.names == tuple(f"m{at:02}" for at in range(12))
    assert not verify_run(setup, Path(verified[1]), 1).failures


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_of_data_counts_what_is_there() -> None:
    """Every table of docs/data.md, made anew from the data."""
    spec = importlib.util.spec_from_file_location("counts", ROOT / ".ci" / "counts.py")
    assert spec
    assert spec.loader
    counts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counts)
    page = counts.PAGE.read_text()
    try:
        again = counts.written(page)
    except errors.DataError as error:
        if "cannot be had" not in str(error):
            raise
        pytest.skip(str(error))
    assert again == page
    assert counts.written(page.replace("| person 01 | 497 |", "| person 01 | 498 |")) == page


def test_the_page_of_data_names_every_dataset_and_its_licence() -> None:
    page = (DOCS / "data.md").read_text()
    first = page.index("| data | what it is | from | licence |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page[first:].split("\n\n")[0].splitlines()[2:]]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {*GROUPS["data"]} - {
        "table",
        "windows",
        "arrays",
        "folder",
        "nodes",
    }  # of one's own: docs/guide/your-data.md, and on nodes: docs/guide/pilot.md
    assert all(len(row) == 4 and row[2] and row[3] for row in rows)
