"""Hostile environments: whatever the system refuses is one line on stderr and a documented exit code, and no traceback anywhere."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import TINY, fedprune

from fedprune_cli.errors import CheckpointError, DeviceError, OutputError, UnforeseenError, explained

DOCUMENTED = {0, *range(2, 11)}
WORKERS = ("execution.kind=processes", "execution.workers=2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "runs": ("runs", "."),
    "completion": ("completion",),
    "allocate": ("allocate", "devices.count=3", "--out", "plan"),
    "train": ("train", *TINY, "out=run"),
    "workers": ("train", *TINY, *WORKERS, "out=run"),
    "compare": ("compare", *TINY, "--jobs", "2"),
    "sweep": ("train", "-m", *TINY, "seed=0,1"),
    "report": ("report", "finished"),
    "verify": ("verify", "finished"),
    "watch": ("watch", "finished", "--once"),
    "resume": ("resume", "finished"),
}


@dataclass(frozen=True)
class Hostile:
    """One thing wrong with an environment: how a shell makes it so around the command `"$@"`, with which variables.

    without: a library that cannot be loaded, and what its first line does.
    """

    shell: str = '"$@"'
    variables: Mapping[str, str] = field(default_factory=dict)
    root: bool = False
    without: tuple[str, str] | None = None


def mounted(options: str, place: str, then: str = "") -> Hostile:
    """Returns a file system of its own at a place, which only this command sees."""
    return Hostile(
        f"""unshare -m bash -c 'mkdir -p {place}; mount -t tmpfs -o {options} none {place}; {then} exec "$@"' - "$@\"""",
        root=True,
    )


BROKEN = {
    "missing": "raise ModuleNotFoundError('No module named {0}', name='{0}')",
    "unloadable": "raise OSError('lib{0}.so.1: cannot open shared object file: No such file or directory')",
    "torn": "import (",
    "old": "raise AttributeError('no attribute of this name')",
}
HOSTILE: dict[str, Hostile] = {
    "TMPDIR too long": Hostile(variables={"TMPDIR": "$PWD/" + 90 * "a"}),
    "TMPDIR missing": Hostile(variables={"TMPDIR": "/nowhere/at/all"}),
    "TMPDIR full": Hostile(mounted("size=64k", "t").shell, {"TMPDIR": "$PWD/t"}, root=True),
    "TMPDIR read-only": Hostile(mounted("ro", "t").shell, {"TMPDIR": "$PWD/t"}, root=True),
    "/dev/shm read-only": mounted("ro", "/dev/shm"),
    "/dev/shm full": mounted("size=4k", "/dev/shm", "head -c 4096 /dev/zero >/dev/shm/x;"),
    "/dev/shm without inodes": mounted("nr_inodes=1", "/dev/shm"),
    "no HOME": Hostile('env -u HOME "$@"'),
    "HOME nowhere": Hostile(variables={"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "XDG_CONFIG_HOME": "/proc/nowhere"}),
    **{f"ulimit -v {kilobytes}": Hostile(f'ulimit -v {kilobytes}; exec "$@"') for kilobytes in (200_000, 900_000, 3_000_000)},
    **{f"ulimit -n {files}": Hostile(f'ulimit -n {files}; exec "$@"') for files in (8, 11, 14, 20)},
    "ulimit -f 1": Hostile('ulimit -f 1; trap "" XFSZ; exec "$@"'),
    "stdout full": Hostile('exec "$@" >/dev/full'),
    "stdout closed": Hostile('exec "$@" >&-'),
    "stdout broken": Hostile('{ sleep 0.2; "$@" 3>&-; echo $? >&3; } 3>code | true; exit $(cat code)'),
    "stderr closed": Hostile('exec "$@" 2>&-'),
    "stderr full": Hostile('exec "$@" 2>/dev/full'),
    "all closed": Hostile('exec "$@" <&- >&- 2>&-'),
    "ASCII": Hostile(variables={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
    "folder gone": Hostile('mkdir gone; cd gone; rmdir ../gone; exec "$@"'),
    **{
        f"{library} {how}": Hostile(without=(library, line.format(library)))
        for library, (how, line) in itertools.product(("torch", "cvxpy", "matplotlib", "hydra", "scipy", "safetensors"), BROKEN.items())
    },
}  # fmt: skip


@functools.cache
def can_mount() -> bool:
    """Whether this process may give a command file systems of its own."""
    command = ["unshare", "-m", "bash", "-c", "mount -t tmpfs none /dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def possible(names: Sequence[str]) -> bool:
    return can_mount() or not any(HOSTILE[name].root for name in names)


def run(command: str, names: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, with everything wrong that is named: shells around it from the first to the last."""
    hostile = [HOSTILE[name] for name in names]
    variables = {key: value.replace("$PWD", str(folder)) for of in hostile for key, value in of.variables.items()}
    for value in variables.values():
        if value.startswith(str(folder)):
            Path(value).mkdir(exist_ok=True)
    libraries = folder / "libraries"
    for library, line in (of.without for of in hostile if of.without):
        (libraries / library).mkdir(parents=True, exist_ok=True)
        (libraries / library / "__init__.py").write_text(line + "\n")
    inner = [sys.executable, "-m", "fedprune_cli", *COMMANDS[command]]
    for shell in reversed([of.shell for of in hostile]):
        inner = ["bash", "-c", shell, "-", *inner]
    path = os.pathsep.join([str(libraries), *filter(None, sys.path)])
    environment = (
        {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"} | variables | {"PYTHONPATH": path}
    )
    return subprocess.run(
        inner, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=200, check=False
    )


@dataclass(frozen=True)
class Answer:
    """How a command answered: its exit code, whether its run folder is there, and what is wrong with that: nothing, it is hoped."""

    code: int
    begun: bool
    wrong: str


def answer(command: str, names: Sequence[str], finished: Path) -> Answer:
    """Runs a command in a folder of its own that holds a finished run; returns how it answered."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        subprocess.run(["cp", "-r", finished, folder / "finished"], check=True)
        result = run(command, names, folder)
        begun = (folder / "run").exists()
    notes = r"(shell-init: |.*: line \d+: ulimit: |.*: round \d|round \d|\d+/\d+  |\d+ of \d+ runs|\d+ runs ended)"
    said = [
        line for line in result.stderr.splitlines() if not re.match(notes, line)
    ]  # the shells around it have words of their own
    errors = [line for line in said if line.startswith("error: ")]
    deaf = any("stderr" in name or "all closed" in name for name in names)
    each = command in ("compare", "sweep")  # each run's line, and the sum of them
    enough = result.returncode == 0 or deaf or len(errors) == 1 or (each and errors)
    fine = enough and len(said) == len(errors) and "Traceback" not in result.stdout + result.stderr
    foreseen = result.returncode in DOCUMENTED and result.returncode != UnforeseenError.exit_code
    wrong = "" if fine and foreseen else f"{command} {names}: exit {result.returncode}: {result.stderr[-1500:]}"
    return Answer(result.returncode, begun, wrong)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    place = tmp_path_factory.mktemp("finished")
    result = fedprune("train", *TINY, "out=finished", cwd=str(place))
    assert result.returncode == 0, result.stderr
    return place / "finished"


@pytest.mark.parametrize(
    ("command", "names", "code"),
    [
        pytest.param(*("compare", ["TMPDIR too long"], 7), marks=pytest.mark.slow),
        pytest.param(*("workers", ["TMPDIR full"], 8), marks=pytest.mark.slow),
        pytest.param(*("workers", ["/dev/shm read-only"], 7), marks=pytest.mark.slow),
        ("allocate", ["ulimit -v 900000"], 7),
        pytest.param(*("compare", ["ulimit -n 11"], 7), marks=pytest.mark.slow),
        ("runs", ["stdout full", "no HOME"], 8),
        ("train", ["stdout closed"], 8),
        ("watch", ["stdout broken"], 8),
        pytest.param(*("report", ["stderr closed", "HOME nowhere"], 0), marks=pytest.mark.slow),
        pytest.param(*("report", ["ASCII"], 0), marks=pytest.mark.slow),
        ("train", ["torch unloadable"], 7),
        pytest.param(*("train", ["matplotlib torn"], 7), marks=pytest.mark.slow),
        ("completion", ["all closed"], 8),
    ],
)
def test_what_the_system_refuses_is_one_line(command: str, names: list[str], code: int, finished: Path) -> None:
    if not possible(names):
        pytest.skip(f"{', '.join(names)}: needs the right to mount a file system")
    answered = answer(command, names, finished)
    assert answered.wrong == ""
    assert answered.code == code
    assert not answered.begun, "written before what is needed was had"


def hostile_environments(count: int, seed: int) -> list[tuple[str, tuple[str, ...]]]:
    """Returns commands with one or two things wrong for each, drawn from all there are."""
    draw, commands, names = random.Random(seed), list(COMMANDS), list(HOSTILE)
    drawn = [(draw.choice(commands), tuple(draw.sample(names, draw.choice((1, 1, 2))))) for _ in range(count)]
    return [(command, of) for command, of in drawn if possible(of)]


@pytest.mark.slow
def test_300_hostile_environments_are_one_line_each(finished: Path) -> None:
    assert [text for of in hostile_environments(300, seed=0) if (text := answer(*of, finished).wrong)] == []


# --- another process writes or deletes in between -------------------------------------------------------------------------


def remove(run_dir: Path) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)


def become_a_file(run_dir: Path) -> None:
    remove(run_dir)
    run_dir.write_text("no folder")


def become_another(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("away"))
    run_dir.mkdir()


def lose(name: str, run_dir: Path) -> None:
    (run_dir / name).unlink(missing_ok=True)


RACES: dict[str, Callable[[Path], None]] = {
    "removed": remove,
    "become a file": become_a_file,
    "become another": become_another,
    **{
        f"without {name}": functools.partial(lose, name)
        for name in ("rounds.jsonl", "state.safetensors", "manifest.json")
    },
}


def change_later(race: str, after_s: float) -> None:
    """Changes the run folder `run`, as another process would, some time from now."""
    folder = os.getcwd()

    def change() -> None:
        time.sleep(after_s)
        with contextlib.suppress(OSError):
            RACES[race](Path(folder, "run"))

    threading.Thread(target=change, daemon=True).start()


def check_race(arguments: Sequence[str], race: str, after_s: float, finished: Path) -> None:
    """Checks that whatever a race leads to is a whole answer, or one line that names the folder."""
    for place in ("run", "away"):
        with contextlib.suppress(OSError):
            Path(place).unlink()
        shutil.rmtree(place, ignore_errors=True)
    if arguments[0] != "train":
        shutil.copytree(finished, "run")
    result = fedprune(*arguments, before=functools.partial(change_later, race, after_s))
    said = [line for line in result.stderr.splitlines() if ": round " not in line]
    what = f"{arguments[0]}, {race} after {after_s:.2f} s: exit {result.returncode}: {result.stderr}"
    assert result.returncode in (0, 4, 5, 6, 8), what
    assert said == [] if result.returncode == 0 else len(said) == 1, what


COMMON = ("removed",)  # the others take as long, and are slow tests


@pytest.mark.parametrize(
    "race", [race if race in COMMON else pytest.param(race, marks=pytest.mark.slow) for race in RACES]
)
def test_a_run_whose_folder_is_changed_by_another_ends_in_one_line(
    race: Callable[[Path], None], finished: Path
) -> None:
    check_race(("train", *TINY, "rounds=80", "out=run"), race, 0.7, finished)


@pytest.mark.slow
def test_whoever_looks_at_a_folder_that_another_changes_says_one_line(finished: Path) -> None:
    draw = random.Random(0)
    commands = (
        ("report", "run"),
        ("verify", "run"),
        ("resume", "run"),
        ("runs", "."),
        ("watch", "run", "--once"),
        ("train", *TINY, "out=run"),
    )
    for _ in range(120):
        check_race(draw.choice(commands), draw.choice(list(RACES)), draw.uniform(0, 1), finished)


# --- the words, without a process ------------------------------------------------------------------------------------------


def raised(f: Callable[[], object]) -> Exception:
    try:
        f()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), OutputError, "cannot write: No space left on device"),
        (OSError(30, "Read-only file system", "a/b"), OutputError, "cannot use a/b: Read-only file system"),
        (
            FileNotFoundError(2, "No such file or directory", "run/x"),
            CheckpointError,
            "run/x: No such file or directory; another process",
        ),
        (BlockingIOError(11, "Resource temporarily unavailable"), DeviceError, "the system refuses what is needed"),
        (MemoryError(), DeviceError, "out of memory (refused by the system)"),
        (RuntimeError("can't start new thread"), DeviceError, "the system refuses a thread"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            DeviceError,
            "cannot load torch (No module named 'torch')",
        ),
    ],
)
def test_each_refusal_has_its_words(error: Exception, kind: type[Exception], words: str) -> None:
    known = explained(error)
    assert type(known) is kind
    assert str(known).startswith(words)
    assert explained(known) is known


def test_what_nobody_foresaw_is_named_and_its_details_are_in_a_file() -> None:
    known = explained(raised(lambda: {}["a\nb"]))  # type: ignore[misc]
    assert isinstance(known, UnforeseenError)
    assert known.exit_code == 10
    path = Path(str(known).rpartition(" ")[2])
    assert str(known) == f"unforeseen KeyError: 'a\\nb'; a defect of fedprune; details are in {path}"
    assert "Traceback" in path.read_text()
    path.unlink()


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, resource.RLIM_INFINITY))


def test_memory_that_runs_out_later_is_one_line_too() -> None:
    result = fedprune("train", *TINY, "devices.count=400", "model.hidden=[4096]", "out=run", before=limit_memory)
    assert (result.returncode, result.stderr.count("\n")) == (7, 1), result.stderr
    assert shlex.split(result.stderr)[0] == "error:"
