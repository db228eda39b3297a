"""Workers on a Ray cluster: actors that hold what a run shares, and are given one task after the other. The one home of `ray`.

What every task needs of the run lies once on each node, in Ray's object store; so does an array that several tasks have in common, such
as u. A task is sent with what is its own. Who dies is replaced, and its task is done again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import os
import pickle
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from fedprune_cli import __version__, plugins
from fedprune_cli.errors import MAX_TEXT, ConfigError, DeviceError
from fedprune_cli.processor import processor
from fedprune_cli.store.state import Array

if TYPE_CHECKING:
    from ray import ObjectRef as Ref
    from ray.actor import ActorHandle as Actor  # of a _Worker

Context = TypeVar("Context")
Task = TypeVar("Task")
Result = TypeVar("Result")

ATTEMPTS = 3  # of the same task, before it is taken to be what kills its workers
CONNECT_S = 15.0  # for a cluster to answer: Ray itself waits for minutes
LOCAL_S = 60.0  # for one to start on this machine
BEGIN_S = 120.0  # for a first worker to import what it needs
LOOK_S = 0.2  # at most until a signal is heeded
LARGE = 1024  # bytes of an array that does not travel within a pickle
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

ASK = """\
import logging, sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False, configure_logging=False)
except Exception as error:
    sys.exit(print(error) or 1)
"""


def _same(task: object) -> float:
    return 0.0


@functools.cache
def reachable(address: str | None) -> None:
    """Raises ConfigError when Ray is not installed, and DeviceError when no cluster of its version answers at the address.

    A process of its own asks: Ray waits for minutes there, prints much, and may abort.
    """
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # a folder of that name is no package
        raise ConfigError("execution.kind=ray needs an extra: pip install 'fedprune[ray]'")
    if address is None:
        return
    where, quiet = f"execution.address={address}", {**QUIET, **os.environ}
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S / 3).close()
        except OSError as error:
            raise DeviceError(f"{where}: no Ray cluster there: {error.strerror or error}") from None
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK, address], env=quiet, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONNECT_S
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{where}: no answer of Ray within {CONNECT_S:.0f} s") from None
    if asked.returncode:
        reason = " ".join(asked.stdout.split()) or f"Ray ended with exit code {asked.returncode}"
        raise DeviceError(f"{where}: {reason[:MAX_TEXT]}")


@contextlib.contextmanager
def crew(address: str | None, workers: int | None, start: Callable[[], object]) -> Iterator[Crew]:
    """Yields workers of the cluster at an address, of a new one on this machine for None; each calls `start` for its context.

    workers: how many; None stands for all processors of the cluster. Raises ConfigError or DeviceError.
    """
    reachable(address)
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    import ray

    with _connected(address, workers):
        count = workers or int(ray.cluster_resources().get("CPU", 0)) or 1
        here = os.getcwd() if os.getcwd() not in sys.path else None  # where Ray lets workers import from, and we do not
        hire = ray.remote(_Worker).options(num_cpus=1, scheduling_strategy="SPREAD").remote
        hired = Crew(functools.partial(hire, plugins.given(), here, [ray.put(start)]))
        for _ in range(count):
            hired.hire_one()
        hired.gather(time.monotonic() + BEGIN_S)
        yield hired


@contextlib.contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[None]:
    """While inside, this process belongs to a cluster; raises DeviceError when it does not answer in time.

    A thread of its own connects and stays: Ray replaces no signal handler there, can be waited for, and what it starts ends with it.
    """
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL + 1)
    # Else it prints what befalls nodes to stdout.
    sys.modules["ray._private.worker"].__dict__["_worker_logs_enabled"] = False
    connected, done, refused = threading.Event(), threading.Event(), list[BaseException]()

    def stay(options: Mapping[str, object]) -> None:
        try:
            ray.init(log_to_driver=False, configure_logging=False, **options)
        except (Exception, SystemExit) as error:
            refused.append(error)
        connected.set()
        done.wait()
        ray.shutdown()

    scratch = functools.partial(tempfile.TemporaryDirectory, prefix="fedprune-ray-", ignore_cleanup_errors=True)
    with contextlib.nullcontext("") if address else scratch() as folder:
        local = {"address": "local", "num_cpus": workers, "include_dashboard": False, "_temp_dir": folder}
        thread = threading.Thread(target=stay, args=({"address": address} if address else local,), daemon=True)
        thread.start()
        what, limit_s = (f"execution.address={address}", CONNECT_S) if address else ("a local Ray cluster", LOCAL_S)
        try:
            if not connected.wait(limit_s):
                raise DeviceError(f"{what}: no answer of Ray within {limit_s:.0f} s")
            if refused:
                raise DeviceError(f"{what}: {' '.join(str(refused[0]).split())[:MAX_TEXT]}")
            yield
        finally:
            done.set()
            if connected.is_set():
                thread.join()


@dataclass(frozen=True)
class _Hand:
    """A worker that has begun, and its name for messages."""

    actor: Actor
    name: str


@dataclass
class Crew:
    """Workers of a cluster. What changes here: who is coming, idle or busy with which task, how many died before, what is placed."""

    hire: Callable[[], Actor]
    coming: dict[Ref, Actor] = field(default_factory=dict)
    idle: list[_Hand] = field(default_factory=list)
    busy: dict[Ref, tuple[_Hand, int | None]] = field(default_factory=dict)
    placed: dict[int, tuple[Array, Ref]] = field(default_factory=dict)
    unbegun: int = 0

    def map(
        self, f: Callable[[Context, Task], Result], tasks: Iterable[Task], cost: Callable[[Task], float] = _same
    ) -> list[Result]:
        """As execute.Executor.map; when a worker dies, names it on stderr and does its task again on another.

        Raises what the first task in their order raised that did, whichever is heard of first.
        """
        todo, results, losses, failed = list(tasks), dict[int, Result](), Counter[int](), dict[int, Exception]()
        letters = self._letters([(f, task) for task in todo])
        waiting = deque(sorted(range(len(todo)), key=lambda at: -cost(todo[at])))
        try:
            while len(results) < (count := min(failed, default=len(todo))):  # of the tasks before the first that failed
                while waiting and self.idle:
                    hand, at = self.idle.pop(), waiting.popleft()
                    self.busy[hand.actor.work.remote(*letters[at])] = (hand, at)
                for done, result in self._finished():
                    if done is None or done >= count:
                        continue
                    if isinstance(result, Exception):
                        failed[done] = result
                        results = {at: made for at, made in results.items() if at < done}
                        waiting = deque(at for at in waiting if at < done)
                        continue
                    if result is not None:
                        results[done] = pickle.loads(result)
                        continue
                    losses[done] += 1
                    if losses[done] == ATTEMPTS:
                        lost = f"a task was lost with its worker for the {ATTEMPTS}rd time (out of memory?)"
                        raise DeviceError(f"{lost}; the finished rounds are safe, resume the run")
                    waiting.appendleft(done)
        finally:
            self.busy = {ref: (hand, None) for ref, (hand, _) in self.busy.items()}  # nobody waits for these now
        if failed:
            raise failed[min(failed)]
        return [results[at] for at in range(len(todo))]

    def hire_one(self) -> None:
        """Asks for one more worker, which comes when the cluster has a processor for it."""
        actor = self.hire()
        self.coming[actor.begin.remote()] = actor

    def gather(self, until: float) -> None:
        """Waits for all who are coming, until a moment of the clock; those who come later take part from then on."""
        while self.coming and time.monotonic() < until:
            self._welcome_one()
        if not self.idle:
            raise DeviceError(f"no worker began within {BEGIN_S:.0f} s: the Ray cluster has no processor free for it")
        if self.coming:
            late = f"{len(self.coming)} of {len(self.coming) + len(self.idle)} workers have not begun"
            _say_once(f"{late}: the Ray cluster has no processor free for them; the others work")

    def _welcome_one(self) -> None:
        """Gives one of those who are coming a place, if any begins soon."""
        import ray

        for begun in ray.wait([*self.coming], timeout=LOOK_S)[0]:
            actor = self.coming.pop(begun)
            try:
                about = cast(dict[str, str], ray.get(begun))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                self.unbegun += 1
                if self.unbegun == ATTEMPTS:
                    last = str(error).strip().splitlines()[-1].strip()[:MAX_TEXT]
                    raise DeviceError(
                        f"workers cannot begin on the Ray cluster, which needs this fedprune: {last}"
                    ) from None
                self.hire_one()
            else:
                self.idle.append(_welcome(actor, about))

    def _finished(self) -> Iterator[tuple[int | None, bytes | Exception | None]]:
        """Waits; yields the task that is done and its pickled result, or what it raised, None where its worker died.

        No task for a worker that just came.
        """
        import ray

        if not self.busy:  # all have died
            self.gather(time.monotonic() + BEGIN_S)
            return
        while not (ended := ray.wait([*self.coming, *self.busy], timeout=LOOK_S)[0]):
            pass
        if ended[0] in self.coming:
            self._welcome_one()
            return
        hand, at = self.busy.pop(ended[0])
        try:
            result = ray.get(ended[0])
        except ray.exceptions.RayTaskError as error:  # the work's own
            self.idle.append(hand)
            yield at, error.cause
        except ray.exceptions.RayError:
            print(f"warning: {hand.name} died; the work of its task is done again", file=sys.stderr, flush=True)
            ray.kill(hand.actor)  # it may only be out of reach
            self.hire_one()
            yield at, None
        else:
            self.idle.append(hand)
            yield at, result

    def _letters(self, calls: Sequence[object]) -> list[tuple[bytes, Mapping[int, Array], Mapping[int, Ref]]]:
        """Returns what is sent for each call: its pickle, the arrays that are its own, and where those are that others have as well.

        What was placed for the last calls and is needed again, such as u after its test, is not placed again.
        """
        import ray

        pickles = [_pack(call) for call in calls]
        times = Counter(number for _, arrays in pickles for number in arrays)
        large = {number: array for _, arrays in pickles for number, array in arrays.items()}
        shared = [number for number in large if times[number] > 1 or number in self.placed]
        self.placed = {number: self.placed.get(number) or (large[number], ray.put(large[number])) for number in shared}
        return [
            (
                data,
                {number: array for number, array in arrays.items() if number not in self.placed},
                {number: self.placed[number][1] for number in arrays if number in self.placed},
            )
            for data, arrays in pickles
        ]


def _welcome(actor: Actor, about: Mapping[str, str]) -> _Hand:
    """Returns a worker that has begun, by what it says about itself; raises DeviceError where its code is not the code here."""
    for name, here in versions().items():
        if about[name] != here:
            raise DeviceError(f"node {about['node']} has {name} {about[name]}, this machine {here}: install the same")
    if about["processor"] != processor():
        _say_once(
            f"node {about['node']} has another processor ({about['processor']}, here {processor()}): the last digits may differ"
        )
    return _Hand(actor, f"worker process {about['pid']} on node {about['node']}")


@functools.cache
def _say_once(warning: str) -> None:
    print(f"warning: {warning}", file=sys.stderr, flush=True)


@functools.cache
def versions() -> Mapping[str, str]:
    """Returns what must be the same on every node: the versions of this package, by its files too, of Python, PyTorch and NumPy."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "fedprune": f"{__version__} ({digest.hexdigest()[:8]})",
        "Python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }


class _Worker:
    """One process of the cluster."""

    def __init__(self, files: Sequence[plugins.PluginFile], not_from: str | None, start: Sequence[Ref]) -> None:
        import ray

        if not_from in sys.path:
            sys.path.remove(not_from)
        self.error: Exception | None = None
        self.context: object = None
        try:
            plugins.give(files)
            self.context = ray.get(start[0])()
        except Exception as error:  # here it would be the end of this process
            self.error = error

    def begin(self) -> dict[str, str]:
        """Returns who this is; raises what its context could not be built for."""
        import ray

        if self.error:
            raise self.error
        who = {"node": ray.util.get_node_ip_address(), "pid": str(os.getpid()), "processor": processor()}
        return who | dict(versions())

    def work(self, data: bytes, own: Mapping[int, Array], placed: Mapping[int, Ref]) -> bytes:
        """Returns the pickled result of one call."""
        import ray

        arrays = {**own, **dict(zip(placed, ray.get([*placed.values()]), strict=True))}
        f, task = _unpack(data, arrays)
        return pickle.dumps(f(self.context, task), protocol=pickle.HIGHEST_PROTOCOL)


def _pack(call: object) -> tuple[bytes, dict[int, Array]]:
    """Returns a pickle without its large arrays, and these by the number that stands for each."""
    arrays: dict[int, Array] = {}

    class Packer(pickle.Pickler):
        def persistent_id(self, value: object) -> int | None:
            if type(value) is not np.ndarray or value.nbytes < LARGE:
                return None
            arrays[id(value)] = value
            return id(value)

    file = io.BytesIO()
    Packer(file, pickle.HIGHEST_PROTOCOL).dump(call)
    return file.getvalue(), arrays


def _unpack(data: bytes, arrays: Mapping[int, Array]) -> tuple[Callable[[object, object], object], object]:
    class Unpacker(pickle.Unpickler):
        def persistent_load(self, number: int) -> Array:
            return arrays[number]

    return cast(tuple[Callable[[object, object], object], object], Unpacker(io.BytesIO(data)).load())  # from our own
