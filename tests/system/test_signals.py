"""Ctrl-C and SIGTERM at any moment: 130 or 143, one line that says how to go on, no traceback, never lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

DIGITS = ("data=digits", "devices.count=8", "rounds=400")
COMMANDS = {
    "train": ("train", *DIGITS, "execution.kind=processes", "execution.workers=2", "out=run"),
    "compare": ("compare", *DIGITS, "--jobs", "2"),
    "sweep": ("train", "-m", *DIGITS, "seed=0,1"),
}
SPAN_S = (
    4.0  # from when signals are heeded: imports, data, the folder, workers and the first rounds, on a machine at rest
)


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """Starts a process in a group of its own, as a terminal does, heeding Ctrl-C whatever this process was told."""
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def heeds(process: subprocess.Popen[str]) -> bool:
    """Whether the process catches SIGTERM, as it does from its first own line on; before, Python starts."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return process.poll() is not None or bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def interrupted(command: str, after_s: float, sign: signal.Signals, again_s: float | None = None) -> str:
    """Starts a command, signals its whole group once or twice, and returns what is wrong with how it ended: nothing, it is hoped."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = start([sys.executable, "-m", "fedprune_cli", *COMMANDS[command]], Path(folder))
        while not heeds(process):
            time.sleep(0.001)
        time.sleep(after_s)
        os.killpg(process.pid, sign)
        if again_s is not None:
            time.sleep(again_s)
            if process.poll() is None:
                os.killpg(process.pid, sign)
        output, errors = process.communicate(timeout=100)
        written = sorted(path.name for path in Path(folder).iterdir())
    said = [line for line in errors.splitlines() if ": round " not in line]
    begun = "every finished round is safe: " + (
        "fedprune resume run" if command == "train" else "the same command continues"
    )
    right = {f"interrupted; {begun}"} if written else {"interrupted; nothing was written yet"}
    if command == "compare":  # which has a folder for its runs before the first of them
        right.add("interrupted; nothing was written yet")
    if process.returncode == 128 + sign and len(said) == 1 and said[0] in right and not output:
        return ""
    return (
        f"{command} {after_s:.3f} s {sign.name} {again_s}: exit {process.returncode}, {written}, {output!r}, {errors!r}"
    )


def beginning_s() -> float:
    """Returns how long a run takes from when it heeds signals to its first rounds: imports, data, the folder, workers."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = start([sys.executable, "-m", "fedprune_cli", *COMMANDS["train"]], Path(folder))
        while not heeds(process):
            time.sleep(0.001)
        since, log = time.monotonic(), Path(folder, "run", "rounds.jsonl")
        while not (log.exists() and log.read_bytes()):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=100)
        return time.monotonic() - since


def many(count: int, seed: int) -> list[str]:
    """Returns what was wrong with `count` interrupted starts, at moments spread over the first seconds; some are signalled twice."""
    draw, span_s = random.Random(seed), 1.3 * beginning_s()
    names = sorted(COMMANDS)
    wrong = []
    for number in range(count):
        sign = signal.SIGTERM if draw.random() < 0.25 else signal.SIGINT
        again_s = draw.uniform(0, 0.3) if draw.random() < 0.25 else None
        wrong.append(interrupted(names[number % 3], draw.uniform(0, span_s), sign, again_s))
    return [text for text in wrong if text]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux whether a process heeds a signal yet")
@pytest.mark.parametrize(
    ("command", "after_s", "sign", "again_s"),
    [
        ("train", 0.0, signal.SIGINT, None),
        ("train", 1.1, signal.SIGINT, None),
        pytest.param(*("train", 2.4, signal.SIGTERM, None), marks=pytest.mark.slow),
        pytest.param(*("train", 3.6, signal.SIGINT, 0.05), marks=pytest.mark.slow),
        pytest.param(*("compare", 0.5, signal.SIGINT, 0.01), marks=pytest.mark.slow),
        pytest.param(*("compare", 3.0, signal.SIGINT, None), marks=pytest.mark.slow),
        ("sweep", 0.2, signal.SIGTERM, None),
        pytest.param(*("sweep", 1.8, signal.SIGINT, None), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_start_is_one_line(
    command: str, after_s: float, sign: signal.Signals, again_s: float | None
) -> None:
    assert interrupted(command, after_s, sign, again_s) == ""


@pytest.mark.slow
def test_500_interrupted_starts_are_one_line_each() -> None:
    assert many(500, seed=0) == []


# --- where a signal is easily lost: each in a small process, without the program's heavy imports ---------------------------

BEGIN = """\
import os, signal, sys, time
from fedprune_cli import interrupt
interrupt.heed()
kill = lambda: os.kill(os.getpid(), signal.SIGINT)
"""
LINE = "interrupted; nothing was written yet\n"


def ended(code: str, tmp_path: Path, *, ignored: bool = False) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a small program that heeds signals."""
    (tmp_path / "program.py").write_text(BEGIN + code)
    was = signal.SIG_IGN if ignored else signal.default_int_handler
    result = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, was),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def test_in_an_import_the_process_ends_at_once(tmp_path: Path) -> None:
    """There C code turns any exception into another, or aborts."""
    (tmp_path / "library.py").write_text(
        "import __main__\ntry:\n    __main__.kill()\nexcept BaseException as e:\n    raise ImportError from e\n"
    )
    assert ended("import library\nprint('lost')", tmp_path) == (130, "", LINE)


def test_one_that_somebody_swallows_ends_the_process_after_a_while(tmp_path: Path) -> None:
    code = "interrupt.GRACE_S = 0.2\ntry:\n    kill()\nexcept BaseException:\n    time.sleep(30)\nprint('lost')"
    assert ended(code, tmp_path) == (130, "", LINE)


def test_one_that_a_destructor_swallows_ends_the_process_at_once(tmp_path: Path) -> None:
    code = "class Last:\n    def __del__(self):\n        kill()\nLast()\nprint('lost')"
    assert ended(code, tmp_path) == (130, "", LINE)


def test_a_second_one_while_closing_ends_the_process_at_once(tmp_path: Path) -> None:
    code = "try:\n    kill()\nfinally:\n    kill()\n    print('lost')"
    assert ended(code, tmp_path) == (130, "", LINE)


def test_one_made_another_error_on_its_way_up_is_an_interruption_still(tmp_path: Path) -> None:
    code = (
        "from fedprune_cli.commands import app\ndef command():\n    try:\n        kill()\n    except BaseException as e:\n"
        "        raise ValueError('of another') from e\n"
        "app.app.command()(app._shielded(command))\nsys.argv = ['fedprune', 'command']\napp.main()"
    )
    assert ended(code, tmp_path) == (130, "", LINE)


def test_the_line_is_what_was_safe_when_it_came(tmp_path: Path) -> None:
    code = (
        "with interrupt.safe(lambda: 'first'):\n    pass\n"
        "try:\n    with interrupt.safe(lambda: 'second'):\n        kill()\nfinally:\n    interrupt.leave()"
    )
    assert ended(code, tmp_path) == (130, "", "interrupted; second\n")


def test_who_is_told_to_ignore_ctrl_c_ignores_it(tmp_path: Path) -> None:
    assert ended("kill()\nprint('went on')", tmp_path, ignored=True) == (0, "went on\n", "")
