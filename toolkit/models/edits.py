"""What steering adds to a state, and at which tokens."""

from collections.abc import Callable

from torch import Tensor

from toolkit.models.hooks import Edit
from toolkit.models.locations import INSIDE


def target_of(location: str, parallel: bool = False) -> str:
    """Return the point of the stream at which what is added at `location` arrives.

    What is missing there is what an adapter must supply. Before the MLP it is the stream after the
    first skip; in `parallel` blocks, whose MLP does not read what attention adds, and after the MLP
    it is the block's output.
    """
    return "resid_mid" if location in INSIDE and not parallel else "post_block"


def steerable(mask: Tensor) -> Tensor:
    """Return which tokens a fitted map may steer: all but padding and each document's first token.

    `mask` bool `[batch, length]`, true for tokens, padded on either side.
    """
    return mask & (mask.cumsum(1) > 1)


def shift(adapter: Callable[[Tensor], Tensor], states: Tensor, where: Tensor) -> Tensor:
    """Return what `adapter` adds to `states`: nothing at the tokens that are false in `where`."""
    return (adapter(states) * where.reshape(*states.shape[:-1], 1)).to(states.dtype)


def steered_by(adapter: Callable[[Tensor], Tensor], where: Tensor) -> Edit:
    """The edit that puts ``states + adapter(states)`` in place of states, `where` that is true."""
    return lambda states: states + shift(adapter, states, where)
