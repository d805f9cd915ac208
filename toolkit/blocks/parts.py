"""The parts of one block that analyses compute with, read one block at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from toolkit.blocks.mlp import MLP, MLPChange
from toolkit.blocks.read import MLPs, check_mlps, check_sublayers, sublayer_at
from toolkit.blocks.sublayer import HeadOutputs, MLPSublayer
from toolkit.documents.batches import Batch
from toolkit.models.pair import ModelPair


@dataclass(frozen=True)
class Sample:
    """States of sampled tokens, each `[n, d]`.

    h: the base model's own MLP input. Of the base block run on the tuned stream: `stream` after
    the first skip (``resid_mid``), `attended` the attention branch's contribution (``pre_mlp``),
    `heads` the heads' outputs, and `forced_delta` that delta of the block's output. All but h are
    None where the family has no path from the attention branch through the MLP.
    """

    h: Tensor
    stream: Tensor | None = None
    attended: Tensor | None = None
    heads: Tensor | None = None
    forced_delta: Tensor | None = None

    def __len__(self) -> int:
        return len(self.h)


@dataclass(frozen=True)
class PlaceSample:
    """States of sampled tokens in the base block on the tuned stream, each `[n, d]`.

    `pre_mlp` and `post_mlp` are the branches' contributions, `post_block` the block's output, and
    `forced_delta` what the block must be made to add.
    """

    pre_mlp: Tensor
    post_mlp: Tensor
    post_block: Tensor
    forced_delta: Tensor

    def __len__(self) -> int:
        return len(self.forced_delta)

    @property
    def stream(self) -> Tensor:
        """The stream after the first skip."""
        return self.post_block - self.post_mlp

    def where(self, kept: Tensor) -> "PlaceSample":
        """Return some of the tokens."""
        return PlaceSample(**{name: value[kept] for name, value in vars(self).items()})


@dataclass(frozen=True)
class BlockParts:
    """One block's MLP, its change, and (None where a family has none) its tail and heads."""

    mlp: MLP
    change: MLPChange
    sublayer: MLPSublayer | None = None
    heads: HeadOutputs | None = None


class BlockPartsReader(Sequence[BlockParts]):
    """Hold what is inside each block of `pair`. Whoever asks for one keeps its block's weights.

    Raises ValueError, with the reason, where a block has no MLP that can be read, or where what is
    read is not what the block computes on `batch`. `has_sublayers`: the path from the attention
    branch through the MLP can be read too, as tried on `batch`; otherwise `no_sublayers` says why
    not.
    """

    def __init__(self, pair: ModelPair, batch: Batch) -> None:
        self._pair, self._mlps = pair, MLPs(pair.base, pair.tuned)
        self.no_sublayers = pair.unavailable.get("pre_mlp", "")
        check_mlps(pair.base_runner, self._each(self._mlps.of_base), batch)
        check_mlps(pair.tuned_runner, self._each(self._mlps.of_tuned), batch)
        if self.no_sublayers:
            return
        try:
            check_sublayers(pair.base_runner, self._each(self._mlps.of_base), batch)
        except ValueError as error:
            self.no_sublayers = " ".join(str(error).split())

    @property
    def has_sublayers(self) -> bool:
        return not self.no_sublayers

    def __len__(self) -> int:
        return len(self._mlps)

    def __getitem__(self, layer: Any) -> Any:
        mlp, change = self._mlps[layer]
        if not self.has_sublayers:
            return BlockParts(mlp, change)
        return BlockParts(mlp, change, *sublayer_at(self._pair.base_runner, layer, mlp))

    def _each(self, read: Callable[[int], MLP]) -> Iterator[MLP]:
        for layer in range(len(self)):
            with self._pair.resident(layer):
                yield read(layer)
