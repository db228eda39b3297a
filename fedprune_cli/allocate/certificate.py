"""What proves that an answer of the allocator is optimal."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 1e-9  # of a certificate: largest relative KKT residual and relative duality gap


@dataclass(frozen=True)
class Certificate:
    """How far an allocation is from the KKT conditions of P1, each as its largest relative residual.

    primal: the budget, the deadline and the bounds; stationarity: w phi' = price where neither bound holds;
    dual: the price's sign, and w phi' on the right side of it where a bound holds; slackness: price times unused bandwidth;
    gap: (g(price) - sum w x) / (sum w + price B), the distance from an upper bound that follows from the price alone.
    """

    primal: float
    stationarity: float
    dual: float
    slackness: float
    gap: float

    @property
    def residual(self) -> float:
        """The largest of the four residuals."""
        return max(self.primal, self.stationarity, self.dual, self.slackness)

    @property
    def holds(self) -> bool:
        """Whether the residuals and the gap are within the tolerance; False where one is NaN."""
        return max(self.residual, abs(self.gap)) <= TOLERANCE
