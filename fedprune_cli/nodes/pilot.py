"""A pilot: the nodes of a folder of certificates as the site of runs, and the roster that they make."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.execute import Executor
from fedprune_cli.nodes.certificates import CA_KEY, NAME
from fedprune_cli.nodes.executor import Host, NodeExecutor, Taken, measured
from fedprune_cli.nodes.protocol import SPARE_BYTES, RunOrder, Terms
from fedprune_cli.round.evaluate import fresh_schedule
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.files import Plain, read_json
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.store.write import write_whole
from fedprune_cli.world.datasets.roster import Card, read_cards, roster_json

ROSTER = "roster.json"
SUMMED = "summed.json"  # which run has made secure sums with which seed


def _over_grpc(address: str, terms: Terms) -> AbstractContextManager[Host]:
    from fedprune_cli.nodes.desk import desk

    return desk(address, terms)


def _over_flower(_: str, terms: Terms) -> AbstractContextManager[Host]:
    from fedprune_cli.nodes.flower import superlink

    return superlink(terms)


CARRIERS = {"nodes": _over_grpc, "flower": _over_flower}  # by execution.kind; each needs packages of its own


@dataclass(frozen=True)
class Pilot:
    """Where the server listens, its folder, and who is told what happens; config: of the run, for the nodes; kind: one of CARRIERS."""

    folder: Path
    address: str
    say: Callable[[str], None]
    config: Mapping[str, Plain] = field(default_factory=dict)
    done: dict[int, Taken] = field(default_factory=dict)
    kind: str = "nodes"

    @contextlib.contextmanager
    def executor(self, setup: Setup) -> Iterator[Executor]:
        """As Site.executor."""
        experiment = setup.experiment
        order = RunOrder(f"{experiment.config_hash}-s{experiment.seed}", self.config)
        if experiment.privacy.secure:
            self._keep_apart(order.run, experiment.seed)
        if setup.batched:
            block = experiment.training.block
            why = f"a device that keeps everything trains as one of {block}, to have a simulation's bytes"
            self.say(f"note: training.block={block}: {why}; training.block=1 takes it less time")
        cards = read_cards(self.folder / ROSTER)
        most_bytes = 4 * setup.blueprint.cost.shared_params + SPARE_BYTES
        run_dir = str(experiment.run_dir.absolute())
        patience_s = experiment.execution.patience_s
        terms = Terms(self.folder, len(cards), most_bytes, patience_s, self.say, cards, order, run_dir)
        with CARRIERS[self.kind](self.address, terms) as here:
            policy = experiment.failsafe.policy
            drops, fresh = not (policy.waits or policy.defers), functools.partial(fresh_schedule, setup)
            yield NodeExecutor(here, setup.blueprint.layout, drops, self.done, fresh, say=self.say)
            here.end()

    def measured(self, record: RoundRecord) -> Mapping[str, object]:
        """As Site.measured."""
        return measured(self.done, record)

    def roster(self) -> list[Card]:
        """Returns the cards of the pilot's devices; the first time it waits until each of them has come, and writes them down."""
        path = self.folder / ROSTER
        if not path.exists():
            terms = Terms(self.folder, self._enrolled(), SPARE_BYTES, 0.0, self.say)
            with CARRIERS[self.kind](self.address, terms) as here:
                cards = here.gather()
            write_whole(path, roster_json(cards))
        return read_cards(path)

    def _keep_apart(self, run: str, seed: int) -> None:
        """Raises ConfigError where another run of this pilot has made secure sums with the same seed; says what the server should not have.

        Two runs of one seed begin with the same u, and devices with the same samples: of the sums of their first rounds, one with a device
        less, the difference would be what that one sent.
        """
        path = self.folder / SUMMED
        before = read_json(path, CheckpointError) if path.exists() else {}
        if before.get(str(seed), run) != run:
            why = f"{before[str(seed)]} of this pilot has made secure sums with it, and their difference may be one device's change"
            raise ConfigError(f"seed={seed}: {why}; take another seed")
        write_whole(path, (json.dumps(before | {str(seed): run}, indent=1) + "\n").encode())
        if (self.folder / CA_KEY).exists():
            whose = "whoever has it can sign as any device; move it away from the server, where enroll needs it alone"
            self.say(f"warning: {self.folder / CA_KEY} is here: {whose}")

    def _enrolled(self) -> int:
        """Returns how many devices have certificates; raises CheckpointError unless their numbers are 0, 1, 2 and so on."""
        found = [NAME.fullmatch(path.name) for path in self.folder.glob("device-*")]
        numbers = sorted(int(one[1]) for one in found if one)
        if not numbers:
            raise CheckpointError(
                f"{self.folder}: no device is enrolled here; fedprune enroll {self.folder} DEVICE... does it"
            )
        if numbers != [*range(len(numbers))]:
            raise CheckpointError(f"{self.folder}: devices must be 0, 1, 2 and so on, enrolled are {numbers}")
        return len(numbers)
