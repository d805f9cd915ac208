"""The adapters that a diagnosis fits in every block, and puts in place of the oracle."""

from typing import Any

from toolkit.analysis.linear_fit import RANKS, ranks_below
from toolkit.fitting.spec import FitSpec

# Forced fits of every size come from one decomposition; a sequential fit costs a stream of its own.
AFTER = [FitSpec.linear("post_block", rank, "forced") for rank in RANKS if rank != "full"]
BEFORE = [
    FitSpec.linear(location, rank, "forced")
    for location in ("pre_mlp", "post_mlp")
    for rank in (0, 8, 32)
]
# The block's delta, supplied from before the MLP, through it.
THROUGH = [FitSpec.linear("pre_mlp", rank, "forced", "block") for rank in (0, 8)]
SEQUENTIAL = [FitSpec.linear("post_block", rank, "sequential") for rank in (0, 8, 32)]
SEQUENTIAL += [FitSpec.linear("pre_mlp", rank, "sequential") for rank in (0, 8)]
SEQUENTIAL += [FitSpec.linear("post_mlp", 8, "sequential")]
FREE = [FitSpec.linear("post_block", rank, "free") for rank in (0, 8, 32, "full")]
SINGLE = FitSpec.linear("post_block", 8, "free")  # also tried in each block alone


def grid_for(branches: tuple[str, ...], d_model: int, through: bool) -> list[FitSpec]:
    """Return the specs that a model of width `d_model` with the locations `branches` can have.

    `through`: maps before the MLP can be fitted through it.
    """
    return [
        spec
        for spec in (*BEFORE, *(THROUGH if through else ()), *AFTER, *SEQUENTIAL, *FREE)
        if spec.location in branches and spec.rank in ranks_below(d_model)
    ]


def on_own_tokens(location: str, rank: Any) -> bool:
    """Tell whether adapters are compared on their own tokens too: those that the report shows."""
    return location == "post_block" and rank in (0, 8, "full")
