"""What the server does with a round's updates: it takes what arrives, and makes the new u of it."""

from __future__ import annotations

from dataclasses import replace

from fedprune_cli.errors import DeviceError
from fedprune_cli.round.protect import checked_by_themselves, protected_sum, step_size_of, weight_of
from fedprune_cli.round.setup import Setup
from fedprune_cli.serve.aggregate import Contribution
from fedprune_cli.serve.deliver import MAX_MAGNITUDE, Arrival, Delivery, Sent, deliver
from fedprune_cli.store.state import Array, State


def receive(setup: Setup, state: State, sent: Sent) -> tuple[Delivery, Array, Array]:
    """Returns what arrived and when the server stopped waiting, the new u [U], and the mean gradient that it implies [U].

    Raises DeviceError when every update is refused although nothing goes wrong by design: no later round would be better.
    """
    failsafe = setup.experiment.failsafe
    if setup.experiment.privacy.by_sum and sent.total_of is None:
        sent = checked_by_themselves(state.shared, sent)
    delivery = deliver(failsafe, state, sent)
    if delivery.log.refused and not delivery.arrivals and not setup.experiment.faulty:
        why = f"every update was refused (not finite, or beyond {MAX_MAGNITUDE:g})"
        raise DeviceError(f"round {state.round + 1}: {why}; lower training.lr={setup.experiment.training.lr}")
    if setup.experiment.privacy.by_sum:
        contributions, log = protected_sum(setup, state, sent, delivery.arrivals)
        delivery = replace(delivery, privacy=log)
    else:
        contributions = [_contribution(setup, arrival) for arrival in delivery.arrivals]
    shared, gradient = failsafe.aggregator.combine(state.shared, contributions)
    return delivery, shared, gradient


def _contribution(setup: Setup, arrival: Arrival) -> Contribution:
    """Returns what an arrival adds: it counts by its samples and less by its age; its change is spread over its steps' sizes."""
    weight = weight_of(setup, arrival.device) / (1 + arrival.age)
    return Contribution(arrival.mask, arrival.values, weight, step_size_of(setup, arrival.device))
