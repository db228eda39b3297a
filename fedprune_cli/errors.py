"""Errors as part of the interface: one line each, and an exit code of its own.

A plug-in checks its own numbers with `require`; config.py adds where the number was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_MESSAGE = 1000  # characters


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
    """The work of one simulated device failed; names round, device and stage."""

    exit_code = 7


class OutputError(FedpruneError):
    """Results cannot be written (full disk, read-only folder)."""

    exit_code = 8


class LimitError(FedpruneError):
    """A watched run broke one of its limits."""

    exit_code = 9


def out_of_memory(error: MemoryError | RuntimeError) -> DeviceError:
    """Returns a refusal of memory, NumPy's or PyTorch's, as an error of one line; raises every other one again."""
    if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
        raise error
    return DeviceError(f"out of memory ({str(error) or 'refused by the system'}); finished rounds are safe")


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
