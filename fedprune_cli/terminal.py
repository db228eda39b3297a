"""What a person at a terminal sees: tables, what is going on, and how far it is. `--quiet` leaves only errors."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprune_cli.store.record import RoundRecord

from fedprune_cli.errors import OutputError

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
EVERY_S = 2.0  # between lines of progress where there is no terminal
GLANCE_S = 0.5  # between looks at what others have done


def be_quiet(quiet: bool) -> bool:
    """Returns whether only errors are to be seen from here on; raises OutputError when more is, and stdout cannot take it."""
    _quiet.set(quiet)
    return not need_stdout(not quiet)


def need_stdout(needed: bool) -> bool:
    """Returns whether stdout is `needed`; raises OutputError, before anything is done, when it is, and is closed or full."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # held in memory
        return needed
    try:
        if needed:
            os.write(descriptor, b"")
    except OSError as error:
        raise OutputError(f"cannot write to stdout: {error.strerror}; --quiet needs none") from None
    return needed


def hold_streams() -> None:
    """Puts something in the place of standard streams that are closed, so that no file that is opened is taken for one of them.

    What cannot be encoded is written in other letters.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # a stdout that refuses what is written: that it is closed is an error only for who needs it
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


PLAIN = {"±": "+-", "−": "-", "–": "-", "×": "x", "≤": "<=", "≥": ">=", "…": "...", "·": "*", "λ": "lambda", "ρ": "rho"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


def let_go() -> OutputError | None:
    """Ends what is written to the standard streams, so that nothing is left for Python to fail with; returns why stdout took not all."""
    refused = None
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            if descriptor == 1:
                refused = OutputError(f"cannot write to stdout: {getattr(error, 'strerror', error)}")
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return refused


def tell_error(error: object) -> None:
    """Prints an error's line, whether or not stderr takes it."""
    with contextlib.suppress(OSError):
        print(f"error: {error}", file=sys.stderr, flush=True)


def show(result: Any) -> None:
    """Prints a table or a text, which is what the command was asked for."""
    from rich.console import Console

    if not _quiet.get():
        console = Console(markup=False, emoji=False)  # names are the user's, and may look like markup
        with console.capture() as shown:
            console.print(result)
        tell(shown.get())


def say(line: str) -> None:
    """Prints a line that belongs to the result."""
    if not _quiet.get():
        tell(f"{line}\n")


def print_json(value: object) -> None:
    """Prints a result for programs on one line, which --quiet leaves as it is."""
    tell(json.dumps(value) + "\n")


def tell(text: str) -> None:
    """Writes to stdout, at once; raises OutputError when the system refuses."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(f"cannot write to stdout: {error.strerror}") from None


def note(line: str) -> None:
    """Prints a line about what is going on."""
    if not _quiet.get():
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def live() -> Iterator[Callable[[Any], None]]:
    """Yields a function that shows a table in the place of the one before; where there is no terminal, below it."""
    from rich.console import Console
    from rich.live import Live

    if not Console().is_terminal or _quiet.get():
        yield show
        return
    with Live(auto_refresh=False) as shown:
        yield lambda table: shown.update(table, refresh=True)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Says what is going on while it takes long, on a terminal only."""
    from rich.console import Console

    with Console(stderr=True, quiet=_quiet.get()).status(text):
        yield


@contextlib.contextmanager
def counting(text: str, count: Callable[[], int]) -> Iterator[None]:
    """Says how many of something are done while others do them: live on a terminal, else a line when there are more."""
    from rich.console import Console

    console, done = Console(stderr=True, quiet=_quiet.get()), threading.Event()

    def look(tell: Callable[[str], None]) -> None:
        seen = 0
        while not done.wait(GLANCE_S if console.is_terminal else EVERY_S):
            now = count()
            if now != seen:
                seen = now
                tell(f"{now} {text}")

    with contextlib.ExitStack() as stack:
        tell: Callable[[str], None] = note
        if console.is_terminal:
            tell = stack.enter_context(console.status(f"0 {text}")).update
        watcher = threading.Thread(target=copy_context().run, args=(look, tell), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


@contextlib.contextmanager
def progress(title: str, rounds: int) -> Iterator[Callable[[RoundRecord], None]]:
    """Yields a function that shows a record, of `rounds` in all: a live bar on a terminal, else a line every two seconds at most."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if _quiet.get():
        yield lambda record: None
        return
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=rounds, figures="")
            yield lambda record: bar.update(task, completed=record.round, figures=figures_of(record))
        return
    started = shown = time.monotonic()
    first = 0

    def line(record: RoundRecord) -> None:
        nonlocal shown, first
        first = first or record.round - 1
        now, left = time.monotonic(), rounds - record.round
        if now - shown >= EVERY_S or not left:
            shown = now
            eta = (now - started) / (record.round - first) * left
            note(f"round {record.round}/{rounds}  {figures_of(record)}  ETA {eta:.0f} s")

    yield line


def figures_of(record: RoundRecord) -> str:
    """Returns a round's figures in a few words."""
    accuracy = "" if record.accuracy is None else f"accuracy {100 * record.accuracy:.1f} %  "
    ratio = "" if record.mean_ratio is None else f"  ratio {record.mean_ratio:.2f}"
    return f"{accuracy}simulated {record.simulated_s:.4g} s{ratio}"
