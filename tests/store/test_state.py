from __future__ import annotations

import numpy as np
import pytest

from fedprune_cli.errors import CheckpointError
from fedprune_cli.store.state import Saved, State, decode, encode, untrained

STATE = State(
    3,
    np.arange(10, dtype=np.float32),
    untrained(np.zeros(0, np.float32), 2),
    {"simulated_s": np.array(1.5), "prune_ratio": np.zeros(2)},
)


def test_a_state_survives_the_disk_and_equal_states_have_equal_bytes() -> None:
    data = encode(Saved(STATE, "abc", "def"))
    saved = decode(data, "x")
    state = saved.state
    assert (saved.config_hash, saved.records) == ("abc", "def")
    assert state.round == 3
    assert state.slots["simulated_s"].shape == ()
    assert (len(state.personal), len(state.personal[1])) == (2, 0)
    np.testing.assert_array_equal(state.shared, STATE.shared)
    assert encode(saved) == data


def test_every_flipped_bit_and_every_truncation_is_detected() -> None:
    data = encode(Saved(STATE, "abc", "def"))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError, match="damaged"):
            decode(bytes(damaged), "x")
    for size in range(len(data)):
        with pytest.raises(CheckpointError, match="damaged"):
            decode(data[:size], "x")
