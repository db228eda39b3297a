"""The section `privacy` of a configuration: secure sums, differential privacy, and what is declared public."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.sections import LATER
from fedprune_cli.store.memory import Outcome, Sizes, Slots

LEAST = 3  # keepers of an entry: in a sum of two, each knows the other's value


@dataclass(frozen=True)
class Privacy:
    """What a run protects; with neither `secure` nor `dp` it is the run that it would be without this section.

    secure: the server learns sums only. threshold: a sum is made where more than this share of its devices is left at the end; least:
    the fewest devices of which an entry may be the sum; spare: how many more keep each, so that so many may drop out; curious: how many
    may tell the server what they know, without whose noise the others' suffices; bits, max_change: of a device's change of an entry, in
    fixed point.
    dp: `client` protects all data of a device, `example` each sample, at (epsilon, delta); clip: the norm to which a device's change, or
    a sample's gradient, is shortened; noise: the noise's standard deviation over clip, None: the least with which the budget lasts.
    public_samples: how many samples a device has is no secret; public_scores: nor are accuracies and losses, which nothing noises.
    """

    secure: bool = field(default=False, metadata=LATER)
    threshold: float = field(default=0.67, metadata=LATER)
    least: int = field(default=5, metadata=LATER)
    spare: int = field(default=0, metadata=LATER)
    curious: int = field(default=0, metadata=LATER)
    bits: int = field(default=18, metadata=LATER)
    max_change: float = field(default=1.0, metadata=LATER)
    dp: str | None = field(default=None, metadata=LATER)
    epsilon: float | None = field(default=None, metadata=LATER)
    delta: float | None = field(default=None, metadata=LATER)
    clip: float | None = field(default=None, metadata=LATER)
    noise: float | None = field(default=None, metadata=LATER)
    public_samples: bool = field(default=False, metadata=LATER)
    public_scores: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        require(0.5 <= self.threshold < 1, "threshold", self.threshold, "in [0.5, 1)")
        few = f"in {LEAST}..1000000: of a sum of two devices each knows the other's part"
        require(LEAST <= self.least <= 10**6, "least", self.least, few)
        require(0 <= self.spare <= 10**6, "spare", self.spare, "in 0..1000000")
        noised = self.secure and self.dp == "client"
        bearable = self.least - 2 if noised else 0
        of_whom = (
            f"in 0..{bearable}, least - 2"
            if noised
            else "0 unless secure=true and dp=client: no other noise is of devices"
        )
        require(0 <= self.curious <= bearable, "curious", self.curious, of_whom)
        require(8 <= self.bits <= 24, "bits", self.bits, "in 8..24")
        require(0 < self.max_change < math.inf, "max_change", self.max_change, "> 0 and finite")
        require(self.dp in (None, "client", "example"), "dp", self.dp, "'client', 'example' or null")
        given = "with privacy.dp" if self.dp else "or null"
        # the least epsilon is nothing that anybody needs; the least clip is far above where a float32 gradient's square, and its norm, is 0
        for key, least, most in (("epsilon", 1e-3, 1000.0), ("delta", 0.0, 0.5), ("clip", 1e-6, 1e6)):
            value = getattr(self, key)
            allowed = not self.dp if value is None else least <= value <= most and value > 0
            require(allowed, key, value, f"in {'[' if least else '('}{least:g}, {most:g}] {given}")
        noise = self.noise
        require(noise is None or 0.1 <= noise <= 1e6, "noise", noise, "in [0.1, 1000000] or null")

    @property
    def none(self) -> bool:
        """Whether nothing is protected."""
        return not self.secure and self.dp is None

    @property
    def by_sum(self) -> bool:
        """Whether the server makes the new u of the sum of the devices' changes alone."""
        return self.secure or self.dp == "client"

    @property
    def hides_scores(self) -> bool:
        """Whether no record may hold the loss or the accuracy of one device."""
        return not self.none and not self.public_scores

    @property
    def keepers(self) -> int:
        """How many devices keep each entry that is sent, before any drops out."""
        return self.least + self.spare

    def needed(self, num_devices: int) -> int:
        """Returns how many of so many devices must be left for a sum to be made."""
        return math.floor(self.threshold * num_devices) + 1

    def weight(self, samples: float) -> float:
        """Returns what a device's change counts in the mean: its samples D_k, or 1 where that would tell how many it has."""
        return 1.0 if self.dp == "client" or (self.dp and not self.public_samples) else samples

    def slots(self, sizes: Sizes) -> Slots:
        """Returns what is remembered before round 1: in how many rounds each device has spent some of its budget, int64 [N]."""
        return {} if self.dp is None else {"privacy_rounds": np.zeros(sizes.num_devices, dtype=np.int64)}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        """Returns what is remembered after a round. Whoever trained has spent, whether or not its update arrived.

        Where who trained is a secret, so has whoever might have: that gain is of the draw, and the draw is spent.
        """
        if self.dp is None:
            return {}
        rounds = slots["privacy_rounds"].copy()
        rounds[outcome.devices if outcome.eligible is None else outcome.eligible] += 1
        return {"privacy_rounds": rounds}
