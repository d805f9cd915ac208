"""The adapters that a diagnosis fits and compares."""

from toolkit.analysis.linear_fit import ranks_below
from toolkit.diagnosis.survey import Recipe
from toolkit.models.locations import BRANCHES

# What is fitted, and put in place of the oracle in all blocks; DESIGN names the ranks.
FORCED = [Recipe(location, rank, "forced") for location in BRANCHES for rank in (0, 8, 32)]
SEQUENTIAL = [Recipe("post_block", rank, "sequential") for rank in (0, 8, 32)]
SEQUENTIAL += [Recipe("pre_mlp", 8, "sequential"), Recipe("post_mlp", 8, "sequential")]
FREE = [Recipe("post_block", rank, "free") for rank in (0, 8, 32, "full")]
SINGLE = Recipe("post_block", 8, "free")  # also tried in each block alone


def recipes_for(branches: tuple[str, ...], d_model: int) -> list[Recipe]:
    """The adapters that a run fits to a model of width `d_model` with the locations `branches`."""
    return [
        recipe
        for recipe in (*FORCED, *SEQUENTIAL, *FREE)
        if recipe.location in branches and recipe.rank in ranks_below(d_model)
    ]
