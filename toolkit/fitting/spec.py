"""What to fit in every block: which kind of adapter, where, of which rank, to which target."""

import hashlib
from dataclasses import dataclass
from typing import Any

from toolkit.adapters.collection import Fit
from toolkit.analysis.linear_fit import Rank
from toolkit.errors import InputError

FITTED_AT = ("heads", "pre_mlp", "post_mlp", "post_block")
FITS = ("free", "forced", "sequential", "blended")
STEERED = ("sequential", "blended")  # fits that read a stream of their own
FITTED_KINDS = ("vector", "linear", "loreft", "nonlinear")


@dataclass(frozen=True)
class FitSpec:
    """One adapter for each block: its location, kind and rank, and what it is fitted to.

    `fit`: ``forced`` supplies what each block contributes by itself; ``sequential`` what is still
    missing after the adapters of earlier blocks; ``free`` the whole difference of the two models'
    own states, upstream changes again in every block; ``blended`` the block's own contribution and
    the share `blend` of what earlier blocks left missing (0 and 1 are nearly the other two).
    `rank` is one for all blocks, or one for each. A non-linear adapter starts from the linear fit
    and is regressed on the block's tokens. `target` is ``own``, what is missing of the stream where
    the adapter adds to it; before the MLP, a forced fit can have ``block``: what is missing after
    the block, fitted through the MLP (a diagnosis does). Documents of the fold `fold` have no part
    in the fit (None: those that are held out have none; a diagnosis fits by folds).
    """

    location: str
    kind: str
    rank: Rank | tuple[int, ...]
    fit: Fit
    blend: float = 1.0
    target: str = "own"
    fold: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in FITTED_KINDS:
            raise InputError(f"kind is {self.kind!r}: expected one of {', '.join(FITTED_KINDS)}")
        if self.fit not in FITS:
            raise InputError(f"fit is {self.fit!r}: expected {', '.join(FITS)}")
        if self.location not in FITTED_AT:
            expected = ", ".join(FITTED_AT)
            raise InputError(f"location is {self.location!r}: adapters are fitted at {expected}")
        through = self.location == "pre_mlp" and self.fit == "forced" and self.kind != "nonlinear"
        if self.target != "own" and not (self.target == "block" and through):
            raise InputError(
                f"target is {self.target!r}: expected own, or block for a forced fit before the MLP"
            )
        least = 1 if self.kind in ("loreft", "nonlinear") else 0
        for rank in self.rank if isinstance(self.rank, tuple) else (self.rank,):
            if rank != "full" and not (isinstance(rank, int) and rank >= least):
                raise InputError(
                    f'rank is {rank!r}: expected a whole number from {least} up, or "full"'
                )

    @classmethod
    def linear(cls, location: str, rank: Rank, fit: Fit, target: str = "own") -> "FitSpec":
        """Make the spec of a linear map; of rank 0, of a fixed vector."""
        return cls(location, "vector" if rank == 0 else "linear", rank, fit, target=target)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "FitSpec":
        """Read what ``dataclasses.asdict`` gave; a spec kept without a kind is linear."""
        rank = fields["rank"]
        fields = {**fields, "rank": tuple(rank) if isinstance(rank, list) else rank}
        return cls(**fields) if "kind" in fields else cls.linear(**fields)

    @property
    def name(self) -> str:
        """A name that no other spec has, short enough for a file."""
        parts: list[Any] = [self.fit, self.location]
        if self.fit == "blended":
            parts.insert(1, self.blend)
        if self.target != "own":
            parts.append(self.target)
        if self.fold is not None:
            parts.append(f"fold{self.fold}")
        if self.kind not in ("vector", "linear"):
            parts.append(self.kind)
        if isinstance(self.rank, tuple):
            digest = hashlib.sha256(repr(self.rank).encode()).hexdigest()[:10]
            return "-".join(map(str, [*parts, sum(self.rank), digest]))
        return "-".join(map(str, [*parts, 0 if self.kind == "vector" else self.rank]))

    @property
    def is_steered(self) -> bool:
        """Tell whether the fit reads a stream of its own."""
        return self.fit in STEERED

    def rank_at(self, layer: int) -> Rank:
        """Return the rank in block `layer`; 0 for a vector."""
        if self.kind == "vector":
            return 0
        return self.rank[layer] if isinstance(self.rank, tuple) else self.rank
