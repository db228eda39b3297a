"""What an update's values cost on the uplink: which numbers of bits may be chosen, and how coarse rounding was so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.sections import LATER
from fedprune_cli.store.memory import Outcome, Sizes, Slots
from fedprune_cli.wire.quantize import BITS_PER_PARAM, QUANTIZED_BITS, levels

FIRST_ROUNDING = 10.0  # omega_q L^2 before any is measured: what rounding a Gaussian block costs


@dataclass(frozen=True)
class Payload:
    """What travels: the candidate `bits` of an uplink value.

    Of several, a round takes those that go with the allocation that learns most: sum w_k x_k / (1 + omega_q / K), since the rounding
    errors of K devices, of relative square omega_q, are independent and average out. omega_q L^2, about the same for all bits, is
    remembered as `rounding` from the last round in which any value was rounded. per_device: whether each device has bits of its own.
    """

    bits: list[int]
    per_device: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        allowed = (*QUANTIZED_BITS, BITS_PER_PARAM)
        valid = bool(self.bits) and len(set(self.bits)) == len(self.bits) and set(self.bits) <= set(allowed)
        require(valid, "bits", self.bits, f"a list of different values out of {allowed}")

    def noise(self, bits: int, num_devices: int, slots: Slots) -> float:
        """Returns omega_q / K, what rounding to `bits` is expected to add to the mean of K devices' updates, relative and squared."""
        omega = 0.0 if bits == BITS_PER_PARAM else float(slots.get("rounding", 0.0)) / levels(bits) ** 2
        return omega / max(num_devices, 1)

    def slots(self, sizes: Sizes) -> Slots:
        return {"rounding": np.array(FIRST_ROUNDING)} if len(self.bits) > 1 else {}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        if "rounding" not in slots or outcome.rounding_error is None:
            return {}
        bits = [outcome.bits]
        if outcome.device_bits is not None:  # of those whose rounding was measured
            trained = [loss is not None for loss in outcome.train_loss]
            bits = outcome.device_bits[trained & (outcome.device_bits != BITS_PER_PARAM)].tolist() or bits
        squares = [levels(one) ** 2 for one in bits]
        if len({*squares}) > 1:  # omega_q L^2 is about the same for all
            return {"rounding": np.array(outcome.rounding_error / np.mean([1 / square for square in squares]))}
        return {"rounding": np.array(outcome.rounding_error * squares[0])}
