"""Adapters of one kind at one location, a block each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from toolkit.steering.adapter import Adapter
from toolkit.steering.gated_heads import GatedHeads
from toolkit.steering.head_affine import HeadAffine
from toolkit.steering.head_vector import HeadVector
from toolkit.steering.linear import Linear
from toolkit.steering.loreft import LoReFT
from toolkit.steering.nonlinear import NonLinear
from toolkit.steering.positions import Positions
from toolkit.steering.vector import FixedVector

Fit = Literal["free", "forced", "sequential", "blended", "matched", "trained", "identity"]

KINDS: dict[str, type[Adapter]] = {
    cls.kind: cls
    for cls in (FixedVector, Linear, LoReFT, NonLinear, HeadVector, HeadAffine, GatedHeads)
}


@dataclass(frozen=True)
class Adapters:
    """Adapters of one kind at one location, by block.

    `fit` says where they come from; `positions` which tokens they steer; `info` is anything worth
    keeping beside them.
    """

    location: str
    by_layer: Mapping[int, Adapter]
    fit: Fit
    info: dict = field(default_factory=dict)
    positions: Positions = field(default_factory=Positions)

    @classmethod
    def identity(
        cls,
        kind: str,
        location: str,
        layers: Iterable[int],
        width: int,
        positions: Positions | str = "all",
        **options: Any,
    ) -> "Adapters":
        """New adapters that change nothing yet; `options` are those of the kind's `identity`."""
        by_layer = {layer: KINDS[kind].identity(width, **options) for layer in layers}
        return cls(location, by_layer, "identity", positions=Positions.parse(positions))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapters into `folder` as safetensors, with all that rebuilds them."""
        from toolkit.steering.saving import save_adapters

        save_adapters(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Adapters":
        """The adapters in `folder`. Missing, extra or mis-shaped weights are an InputError."""
        from toolkit.steering.saving import load_adapters

        return load_adapters(folder)

    @property
    def kind(self) -> str:
        return next(iter(self.by_layer.values())).kind

    @property
    def rank(self) -> Any:
        """The rank of every block; where they differ, all ranks in a row, such as ``4-8-2``."""
        ranks = [adapter.rank for adapter in self.by_layer.values()]
        return ranks[0] if len(set(ranks)) == 1 else "-".join(map(str, ranks))

    @property
    def parameters(self) -> int:
        """How many numbers the adapters hold."""
        return sum(p.numel() for adapter in self.by_layer.values() for p in adapter.parameters())

    @property
    def modules(self) -> nn.ModuleDict:
        """The adapters as one module, by block."""
        return nn.ModuleDict({str(layer): adapter for layer, adapter in self.by_layer.items()})
