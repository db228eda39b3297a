"""The members of a comparison: side by side, each in a process of its own, or one by one; one that fails leaves the rest alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedprune_cli import plugins
from fedprune_cli.errors import DeviceError, explained
from fedprune_cli.execute import begin_child, forkserver, starting
from fedprune_cli.many.one import HIDDEN, Display, run_rounds, run_to_end
from fedprune_cli.round.setup import Setup
from fedprune_cli.runs.life import begin_or_reopen, serially


@dataclass(frozen=True)
class Member:
    """One run of a comparison: its arm and seed, its configuration as YAML, where it is kept, and whether it was finished before.

    reported: whether it gets a report of its own; the trials that choose a setting are many, and stand in the comparison's.
    """

    arm: str
    seed: int
    config: str
    run_dir: Path
    finished: bool = False
    reported: bool = True

    def take(self, setup: Setup, display: Display = HIDDEN) -> None:
        """Takes the begun run to its end."""
        (run_to_end if self.reported else run_rounds)(setup, self.run_dir, display)

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Failure:
    """Why a member has no result, in one line, and the exit code that goes with it."""

    member: Member
    exit_code: int
    message: str

    def __str__(self) -> str:
        return f"{self.member}: {self.message}"


def run_one_by_one(members: Sequence[Member], display: Display) -> Iterator[tuple[Member, Failure | None]]:
    """Begins or continues the members in this process, as `display` shows; yields each when it ends, and why it failed if it did."""
    for member in members:
        try:
            with display.status("loading data and building the world"):
                setup = _begin(member)
            member.take(setup, display)
        except Exception as error:
            known = explained(error)
            yield member, Failure(member, known.exit_code, str(known))
        else:
            yield member, None


def run_members(members: Sequence[Member], jobs: int) -> Iterator[tuple[Member, Failure | None]]:
    """Begins or continues the members, `jobs` at a time, each serially; yields each when it ends, and why it failed if it did."""
    context = forkserver([__name__])
    waiting, running = list(members), dict[int, tuple[ForkServerProcess, Member, Connection]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                member = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(member, plugins.given(), sender))
                with starting("a process for each run"):
                    process.start()
                sender.close()
                running[process.sentinel] = (process, member, receiver)
            ended = wait(list(running))
            for sentinel in [one for one in running if one in ended]:
                process, member, receiver = running.pop(sentinel)
                process.join()
                yield member, _failure(process, member, receiver)
    finally:
        for process, _, _ in running.values():
            process.kill()  # its finished rounds are on disk
            process.join()


def _failure(process: ForkServerProcess, member: Member, receiver: Connection) -> Failure | None:
    if process.exitcode == 0:
        return None
    try:
        exit_code, message = receiver.recv()
    except EOFError:
        exit_code = DeviceError.exit_code
        message = f"its process died (exit code {process.exitcode}); the same command continues it"
    return Failure(member, exit_code, message)


def _begin(member: Member) -> Setup:
    return begin_or_reopen(DictConfig(OmegaConf.create(member.config)))


def _work(member: Member, files: Sequence[plugins.PluginFile], sender: Connection) -> None:
    """Takes one member to its end, with the parent's plug-ins; tells the parent what was wrong when something was."""
    begin_child()
    try:
        plugins.give(files)
        member.take(serially(_begin(member)))
    except Exception as error:
        known = explained(error)
        sender.send((known.exit_code, str(known)))
        raise SystemExit(known.exit_code) from None
