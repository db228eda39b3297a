"""A pilot: the nodes of a folder of certificates as the site of runs, and the roster that they make."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from fedprune_cli.errors import CheckpointError
from fedprune_cli.execute import Executor
from fedprune_cli.nodes.certificates import NAME
from fedprune_cli.nodes.executor import Host, NodeExecutor, Taken, measured
from fedprune_cli.nodes.protocol import SPARE_BYTES, RunOrder, Terms
from fedprune_cli.round.evaluate import fresh_schedule
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.files import Plain
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.store.write import write_whole
from fedprune_cli.world.datasets.roster import Card, read_cards, roster_json

ROSTER = "roster.json"


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
        cards = read_cards(self.folder / ROSTER)
        most_bytes = 4 * setup.blueprint.cost.shared_params + SPARE_BYTES
        run_dir = str(experiment.run_dir.absolute())
        patience_s = experiment.execution.patience_s
        terms = Terms(self.folder, len(cards), most_bytes, patience_s, self.say, cards, order, run_dir)
        with CARRIERS[self.kind](self.address, terms) as here:
            policy = experiment.failsafe.policy
            drops, fresh = not (policy.waits or policy.defers), functools.partial(fresh_schedule, setup)
            yield NodeExecutor(here, setup.blueprint.layout, drops, self.done, fresh)
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
