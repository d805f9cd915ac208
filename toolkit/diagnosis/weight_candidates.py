"""Steering beside weights: the best low-rank changes of the weights, at steering's sizes."""

from typing import Any

import torch

from toolkit.analysis.low_rank_change import LowRank
from toolkit.documents.batches import Batch
from toolkit.errors import InputError
from toolkit.evaluation.candidates import Candidate
from toolkit.fitting.block_result import BlockResult, Place
from toolkit.fitting.weight_change import FITS, WeightSpec, changes_of, require_followed
from toolkit.models.pair import ModelPair

BESIDE = (8, 32)  # the ranks of steering after the block whose numbers a change may have
LORA = 8  # the rank that people give a LoRA


def n_weight_candidates(d_model: int) -> int:
    """Count the candidates of a model of width `d_model`."""
    return len(FITS) * (sum(rank < d_model for rank in BESIDE) + 1)


@torch.no_grad()
def why_no_weights(pair: ModelPair, batch: Batch) -> str:
    """Return why changes of weights cannot be cut to a size, as tried on `batch`; else nothing."""
    if pair.base_runner.offload or pair.tuned_runner.offload:
        return "weights that are read from disk block by block are not changed"
    try:
        require_followed(pair, batch)
    except InputError as error:
        return str(error)
    return ""


def weight_candidates(pair: ModelPair, blocks: list[BlockResult]) -> list[Candidate]:
    """Make the candidates of every size, in both metrics; none where no pieces were kept."""
    pieces: Any = {fit: _together(blocks, fit) for fit in FITS}
    if not any(len(found.gains) for found in pieces[FITS[0]].values()):
        return []
    sizes: dict[WeightSpec, str] = {}
    for rank in BESIDE:
        budget = pair.n_layers * (2 * rank + 1) * pair.d_model
        if rank < pair.d_model:
            sizes |= {WeightSpec(fit, budget=budget): f"steering {rank}" for fit in FITS}
    sizes |= {WeightSpec(fit, rank=LORA): f"lora {LORA}" for fit in FITS}
    found = changes_of(pair, pieces, list(sizes))
    return [
        Candidate(spec, weights=found[spec], label=label)
        for spec, label in sizes.items()
        if found[spec].parameters
    ]


def _together(blocks: list[BlockResult], fit: Any) -> dict[Place, LowRank]:
    return {place: piece for block in blocks for place, piece in block.pieces.get(fit, {}).items()}
