"""Laws of pruners: nested masks of exact count, what matters most is kept, and a memory is a function of a round's facts."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import configured, each, outcome
from fedprune_cli.learn.prune import Pruner, build_masks
from fedprune_cli.learn.structured import Layout
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.state import State, untrained

NO_CHANNELS = Layout((), {}, 0, {})  # single entries are dropped
NOBODY = untrained(np.zeros(0, np.float32), 0)
each_pruner = each("pruners")


@functools.cache
def pruner_of(name: str) -> Pruner:
    return build_experiment(configured(f"pruner={name}")).pruner


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
        assert masks[device].sum() == round((1 - ratio) * size), (
            f"{masks[device].sum()} of {size} are kept at ratio {ratio}"
        )
    for weak in range(len(ratios)):
        for strong in range(len(ratios)):
            if ratios[weak] >= ratios[strong]:
                assert (masks[weak] <= masks[strong]).all(), "a mask is not within that of a lower ratio"


@each_pruner
def test_what_is_kept_matters_at_least_as_much_as_what_is_dropped(name: str) -> None:
    pruner = pruner_of(name)
    state = state_of(pruner, 200, 3)
    slots = {slot: np.linspace(-1, 1, 200, dtype=np.float32) for slot in state.slots}
    state = State(state.round, state.shared, state.personal, slots)
    importance = pruner.importance(state, 7)
    mask = build_masks(pruner, state, np.array([0.6]), 7, NO_CHANNELS)[0]
    assert importance[mask].min() >= importance[~mask].max()


@each_pruner
def test_the_ranking_is_finite_and_the_same_each_time(name: str) -> None:
    pruner = pruner_of(name)
    state = state_of(pruner, 100, 1)
    before = state.shared.copy()
    importance = pruner.importance(state, 3)
    assert importance.shape == (100,), "importance must be one number for each shared entry"
    assert np.isfinite(importance).all(), "an entry's importance is not finite"
    np.testing.assert_array_equal(importance, pruner.importance(state, 3), "randomness must come from rng.stream alone")
    np.testing.assert_array_equal(state.shared, before, "it changed the state that it was shown")


@each_pruner
def test_what_it_remembers_keeps_its_form(name: str) -> None:
    """Slots are named arrays: a round replaces some, by others of the same shape and type, and a checkpoint can hold them."""
    pruner = pruner_of(name)
    first = pruner.slots(Sizes(4, 50))
    facts = outcome([1, 3], gradient=np.linspace(-1, 1, 50, dtype=np.float32))
    later = pruner.next_slots(first, facts)
    assert set(later) <= set(first), "next_slots knows names that slots does not"
    for key, value in later.items():
        assert (value.shape, value.dtype) == (first[key].shape, first[key].dtype), (
            f"slot {key} changes its shape or type"
        )
        np.testing.assert_array_equal(value, pruner.next_slots(first, facts)[key])
