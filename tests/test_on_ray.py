"""Workers on a Ray cluster: the bytes of `serial`, also when workers or a whole node die; what several tasks need lies there once.

Skipped where Ray is not installed, but for what is said then.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, composed, make_setup, results, run_to_end
from test_execute import Context, build, die_once, fail, scaled

from fedprune_cli import on_ray
from fedprune_cli.errors import ConfigError, DeviceError
from fedprune_cli.execute import Execution, executor, ready
from fedprune_cli.runs import life

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: fedprune[ray]")
ON_RAY = ("execution.kind=ray", "execution.workers=2")
HERE = os.pathsep.join([str(Path(on_ray.__file__).parent.parent), *filter(None, sys.path)])


@pytest.fixture(autouse=True)
def _workers_import_as_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE)
    on_ray.reachable.cache_clear()


def die(context: Context, task: tuple[int, np.ndarray]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task[0]


def place(context: Context, task: tuple[int, np.ndarray]) -> tuple[float, bool, bool, int]:
    """Returns a sum, and whether the context's big array and the task's can be written to, and the threads of PyTorch."""
    import torch

    own, common = task
    sum_ = float(common.sum()) + own
    return sum_, context[0].flags.writeable, common.flags.writeable, torch.get_num_threads()


@needs_ray
def test_workers_give_the_results_of_serial_in_order_also_when_one_dies(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = functools.partial(build, np.arange(100_000.0), np.array([7.0]))
    common = np.arange(5_000.0)
    tasks = [(n, common) for n in range(8)]
    with executor(Execution("serial", None), context) as workers:
        expected = workers.map(scaled, range(20)), workers.map(place, tasks)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with executor(Execution("ray", 2), context) as workers:
        assert workers.map(scaled, range(20)) == expected[0]
        assert {number: signal.getsignal(number) for number in before} == before
        assert [one[0] for one in workers.map(place, tasks)] == [one[0] for one in expected[1]]
        assert {one[1:] for one in workers.map(place, tasks)} == {(False, False, 1)}  # both lie in the store
        with pytest.raises(DeviceError, match=r"^task 4 is bad$"):
            workers.map(fail, [4, 5])
        assert workers.map(scaled, [0]) == [7.0]
        assert workers.map(die_once, [(n, str(tmp_path / "died")) for n in range(8)]) == [10 * n for n in range(8)]
        with pytest.raises(DeviceError, match="the 3rd time"):
            workers.map(die, [(1, common)])
    output = capfd.readouterr()
    assert output.err.count("died; the work of its task is done again") == 1 + on_ray.ATTEMPTS
    assert not output.out


@needs_ray
def test_a_run_whose_worker_is_killed_has_the_bytes_of_serial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Small models side by side, and masks, personal parts and tests of one by one, with Taylor's memory of gradients."""
    run_to_end(tmp_path / "serial", "pruner=taylor", "rounds=4", "execution.kind=serial")
    crews: list[on_ray.Crew] = []
    monkeypatch.setattr(on_ray.Crew, "gather", _seen(crews, on_ray.Crew.gather))
    overrides = ("pruner=taylor", "rounds=4", *ON_RAY)
    setup = make_setup(*overrides)
    life.create(setup, composed(*overrides), tmp_path / "ray")
    for record in life.run(setup, tmp_path / "ray"):
        if record.round == 2:
            os.kill(int(crews[0].idle[-1].name.split()[2]), signal.SIGKILL)  # the next one to be given a task
    assert results(tmp_path / "ray") == results(tmp_path / "serial")
    assert "died; the work of its task is done again" in capfd.readouterr().err


def _seen(crews: list[on_ray.Crew], gather: Callable[[on_ray.Crew, float], None]) -> Callable[[Any, float], None]:
    def seen(crew: on_ray.Crew, until: float) -> None:
        crews.append(crew)
        gather(crew, until)

    return seen


@needs_ray
def test_ctrl_c_ends_it_in_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedprune_cli", "train", *TINY, *ON_RAY, "rounds=4000", "out=run", "--quiet"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    log = tmp_path / "run" / "rounds.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    since = time.monotonic()
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert errors == "interrupted; every finished round is safe: fedprune resume run\n"
    assert time.monotonic() - since < 9
    assert not [path for path in Path("/proc").glob("[0-9]*/cwd") if _within(path, tmp_path)]


def _within(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder) and link.parent.name != str(os.getpid())
    except OSError:
        return False


# --- what is refused --------------------------------------------------------------------------------------------------------


def test_without_ray_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^execution.kind=ray needs an extra: pip install 'fedprune\[ray\]'$"):
        ready(Execution("ray", None), object)


@pytest.mark.parametrize("address", ["nowhere", "host:", ":6379", "ray://host:1", "host:123456", "a b:1"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Execution("ray", None, address)


@needs_ray
def test_nobody_or_somebody_else_at_the_address_is_one_line_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "CONNECT_S", 4.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        address, since = f"127.0.0.1:{other.getsockname()[1]}", time.monotonic()
        with pytest.raises(
            DeviceError, match=f"^execution.address={address}: no Ray cluster there: Connection refused$"
        ):
            ready(Execution("ray", None, address), object)
        other.listen()
        with pytest.raises(DeviceError, match=f"^execution.address={address}: no answer of Ray within 4 s$"):
            ready(Execution("ray", None, address), object)
        assert time.monotonic() - since < 8


def test_a_node_with_other_code_is_named_and_another_processor_is_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    about = {"node": "10.0.0.2", "pid": "7", "processor": on_ray.processor(), **on_ray.versions()}
    assert on_ray._welcome(None, about).name == "worker process 7 on node 10.0.0.2"
    for name in on_ray.versions():
        with pytest.raises(
            DeviceError, match=rf"^node 10.0.0.2 has {name} another, this machine .*: install the same$"
        ):
            on_ray._welcome(None, about | {name: "another"})
    assert not capfd.readouterr().err
    for _ in range(2):
        on_ray._welcome(None, about | {"processor": "abacus"})
    assert capfd.readouterr().err.count("10.0.0.2 has another processor (abacus, here ") == 1


def test_a_worker_that_dies_before_it_began_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayError(Exception): ...

    about = {"node": "10.0.0.2", "pid": "7", "processor": on_ray.processor(), **on_ray.versions()}
    begins = iter(
        [RayError("lost"), RayError("lost"), about, RayError("lost\nModuleNotFoundError: No module named 'x'")]
    )

    def get(ref: object) -> dict[str, str]:
        begun = next(begins)
        if isinstance(begun, RayError):
            raise begun
        return begun

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=type("RayTaskError", (RayError,), {}))
    ray = SimpleNamespace(wait=lambda refs, timeout: (refs[:1], refs[1:]), get=get, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "ray", ray)
    crew = on_ray.Crew(lambda: SimpleNamespace(begin=SimpleNamespace(remote=object)))
    crew.hire_one()
    crew.gather(time.monotonic() + 60)
    assert [hand.name for hand in crew.idle] == ["worker process 7 on node 10.0.0.2"]
    crew.hire_one()
    with pytest.raises(DeviceError, match=r"which needs this fedprune: ModuleNotFoundError: No module named 'x'$"):
        crew.gather(time.monotonic() + 60)


# --- two nodes ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Returns what makes a cluster of two nodes of one processor on this machine, of which the second imports from a path."""
    from ray.cluster_utils import Cluster

    made: list[Any] = []

    def make(second: str) -> Any:
        node = {"num_cpus": 1, "env_vars": {"PYTHONPATH": HERE}, "include_dashboard": False}
        made.append(Cluster(initialize_head=True, head_node_args=node))
        made[0].add_node(**node | {"env_vars": {"PYTHONPATH": second}})
        return made[0]

    yield make
    for cluster in made:
        cluster.shutdown()


@needs_ray
@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost_give_the_bytes_of_serial(
    tmp_path: Path, two_nodes: Callable[[str], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = two_nodes(HERE)
    overrides = ("rounds=8", "execution.kind=ray", f"execution.address={cluster.address}")
    run_to_end(tmp_path / "serial", "rounds=8", "execution.kind=serial")
    setup = make_setup(*overrides)
    life.create(setup, composed(*overrides), tmp_path / "ray")
    for record in life.run(setup, tmp_path / "ray"):
        if record.round == 3:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert results(tmp_path / "ray") == results(tmp_path / "serial")
    assert "died; the work of its task is done again" in capfd.readouterr().err


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "files", [{"fedprune_cli/more.py": "1\n"}, {"fedprune_cli/on_ray.py": ""}], ids=["other", "old"]
)
def test_a_node_with_another_fedprune_is_refused(
    files: Mapping[str, str], tmp_path: Path, two_nodes: Callable[[str], Any]
) -> None:
    shutil.copytree(Path(on_ray.__file__).parent, tmp_path / "fedprune_cli")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    cluster = two_nodes(os.pathsep.join([str(tmp_path), HERE]))
    context = functools.partial(build, np.arange(9.0), np.array([7.0]))
    with (
        pytest.raises(DeviceError, match=r"has fedprune .*: install the same$|needs this fedprune: "),
        executor(Execution("ray", None, cluster.address), context),
    ):
        pass
