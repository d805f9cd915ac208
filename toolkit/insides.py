"""Every block's MLP, its change, tail and heads, read one block at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.documents import Batch
from toolkit.inside import Inside
from toolkit.mlp import MLP, MLPs
from toolkit.pair import ModelPair
from toolkit.tail import check_tails, tail_at


class Insides(Sequence[Inside]):
    """What is inside each block of `pair`. Whoever asks for one keeps its block's weights.

    Raises ValueError, with the reason, where a block has no MLP that can be read. `has_tails`:
    the path from the attention branch through the MLP can be read too, as tried on `batch`;
    otherwise `no_tails` says why not.
    """

    def __init__(self, pair: ModelPair, batch: Batch) -> None:
        self._pair, self._mlps = pair, MLPs(pair.base, pair.tuned)
        self.no_tails = pair.missing.get("pre_mlp", "")
        for _ in self._each():  # each can be read
            pass
        if self.no_tails:
            return
        try:
            check_tails(pair.base_blocks, self._each(), batch)
        except ValueError as error:
            self.no_tails = " ".join(str(error).split())

    @property
    def has_tails(self) -> bool:
        return not self.no_tails

    def __len__(self) -> int:
        return len(self._mlps)

    def __getitem__(self, layer: Any) -> Any:
        mlp, change = self._mlps[layer]
        if not self.has_tails:
            return Inside(mlp, change)
        return Inside(mlp, change, *tail_at(self._pair.base_blocks, layer, mlp))

    def _each(self) -> Iterator[MLP]:
        for layer in range(len(self)):
            with self._pair.resident(layer):
                yield self._mlps[layer][0]
