"""How much sooner any allocation at all could end the rounds of equal bandwidth: the bound on what a joint choice can save.

A round of the arm `equal` keeps some weighted share of the model on the devices that it admits. `minlatency` finds the least time in which
these devices can keep as much, whoever of them keeps it, by any ratios and bandwidths: P1 is concave, so that nothing does it sooner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fedprune_cli.allocate.baselines import MinLatency
from fedprune_cli.many.compared import build_member, read_contest
from fedprune_cli.report.read import read_run
from fedprune_cli.report.tuning import round_s
from fedprune_cli.round.plan import plan_round
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import Setup, prepare


def bounds(overrides: Sequence[str], seeds: Sequence[int], setting: Sequence[str]) -> list[float]:
    """Returns on each seed how much less time, as a fraction, the rounds of `equal` could take at the setting that it took.

    The runs of `personalized`, which say what `round` is in the setting, are read, and have to be there.
    """
    contest = read_contest([*overrides, "tune=null"], None, None, seeds)
    dense = {seed: read_run(build_member(contest, "personalized", (), seed)[0].run_dir) for seed in seeds}
    contest = dataclasses.replace(contest, round_s={seed: round_s(run) for seed, run in dense.items()})
    return [room(prepare(build_member(contest, "equal", setting, seed)[1])) for seed in seeds]


def room(setup: Setup) -> float:
    """Returns how much less time, as a fraction, all rounds of a run could take that keep the same weight on the same devices."""
    slots, took_s, least_s = setup.initial.slots, 0.0, 0.0
    for number in range(setup.experiment.rounds):
        plan = plan_round(setup, choose_roster(setup, number, slots), slots)
        admitted = np.flatnonzero(plan.allocation.admitted)
        if not len(admitted):
            continue
        problem = plan.problem.take(admitted)
        kept = 1 - plan.allocation.prune_ratio[admitted]
        ratio = float(1 - problem.weight @ kept / problem.weight.sum())
        soonest = MinLatency("minlatency", ratio).solve(dataclasses.replace(problem, deadline_s=np.inf), 0, number)
        took_s += float(plan.allocation.latency_s[admitted].max())
        least_s += float(soonest.latency_s.max())
    return 1 - least_s / took_s
