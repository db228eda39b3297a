"""Windows of a recording or a text, cut so that it can be divided: no sample lies in windows of two groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_cli.store.state import Array


def cut(totals: Sequence[int], length: int, stride: int, stretch: int) -> tuple[Array, Array, Array]:
    """Returns of every window its series, its first sample in it, and its group, int64 [N] each.

    Every series is laid out in stretches of `stretch` samples, the last one shorter. Windows of `length` samples start every `stride`
    samples of a stretch and end within it; windows of two stretches, which would share samples with windows of both, are left out. A
    stretch is a group. A stretch shorter than a window has none.
    """
    series, first, group = [], [], []
    stretches = 0
    for index, total in enumerate(totals):
        for begin in range(0, total, stretch):
            starts = np.arange(begin, min(begin + stretch, total) - length + 1, stride, dtype=np.int64)
            series.append(np.full(len(starts), index, dtype=np.int64))
            first.append(starts)
            group.append(np.full(len(starts), stretches, dtype=np.int64))
            stretches += 1
    nothing = np.zeros(0, dtype=np.int64)
    return np.concatenate([nothing, *series]), np.concatenate([nothing, *first]), np.concatenate([nothing, *group])
