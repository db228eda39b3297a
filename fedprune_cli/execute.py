"""Executors: map a function over units of work, results in order. Kind and worker count never change a number."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fedprune_cli.errors import DeviceError, require

Unit = TypeVar("Unit")
Result = TypeVar("Result")

_context: Any = None  # what a worker process built once, at its start


@dataclass(frozen=True)
class Execution:
    """Where devices' work runs: `serial` in this process, `processes` in single-threaded workers (null: one a core)."""

    kind: str
    workers: int | None

    def __post_init__(self) -> None:
        require(self.kind in ("serial", "processes"), "kind", self.kind, "'serial' or 'processes'")
        require(self.workers is None or 1 <= self.workers <= 4096, "workers", self.workers, "in 1..4096 or null")


class Executor(Protocol):
    """Maps f(context, unit) over units."""

    def map(self, f: Callable[[Any, Unit], Result], units: Iterable[Unit]) -> list[Result]:
        """Returns the results in the order of the units."""


@dataclass(frozen=True)
class _Serial:
    context: Any

    def map(self, f: Callable[[Any, Unit], Result], units: Iterable[Unit]) -> list[Result]:
        return [f(self.context, unit) for unit in units]


@dataclass(frozen=True)
class _Processes:
    pool: ProcessPoolExecutor

    def map(self, f: Callable[[Any, Unit], Result], units: Iterable[Unit]) -> list[Result]:
        try:
            return list(self.pool.map(_work, ((f, unit) for unit in units)))
        except BrokenProcessPool:
            raise DeviceError(
                "a worker process died (killed, or out of memory?); the finished rounds are safe, resume the run"
            ) from None


def _start(build: Callable[[], Any]) -> None:
    global _context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _context = _single_threaded(build)


def _die_with_parent() -> None:
    """Ends a worker whose parent was killed: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


def _work(task: tuple[Callable[[Any, Any], Any], Any]) -> Any:
    f, unit = task
    return f(_context, unit)


def _single_threaded(build: Callable[[], Any]) -> Any:
    import torch

    torch.set_num_threads(1)  # two threads sum in another order and give other bits
    return build()


@contextlib.contextmanager
def executor(execution: Execution, build: Callable[[], Any]) -> Iterator[Executor]:
    """Yields the executor; each of its processes calls `build` once for the context that `map` hands to f."""
    workers = execution.workers or os.cpu_count() or 1
    if execution.kind == "serial":
        yield _Serial(_single_threaded(build))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(build,))
    try:
        yield _Processes(pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
