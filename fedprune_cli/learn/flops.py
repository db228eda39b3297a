"""The FLOPs of a model's products and convolutions by module, as PyTorch's FlopCounterMode counts them and by its rules.

Its own mode costs each process seconds: PyTorch has what a mode's class says of `__torch_dispatch__` imported with its whole compiler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torch.utils.module_tracker import ModuleTracker

if TYPE_CHECKING:
    from torch._ops import OpOverload


def _conv_backward_flops(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: object, **_: object
) -> int:
    """Each gradient of a convolution costs what its forward pass costs; PyTorch's own formula forgets the groups."""
    transposed, output_mask = bool(args[4]), args[7]
    return conv_flop_count([*x.shape], [*weight.shape], [*grad_out.shape], transposed) * sum(output_mask[:2])  # type: ignore[index]


RULES = {**flop_registry, torch.ops.aten.convolution_backward: _conv_backward_flops}


class _Counting:
    """Counts what is called, forward and backward. It is no mode itself, so that PyTorch does not wrap it."""

    flops: defaultdict[str, int]
    tracker: ModuleTracker

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        words = dict(kwargs or {})
        with self:  # type: ignore[attr-defined]
            parts = func.decompose(*args, **words)
        if parts is not NotImplemented:
            return parts
        output = func(*args, **words)
        if rule := RULES.get(func.overloadpacket):
            for module in set(self.tracker.parents):
                self.flops[module] += rule(*args, **words, out_val=output)
        return output


class FlopCounter(_Counting, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered. flops: name of a module, after the model's class and a dot -> what it and all in it took."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.tracker = defaultdict(int), tracker
