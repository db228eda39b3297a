"""A node's own noise, and how much of its privacy budget it has spent: both on its disk before it answers, whatever a server says.

The key of the noise comes from a secret of the node's and from all that decides what the noise is added to: the run's configuration, the
node's samples, its v_k, and what it was asked. So the same task has the same noise again, after either side was killed, and tells nothing
more; another task has other noise, and is paid for. Tests, which nothing noises, are counted.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedprune_cli.errors import CheckpointError
from fedprune_cli.privacy.accounting import LARGEST, SMALLEST_NOISE, Release, draws_for, epsilon, require_accountant
from fedprune_cli.privacy.secure import RefusedSumError
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.store.files import fits, read_bytes, read_json
from fedprune_cli.store.write import private_folder, write_durable

PRIVATE, SECRET = "private", "noise.key"  # a folder that its owner alone can look into
SPENT = "spent.json"
SECRET_BYTES = 32
RELEASE = {"noise": float, "rate": float, "times": int}
SPARE_TESTS = 10  # of rounds that are made again with other survivors
FORM = {
    "of": str, "epsilon": float, "delta": float, "may_test": int, "release": (RELEASE, None), "rounds": int, "tasks": [str], "tests": [str]
}  # fmt: skip


class SpentError(RefusedSumError):
    """A task that would tell more of this device than its privacy budget allows."""


@dataclass(frozen=True)
class Ledger:
    """What a run may spend, epsilon at delta, and has spent.

    of: the SHA-256 of its configuration and of the node's samples; may_test: how many models it may have tested; release: what a round of
    the device's releases, None before the first; rounds: how many the budget allows; tasks, tests: what was paid for and tested, by the
    SHA-256 of what was asked.
    """

    of: str
    epsilon: float
    delta: float
    may_test: int
    release: Release | None = None
    rounds: int = 0
    tasks: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Purse:
    """What a node has to spend in a run. folder: the run's on the node; rounds: as many as the run has, which it need not afford.

    of: the SHA-256 of the run's configuration and of the node's samples.
    """

    folder: Path
    privacy: Privacy
    rounds: int
    of: str = ""

    @property
    def may_test(self) -> int:
        """How many models of the run may be tested: those of its rounds, and of some that are made again."""
        return self.rounds + SPARE_TESTS

    def open(self) -> None:
        """Makes the ledger of a run that begins; nothing where nothing is differentially private.

        Raises CheckpointError where the run began with another configuration or other samples, and where its ledger is gone.
        """
        path = self.folder / SPENT
        if path.exists() and (self.privacy.dp is None or _read(path).of != self.of):
            other = "this run began with another configuration or other samples, and its noise is for those"
            raise CheckpointError(f"{path}: {other}; have the server begin a run of another seed")
        if self.privacy.epsilon is None or self.privacy.delta is None or self.privacy.dp is None:
            return
        if self.privacy.dp == "example":
            require_accountant(0.5)
        if not path.exists():
            if any(not file.name.startswith(".") for file in self.folder.iterdir()):
                # a file that was never whole, whose name begins with a dot, is none
                gone = "missing, though this run has begun: without it the node forgets what it has spent"
                raise CheckpointError(f"{path}: {gone}; bring it back, or leave this run by removing {self.folder}")
            _write(path, Ledger(self.of, self.privacy.epsilon, self.privacy.delta, self.may_test))

    def key(self, what: bytes) -> bytes:
        """Returns the key of the node's draws for one task, which `what` tells from all others of the run."""
        secret = _secret(self.folder.parent / PRIVATE)
        return hmac.digest(secret, f"{self.folder.name}\0{self.of}\0".encode() + what, "sha256")

    def spend(self, one: Release, entry: str) -> None:
        """Notes that noise is about to be used for what `entry` names; nothing where it was before.

        one: what a round of the device's releases. Raises SpentError where the budget does not allow it, or releases differ within the run.
        """
        if not (SMALLEST_NOISE <= one.noise <= LARGEST and 0 < one.rate <= 1 and 1 <= one.times <= LARGEST):
            raise SpentError(f"{_words(one)}, is nothing that it can reckon with")
        path = self.folder / SPENT
        ledger = _read(path)
        if ledger.release is None:
            ledger = replace(ledger, release=one, rounds=self._affords(one))
        if entry in ledger.tasks:
            return
        if ledger.release != one:
            before, now = _words(ledger.release or one), _words(one)
            raise SpentError(f"its rounds so far were of {before}, and this one is of {now}: no sum is known of both")
        if len(ledger.tasks) >= ledger.rounds:
            budget = f"epsilon {ledger.epsilon:g} at delta {ledger.delta:g} with {_words(one)}"
            raise SpentError(
                f"its privacy budget, {budget}, allows {ledger.rounds} rounds of this run, and this is another one"
            )
        _write(path, replace(ledger, tasks=(*ledger.tasks, entry)))

    def allow_test(self, entry: str) -> None:
        """Notes that a model is about to be tested, which `entry` names; raises SpentError for one more than the run may have tested."""
        path = self.folder / SPENT
        ledger = _read(path)
        if entry in ledger.tests:
            return
        if len(ledger.tests) >= ledger.may_test:
            raise SpentError(f"it has tested {len(ledger.tests)} models of a run of {self.rounds} rounds, and no more")
        _write(path, replace(ledger, tests=(*ledger.tests, entry)))

    def _affords(self, one: Release) -> int:
        """Returns how many rounds the budget allows, at most all of the run's. It takes seconds where samples are drawn."""
        budget, delta = self.privacy.epsilon or 0.0, self.privacy.delta or 0.0
        if epsilon(Release(one.noise, one.rate, self.rounds * one.times), delta) <= budget:
            return self.rounds
        return draws_for(budget, delta, one, self.rounds)


def ledgers(node: Path, but: Path) -> Iterator[Ledger]:
    """Yields what the runs of a node have spent, of those whose folder is not `but`; raises CheckpointError for a damaged one."""
    yield from (_read(path) for path in sorted(node.glob(f"*/{SPENT}")) if path.parent != but)


def _secret(place: Path) -> bytes:
    """Returns the node's secret, which is drawn from the operating system the first time; raises CheckpointError for a damaged one."""
    path = place / SECRET
    if not path.exists():
        private_folder(place)
        write_durable(path, os.urandom(SECRET_BYTES))
    secret = read_bytes(path, SECRET_BYTES, CheckpointError)
    if len(secret) != SECRET_BYTES:
        raise CheckpointError(f"{path}: damaged (must be {SECRET_BYTES} bytes); remove it to have a new one")
    return secret


def _words(one: Release) -> str:
    return f"noise {one.noise:g}, {one.times} draws with probability {one.rate:.4g}"


def _write(path: Path, ledger: Ledger) -> None:
    write_durable(path, (json.dumps(asdict(ledger)) + "\n").encode())


def _read(path: Path) -> Ledger:
    value = read_json(path, CheckpointError)
    if not (fits(value, FORM) and {*value} == {*FORM} and value["epsilon"] > 0 and value["delta"] > 0):
        raise CheckpointError(f"{path}: damaged (not what a node has spent of its privacy budget)")
    one = value["release"]
    release = None if one is None else Release(one["noise"], one["rate"], one["times"])
    return Ledger(**value | {"release": release, "tasks": tuple(value["tasks"]), "tests": tuple(value["tests"])})
