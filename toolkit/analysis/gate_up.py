"""The other half of the post's condition: one Δh that does to gate and up what fine-tuning did.

Is there a Δh with ``W_g Δh ≈ ΔW_g h`` and ``W_u Δh ≈ ΔW_u h``? With ``W̄ = [W_g; W_u]`` and
``t(h) = ΔW̄ h + Δb̄`` the least-squares answer is ``Δh = W̄⁺ t(h)``: an affine map of h, the same
for all tokens. So the best shared map is as good as a free vector for every token; only a lower
rank costs more. Best rank r: reduced-rank regression in the metric of ``W̄ᵀW̄``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.analysis.linear_fit import LinearFit, Rank, leading_eigenvectors, ranks_below
from toolkit.analysis.reachability import median, residual_quartiles
from toolkit.analysis.shared_map import SHARED_RANKS, explained
from toolkit.blocks.mlp import MLP, MLPChange


@dataclass(frozen=True)
class InnerPairRow:
    """``1 − E‖t − W̄Δh‖² / E‖t‖²`` on fit and held-out tokens, and over the held-out tokens the
    residual ``‖t − W̄Δh‖ / ‖t‖`` and the median ``‖Δh‖ / ‖h‖``. Rank ``full`` is also the best that
    a free vector for every token can do.
    """

    rank: Rank
    explained_fit: float
    explained_heldout: float
    explained_heldout_sem: float
    residual_q25: float
    residual_median: float
    residual_q75: float
    size_median: float
    n_tokens: int


def inner_pair(mlp: MLP, change: MLPChange, fit: Tensor, held_out: Tensor) -> list[InnerPairRow]:
    """Rows by rank, from MLP inputs `[n, d]`; none where neither gate nor up changed."""
    pair = _Pair(mlp, change)
    if not (bool(pair.target(fit).any()) and bool(pair.target(held_out).any())):
        return []
    maps = pair.fit(fit)
    rows = []
    for rank in ranks_below(fit.shape[1], SHARED_RANKS):
        matrix, bias = maps.matrix(rank), maps.bias(rank)

        def steering(h: Tensor, matrix: Tensor = matrix, bias: Tensor = bias) -> Tensor:
            return pair.unscale(h.double() @ matrix.T + bias)

        sizes = pair.target(held_out).norm(dim=1)
        left = pair.left(held_out, steering(held_out))
        share, sem = explained(left, pair.target(held_out))
        tokens = sizes > 0
        rows.append(
            InnerPairRow(
                rank=rank,
                explained_fit=explained(pair.left(fit, steering(fit)), pair.target(fit))[0],
                explained_heldout=share,
                explained_heldout_sem=sem,
                **residual_quartiles(left.norm(dim=1)[tokens].double() / sizes[tokens].double()),
                size_median=median(steering(held_out).norm(dim=1) / held_out.double().norm(dim=1)),
                n_tokens=len(held_out),
            )
        )
    return rows


class _Pair:
    """``W̄ = [W_g; W_u]`` (W_g alone without a gate), its change, and a root of ``W̄ᵀW̄``."""

    def __init__(self, mlp: MLP, change: MLPChange) -> None:
        self.weight = mlp.gate if mlp.up is None else torch.cat([mlp.gate, mlp.up])
        self.parts = [change.gate] if change.up is None else [change.gate, change.up]
        gram = (self.weight.T @ self.weight).double()
        level = 1e-12 * float(gram.trace())
        eye = torch.eye(len(gram), device=gram.device).double()
        self.root = torch.linalg.cholesky(gram + level * eye)

    def target(self, h: Tensor) -> Tensor:
        """``t(h)``, `[n, 2 d_ff]`."""
        return torch.cat([part(h) for part in self.parts], 1)

    def left(self, h: Tensor, steering: Tensor) -> Tensor:
        """``t(h) − W̄ Δh``."""
        return self.target(h) - steering.to(h.dtype) @ self.weight.T

    def scale(self, t: Tensor) -> Tensor:
        """``root⁻¹ W̄ᵀ t`` of rows: the reachable part of t, in coordinates of its own norm."""
        pulled = (t @ self.weight).double()
        return torch.linalg.solve_triangular(self.root, pulled.T, upper=False).T

    def unscale(self, u: Tensor) -> Tensor:
        """``Δh = root⁻ᵀ u`` of rows."""
        return torch.linalg.solve_triangular(self.root, u, upper=False, left=False)

    def fit(self, h: Tensor) -> LinearFit:
        """The maps from h to the scaled Δh: ``full`` from the weights, directions from tokens."""
        nothing = h.new_zeros(1, h.shape[1])
        eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
        full = self.scale(self.target(eye) - self.target(nothing)).T
        centred = (h - h.mean(0)).double() @ full.T
        directions = leading_eigenvectors(centred.T @ centred, 32)
        means = h.double().mean(0), self.scale(self.target(h)).mean(0)
        return LinearFit(*means, full, directions)
