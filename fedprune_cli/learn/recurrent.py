"""What recurrent models are made of: inputs as steps or as tokens, and layers that go from step to step."""

from __future__ import annotations

from torch import Tensor, nn


class Steps(nn.Module):
    """Makes windows [n, axes, 1, length] sequences of steps [n, length, axes]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(2).transpose(1, 2)


class Tokens(nn.Module):
    """Makes texts [n, 1, 1, length], whose tokens are numbers, sequences of token ids, int64 [n, length]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).long()


class Gru(nn.Module):
    """A GRU over sequences [n, length, inputs] from a state of zeros.

    It gives the states after each step [n, length, hidden], or with `last` the one after the last step [n, hidden].
    """

    def __init__(self, inputs: int, hidden: int, last: bool) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, batch_first=True)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        states, final = self.gru(x)
        return final[0] if self.last else states
