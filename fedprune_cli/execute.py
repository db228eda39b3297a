"""Executors: map a function over tasks, results in order. Kind and worker count never change a number."""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast

from fedprune_cli import on_ray, plugins
from fedprune_cli.errors import ConfigError, DeviceError, OutputError, require
from fedprune_cli.sections import LATER

Context = TypeVar("Context")
Task = TypeVar("Task")
Result = TypeVar("Result")

ATTEMPTS = 3  # of the same work, before it is taken to be what kills its workers
LONGEST_TEMPDIR = (
    108 - len("/pymp-12345678/listener-12345678") - 1
)  # bytes of a socket's path, with the zero at its end
QUIET_SERVER = "fedprune_cli.forked"
LEAKS = "ignore::UserWarning:multiprocessing.resource_tracker"
SEMAPHORES = "semaphores (/dev/shm), which workers need"
SAFE = "finished rounds are safe"
ALIGNMENT = 64  # bytes: what numpy and vector instructions like

REMOTE = ("nodes", "flower")
KINDS = ("serial", "processes", "ray", *REMOTE)

_context: object = None  # what a worker process built once, at its start


@dataclass(frozen=True)
class Execution:
    """Where devices' work runs: `serial` in this process, else in single-threaded workers (null: one a core), or on nodes.

    kind: `processes` of this machine, actors on the `ray` cluster at `address`, null starting one on this machine, or nodes that keep
    their data. patience_s: how long a node may be away before its task is lost, and its device has died in mid-round. by_clock: whether
    the server's clock decides which node is late, and not the modelled seconds.
    """

    kind: str
    workers: int | None
    address: str | None = field(default=None, metadata=LATER)
    patience_s: float = 60.0
    by_clock: bool = False

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", self.kind, "'serial', 'processes', 'ray', 'nodes' or 'flower'")
        good = self.address in (None, "auto") or re.fullmatch(r"[\w.:\[\]-]+:\d{1,5}", str(self.address), re.ASCII)
        require(bool(good), "address", self.address, "HOST:PORT of a Ray cluster's head, auto or null")
        require(self.remote or not self.by_clock, "by_clock", self.by_clock, "false where no nodes do the work")
        require(0 <= self.patience_s <= 10**6, "patience_s", self.patience_s, "in 0..1000000")
        require(self.workers is None or 1 <= self.workers <= 4096, "workers", self.workers, "in 1..4096 or null")

    @property
    def remote(self) -> bool:
        """Whether nodes do the work that keep their data and personalized parts themselves."""
        return self.kind in REMOTE


def _same(task: object) -> float:
    return 0.0


def usable_cores() -> int:
    """Returns how many cores this process may use at the same time: by `taskset`, and by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # there is none, or it is "max"
        return cores


class Executor(Protocol):
    """Maps f(context, task) over tasks."""

    def map(
        self, f: Callable[[Context, Task], Result], tasks: Iterable[Task], cost: Callable[[Task], float] = _same
    ) -> list[Result]:
        """Returns the results in the order of the tasks; those of most `cost` are begun first, so that no worker waits long."""


@dataclass(frozen=True)
class _Serial:
    context: object

    def map(
        self, f: Callable[[Context, Task], Result], tasks: Iterable[Task], cost: Callable[[Task], float] = _same
    ) -> list[Result]:
        return [f(cast(Context, self.context), task) for task in tasks]


@dataclass
class _Processes:
    """Workers in processes. The pool is the one thing here that changes: a broken one is replaced."""

    start: Callable[[], ProcessPoolExecutor]
    pool: ProcessPoolExecutor

    def map(
        self, f: Callable[[Context, Task], Result], tasks: Iterable[Task], cost: Callable[[Task], float] = _same
    ) -> list[Result]:
        """As Executor.map; when a worker dies, names it on stderr and does the lost work again on new workers."""
        todo, results = list(tasks), dict[int, Result]()
        for _ in range(ATTEMPTS):
            waiting = sorted((at for at in range(len(todo)) if at not in results), key=lambda at: -cost(todo[at]))
            with starting("a worker process"):
                futures = {at: self.pool.submit(_work, f, todo[at]) for at in waiting}
            workers = multiprocessing.active_children()
            for at, future in futures.items():
                with contextlib.suppress(BrokenProcessPool):
                    results[at] = future.result()
            if len(results) == len(todo):
                return [results[at] for at in range(len(todo))]
            self.pool.shutdown(wait=True, cancel_futures=True)
            lost = f"{_dead(workers)} died; the work of {len(todo) - len(results)} tasks is"
            print(f"warning: {lost} done again", file=sys.stderr, flush=True)
            self.pool = self.start()
        raise DeviceError(
            f"{lost} lost for the {ATTEMPTS}rd time (out of memory?); the finished rounds are safe, resume the run"
        )


def _dead(workers: Sequence[BaseProcess]) -> str:
    """Returns which workers of a broken pool died by themselves: it ends the others with SIGTERM."""
    dead = [worker for worker in workers if worker.exitcode not in (None, 0, -signal.SIGTERM)]
    named = [f"worker process {worker.pid} (exit code {worker.exitcode})" for worker in dead]
    return " and ".join(named) or "a worker process"


@dataclass(frozen=True)
class _Shared:
    """A pickled object whose arrays lie in an unnamed file, which workers map: one copy in memory for all of them."""

    data: bytes
    spans: tuple[tuple[int, int], ...]
    file: BinaryIO

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """While a worker is started: hands it the file's descriptor, and there gives the object back; plug-ins before it."""
        return _open, (plugins.given(), self.data, self.spans, reduction.DupFd(self.file.fileno()))


def _share(value: object) -> _Shared:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    spans, at = [], 0
    for buffer in buffers:
        at += -at % ALIGNMENT
        spans.append((at, at + buffer.raw().nbytes))
        at = spans[-1][1]
    file = _temporary(at)
    for buffer, (start, _) in zip(buffers, spans, strict=True):
        file.seek(start)
        file.write(buffer.raw())
    file.flush()
    return _Shared(data, tuple(spans), file)


def _temporary(size: int) -> BinaryIO:
    """Returns an unnamed file in the temporary folder that has room for `size` bytes; raises OutputError when there is none."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the last reference to it
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        place = tempfile.tempdir or "temporary folder"
        raise OutputError(
            f"cannot write {size / 1e6:.1f} MB to {place}: {error.strerror}; TMPDIR chooses another"
        ) from None
    return cast(BinaryIO, file)


class _Descriptor(Protocol):
    """What `reduction.DupFd` is where it arrives."""

    def detach(self) -> int: ...


def _open(
    files: Sequence[plugins.PluginFile], data: bytes, spans: tuple[tuple[int, int], ...], descriptor: _Descriptor
) -> object:
    plugins.give(files)
    with open(descriptor.detach(), "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return pickle.loads(data, buffers=[mapped[start:end] for start, end in spans])  # from this program's own parent


def _start(shared: object) -> None:
    """Begins a worker's life with what was shared: the function that builds its context."""
    global _context
    begin_child()
    try:
        _context = _single_threaded(cast(Callable[[], object], shared))
    except Exception as error:  # here it would be a traceback
        _context = _Unstarted(error)


@dataclass(frozen=True)
class _Unstarted:
    """In place of a worker's context: why there is none."""

    error: Exception


def begin_child() -> None:
    """Begins a process of this program's own: Ctrl-C is its parent's business, whose end is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """Ends a worker whose parent was killed: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


@functools.cache
def end_when_orphaned() -> None:
    """Ends this process, one that a library started, once the one that started it is gone: joblib's workers would wait for ever.

    Ctrl-C is the business of the one that started it.
    """
    parent = os.getppid()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # finished rounds are on disk

    threading.Thread(target=look, daemon=True).start()


def _work(f: Callable[[Context, Task], Result], task: Task) -> Result:
    if isinstance(_context, _Unstarted):
        raise _context.error
    return f(cast(Context, _context), task)


def _single_threaded(build: Callable[[], object]) -> object:
    import torch

    torch.set_num_threads(1)  # two threads sum in another order and give other bits
    return build()


def forkserver(preload: Sequence[str]) -> multiprocessing.context.ForkServerContext:
    """Returns the way to start processes: a server imports the modules `preload` once, and forks each from there; they share its memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([QUIET_SERVER, *preload])
    _prepare()
    with starting("processes"):
        multiprocessing.resource_tracker.ensure_running()  # first: it unblocks what is blocked here
    signal.pthread_sigmask(
        signal.SIG_BLOCK, [signal.SIGINT]
    )  # it is imported by what is started here, so that Ctrl-C finds nobody
    try:
        with starting("processes"):
            multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return context


def _prepare() -> None:
    """Raises DeviceError when processes could not be reached by a socket in the temporary folder."""
    if LEAKS not in sys.warnoptions:  # of what a killed process could not remove, and the tracker does
        sys.warnoptions.append(LEAKS)
    with starting("processes"):
        place = tempfile.gettempdir()
    if (length := len(os.fsencode(place))) > LONGEST_TEMPDIR:
        raise DeviceError(
            f"TMPDIR={place}: its {length} bytes are too long for the sockets of processes, at most {LONGEST_TEMPDIR}; choose a shorter one"
        )


@contextlib.contextmanager
def starting(what: str) -> Iterator[None]:
    """Turns the system's refusal of processes, threads or what they share into a DeviceError of one line."""
    try:
        yield
    except EOFError:
        raise DeviceError(f"the system refuses {what}: the server that starts them has ended; {SAFE}") from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "start new thread" not in str(error):
            raise
        raise DeviceError(f"the system refuses {what}: {getattr(error, 'strerror', None) or error}; {SAFE}") from None


def ready(execution: Execution, build: Callable[[], object]) -> None:
    """Raises DeviceError or OutputError when what the executor needs cannot be had: asked before anything is written."""
    if execution.kind == "serial" or execution.remote:
        return
    if execution.kind == "ray":
        on_ray.reachable(execution.address)
        return
    _prepare()
    with starting(SEMAPHORES):
        multiprocessing.get_context("forkserver").Lock()
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(build, protocol=5, buffer_callback=buffers.append)
    _temporary(sum(buffer.raw().nbytes + ALIGNMENT for buffer in buffers)).close()


@contextlib.contextmanager
def executor(execution: Execution, build: Callable[[], object], preload: Sequence[str] = ()) -> Iterator[Executor]:
    """Yields the executor; each of its processes calls `build` once for the context that `map` hands to f.

    preload: the modules that its processes need, imported once for all of them.
    """
    workers = execution.workers or usable_cores()
    if execution.remote:
        raise ConfigError(
            f"execution.kind={execution.kind}: nodes do the work of this run, and `fedprune serve` reaches them"
        )
    if execution.kind == "serial":
        yield _Serial(_single_threaded(build))
        return
    if execution.kind == "ray":
        with on_ray.crew(
            execution.address,
            execution.workers if execution.address else workers,
            functools.partial(_single_threaded, build),
        ) as crew:
            yield crew
        return
    shared = _share(build)
    context = forkserver(preload)

    def start() -> ProcessPoolExecutor:
        with starting(SEMAPHORES):
            return ProcessPoolExecutor(workers, context, initializer=functools.partial(_start, shared))

    processes = _Processes(start, start())
    try:
        yield processes
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.kill()  # what they do is not waited for
        raise
    finally:
        processes.pool.shutdown(wait=True, cancel_futures=True)
