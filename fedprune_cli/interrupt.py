"""Ctrl-C and SIGTERM: the process ends soon, says in one line what is safe, and shows no traceback, wherever the signal found it.

Imported before anything else, and so it imports next to nothing. What it remembers belongs to the process: a signal came or it did not.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTHING = "nothing was written yet"
SAME_COMMAND = "every finished round is safe: the same command continues"
GRACE_S = 10.0  # for what has to be closed: then the process ends all the same

_process = os.getpid()
_code = 0  # once a signal came: the exit code that goes with it
_said = False  # whether the line was printed


class Interrupted(SystemExit):
    """A signal asked this process to end. Nothing that catches errors catches it, and nobody prints a traceback of it."""


def _nothing() -> str:
    return NOTHING


_safe: Callable[[], str] = _nothing


def heed() -> None:
    """Answers both signals from here on, unless whoever started the process told it to ignore them, as `nohup` and `&` do."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _answer)
    sys.unraisablehook = _unraisable


@contextlib.contextmanager
def safe(words: Callable[[], str]) -> Iterator[None]:
    """While inside, an interruption says `words()`: what is safe, and how to go on. They are asked for when they are printed."""
    global _safe
    before, _safe = _safe, words
    yield
    _safe = before  # and not after an error: an interruption is one, and its line is still to be printed


def signalled() -> bool:
    """Whether a signal came: whatever is raised from then on is its consequence."""
    return _code != 0


def leave() -> NoReturn:
    """Says the line and ends this process with the signal's exit code: children at once, then what was registered for the exit."""
    _say()
    with contextlib.suppress(BaseException):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if "multiprocessing.process" in sys.modules:
            for child in sys.modules["multiprocessing.process"].active_children():
                child.kill()  # finished rounds are on disk
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
    os._exit(_code or 128 + signal.SIGINT)


def _answer(number: int, frame: FrameType | None) -> None:
    global _code
    if os.getpid() != _process:  # a copy of the process, on its way to be another program
        os._exit(128 + number)
    if _code:
        _end()
    _code = 128 + number
    try:
        _thread.start_new_thread(_guard, ())
    except RuntimeError:  # no thread can be had
        _end()
    if _importing(frame):  # where C code makes something else of any exception, or aborts
        leave()
    raise Interrupted(_code)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _guard() -> None:
    """Ends the process when it has not ended by itself: somebody swallowed the exception, or waits for what does not come."""
    time.sleep(GRACE_S)
    _end()


def _unraisable(unraisable: UnraisableHookArgs) -> None:
    """Ends the process when the exception was lost, in a destructor or a callback; leaves other such errors to Python."""
    if isinstance(unraisable.exc_value, Interrupted):
        leave()
    if not _code:
        sys.__unraisablehook__(unraisable)


def _end() -> NoReturn:
    _say()
    os._exit(_code)


def _say() -> None:
    global _said
    said, _said = _said, True
    if said:
        return
    with contextlib.suppress(BaseException):
        clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # a line half drawn, a cursor hidden
        os.write(2, f"{clear}interrupted; {_safe()}\n".encode(errors="backslashreplace"))
