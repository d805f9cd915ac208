"""What an adapter is: a function from a hidden state to what is added to it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from toolkit.analysis.linear_fit import Rank


class Adapter(nn.Module, ABC):
    """One block's adapter. Subclasses are final, and each is named by its `kind`.

    ``forward(states)`` maps `[..., width]` to the change Δ of the same shape.
    ``identity(width, ...)`` makes the adapter that changes nothing yet, with the shapes that
    training and loading need; `config` are its arguments, from which one on disk is rebuilt.
    Parameters come without gradients and the adapter in evaluation mode: what trains it asks for
    the one and the other.
    """

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.eval()  # gates are noisy in training alone

    @property
    @abstractmethod
    def rank(self) -> Rank:
        """The rank of what can be added: 0 for a constant."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The arguments of `identity`, as JSON can hold them."""

    @classmethod
    @abstractmethod
    def identity(cls, *args: Any, **options: Any) -> Self:
        """An adapter of states `[..., width]` that adds nothing."""

    @abstractmethod
    def forward(self, states: Tensor) -> Tensor: ...

    def penalty(self) -> Tensor | float:
        """Return what training adds to the loss on this adapter's account."""
        return 0.0


def fixed(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter without a gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def columns(rank: Rank, width: int) -> int:
    """Count how many dimensions an adapter of `rank` works in."""
    return width if rank == "full" else rank


def random_rows(rank: int, width: int) -> Tensor:
    """A down-projection to start from, `[rank, width]`: states of unit variance keep it."""
    return torch.randn(rank, width) / width**0.5
