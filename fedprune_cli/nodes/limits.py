"""What a node asks of every run, whatever a server says: told once, when it joins, and kept on its own disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.nodes.spent import PRIVATE, Purse, ledgers
from fedprune_cli.store.files import fits, read_json
from fedprune_cli.store.write import private_folder, write_durable

FILE = "limits.json"
Bound = TypeVar("Bound", int, float)
FORM = {"secure": bool, "epsilon": (float, None), "delta": (float, None), "tests": (int, None)}


@dataclass(frozen=True)
class Limits:
    """secure: it takes part in secure sums only; the others, of all its runs together, None: no bound.

    epsilon, delta: what they may spend of its privacy; tests: how many models they may have tested, which tells of its data without noise.
    """

    secure: bool = False
    epsilon: float | None = None
    delta: float | None = None
    tests: int | None = None

    def refuse(self, device: int, purse: Purse) -> None:
        """Raises ConfigError where a run does not keep to them.

        Runs add up, each with its whole budget, whatever it protects.
        """
        run, privacy = f"device-{device}: {purse.folder.name}", purse.privacy
        asked = (
            ("epsilon", self.epsilon, privacy.epsilon),
            ("delta", self.delta, privacy.delta),
            ("tests", self.tests, purse.may_test),
        )
        if self.secure and not privacy.secure:
            raise ConfigError(f"{run} has no privacy.secure=true, and this node joined with --secure")
        earlier = [*ledgers(purse.folder.parent, purse.folder)]
        for key, most, own in asked:
            if most is None:
                continue
            if privacy.dp is None or own is None:
                raise ConfigError(f"{run} has no privacy.dp, and this node joined with --{key} {most:g}")
            before = sum(getattr(ledger, "may_test" if key == "tests" else key) for ledger in earlier)
            if before + own > most:
                raise ConfigError(
                    f"{run} may have {key} {own:g}, and earlier runs {before:g}: together more than this node's --{key} {most:g}"
                )


NO_LIMITS = Limits()


def remembered(node: Path, given: Limits) -> Limits:
    """Returns the limits of a node's folder, made as narrow as those that are given with a `join`, and keeps them for every later one.

    Raises CheckpointError for a damaged file.
    """
    path = node / PRIVATE / FILE
    before = _read(path) if path.exists() else NO_LIMITS
    narrow = Limits(
        before.secure or given.secure, _least(before.epsilon, given.epsilon), _least(before.delta, given.delta),
        _least(before.tests, given.tests),
    )  # fmt: skip
    if narrow != before:
        private_folder(path.parent)
        write_durable(path, (json.dumps(asdict(narrow)) + "\n").encode())
    return narrow


def _least(*bounds: Bound | None) -> Bound | None:
    return min((bound for bound in bounds if bound is not None), default=None)


def _read(path: Path) -> Limits:
    value = read_json(path, CheckpointError)
    if not fits(value, FORM) or {*value} != {*FORM}:
        raise CheckpointError(f"{path}: damaged (not what a node asks of every run)")
    return Limits(**value)
