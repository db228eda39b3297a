"""What the built-in pruners rank by."""

from __future__ import annotations

import numpy as np
from conftest import outcome

from fedprune_cli.contracts.test_pruners import NO_CHANNELS, NOBODY, pruner_of
from fedprune_cli.learn.prune import build_masks
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.state import State


def test_ties_are_kept_by_index() -> None:
    pruner = pruner_of("magnitude")
    state = State(0, np.array([1, -1, 1, 1], np.float32), NOBODY, {})
    assert build_masks(pruner, state, np.array([0.5]), 0, NO_CHANNELS)[0].tolist() == [True, True, False, False]


def test_the_random_pruner_redraws_every_round_and_taylor_follows_the_gradient() -> None:
    random, taylor = pruner_of("random"), pruner_of("taylor")
    orders = [random.importance(State(n, np.ones(50, np.float32), NOBODY, {}), 0) for n in (0, 0, 1)]
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()
    state = State(0, np.array([1, 1, 1], np.float32), NOBODY, taylor.slots(Sizes(0, 3)))
    remembered = taylor.next_slots(state.slots, outcome(gradient=np.array([0, 3, -2], np.float32)))["gradient"]
    assert remembered.tolist() == [1, 3, -2]  # no news of the first entry: it keeps its last gradient
