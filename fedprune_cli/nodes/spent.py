"""A node's own noise, and how much of its privacy budget it has spent: both on its disk before it answers, whatever a server says.

The key of the noise comes from a secret of the node's and from all that it was asked. So the same task has the same noise again, after
either side was killed, and tells nothing more; another task has other noise, and is paid for. What is spent is counted by run: whoever
takes part in several runs has spent the sum of what they may spend.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.privacy.accounting import Release, draws_for, epsilon
from fedprune_cli.privacy.secure import RefusedSumError
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.store.files import fits, read_bytes, read_json
from fedprune_cli.store.write import private_folder, write_whole

PRIVATE, SECRET = "private", "noise.key"  # a folder that its owner alone can look into
SPENT = "spent.json"
SECRET_BYTES = 32
FORM = {"release": {"noise": float, "rate": float, "times": int}, "rounds": int, "epsilon": float, "tasks": [str]}


class SpentError(RefusedSumError):
    """A task that would tell more of this device than its privacy budget allows."""


@dataclass(frozen=True)
class Purse:
    """What a node has to spend in a run. folder: the run's on the node; rounds: as many as the run has, which it need not afford."""

    folder: Path
    privacy: Privacy
    rounds: int

    def key(self, what: bytes) -> bytes:
        """Returns the key of the node's draws for one task, which `what` tells from all others of the run."""
        secret = _secret(self.folder.parent / PRIVATE)
        return hmac.digest(secret, self.folder.name.encode() + b"\0" + what, "sha256")

    def spend(self, one: Release, key: bytes) -> None:
        """Notes that a task's noise, of this key, is about to be used; nothing where it was before.

        one: what a round of the device's releases. Raises SpentError where the budget does not allow it, or releases differ within the run.
        """
        entry, path = hashlib.sha256(key).hexdigest(), self.folder / SPENT
        release, most, tasks, _ = _read(path) if path.exists() else (one, self._affords(one), [], 0.0)
        if entry in tasks:
            return
        if release != one:
            before, now = _words(release), _words(one)
            raise SpentError(f"its rounds so far were of {before}, and this one is of {now}: no sum is known of both")
        if len(tasks) >= most:
            budget = f"epsilon {self.privacy.epsilon:g} at delta {self.privacy.delta:g} with {_words(one)}"
            raise SpentError(f"its privacy budget, {budget}, allows {most} rounds of this run, and this is another one")
        ledger = {"release": asdict(one), "rounds": most, "epsilon": self.privacy.epsilon, "tasks": [*tasks, entry]}
        write_whole(path, (json.dumps(ledger) + "\n").encode())

    def _affords(self, one: Release) -> int:
        """Returns how many rounds the budget allows, at most all of the run's. It takes seconds where samples are drawn."""
        budget, delta = self.privacy.epsilon or 0.0, self.privacy.delta or 0.0
        if epsilon(Release(one.noise, one.rate, self.rounds * one.times), delta) <= budget:
            return self.rounds
        return draws_for(budget, delta, one, self.rounds)


def refuse_beyond(most: float, device: int, purse: Purse) -> None:
    """Raises ConfigError where a run, with all others that the node has been in, may spend more than epsilon `most`.

    Each counts with its whole budget, whatever it protects and at whatever delta.
    """
    run, own = f"device-{device}: {purse.folder.name}", purse.privacy.epsilon
    if purse.privacy.dp is None or own is None:
        raise ConfigError(f"{run} has no privacy.dp, and this node joined with --epsilon {most:g}")
    before = sum(_read(path)[3] for path in purse.folder.parent.glob(f"*/{SPENT}") if path.parent != purse.folder)
    if before + own > most:
        raise ConfigError(
            f"{run} may spend epsilon {own:g}, and earlier runs {before:g}: together more than this node's --epsilon {most:g}"
        )


def _secret(place: Path) -> bytes:
    """Returns the node's secret, which is drawn from the operating system the first time; raises CheckpointError for a damaged one."""
    path = place / SECRET
    if not path.exists():
        private_folder(place)
        write_whole(path, os.urandom(SECRET_BYTES))
    secret = read_bytes(path, SECRET_BYTES, CheckpointError)
    if len(secret) != SECRET_BYTES:
        raise CheckpointError(f"{path}: damaged (must be {SECRET_BYTES} bytes); remove it to have a new one")
    return secret


def _words(one: Release) -> str:
    return f"noise {one.noise:g}, {one.times} draws with probability {one.rate:.4g}"


def _read(path: Path) -> tuple[Release, int, list[str], float]:
    value = read_json(path, CheckpointError)
    if not fits(value, FORM):
        raise CheckpointError(f"{path}: damaged (not what a node has spent of its privacy budget)")
    return Release(**value["release"]), value["rounds"], value["tasks"], value["epsilon"]
