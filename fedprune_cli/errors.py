"""Errors as part of the interface: one line each, and an exit code of its own.

A plug-in checks its own numbers with `require`; config/build.py adds where the number was written. What the system refuses, a library that
cannot be loaded and what nobody foresaw become errors of one line here too, by `explained`.
"""

from __future__ import annotations

import difflib
import errno
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Iterable

OWN = __name__.partition(".")[0]
MAX_MESSAGE = 1000  # characters
MAX_TEXT = 300  # of them for what somebody else's error says


def one_line(text: str) -> str:
    """Returns the text as a terminal shows it on one line: what would move the cursor is escaped, what is too long cut."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[: 2 * MAX_MESSAGE])
    return shown if len(shown) <= MAX_MESSAGE else shown[:MAX_MESSAGE] + " ..."


class FedpruneError(Exception):
    """Something the user can act on. The message is the whole story, on one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(FedpruneError):
    """A configuration value is wrong; `key` names it when the raiser knows it."""

    exit_code = 2

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class InfeasibleError(FedpruneError):
    """No allocation meets the deadline and the policy is `fail`."""

    exit_code = 3


class RegressionError(FedpruneError):
    """A measured figure is worse than the baseline's by more than the limit."""

    exit_code = 3


class CertificateError(FedpruneError):
    """An allocation's certificate is above its tolerance."""

    exit_code = 4


class CheckpointError(FedpruneError):
    """A run folder cannot be used: it exists, is damaged, or belongs to another configuration."""

    exit_code = 5


class DataError(FedpruneError):
    """A dataset, fleet table or trace is missing, truncated or malformed."""

    exit_code = 6


class DeviceError(FedpruneError):
    """This machine cannot do the work: memory, processes, shared memory, a library, or a simulated device whose work failed."""

    exit_code = 7


class OutputError(FedpruneError):
    """Results cannot be written (full disk, read-only folder, closed stdout)."""

    exit_code = 8


class LimitError(FedpruneError):
    """A watched run broke one of its limits."""

    exit_code = 9


class UnforeseenError(FedpruneError):
    """What nobody foresaw: a defect. The message names the error, and the file that holds the details."""

    exit_code = 10


CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.EPIPE,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR)
LIMITS = {
    errno.EMFILE: (resource.RLIMIT_NOFILE, "n"),
    errno.EAGAIN: (resource.RLIMIT_NPROC, "u"),
    errno.ENOMEM: (resource.RLIMIT_AS, "v"),
}


def explained(error: BaseException) -> FedpruneError:
    """Returns any error as one of one line with an exit code: what the system refused, what cannot be loaded, or what nobody foresaw."""
    if isinstance(error, FedpruneError):
        return error
    if library := _loading(error):
        reason = str(error) if isinstance(error, ImportError | OSError) else f"{type(error).__name__}: {error}"
        short = isinstance(error, MemoryError) or "map segment" in reason or "allocate memory" in reason
        number = errno.ENOMEM if short else error.errno if isinstance(error, OSError) else None
        return DeviceError(
            f"cannot load {library} ({' '.join(reason.split())[:MAX_TEXT]}){_limit(number) or '; install it again'}"
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return DeviceError(f"out of memory ({str(error) or 'refused by the system'}); finished rounds are safe")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return DeviceError(f"the system refuses a thread{_limit(errno.EAGAIN)}; finished rounds are safe")
    if isinstance(error, OSError):
        return _refused(error)
    name, text = type(error).__name__, " ".join(str(error).split())
    return UnforeseenError(
        f"unforeseen {name}{': ' * bool(text)}{text[:MAX_TEXT]}; a defect of {_whose(error)}; {_details(error)}"
    )


def _refused(error: OSError) -> FedpruneError:
    """Returns the system's refusal, which nobody closer to it has explained: by what is refused, and of which file."""
    reason, name = error.strerror or str(error) or type(error).__name__, error.filename
    if error.errno in CANNOT_WRITE:
        return OutputError(
            f"cannot use {os.fsdecode(name)}: {reason}" if isinstance(name, str | bytes) else f"cannot write: {reason}"
        )
    if error.errno in GONE and isinstance(name, str | bytes):
        return CheckpointError(f"{os.fsdecode(name)}: {reason}; another process may have removed or replaced it")
    return DeviceError(f"the system refuses what is needed: {reason}{_limit(error.errno)}; finished rounds are safe")


def _limit(number: int | None) -> str:
    """Returns the limit behind a refusal as the shell shows it, nothing where there is none."""
    kind, letter = LIMITS.get(number or 0, (None, ""))
    soft = resource.RLIM_INFINITY if kind is None else resource.getrlimit(kind)[0]
    return "" if soft == resource.RLIM_INFINITY else f" (ulimit -{letter} {soft // 1024 if letter == 'v' else soft})"


def _loading(error: BaseException) -> str | None:
    """Returns the library that could not be imported, None when the error is of another kind."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and module not in (OWN, "__main__", "__mp_main__"):
            return module
    if isinstance(error, SyntaxError) and error.filename and f"{os.sep}{OWN}{os.sep}" not in error.filename:
        path = error.filename.removesuffix(".py").removesuffix(f"{os.sep}__init__")
        return path.rpartition("site-packages" + os.sep)[2].partition(os.sep)[0] or os.path.basename(path)
    named = error.name if isinstance(error, ImportError) else None
    return named.partition(".")[0] if named and not named.startswith(OWN) else None


def _whose(error: BaseException) -> str:
    """Returns who has to mend it: the plug-in that was at work, and its line, or fedprune."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        if (file := frame.f_globals.get("__plugin__")) is not None:
            return f"{file.path}, line {line}"
    return "fedprune"


def _details(error: BaseException) -> str:
    """Writes the traceback to a new file, in the temporary folder or else here; returns where it is, in words."""
    text = "".join(traceback.format_exception(error))
    for folder in (None, "."):
        try:
            descriptor, path = tempfile.mkstemp(".txt", "fedprune-error-", folder, text=True)
            with open(descriptor, "w", errors="backslashreplace") as file:
                file.write(f"{sys.argv}\n{text}")
        except OSError:
            continue
        return f"details are in {path}"
    return "no file could be written for the details"


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises ConfigError naming `key`, its `value` and what is `allowed`, unless `ok`."""
    if not ok:
        raise ConfigError(f"{value!r} is not allowed: must be {allowed}", key=key)


def unknown(kind: str, name: str, allowed: Iterable[str], key: str | None = None) -> ConfigError:
    """Returns the error for a `name` that no table entry has, with the nearest valid one."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(names)}", key=key)
