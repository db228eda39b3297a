"""Laws over every registered pruner."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from conftest import outcome
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.learn.prune import PRUNERS, Pruner, build_masks
from fedprune_cli.learn.structured import Layout
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.state import State, untrained

NO_CHANNELS = Layout((), {}, 0, {})  # single entries are dropped
NOBODY = untrained(np.zeros(0, np.float32), 0)
each_pruner = pytest.mark.parametrize("name", PRUNERS)


@functools.cache
def pruner_of(name: str) -> Pruner:
    return build_experiment(compose_config([f"pruner={name}"])).pruner


def state_of(pruner: Pruner, size: int, seed: int) -> State:
    rng = np.random.Generator(np.random.PCG64(seed))
    shared = np.round(rng.normal(size=size), 1).astype(np.float32)  # rounded: ties happen
    return State(2, shared, NOBODY, pruner.slots(Sizes(0, size)))


@each_pruner
@given(size=st.integers(1, 300), ratios=st.lists(st.floats(0, 1), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_masks_are_nested_and_of_exact_count(name: str, size: int, ratios: list[float], seed: int) -> None:
    pruner = pruner_of(name)
    masks = build_masks(pruner, state_of(pruner, size, seed), np.array(ratios), seed, NO_CHANNELS)
    for device, ratio in enumerate(ratios):
        assert masks[device].sum() == round((1 - ratio) * size)
    for weak in range(len(ratios)):
        for strong in range(len(ratios)):
            if ratios[weak] >= ratios[strong]:
                assert (masks[weak] <= masks[strong]).all()


@each_pruner
def test_what_is_kept_matters_at_least_as_much_as_what_is_dropped(name: str) -> None:
    pruner = pruner_of(name)
    state = state_of(pruner, 200, 3)
    slots = {slot: np.linspace(-1, 1, 200, dtype=np.float32) for slot in state.slots}
    state = State(state.round, state.shared, state.personal, slots)
    importance = pruner.importance(state, 7)
    mask = build_masks(pruner, state, np.array([0.6]), 7, NO_CHANNELS)[0]
    assert importance[mask].min() >= importance[~mask].max()


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
