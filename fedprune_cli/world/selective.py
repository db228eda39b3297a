"""Frequency-selective fading: another gain in every resource block."""

from __future__ import annotations

import numpy as np

from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array


def block_fading(seed: int, number: int, shape: tuple[int, int], blocks_apart: float) -> Array:
    """Returns the Rayleigh fading of every device in every block of round `number`, of mean 1, float64 [N, blocks].

    shape: N and the number of blocks; blocks_apart: the coherence bandwidth in blocks, over which the correlation of two gains falls to
    1/2; infinite: all blocks of a device fade alike. A gain is |h|^2 of a Gauss-Markov h along the blocks, so that the correlation falls
    by half over each coherence bandwidth. Of a channel with an exponential delay profile of spread tau the correlation is 1/2 over
    1 / (2 pi tau) as well. It stands in for `fading` and multiplies the gain without it, `path_gain`.
    Ignored: the shape of the delay profile, and correlation between rounds. More devices change no earlier one.
    """
    noise = stream(seed, "selective", number).normal(scale=0.5**0.5, size=(*shape, 2))
    rho = 2.0 ** (-0.5 / blocks_apart)  # of h; that of the gains is its square
    field = noise[:, 0]
    gain = np.empty(shape)
    gain[:, 0] = (field**2).sum(axis=1)
    for at in range(1, shape[1]):
        field = rho * field + (1 - rho**2) ** 0.5 * noise[:, at]
        gain[:, at] = (field**2).sum(axis=1)
    return gain
