"""The weight side: how large and how concentrated each matrix's change is, and where it points."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.blocks.mlp import Change


@dataclass(frozen=True)
class WeightRow:
    """One module's ``ΔW``, from its singular values σ.

    norm_2: the largest σ. norm_fro: ``‖ΔW‖_F``. relative: ``‖ΔW‖_F / ‖W‖_F``. rank: σ above
    ``max(rows, columns) · ε · σ_1``, ε of the weights' precision
    (float32's at least). stable_rank: ``‖ΔW‖_F² / σ_1²``.
    k90: the fewest σ² that hold 90% of their sum. outside: the share of ``‖ΔW‖_F²`` that lies
    outside col(W), which steering before the module cannot reach to first order. Of an unchanged
    matrix all are 0.
    """

    rows: int
    columns: int
    norm_2: float
    norm_fro: float
    relative: float
    rank: int
    stable_rank: float
    k90: int
    outside: float


def weight_row(weight: Tensor, change: Change) -> WeightRow:
    """Describe the change of a matrix `[out, in]`; factors are never multiplied out."""
    values = singular_values(change)
    energy = values.square()
    total = float(energy.sum())
    rows, columns = weight.shape
    size = float(weight.double().norm())
    if total == 0:
        return WeightRow(rows, columns, 0.0, 0.0, 0.0, 0, 0.0, 0, 0.0)
    # No finer than float32: singular values from squares are good to 1e-8.
    precision = max(torch.finfo(change.factors[0].dtype).eps, torch.finfo(torch.float32).eps)
    cutoff = max(rows, columns) * precision * values[0]
    reached = energy.cumsum(0) >= 0.9 * total
    return WeightRow(
        rows=rows,
        columns=columns,
        norm_2=float(values[0]),
        norm_fro=total**0.5,
        relative=total**0.5 / size if size else float("inf"),
        rank=int((values > cutoff).sum()),
        stable_rank=total / float(energy[0]),
        k90=int(reached.long().argmax()) + 1,
        outside=share_outside(weight, change, total),
    )


def singular_values(change: Change) -> Tensor:
    """Compute the singular values of ΔW, largest first; of ``B A`` from two thin QRs."""
    if len(change.factors) == 2:
        b, a = (factor.double() for factor in change.factors)
        core = torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T
        return torch.linalg.svdvals(core)
    (delta,) = change.factors
    delta = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    # From squares: what lies below 1e-8 of the largest is rounding, far below any rank's cutoff.
    return torch.linalg.eigvalsh(delta @ delta.T).clamp_min(0).sqrt().flip(0)


def share_outside(weight: Tensor, change: Change, energy: float) -> float:
    """``‖(I − P) ΔW‖_F² / ‖ΔW‖_F²``, P the projection onto col(W); `energy` is ``‖ΔW‖_F²``.

    Singular values of W below ``max(out, in) · ε · σ_1`` do not count, ε that of float32.
    """
    columns = change.factors[0].double()
    if len(change.factors) == 2:  # as many columns as the rank, with the same products
        columns = columns @ torch.linalg.qr(change.factors[1].double().T)[1].T
    weight = weight.double()
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    tolerance = (max(weight.shape) * torch.finfo(torch.float32).eps) ** 2
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # The trace is no less than σ_1²: passing this, no singular value is left out.
    if not bool(torch.linalg.cholesky_ex(gram - tolerance * gram.trace() * eye)[1]):
        if wide:
            return 0.0
        pulled = weight.T @ columns
        inside = (pulled * torch.cholesky_solve(pulled, torch.linalg.cholesky(gram))).sum()
    else:
        values, vectors = torch.linalg.eigh(gram)
        kept = values > tolerance * values[-1]
        coordinates = vectors[:, kept].T @ (columns if wide else weight.T @ columns)
        scale = 1.0 if wide else values[kept, None]
        inside = (coordinates.square() / scale).sum()
    return max(1 - float(inside) / energy, 0.0)
