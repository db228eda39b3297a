#!/usr/bin/env python
"""Shows that two commits give the same bytes: runs tiny configurations with the code of BASE and of the working tree, and compares.

usage: same.py BASE [--allow NAME[,NAME]] [--only NAME[,NAME]]

Prints one line a configuration: `equal`, or which file differs and where first. --allow names the configurations that a commit is meant
to change: these are printed as such and do not fail. Exit code 0 when all the others are equal, 1 when one is not, did not run, or does not
reach what it is there for.

Both codes are used through the command line alone. What takes long is importing torch and its like; so this process imports these, never
fedprune itself, and forks one process for each command, which finds the code of its own tree first. What BASE gave is kept under
outputs/.same, named by commit, this script and the versions of what decides the bytes.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "outputs" / ".same"
COMPARED = (
    "rounds.jsonl", "state.safetensors", "masks-*.safetensors", "personal-*.f32", "summary.json", "manifest.json", "config.yaml",
    "allocation.json", "allocation.csv", "frontier.csv",
)  # fmt: skip
SAME_TIME = 2  # configurations
LONGEST_S = 300  # a command, before it is ended
SHOWN = 6  # differing files of a configuration
FAILED = "failed"
DECIDE = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "scikit-learn",
    "fedprune",
)
HEAVY = (
    "hydra._internal.hydra", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf",
    "matplotlib.backends.backend_svg", "matplotlib.figure", "rich.progress", "rich.table", "safetensors.numpy", "scipy.optimize",
    "scipy.stats", "sklearn.datasets", "torch", "torch._dynamo", "torch.fx", "torch.onnx", "torch.utils.flop_counter",
    "torchvision.models.resnet", "typer",
)  # fmt: skip

WORLD = (
    "devices=sampled", "data=digits", "data.limit=600", "devices.count=6", "devices.fresh=1", "rounds=5", "model.hidden=[16]",
    "training.batch_size=8", "training.shared_steps=3", "training.personal_steps=2", "evaluation.fresh_steps=2",
)  # fmt: skip
ALONE = (*WORLD, "out=run")
PHYSICAL = """\
cpu_ghz,cycles_per_flop,tx_power_dbm,samples,{},max_bandwidth_mhz
1.5,0.6,23,120,{},20
0.6,1.9,20,40,{},4
0.9,1.0,23,75,{},20
2.0,0.5,23,200,{},9
"""
OWN = """\
shared_compute_s,payload_bits,fixed_s,snr_hz,weight,max_ratio,energy_budget_j,shared_energy_j,fixed_energy_j,tx_power_w
0.02,400000,0.004,3e8,0.4,0.9,0.05,0.01,0.001,0.2
0.05,400000,0.002,4e7,0.2,0.8,0.05,0.01,0.001,0.2
0.01,400000,0.001,9e8,0.4,0.9,0.05,0.01,0.001,0.1
"""
TABLES = {
    "km.csv": PHYSICAL.format("distance_km", 0.3, 0.05, 0.2, 0.45),
    "db.csv": PHYSICAL.format("gain_db", -105, -88, -99, -110),
    "own.csv": OWN,
}
INTERRUPT = "!"  # before a command: it gets Ctrl-C once two rounds are on disk


@dataclass(frozen=True)
class Configuration:
    """Commands that run one after the other in one folder, and what their records must show to prove anything, as expressions."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    reaches: tuple[str, ...] = ()


def train(*overrides: str) -> tuple[str, ...]:
    """Returns the command of a tiny run, on the fleet of WORLD unless `overrides` name another one."""
    own = any(word.startswith("devices=") for word in overrides)
    return ("train", *(word for word in ALONE if not (own and word.startswith("devices="))), *overrides)


FAULTS = "faults=flaky,bursty,garbled,poisoned,misestimated"
CROWD = ("devices.count=20", "deadline.fraction=0.3")  # in which each of them strikes
CONFIGURATIONS = (
    Configuration(
        "branch",
        (train("seed=1"), ("resume", "run", "rounds=8", "deadline.fraction=0.4", "out=branch")),
        ('"status": "optimal"', '"round": 8,'),
    ),
    Configuration(
        "interrupted",
        (
            (INTERRUPT, *train("rounds=40", "devices.per_round=4", "weights=uniform", "evaluation.every=2")),
            ("resume", "run"),
        ),
        ('"round": 40,',),
    ),
    Configuration(
        "idle",
        (
            train(
                "devices.count=2", "rounds=9", "channel.outage_enter=0.6", "channel.outage_leave=0.4", "evaluation.every=4"
            ),
        ),
        ("every device is in outage", '"status": "optimal"'),
    ),
    Configuration(
        "nobody",
        (
            train("deadline.seconds=1e-6", "allocator.on_infeasible=drop"),
            train("deadline.total_seconds=0.006", "allocator.on_infeasible=drop", "evaluation.devices=2", "out=spent"),
        ),
        ('"status": "dropped".*"devices": {"id": \\[]', '"status": "optimal"'),
    ),
    Configuration(
        "frozen",
        (
            train(
                "rounds=8", "participation.freeze_below=0.9", "participation.freeze_window=1", "weights=pruning_error",
                "channel.outage_enter=0.2",
            ),
        ),
        ('"status": "frozen"', '"frozen": [1-5]', '"status": "optimal".*"frozen": [1-5]'),
    ),
    Configuration(
        "late",
        (
            (
                "train", "-m", *WORLD, *CROWD, FAULTS, "failsafe.late=drop,defer,wait", "failsafe.safe_ratio=true",
                "failsafe.clip_norm=0.9", "failsafe.quarantine_after=1", "failsafe.quarantine_rounds=2",
                "failsafe.max_staleness=1", "failsafe.outlier_norm=2",
            ),
        ),
        (
            "died", "lost", "delayed", "poisoned", "late", "refused", "stale", "expired", "clipped", "outliers", "safe",
            "quarantined",
        ),
    ),
    Configuration(
        "robust",
        (
            (
                "train", "-m", *WORLD, *CROWD, FAULTS, "failsafe.aggregation=median,trimmed_mean", "faults.poison=noise",
                "method=pruned", "failsafe.max_staleness=0", "failsafe.wait_factor=1.1",
            ),
        ),
        ("died", "lost", "delayed", "poisoned", "refused", "expired"),
    ),
    Configuration(
        "all-faults",
        (
            train(
                *CROWD, "rounds=8", "faults=flaky", "faults.stale=0.3", "faults.nan_share=0.05", "faults.misshapen_share=0.05",
                "faults.poisoned_share=0.1", "faults.clock_error=0.3", "faults.channel_error=0.3",
                "failsafe.quarantine_after=2", "payload.bits=[8,32]", "participation.freeze_below=0.2",
                "participation.freeze_window=2", "pruner=taylor", "channel.outage_enter=0.1",
            ),
        ),
        ("died", "lost", "delayed", "poisoned", "refused", "stale", "quarantined", '"frozen": [1-9]'),
    ),
    Configuration(
        "channels",
        (
            train("pruner.granularity=channel", "model.hidden=[16,12]", "training.block=1"),
            train(
                "model=cnn", "model.channels=[4,6]", "model.hidden=12", "model.padding=2", "pruner=taylor",
                "pruner.granularity=channel", "rounds=3", "out=cnn",
            ),
        ),
    ),
    Configuration("taylor", (train("pruner=taylor", "training.block=1", "training.epochs=1", "meter=paper"),)),
    Configuration(
        "bits",
        (
            train(
                "payload.bits=[4,8,32]", "pruner=random", "deadline.fraction=0.25", "deadline.last_fraction=1.0", "rounds=8",
                "weights=pruning_error",
            ),
            train("payload.bits=[2]", "allocator=fixed", "allocator.ratio=0.3", "out=two"),
        ),
        ('"bits": 4,', '"bits": (8|32),', '"bits": 2,'),
    ),
    Configuration(
        "fedsim",
        (
            train(
                "method=fedsim", "channel=umi", "partition=shards", "devices=classes", "training.momentum=0.9",
                "training.weight_decay=0.01", "payload.bits=[8]",
            ),
        ),
    ),
    Configuration(
        "schedules",
        (
            train(
                "deadline.fraction=0.3", "deadline.last_fraction=0.8", "channel=uma", "partition=quantity", "allocator=minmax"
            ),
            train("deadline.total_seconds=0.03", "devices.energy_budget_j=0.002", "channel.fading=none", "out=total"),
        ),
    ),
    Configuration(
        "processes",
        (
            train(
                "execution.kind=processes", "execution.workers=2", "devices.per_round=4", "devices.count=12",
                "training.block=2",
            ),
        ),
    ),
    Configuration("sweep", (("train", "-m", *WORLD, "method=fedavg,fedrep,local", "seed=3,4"),)),
    Configuration(
        "compare",
        (("compare", *WORLD, "--methods", "proposed,personalized", "--seeds", "5", "--jobs", "2", "--out", "compared"),),
    ),
    Configuration(
        "allocate",
        (
            ("allocate", *WORLD, "--out", "plain"),
            ("allocate", *WORLD, "payload.bits=[8]", "pruner=taylor", "--out", "few-bits"),
            ("allocate", *WORLD, "devices.max_bandwidth_mhz=5", "devices.energy_budget_j=0.003", "--out", "limits"),
            ("allocate", *WORLD, "--objective", "p2", "--mean-ratio", "0.3", "--out", "p2"),
            ("allocate", *WORLD, "--objective", "minmax", "--deadline-fraction", "0.6", "--out", "minmax"),
        ),
    ),
    Configuration(
        "allocate-table",
        (
            ("allocate", *WORLD, "--devices", "../km.csv", "--out", "km"),
            ("allocate", *WORLD, "--devices", "../db.csv", "--deadline-fraction", "0.7", "--objective", "minmax", "--out", "db"),
            ("allocate", *WORLD, "--devices", "../own.csv", "--bandwidth-mhz", "8", "--out", "own"),
        ),
    ),
    Configuration(
        "allocate-table-options",
        (
            ("allocate", *WORLD, "payload.bits=[8]", "--devices", "../km.csv", "--out", "bits"),
            ("allocate", *WORLD, "pruner=taylor", "--devices", "../db.csv", "--out", "taylor"),
        ),
    ),
)  # fmt: skip


# --- running --------------------------------------------------------------------------------------------------------


def fork_command(tree: Path, place: Path, command: Sequence[str]) -> int:
    """Returns the process that runs `fedprune COMMAND` in the folder `place`, with the code of `tree`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LONGEST_S)
        os.chdir(place)
        for descriptor, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(name, flags, 0o644), descriptor)
        os.environ["PYTHONPATH"] = str(tree)  # for the processes that it starts
        sys.path[0] = str(tree)
        sys.argv = ["fedprune", *command]
        code = call_fedprune()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def call_fedprune() -> int:
    """Does what `python -m fedprune_cli` does with sys.argv; returns the exit code."""
    try:
        runpy.run_module("fedprune_cli", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def run_command(tree: Path, place: Path, command: Sequence[str]) -> str:
    """Returns why a command failed, in a line, or nothing."""
    interrupts = command[0] == INTERRUPT
    asked = [*command[1:]] if interrupts else [*command]
    pid = fork_command(tree, place, asked)
    ended, status = 0, 0
    while interrupts and not ended and count_rounds(place / "run") < 2:
        time.sleep(0.005)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        if interrupts:
            os.kill(pid, signal.SIGINT)
        status = os.waitpid(pid, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code == (130 if interrupts else 0):
        return ""
    said = (place / "stderr").read_text(errors="replace").splitlines()
    last = next((line for line in reversed(said) if line.strip()), "nothing on stderr")
    return f"`fedprune {asked[0]}` ended with {code}: {last.strip()}"


def count_rounds(run_dir: Path) -> int:
    """Returns the rounds that a run has recorded, 0 before it has begun."""
    with contextlib.suppress(OSError):
        return (run_dir / "rounds.jsonl").read_bytes().count(b"\n")
    return 0


def run_configuration(tree: Path, place: Path, configuration: Configuration) -> None:
    """Leaves in `place` what is compared, and in `failed` why a command did not run."""
    place.mkdir(parents=True)
    for command in configuration.commands:
        if why := run_command(tree, place, command):
            (place / FAILED).write_text(why)
            break
    for path in place.rglob("*"):
        if path.is_file() and path.name != FAILED and not any(path.match(pattern) for pattern in COMPARED):
            path.unlink()


def load_what_is_slow() -> None:
    """Imports what is not ours and takes long, and turns drawing off: figures are not compared, and would take most of the time."""
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        figure = importlib.import_module("matplotlib.figure").Figure
        figure.savefig = lambda _, file, **__: file.write(b"<svg></svg>")


def run_all(tasks: Sequence[tuple[Path, Path, Configuration]]) -> None:
    """Runs configurations, each in the folder of its name in a place, with the code of a tree."""
    load_what_is_slow()
    waiting, running = list(tasks), set[int]()
    while waiting or running:
        while waiting and len(running) < SAME_TIME:
            tree, place, configuration = waiting.pop(0)
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                try:
                    run_configuration(tree, place / configuration.name, configuration)
                finally:
                    os._exit(0)
            running.add(pid)
        running.discard(os.wait()[0])


# --- comparing ------------------------------------------------------------------------------------------------------


def first_difference(a: object, b: object, where: str = "") -> str:
    """Returns the path of the first entry in which two JSON values differ, and both; nothing when they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        if [*a] != [*b]:
            odd = next((key for key in [*a, *b] if key not in a or key not in b), "")
            return (
                f"{where}{odd} only {'here' if odd in b else 'at BASE'}" if odd else f"{where}: keys in another order"
            )
        pairs = ((f"{where}.{key}".lstrip("."), a[key], b[key]) for key in a)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = ((f"{where}[{at}]", *both) for at, both in enumerate(zip(a, b, strict=True)))
    else:
        return "" if repr(a) == repr(b) else f"{where}: {short(a)} became {short(b)}"
    return next(filter(None, (first_difference(x, y, at) for at, x, y in pairs)), "")


def short(value: object) -> str:
    """Returns a value for a line of text."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def tensors(data: bytes) -> dict[str, object]:
    """Returns what a safetensors file holds: of each tensor its form and the SHA-256 of its values, and last the metadata."""
    size = int.from_bytes(data[:8], "little")
    found: dict[str, dict[str, object]] = json.loads(data[8 : 8 + size])
    about = {key: json.loads(str(text)) for key, text in found.pop("__metadata__", {}).items()}
    for tensor in found.values():
        start, end = tensor.pop("data_offsets")  # type: ignore[misc]
        tensor["values"] = hashlib.sha256(data[8 + size + start : 8 + size + end]).hexdigest()[:12]
    return {**found, "metadata": about}


def explain(name: str, old: bytes, new: bytes) -> str:
    """Returns where two files of one name differ first."""
    with contextlib.suppress(ValueError):
        if name == "state.safetensors":
            return first_difference(tensors(old), tensors(new)) or "the same tensors in other bytes"
        if name.endswith(".json"):
            return first_difference(json.loads(old), json.loads(new)) or "the same values in other bytes"
    lines = old.splitlines(), new.splitlines()
    for number, (a, b) in enumerate(zip(*lines, strict=False), start=1):
        if a != b and name == "rounds.jsonl":
            return (
                f"round {number}, {first_difference(json.loads(a), json.loads(b)) or 'the same values in other bytes'}"
            )
        if a != b and name.endswith((".yaml", ".csv")):
            return f"line {number}: {short(a.decode())} became {short(b.decode())}"
    return "other bytes" if len(lines[0]) == len(lines[1]) else f"{len(lines[0])} lines became {len(lines[1])}"


def compare(base: Path, here: Path) -> list[str]:
    """Returns in what two folders differ, a line each, and the files in the order of COMPARED."""
    names = {path.relative_to(root) for root in (base, here) for path in root.rglob("*") if path.is_file()}
    order = {pattern: at for at, pattern in enumerate(COMPARED)}
    lines = []
    for name in sorted(names, key=lambda name: (order.get(name.name, len(order)), str(name))):
        if not (base / name).exists() or not (here / name).exists():
            lines.append(f"{name}: only {'at BASE' if (base / name).exists() else 'here'}")
        elif (old := (base / name).read_bytes()) != (new := (here / name).read_bytes()):
            lines.append(f"{name}: {explain(name.name, old, new)}")
    return lines


def missed(place: Path, configuration: Configuration) -> list[str]:
    """Returns what a configuration is there for and does not reach; a plain word is a kind of fault that befell some device."""
    text = "\n".join(path.read_text() for path in sorted(place.rglob("rounds.jsonl")))
    patterns = {what: f'"{what}": \\[\\d' if what.isalpha() else what for what in configuration.reaches}
    return [what for what, pattern in patterns.items() if not re.search(pattern, text)]


def judge(configuration: Configuration, base: Path, here: Path, *, allowed: bool) -> tuple[bool, list[str]]:
    """Returns whether a configuration is as it should be, and what to print of it."""
    for side, place in (("at BASE", base), ("here", here)):
        if (place / FAILED).exists():
            return False, [f"does not run {side}: {(place / FAILED).read_text()}"]
    if not any(base.rglob("*.json")):
        return False, ["left nothing to compare"]
    if lost := missed(base, configuration):
        return False, [f"never reaches {', '.join(lost)}: it proves nothing"]
    if not (differences := compare(base, here)):
        return True, ["equal, though it may differ" if allowed else "equal"]
    more = len(differences) - SHOWN
    shown = [*differences[:SHOWN], *([f"and {more} more files"] if more > 0 else [])]
    return allowed, ["differs, as intended" if allowed else "DIFFERS", *shown]


# --- the two trees --------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    """Returns what git prints; ends this program with git's own words when it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: git {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout.strip()


@contextlib.contextmanager
def temporary_folder(within: Path | None = None) -> Iterator[Path]:
    """Yields a folder that is gone afterwards; tempfile.TemporaryDirectory would also remove it at the end of each forked process."""
    folder = Path(tempfile.mkdtemp(prefix="now-", dir=within))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def files_of(commit: str) -> Iterator[Path]:
    """Yields a folder that holds the files of a commit, and is gone afterwards."""
    with temporary_folder() as folder:
        place = folder / "tree"
        git("worktree", "add", "--detach", str(place), commit)
        try:
            yield place
        finally:
            git("worktree", "remove", "--force", str(place))


def kept_at(commit: str) -> Path:
    """Returns where a commit's results are kept: whatever decides their bytes is in the name."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in DECIDE]
    made_by = "\n".join([Path(__file__).read_text(), platform.python_version(), *versions])
    return KEPT / f"{commit}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"


def run_both(commit: str, chosen: Sequence[Configuration], temporary: Path) -> dict[str, tuple[Path, Path]]:
    """Runs BASE, where it was not kept, and the working tree; returns what each gave by the configuration's name."""
    kept, fresh, here = kept_at(commit), temporary / "base", temporary / "here"
    for place in (fresh, here):
        place.mkdir()
        for name, text in TABLES.items():
            (place / name).write_text(text)
    own = [(ROOT, here, configuration) for configuration in chosen]
    missing = [configuration for configuration in chosen if not (kept / configuration.name).exists()]
    with files_of(commit) if missing else contextlib.nullcontext(ROOT) as tree:
        run_all([*((tree, fresh, configuration) for configuration in missing), *own])
    kept.mkdir(parents=True, exist_ok=True)
    given = {configuration.name: kept / configuration.name for configuration in chosen}
    for name in (configuration.name for configuration in missing):
        if (fresh / name / FAILED).exists():  # it may run the next time
            given[name] = fresh / name
        else:
            with contextlib.suppress(OSError):  # another process was first, with the same
                (fresh / name).rename(kept / name)
    return {name: (place, here / name) for name, place in given.items()}


def stop(signum: int, frame: object) -> NoReturn:
    """Ends as Ctrl-C does, so that nothing is left behind."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs and compares; returns the exit code."""
    names = [configuration.name for configuration in CONFIGURATIONS]
    parser = argparse.ArgumentParser(description="Shows that the working tree gives the same bytes as a commit.")
    parser.add_argument("base", help="the commit")
    parser.add_argument("--allow", default="", help="configurations that are meant to differ, joined by commas")
    parser.add_argument("--only", default="", help="run only these")
    arguments = parser.parse_args()
    allowed, only = ({*filter(None, text.split(","))} for text in (arguments.allow, arguments.only))
    if unknown := (allowed | only) - {*names}:
        parser.error(f"no configuration is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [configuration for configuration in CONFIGURATIONS if configuration.name in (only or names)]
    commit = git("rev-parse", "--verify", f"{arguments.base}^{{commit}}")
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    signal.signal(signal.SIGTERM, stop)
    KEPT.mkdir(parents=True, exist_ok=True)
    started, good = time.monotonic(), []
    with temporary_folder(KEPT) as temporary:
        places = run_both(commit, chosen, temporary)
        for configuration in chosen:
            right, lines = judge(configuration, *places[configuration.name], allowed=configuration.name in allowed)
            good.append(right)
            print(f"{configuration.name:24}{lines[0]}", *(f"    {line}" for line in lines[1:]), sep="\n")
    print(f"{sum(good)} of {len(good)} as they should be, against {commit[:12]}, in {time.monotonic() - started:.0f} s")
    return int(not all(good))


if __name__ == "__main__":
    raise SystemExit(main())
