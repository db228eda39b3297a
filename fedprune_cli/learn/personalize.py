"""Methods: which part is personalized, and in which order a device trains its two parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from fedprune_cli.errors import require

Kind = Literal["personal", "shared", "both"]


@dataclass(frozen=True)
class Phase:
    """A stretch of local steps that updates one part, or both at once, while the rest is frozen."""

    kind: Kind
    steps: int


class Method(Protocol):
    """A method plug-in: a frozen dataclass whose fields are its configuration."""

    @property
    def name(self) -> str: ...

    @property
    def personal_part(self) -> str: ...

    def phases(self) -> tuple[Phase, ...]:
        """Returns a device's work of one round, in order."""


@dataclass(frozen=True)
class FedAlt:
    """Personal steps with u frozen, then shared steps with v frozen (Pillutla et al., ICML 2022, Algorithm FedAlt).

    The same schedule is FedRep with many personal steps (Collins et al., ICML 2021), FedAvg with nothing personalized
    and purely local training with everything personalized.
    """

    name: str
    personal_part: str
    personal_steps: int
    shared_steps: int

    def __post_init__(self) -> None:
        require(0 <= self.personal_steps <= 10**6, "personal_steps", self.personal_steps, "in 0..1000000")
        require(0 <= self.shared_steps <= 10**6, "shared_steps", self.shared_steps, "in 0..1000000")

    def phases(self) -> tuple[Phase, ...]:
        return Phase("personal", self.personal_steps), Phase("shared", self.shared_steps)


@dataclass(frozen=True)
class FedSim:
    """Both parts in the same steps (Pillutla et al., Algorithm FedSim); with the head personalized it is FedPer."""

    name: str
    personal_part: str
    steps: int

    def __post_init__(self) -> None:
        require(0 <= self.steps <= 10**6, "steps", self.steps, "in 0..1000000")

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("both", self.steps),)


def personal_only(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Returns the phases of a device that trains its personal part alone: steps on both become steps on that."""
    return tuple(Phase("personal", phase.steps) for phase in phases if phase.kind != "shared")


METHODS: dict[str, type[Method]] = {
    "proposed": FedAlt,
    "personalized": FedAlt,
    "pruned": FedAlt,
    "fedavg": FedAlt,
    "local": FedAlt,
    "fedrep": FedAlt,
    "fedsim": FedSim,
    "fedper": FedSim,
}
