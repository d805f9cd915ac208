"""The adapters that a diagnosis fits in every block, and puts in place of the oracle."""

from collections.abc import Sequence
from typing import Any

from toolkit.adapters.collection import Adapters
from toolkit.analysis.linear_fit import RANKS, ranks_below
from toolkit.evaluation.candidates import Candidate
from toolkit.evaluation.compare import FORCINGS, Forcing
from toolkit.fitting.block_result import BlockResult
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


def forcings_of(candidate: Candidate) -> tuple[Forcing, ...]:
    """Return the forcings of one candidate: on its own tokens as well where the report shows it.

    Generating token by token is most of what a comparison costs.
    """
    shown = on_own_tokens(candidate.location, candidate.rank)
    plain = candidate.adapters is None and candidate.weights is None
    return FORCINGS if plain or shown else ("tuned",)


def fitted_candidates(blocks: Sequence[BlockResult], specs: Sequence[FitSpec]) -> list[Candidate]:
    """Return every spec in all blocks, and one of them in each block alone."""
    everywhere = {
        spec: Adapters(
            spec.location,
            {b.layer: b.adapters[spec] for b in blocks},
            spec.fit,
            {} if spec.target == "own" else {"target": spec.target},
        )
        for spec in specs
    }
    candidates = [Candidate.of(adapters, key=spec) for spec, adapters in everywhere.items()]
    if SINGLE in everywhere:
        single = everywhere[SINGLE]
        candidates += [Candidate.of(single, block.layer, SINGLE) for block in blocks]
    return candidates
