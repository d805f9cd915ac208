"""The adapters that a diagnosis fits in every block, and puts in place of the oracle."""

from toolkit.analysis.linear_fit import ranks_below
from toolkit.fitting.spec import FitSpec
from toolkit.models.locations import BRANCHES

# DESIGN names the ranks.
FORCED = [FitSpec.linear(location, rank, "forced") for location in BRANCHES for rank in (0, 8, 32)]
SEQUENTIAL = [FitSpec.linear("post_block", rank, "sequential") for rank in (0, 8, 32)]
SEQUENTIAL += [FitSpec.linear(location, 8, "sequential") for location in ("pre_mlp", "post_mlp")]
FREE = [FitSpec.linear("post_block", rank, "free") for rank in (0, 8, 32, "full")]
SINGLE = FitSpec.linear("post_block", 8, "free")  # also tried in each block alone


def grid_for(branches: tuple[str, ...], d_model: int) -> list[FitSpec]:
    """Return the specs that a model of width `d_model` with the locations `branches` can have."""
    return [
        spec
        for spec in (*FORCED, *SEQUENTIAL, *FREE)
        if spec.location in branches and spec.rank in ranks_below(d_model)
    ]
