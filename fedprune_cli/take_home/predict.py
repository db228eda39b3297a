"""What a model says of samples, and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import DataError
from fedprune_cli.learn.client import EVALUATION_BATCH
from fedprune_cli.report.page import csv_text, percent
from fedprune_cli.store.state import Array
from fedprune_cli.take_home.formats import Model
from fedprune_cli.take_home.samples import Asked
from fedprune_cli.terminal import Table

HEADERS = ("sample", "prediction", "probability", "label")


@dataclass(frozen=True)
class Predictions:
    """names: of the samples; predicted: their classes by name; shares: the softmax of each, float [n]; labels: None where unknown."""

    names: tuple[str, ...]
    predicted: tuple[str, ...]
    shares: tuple[float, ...]
    labels: tuple[str | None, ...]

    @property
    def total(self) -> int:
        """Samples with a label."""
        return sum(label is not None for label in self.labels)

    @property
    def correct(self) -> int:
        """Those whose prediction is their label."""
        return sum(label == said for label, said in zip(self.labels, self.predicted, strict=True))

    def as_json(self) -> Mapping[str, object]:
        """Returns it for programs; accuracy is None without labels."""
        return {
            "predictions": list(self.predicted),
            "probabilities": list(self.shares),
            "labels": list(self.labels) if self.total else None,
            "correct": self.correct if self.total else None,
            "total": self.total,
            "accuracy": self.correct / self.total if self.total else None,
        }

    def _rows(self) -> list[list[str]]:
        rows = zip(self.names, self.predicted, self.shares, self.labels, strict=True)
        return [[name, said, f"{share:.4f}", label or ""] for name, said, share, label in rows]

    def table(self) -> Table:
        """Returns it for the terminal."""
        width = 4 if self.total else 3
        headers, rows = HEADERS[:width], [row[:width] for row in self._rows()]
        return Table.of("predictions", headers, rows, folding=["prediction", "label"], elsewhere="in --json")

    def csv(self) -> str:
        """Returns it as CSV."""
        return csv_text(HEADERS, self._rows())

    def sentence(self) -> str:
        """Says how often the model was right."""
        if not self.total:
            return "no labels: there is no accuracy"
        return f"accuracy {percent(self.correct / self.total)}: {self.correct} of {self.total} right"


def predict(model: Model, asked: Asked) -> Predictions:
    """Returns what the model says, in batches as large as the run's tests; raises DataError when its values are not finite."""
    size = EVALUATION_BATCH
    logits = np.concatenate([model.logits(asked.inputs[at : at + size]) for at in range(0, len(asked.inputs), size)])
    if not np.isfinite(logits).all():
        raise DataError(
            f"sample {asked.names[int(np.argwhere(~np.isfinite(logits))[0][0])]}: the model gives values that are not finite"
        )
    classes = model.description.labels
    chosen = logits.argmax(1)
    shares = _softmax(logits)[np.arange(len(chosen)), chosen]
    return Predictions(
        asked.names,
        tuple(classes[at] for at in chosen.tolist()),
        tuple(shares.tolist()),
        tuple(classes[at] if at >= 0 else None for at in asked.labels.tolist()),
    )


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
