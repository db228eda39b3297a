"""Steps on samples that nobody can tell apart: each one's gradient is clipped, and their sum is noised (DP-SGD; Abadi et al., CCS 2016).

Both parts' steps are noised: v_k never leaves its device, but the gradients of u are those at v_k, and so would tell what v_k learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.parts import Parts
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.rng import Draws, SecretStream, stream
from fedprune_cli.store.state import Array

SAMPLES = 32  # of which gradients are computed at a time, to bound memory


@dataclass(frozen=True)
class Noised:
    """How steps are noised. clip: the norm to which a sample's gradient is shortened; noise: the noise's standard deviation over it.

    key: of a device's own draws of samples and noise, which nobody else may know; None: named streams, as a simulation has them.
    """

    clip: float
    noise: float
    key: bytes | None = None

    def draws(self, seed: int, number: int, device: int, phase: int) -> tuple[Draws, Draws]:
        """Returns what a phase's samples and its noise are drawn from."""
        if self.key is None:
            of = number, device, phase
            return stream(seed, "batch", *of), stream(seed, "privacy_noise", *of)
        return SecretStream(b"batch %d" % phase + self.key), SecretStream(b"noise %d" % phase + self.key)


def drawn_batches(rng: Draws, num_samples: int, phase: LocalPhase) -> list[Array]:
    """Returns the positions of each step's samples: every sample takes part in a step with probability batch / D_k, whatever others do.

    It is what the accounting is for: batches that are cut out of a permutation would be another draw.
    """
    rate = phase.batch / num_samples
    return [np.flatnonzero(rng.random(num_samples) < rate) for _ in range(phase.steps)]


def sample_gradients(
    model: nn.Module, params: Mapping[str, Tensor], x: Tensor, y: Tensor, keep: Sequence[Tensor] | None
) -> tuple[list[Tensor], Tensor]:
    """Returns the gradients of each of n samples, [n, ...] for every parameter, and their losses [n].

    keep: which entries of the first parameters, those of the shared part, the device keeps; None: everything. The others do not move.
    """

    def loss_of(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, values, (one.unsqueeze(0),)), label.unsqueeze(0))

    values = {name: param.detach() for name, param in params.items()}
    grads, losses = vmap(grad_and_value(loss_of), (None, 0, 0), chunk_size=SAMPLES)(values, x, y)
    of_each = list(grads.values())
    for at, kept in enumerate(keep or ()):
        of_each[at] = of_each[at] * kept
    return of_each, losses


def noised_mean(of_each: Sequence[Tensor], batch: int, noised: Noised, rng: Draws) -> tuple[Tensor, ...]:
    """Returns what a step descends: the sum of the samples' gradients, each at most `clip` long, and the noise, over the planned batch.

    A gradient that is not finite is none: where it is not would tell what its sample holds, and no noise hides what is not a number.
    """
    squares = torch.stack([grad.flatten(1).square().sum(1) for grad in of_each])
    norms = squares.sum(0).sqrt()
    factor = (noised.clip / norms.clamp(min=1e-30)).clamp(max=1.0)
    if not (finite := torch.isfinite(norms)).all():
        factor = torch.where(finite, factor, 0.0)
        of_each = [grad.where(finite.view(-1, *[1] * (grad.dim() - 1)), torch.zeros(())) for grad in of_each]
    scale = noised.clip * noised.noise
    return tuple(_on_lattice(torch.tensordot(factor, grad, 1), scale, rng) / batch for grad in of_each)


def _on_lattice(total: Tensor, scale: float, rng: Draws) -> Tensor:
    """Returns the sum with noise of the standard deviation `scale`, rounded to whole multiples of a millionth of it.

    Which float32 numbers a product of float32 noise can be depends on `scale`, so that one which cannot be would tell that there was
    more than noise (Mironov, CCS 2012). On the lattice every number can come of noise alone.
    """
    if not scale:
        return total
    step = 2.0 ** (math.floor(math.log2(scale)) - 20)
    noisy = total.double() + scale * torch.from_numpy(rng.standard_normal(total.shape, np.float64))
    return (torch.round(noisy / step) * step).float()


def require_sample_gradients(parts: Parts, shape: Sequence[int], name: str) -> None:
    """Raises ConfigError for a model of which no gradient can be had for each sample, such as a recurrent one; shape: of an input."""
    params = dict(zip([name for name, _ in parts.names], parts.all_params, strict=True))
    try:
        sample_gradients(parts.model, params, torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64), None)
    except RuntimeError:
        why = "its layers give no gradient for each sample; take a model of linear and convolutional layers"
        raise ConfigError(f"model={name}: not with privacy.dp=example: {why}") from None
