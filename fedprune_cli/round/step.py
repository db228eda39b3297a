"""THE PAGE TO READ FIRST: a round is allocate, prune, train, aggregate, meter, record."""

from __future__ import annotations

from fedprune_cli.execute import Executor
from fedprune_cli.round.bill import charge, charge_idle
from fedprune_cli.round.evaluate import evaluate_round
from fedprune_cli.round.memory import next_slots
from fedprune_cli.round.plan import plan_round
from fedprune_cli.round.receive import receive
from fedprune_cli.round.record import Finished, build_record
from fedprune_cli.round.rest import rest
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import Setup
from fedprune_cli.round.work import assign, train_round
from fedprune_cli.serve.deliver import Sent
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.store.state import State


def round_step(setup: Setup, state: State, workers: Executor) -> tuple[State, RoundRecord]:
    """Returns the state after one more round, and the round's record."""
    experiment = setup.experiment
    roster = choose_roster(setup, state.round, state.slots)  # who is there, who trains, who is frozen or shut out
    if not len(roster.asked):
        return rest(setup, state, roster, workers)
    plan = plan_round(setup, roster, state.slots)  # ratios, bandwidths and bits: by what the server believes
    work = assign(setup, state, roster, plan)  # masks and tasks, and what fate has in store
    results = train_round(setup, work, workers)
    bill = charge(setup, roster, plan, work, results)  # modelled seconds, joules and bytes: at the truth

    sent = Sent(
        results.updates, work.masks, work.fates, work.moment, bill.training.latency_s, plan.deadline_s, work.expected,
        results.total_of,
    )  # fmt: skip
    delivery, shared, gradient = receive(setup, state, sent)  # what arrives, when the server stops waiting, the new u
    bill = charge_idle(setup, roster, work, bill, delivery.latency_s)

    finished = Finished(plan, work, results, bill, delivery)
    outcome = finished.outcome(state, gradient)  # the facts that memories learn from
    personal = state.personal.replaced({update.device: update.personal for update in results.all})
    new = State(state.round + 1, shared, personal, next_slots(experiment, state.slots, outcome), work.masks.arrays())
    scores = evaluate_round(setup, new, work.masks, workers)
    return new, build_record(setup, new, finished, outcome, scores)
