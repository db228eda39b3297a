"""What a run keeps of its masks tells every one of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import make_experiment, make_setup
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.learn.prune import build_masks, masks_of_arrays
from fedprune_cli.store.state import State, untrained

NOBODY = untrained(np.zeros(0, np.float32), 0)
PRUNER = make_experiment().pruner


@pytest.mark.parametrize("granularity", ["weight", "channel"])
@given(ratios=st.lists(st.floats(0, 1), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_masks_come_back_from_their_arrays(granularity: str, ratios: list[float], seed: int) -> None:
    """As few bytes as tell them give every device the same entries and channels; where everybody keeps all there is nothing to tell."""
    layout = make_setup(f"pruner.granularity={granularity}", "model.hidden=[16,12]").blueprint.layout
    size = sum(math.prod(shape) for shape in list(layout.shapes.values())[: layout.num_shared])
    shared = np.random.Generator(np.random.PCG64(seed)).normal(size=size).astype(np.float32)
    masks = build_masks(PRUNER, State(2, shared, NOBODY, {}), np.array(ratios), seed, layout)
    arrays = masks.arrays()
    assert all(value.dtype == np.uint8 for value in arrays.values())
    again = masks_of_arrays(arrays, layout, len(ratios))
    assert again is not None
    for device in range(len(ratios)):
        assert np.array_equal(again[device], masks[device])
        assert all(map(np.array_equal, again.kept_units(device), masks.kept_units(device))) or masks[device].all()
    assert (not arrays) == all(masks[device].all() for device in range(len(ratios)))
    assert not arrays or masks_of_arrays(arrays, layout, len(ratios) + 1) is None
    assert (
        not arrays or masks_of_arrays({name: value[1:] for name, value in arrays.items()}, layout, len(ratios)) is None
    )
