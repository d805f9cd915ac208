"""How concentrated a delta is: the spectrum of its uncentred second moment."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHARES = {"k50": 0.50, "k90": 0.90, "k95": 0.95, "k99": 0.99}


@dataclass(frozen=True)
class Spectrum:
    """The spectrum λ of ``E[δδᵀ]``. A zero delta has zero everywhere.

    rms: ``sqrt(Σλ)``, in the units of the states.
    relative_rms: ``rms / sqrt(E‖h_base‖²)``; below the noise floor of the models' precision the
        rest describes rounding.
    mean_share: ``‖Eδ‖² / E‖δ‖²``, what a fixed vector could explain.
    participation_ratio: ``(Σλ)² / Σλ²``; entropy_rank: ``exp(−Σ p log p)``, ``p = λ/Σλ``: two
        effective numbers of dimensions.
    k50, k90, k95, k99: fewest eigenvalues whose sum reaches that share of the energy. A small k
        says that δ lies near a subspace, not that it is a linear function of the state.
    """

    n_tokens: int
    rms: float
    relative_rms: float
    mean_share: float
    participation_ratio: float
    entropy_rank: float
    k50: int
    k90: int
    k95: int
    k99: int


def fewest(shares: Tensor, share: float) -> int:
    """How many of `shares`, which fall and sum to 1, it takes for their sum to reach `share`."""
    return min(int((shares.cumsum(0) < share).sum()) + 1, len(shares))


def spectrum(second_moment: Tensor, mean: Tensor, base_energy: float, n_tokens: int) -> Spectrum:
    """Describe a delta from ``E[δδᵀ]`` `[d, d]`, ``Eδ`` `[d]` and the base state's ``E‖h‖²``."""
    eigenvalues = torch.linalg.eigvalsh(second_moment).flip(0).clamp_min(0)
    total = float(eigenvalues.sum())
    if total == 0:
        return Spectrum(n_tokens, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0)
    shares = eigenvalues / total
    counts = {name: fewest(shares, share) for name, share in SHARES.items()}
    return Spectrum(
        n_tokens=n_tokens,
        rms=total**0.5,
        relative_rms=(total / base_energy) ** 0.5,
        mean_share=float(mean.square().sum()) / total,
        participation_ratio=1 / float(shares.square().sum()),
        entropy_rank=float(torch.special.entr(shares).sum().exp()),
        **counts,
    )
