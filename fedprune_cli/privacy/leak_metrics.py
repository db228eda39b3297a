"""How close a guess is: PSNR and SSIM of reconstructions, Jaccard of labels, AUC of membership; the best match of guesses and samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from fedprune_cli.store.state import Array

MAX_DB = 150.0  # of a PSNR: what equals to the last digit of a float32 and what is equal are the same to an eye
WINDOW = 7  # pixels of a side of SSIM's window, all of equal weight
K1, K2 = 0.01, 0.03  # SSIM's constants (Wang et al., IEEE Trans. Image Processing 2004)


def psnr_db(mse: Array, peak: float) -> Array:
    """Returns 10 log10(peak^2 / mse) in dB, at most MAX_DB.

    >>> psnr_db(np.array([0.01, 0.0]), 1.0).tolist()
    [20.0, 150.0]
    """
    floor = peak**2 / 10 ** (MAX_DB / 10)
    return 10 * np.log10(peak**2 / np.maximum(np.asarray(mse, dtype=np.float64), floor))


def squared_errors(originals: Array, guesses: Array) -> Array:
    """Returns the mean squared error of every original [n, ...] and guess [m, ...], float64 [n, m]."""
    a, b = (np.asarray(of, dtype=np.float64).reshape(len(of), -1) for of in (originals, guesses))
    rows = [np.square(b - one).mean(1) for one in a]  # not by expanding the square, which would lose the last digits
    return np.stack(rows) if rows else np.zeros((0, len(b)))


def best_match(originals: Array, guesses: Array) -> tuple[Array, Array]:
    """Returns for each original [n, ...] the guess [m, ...] that is given to it, int [n], and its mean squared error [n].

    No guess is given to two originals while there are enough; the sum of log errors, that is of decibels, decides. It takes the originals
    to know: what this finds is a bound on what an attacker's eye would choose, so the same is always asked of samples that were not there.
    """
    error = squared_errors(originals, guesses)
    if error.shape[1] < error.shape[0]:
        chosen = error.argmin(1)
    else:
        _, chosen = linear_sum_assignment(np.log(np.maximum(error, 1e-30)))
    return chosen, error[np.arange(len(error)), chosen]


def ssim(a: Array, b: Array, peak: float) -> float:
    """Returns the mean structural similarity of two pictures [C, H, W], over all windows of 7x7, or of a smaller picture's side.

    >>> flat = np.full((1, 8, 8), 0.5)
    >>> ssim(flat, flat, 1.0)
    1.0
    """
    side = min(WINDOW, *a.shape[1:])

    def mean(of: Array) -> Array:
        return np.lib.stride_tricks.sliding_window_view(of, (side, side), axis=(1, 2)).mean((-1, -2))

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    mean_a, mean_b, c1, c2 = mean(a), mean(b), (K1 * peak) ** 2, (K2 * peak) ** 2
    var_a, var_b, cov = (
        mean(x * y) - m * n for x, y, m, n in ((a, a, mean_a, mean_a), (b, b, mean_b, mean_b), (a, b, mean_a, mean_b))
    )
    similar = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(similar.mean())


def jaccard(truth: Sequence[int], guess: Sequence[int]) -> float:
    """Returns the share of labels in both out of those in either, each counted as often as it is there.

    >>> jaccard([1, 1, 2], [1, 2, 3])
    0.5
    """
    a, b = Counter(map(int, truth)), Counter(map(int, guess))
    return (a & b).total() / max((a | b).total(), 1)


def auc(members: Array, others: Array) -> float:
    """Returns how often a member's score is above another's, ties counted half: 0.5 is chance.

    >>> auc(np.array([3.0, 2.0]), np.array([2.0, 1.0]))
    0.875
    """
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    return float((ranks.sum() - len(members) * (len(members) + 1) / 2) / (len(members) * len(others)))
