"""Stochastic rounding: unbiased, as coarse as its bits say, as long as the meter counts; and what it does to a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_setup, outcome, run_to_end
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.store.memory import Sizes
from fedprune_cli.wire.payload import Payload
from fedprune_cli.wire.quantize import BLOCK, QUANTIZED_BITS, bits_per_value, dequantize, levels, quantize

BOTH_CANDIDATES = ("payload.bits=[4,32]", "deadline.fraction=0.3")


@given(st.integers(0, 3 * BLOCK + 5), st.sampled_from(QUANTIZED_BITS), st.integers(0, 2**32), st.floats(1e-20, 1e20))
def test_a_value_is_moved_by_less_than_a_step_and_costs_what_the_meter_counts(
    size: int, bits: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal(size)).astype(np.float32)
    code = quantize(values, bits, rng)
    read = dequantize(code, size, bits)
    blocks = -(-size // BLOCK)
    assert len(code) == 4 * blocks + -(-size * bits // 8)
    assert 8 * len(code) <= bits_per_value(bits) * size + 32 + 8  # a last block that is not full, a last byte
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        step = np.abs(values[block]).max() / levels(bits)
        assert np.abs(read[block] - values[block]).max() <= step * (1 + 1e-4)


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_rounding_is_unbiased(bits: int) -> None:
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    codes = [quantize(values, bits, np.random.default_rng(i)) for i in range(1, 2001)]
    draws = np.array([dequantize(code, 200, bits) for code in codes], dtype=np.float64)
    step = np.abs(values).max() / levels(bits)
    assert np.abs(draws.mean(0) - values).max() < 5 * step / 2 / np.sqrt(len(draws)) + 1e-6
    assert draws.std(0).max() <= 0.51 * step


def test_zeros_stay_zeros() -> None:
    code = quantize(np.zeros(2000, dtype=np.float32), 4, np.random.default_rng(0))
    assert not dequantize(code, 2000, 4).any()


def test_fewer_bits_send_less_and_32_send_the_values_themselves(tmp_path: Path) -> None:
    sent = {}
    for bits in (32, *QUANTIZED_BITS):
        records = run_to_end(tmp_path / str(bits), f"payload.bits=[{bits}]", "method=personalized")
        sent[bits] = records[0]["bytes_up"]
        assert (records[0]["rounding_error"] is None) == (bits == 32)
        entries = make_setup().blueprint.cost.shared_params * len(records[0]["devices"]["id"])
        np.testing.assert_allclose(8 * sent[bits] / entries, bits_per_value(bits), rtol=0.02)
    assert sorted(sent.values()) == [sent[bits] for bits in sorted(sent)]


def test_the_choice_of_bits_is_the_best_of_its_candidates_and_a_tight_deadline_takes_few(tmp_path: Path) -> None:
    tight = run_to_end(tmp_path / "tight", *BOTH_CANDIDATES)
    loose = run_to_end(tmp_path / "loose", "payload.bits=[4,32]", "deadline.fraction=1.0")
    assert {record["bits"] for record in tight} == {4}
    assert {record["bits"] for record in loose} == {32}
    assert verify_run(make_setup(*BOTH_CANDIDATES), tmp_path / "tight", every=1).failures == ()


def test_a_spent_budget_of_time_leaves_the_choice_to_the_policy(tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "run", "devices=sampled", "payload.bits=[4,32]", "deadline.total_seconds=1e-3")
    assert records[-1]["status"] == "stretched"


def test_what_rounding_to_some_bits_cost_tells_what_other_bits_would() -> None:
    """omega_q L^2 is about the same for all bits: what is measured at one is expected at itself, and scaled at the others."""
    payload, sizes = Payload([4, 8, 32]), Sizes(3, 10)
    slots = payload.next_slots(payload.slots(sizes), outcome([0, 1], bits=8, rounding_error=0.01))
    assert payload.noise(8, 1, slots) == pytest.approx(0.01)
    assert payload.noise(8, 5, slots) == pytest.approx(0.01 / 5)
    assert payload.noise(4, 1, slots) == pytest.approx(0.01 * (127 / 7) ** 2)
    assert payload.noise(32, 1, slots) == 0
    assert payload.next_slots(slots, outcome([0], rounding_error=None)) == {}
    assert Payload([8]).slots(sizes) == {}
