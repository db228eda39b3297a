"""Executors: the same results in order from both, one copy of the data, and a dead worker's work done again."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedprune_cli.errors import DeviceError
from fedprune_cli.execute import Execution, executor

Context = tuple[np.ndarray, np.ndarray]


def build(big: np.ndarray, small: np.ndarray) -> Context:
    return big, small


def scaled(context: Context, task: int) -> float:
    return float(context[0].sum()) * task + float(context[1][0])


def die_once(context: Context, task: tuple[int, str]) -> int:
    """Kills its worker the first time that task 3 is worked on."""
    number, marker = task
    if number == 3 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


def die(context: Context, task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def fail(context: Context, task: int) -> int:
    time.sleep(0.3 * (task == 4))  # the other is heard of first
    raise DeviceError(f"task {task} is bad")


def mapped_bytes(context: Context, task: int) -> tuple[bool, bool]:
    """Whether the big array is read-only and lies in a file that is mapped, not in this process's own memory."""
    address = context[0].__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return not context[0].flags.writeable, "deleted" in line
    return False, False


@pytest.fixture
def context() -> functools.partial[Context]:
    return functools.partial(build, np.arange(100_000.0), np.array([7.0]))


def test_both_executors_give_the_same_results_in_order(context: functools.partial[Context]) -> None:
    results = []
    for execution in (Execution("serial", None), Execution("processes", 1), Execution("processes", 2)):
        with executor(execution, context) as workers:
            results.append([*workers.map(scaled, range(20)), *workers.map(scaled, [5])])
    assert results[0] == results[1] == results[2]


def test_the_work_of_a_dead_worker_is_done_again_and_it_is_named(
    context: functools.partial[Context], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with executor(Execution("processes", 2), context) as workers:
        assert workers.map(die_once, [(n, str(tmp_path / "died")) for n in range(8)]) == [10 * n for n in range(8)]
        assert workers.map(scaled, [1]) == workers.map(scaled, [1])  # and the new workers go on
    assert "(exit code -9) died; the work of" in capfd.readouterr().err


def test_work_that_always_kills_its_worker_ends_in_one_line(context: functools.partial[Context]) -> None:
    with executor(Execution("processes", 1), context) as workers, pytest.raises(DeviceError, match="the 3rd time"):
        workers.map(die, [1])


def test_an_error_of_the_work_is_the_work_s_own(context: functools.partial[Context]) -> None:
    with executor(Execution("processes", 2), context) as workers:
        with pytest.raises(DeviceError, match="task 4 is bad"):
            workers.map(fail, [4, 5])
        assert workers.map(scaled, [0]) == [7.0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's view of a process's memory")
def test_the_data_are_mapped_and_not_copied(context: functools.partial[Context]) -> None:
    with executor(Execution("processes", 2), context) as workers:
        assert set(workers.map(mapped_bytes, range(4))) == {(True, True)}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux which signals a process has blocked")
def test_the_server_of_processes_never_hears_ctrl_c() -> None:
    """Not even while it is imported, before it can ignore it: it is started with the signal blocked."""
    code = (
        "from pathlib import Path\nfrom multiprocessing import forkserver\nfrom fedprune_cli import execute\n"
        "if __name__ == '__main__':\n execute.forkserver([])\n"
        " status = Path(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read_text()\n"
        " print(next(line.split()[1] for line in status.splitlines() if line.startswith('SigBlk')))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert int(result.stdout, 16) >> (signal.SIGINT - 1) & 1
