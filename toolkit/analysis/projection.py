"""When a steer after the block can do what a linear steer after the MLP does.

A block's output is ``h = s + y``: the skip term s, in a subspace S, and the MLP's output y, in Y.
Where S and Y meet in nothing but 0 there is the projection P onto Y along S, ``P(s + y) = y``. Then
``A y = A P h``: the post-MLP steer A of rank r is the post-block steer ``A P``, of rank r at most.
(The post's P is the other one, ``I − P`` on S + Y, which keeps the skip term; what A reads is the
MLP's part.) Where they meet, the best affine guess of y from h takes P's place, and is not exact.

Subspaces are bases with orthonormal columns, `[d, k]`; everything is float64.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from toolkit.analysis.linear_fit import LinearFit
from toolkit.analysis.spectrum import fewest
from toolkit.statistics import Moments

MEETING = 1e-6  # radians: below this angle two subspaces share a direction, up to rounding


@dataclass(frozen=True)
class Overlap:
    """How two subspaces of d dimensions lie to each other.

    `smallest` and `median` are principal angles in degrees, 90 where all is orthogonal. Where
    ``skip + mlp > d`` they meet whatever the angles: the smallest is then 0.
    """

    d: int
    skip: int
    mlp: int
    smallest: float
    median: float

    @property
    def meet(self) -> bool:
        """Tell whether they share more than 0."""
        return self.skip + self.mlp > self.d or self.smallest < np.degrees(MEETING)


@dataclass(frozen=True)
class AffineMap:
    """``x ↦ matrix x + offset``: `matrix` `[d_out, d_in]`, `offset` `[d_out]`."""

    matrix: Tensor
    offset: Tensor

    @classmethod
    def of(cls, fit: LinearFit) -> "AffineMap":
        """A fit at full rank."""
        return cls(fit.full, fit.bias("full"))


def energy_subspace(second_moment: Tensor, share: float) -> Tensor:
    """Return the fewest leading eigenvectors of ``E[xxᵀ]`` with `share` of the energy, `[d, k]`.

    A share of 1 is all that x spans. Directions that hold no more than rounding are never counted;
    a zero x spans nothing.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: expected more than 0 and at most 1")
    values, vectors = torch.linalg.eigh(second_moment.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    floor = float(values[0]) * len(values) * torch.finfo(values.dtype).eps
    spanned = int((values > floor).sum())
    if spanned == 0 or share == 1:
        return vectors[:, :spanned]
    return vectors[:, : min(spanned, fewest(values / values.sum(), share))]


def overlap(skip: Tensor, mlp: Tensor) -> Overlap:
    """The principal angles between two subspaces; 90 degrees where one of them is nothing."""
    d = len(skip)
    angles = np.array([np.pi / 2])
    if skip.shape[1] and mlp.shape[1]:
        angles = scipy.linalg.subspace_angles(skip.cpu().numpy(), mlp.cpu().numpy())
    smallest = 0.0 if skip.shape[1] + mlp.shape[1] > d else float(np.degrees(angles.min()))
    median = float(np.degrees(np.median(angles)))
    return Overlap(d, skip.shape[1], mlp.shape[1], smallest, median)


def oblique_projection(onto: Tensor, along: Tensor) -> Tensor:
    """P `[d, d]` that keeps what is in `onto` and takes away what is in `along`.

    Nothing else is kept: what is orthogonal to both goes to 0. Its 2-norm is 1 / sin of the
    smallest angle between the two, by which errors grow. Raises ValueError where they meet.
    """
    found = overlap(along, onto)
    if found.meet:
        raise ValueError(
            f"subspaces of {found.skip} and {found.mlp} of {found.d} dimensions share a direction "
            f"(smallest angle {found.smallest:.2g} degrees): there is no projection onto one along "
            "the other"
        )
    both = torch.cat([onto, along], 1).double()
    return onto.double() @ torch.linalg.pinv(both)[: onto.shape[1]]


def compose(
    up: Tensor, down: Tensor, bias: Tensor | None, guess: AffineMap
) -> tuple[Tensor, Tensor, Tensor]:
    """The adapter ``up (down y) + bias`` with ``guess(h)`` in place of y: its up, down and bias.

    `up` `[d, r]` stays, so the rank is r at most.
    """
    up, down = up.double(), down.double()
    constant = up @ (down @ guess.offset)
    return up, down @ guess.matrix, constant if bias is None else constant + bias.double()


def centred_r2(
    guess: AffineMap, moments: Moments, x: str, t: str, seen: Tensor | None = None
) -> float:
    """``1 − E‖A(t − guess(x))‖² / E‖A(t − Et)‖²`` on the tokens of `moments`.

    A is the identity, or `seen` `[n, d_t]`: what a steer makes of the target. `moments` holds
    (x, x), (t, t) and (t, x). 0 where A t does not vary.
    """
    c_xx, c_tt, c_tx = (moments.covariance[pair] for pair in ((x, x), (t, t), (t, x)))
    gap = moments.mean[t] - guess.matrix @ moments.mean[x] - guess.offset
    cross = c_tx @ guess.matrix.T
    missed = c_tt - cross - cross.T + guess.matrix @ c_xx @ guess.matrix.T + torch.outer(gap, gap)
    if seen is not None:
        missed, c_tt = (seen.double() @ m @ seen.double().T for m in (missed, c_tt))
    variance = float(c_tt.trace())
    return 1 - float(missed.trace()) / variance if variance else 0.0
