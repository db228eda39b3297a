"""What the server reads in an update without any training: the sample in a linear first layer, the labels in the head's bias.

Analytic inversion, for a linear first layer (Phong et al., IEEE Trans. Information Forensics and Security 2018): a unit's weights change by
g x and its bias by g, so their quotient is the sample. Where a unit is active for several samples it is a mixture of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.store.state import Array

SWEEPS = 60  # of the completion, over a layer of any size
MERGES = 3  # of units that agree, each with more to agree on than the one before
LEAST_COMMON, AGREEMENT = (
    8,
    0.01,
)  # inputs that two units must both know, and how far apart they may be, of the largest value


@dataclass(frozen=True)
class FirstLayer:
    """The gradient of a linear first layer as far as it was seen: weights [units, inputs], bias [units], float64; bool: which are known."""

    weight: Array
    bias: Array
    weight_known: Array
    bias_known: Array


def quotients(layer: FirstLayer, fill: Array) -> Array:
    """Returns a sample for each unit whose bias was seen to change, dW_ij / db_i, and again merged: float64 [at most 2 units, inputs].

    Units that agree in all inputs which both know are active for the same sample: each then tells the other what it has not seen.
    fill [inputs]: what stands for inputs that remain unknown.
    """
    units = np.flatnonzero(layer.bias_known & (layer.bias != 0))
    with np.errstate(over="ignore", invalid="ignore"):
        found = layer.weight[units] / layer.bias[units, None]
    known = layer.weight_known[units] & np.isfinite(found)
    found = np.where(known, found, 0.0)
    alone = np.where(known, found, fill)
    for _ in range(MERGES if not known.all() else 0):
        merged, joined = found.copy(), known.copy()
        for at, (values, mine) in enumerate(zip(found, known, strict=True)):
            common = known & mine
            apart = np.abs(np.where(common, found - values, 0.0)).max(1)
            same = (common.sum(1) >= LEAST_COMMON) & (apart <= AGREEMENT * np.abs(values).max())
            same[at] = True
            count = known[same].sum(0)
            merged[at] = np.divide(found[same].sum(0), count, out=np.zeros(len(count)), where=count > 0)
            joined[at] = count > 0
        found, known = merged, joined
    return (
        alone if known.all() and np.array_equal(alone, found) else np.concatenate([alone, np.where(known, found, fill)])
    )


def strongest(layer: FirstLayer, fill: Array) -> Array:
    """Returns one sample, float64 [1, inputs]: for each input the quotient of the unit with the largest change of its bias."""
    size = np.where(layer.bias_known, np.abs(layer.bias), 0.0)
    usable = layer.weight_known * size[:, None]
    unit = usable.argmax(0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = layer.weight[unit, np.arange(len(fill))] / layer.bias[unit]
    return np.where((usable.max(0) > 0) & np.isfinite(found), found, fill)[None]


def completed(layer: FirstLayer, fill: Array) -> Array:
    """Returns one sample, float64 [1, inputs]: the whole layer's gradient is g (x, 1), of rank one, and completed from what was seen.

    From the known last entry 1 on, what a unit's known inputs say of g, and then what all known units say of an input, is solved by
    least squares in turn: units without a known bias and inputs of which few weights are known take part as well.
    """
    seen = np.column_stack([layer.weight, layer.bias])
    known = np.column_stack([layer.weight_known, layer.bias_known]).astype(np.float64)
    seen = seen * known
    x = np.append(np.zeros(len(fill)), 1.0)
    has_x = np.append(np.zeros(len(fill)), 1.0)
    for _ in range(SWEEPS):
        base = (known * has_x) @ np.square(x)
        g = np.divide(seen @ (x * has_x), base, out=np.zeros(len(base)), where=base > 0)
        base = np.square(g) @ known
        has_x = (base > 0).astype(np.float64)
        x = np.divide(g @ seen, base, out=np.zeros(len(base)), where=base > 0)
        if not has_x[-1]:
            x, has_x[-1] = np.append(x[:-1], 1.0), 1.0
        elif x[-1] != 0:
            x = x / x[-1]
    return np.where((has_x[:-1] > 0) & np.isfinite(x[:-1]), x[:-1], fill)[None]


def signed_labels(bias: Array) -> Array:
    """Returns the labels whose entry of the head's bias gradient [classes], mean softmax minus share of the label, is negative, int."""
    return np.flatnonzero(bias < 0)


def counted_labels(bias: Array, samples: int) -> Array:
    """Returns `samples` labels, some more than once, int, by the head's bias gradient [classes] (LLG; Wainakh et al., PoPETs 2022).

    What a sample takes off its label's entry is estimated by the sum of the negative ones, and the lowest entry is served first.
    """
    left, found = np.array(bias, dtype=np.float64), list[int]()
    impact = left[left < 0].sum() * (1 + 1 / len(left)) / samples
    for label in signed_labels(left)[:samples]:
        found.append(int(label))
        left[label] -= impact
    while len(found) < samples:
        found.append(int(left.argmin()))
        left[found[-1]] -= impact
    return np.sort(np.array(found))
