"""What a device keeps of the model: the whole of it, some entries of its shared part, or some channels of both parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedprune_cli.learn.parts import Parts
from fedprune_cli.learn.structured import Layout
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Loaded:
    """A device's model as vectors that its parameters share, u * m_k or what is left of it, and what stays fixed.

    mask: which entries of u the device keeps, bool [U], None for all of them; keep: the same, cut like the parameters, None where the
    model has no others; personal_mask: which entries of v_k are in the model, None for all.
    """

    shared: Tensor
    personal: Tensor
    mask: Array | None = None
    keep: tuple[Tensor, ...] | None = None
    personal_mask: Array | None = None

    def kept(self) -> Array:
        """Returns the entries of the shared part that the device keeps as they are now [n_k]; a smaller model has no others."""
        values = self.shared.cpu().numpy()
        return values.copy() if self.mask is None or self.keep is None else values[self.mask]


@dataclass(frozen=True)
class Whole:
    """Everything."""

    batchable: ClassVar[bool] = True

    def mask(self, size: int) -> Array | None:
        """Returns which of `size` shared entries are kept, bool [U]; None stands for all."""
        return None

    def load(self, parts: Parts, layout: Layout, shared: Array, personal: Array) -> Loaded:
        """Sets the model to u = `shared` and v_k = `personal`."""
        parts.make_whole()
        parts.shared.copy_(torch.from_numpy(shared))
        parts.personal.copy_(torch.from_numpy(personal))
        return Loaded(parts.shared, parts.personal)


@dataclass(frozen=True)
class Entries:
    """The entries of u that a mask has, and all of v_k: what is dropped is zero, and its computation is only modelled as saved.

    packed: the mask m_k, eight entries to a byte.
    """

    packed: Array
    batchable: ClassVar[bool] = True

    def mask(self, size: int) -> Array | None:
        """Returns m_k, bool [U]."""
        return np.unpackbits(self.packed, count=size).astype(bool)

    def load(self, parts: Parts, layout: Layout, shared: Array, personal: Array) -> Loaded:
        """Sets the model to (u * m_k, v_k)."""
        whole = Whole().load(parts, layout, shared, personal)
        mask = self.mask(shared.size)
        kept = torch.from_numpy(mask).to(parts.shared.device)
        parts.shared.mul_(kept)
        return Loaded(whole.shared, whole.personal, mask, parts.shared_views(kept.float()))


@dataclass(frozen=True)
class Channels:
    """Whole channels of both parts: the model really is smaller. units: which of each channel group's units, a bool array a group."""

    units: tuple[Array, ...]
    batchable: ClassVar[bool] = False

    def mask(self, size: int) -> Array | None:
        """Returns None: of the smaller model everything is kept."""
        return None

    def load(self, parts: Parts, layout: Layout, shared: Array, personal: Array) -> Loaded:
        """Makes the model the slice of (u, v_k) that is left; the parameters are views into vectors of its own size."""
        mask, personal_mask, shapes = layout.masks(self.units)
        entries = shared[mask], personal[personal_mask]
        mine, own = (torch.from_numpy(values).to(parts.shared.device) for values in entries)
        parts.point(mine, own, shapes)
        return Loaded(mine, own, mask, personal_mask=personal_mask)


Kept = Whole | Entries | Channels
