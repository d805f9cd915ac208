"""Stages of a run, and the operations of a pass: what all other formulas are made of."""

from dataclasses import dataclass
from typing import Literal

from toolkit.planning.shapes import BlockShape, ModelShape
from toolkit.planning.workload import BatchShape

Kind = Literal["block", "decode", "moments", "mlp", "fit", "reach", "shared", "logit"]
ANALYSES: tuple[Kind, ...] = ("fit", "reach", "shared")  # done where float64 is fast


@dataclass(frozen=True)
class Stage:
    """Operations of one part of a run, and at which measured rate they are done.

    `decomposed` are those of them that decompositions need, which run below the rate of a product.
    `passes` are those through the whole model that make one token each.
    """

    name: str
    kind: Kind
    operations: float
    decomposed: float = 0.0
    passes: int = 0


def scores(shape: ModelShape, queries: int, keys: int) -> float:
    """Attention's scores and their weighted sum: ``4 H e`` a query and key, masked ones too."""
    return 4.0 * shape.n_heads * shape.head_dim * queries * keys


def block_pass(shape: ModelShape, block: BlockShape, batch: BatchShape) -> float:
    """One block on one batch: ``2 M + 4 H e T`` a token."""
    return batch.rows * (
        2.0 * block.matrices * batch.length + scores(shape, batch.length, batch.length)
    )


def head(shape: ModelShape, n: float) -> float:
    """Count the language-model head on n tokens: ``2 d V`` a token."""
    return 2.0 * shape.d * shape.vocabulary * n
