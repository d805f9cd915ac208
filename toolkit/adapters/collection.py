"""Adapters of one kind at one location, a block each, in memory and on disk."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.card import CARD, card, facts, write_card
from toolkit.adapters.hub import upload
from toolkit.adapters.kinds import KINDS
from toolkit.adapters.positions import Positions
from toolkit.errors import InputError
from toolkit.models.locations import POINTS
from toolkit.runtime import html
from toolkit.runtime.records import json_text, write_tensors, write_text

Fit = Literal[
    "free",
    "forced",
    "sequential",
    "blended",
    "matched",
    "trained",
    "distilled",
    "swept",
    "identity",
]

CONFIG, WEIGHTS = "adapters.json", "adapters.safetensors"
FORMAT = 2


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
        """Write the adapters into `folder`, which is made: safetensors, what rebuilds them, a card.

        A ``README.md`` that is not ours stays as it is.
        """
        folder, config = Path(folder), self._config
        text = json_text(config)  # `info` that JSON cannot hold is an error before any file
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{layer}.{name}": tensor.detach().cpu().contiguous()
            for layer, adapter in self.by_layer.items()
            for name, tensor in adapter.state_dict().items()
        }
        write_tensors(tensors, folder / WEIGHTS)
        write_text(text, folder / CONFIG)
        write_card(folder, config)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload steering adapters",
    ) -> str:
        """Upload what `save_pretrained` writes to the model `repo_id`; return its address.

        The model is made, `private` or not, where it is missing; `token` is by default the one
        that this machine is logged in with. A card on the hub that is not ours stays as it is.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            # A path to the base, if it is one, is none from a folder that is gone.
            (Path(folder) / CARD).write_text(card(self._config), encoding="utf-8")
            return upload(Path(folder), repo_id, private, token, commit_message)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Adapters":
        """Read the adapters in `folder`. Missing, extra or mis-shaped weights are an InputError."""
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} does not hold adapters ({error})") from error
        if not isinstance(config, dict) or config.get("layers", True) in ({}, None):
            raise InputError(f"{folder / CONFIG} names no block with an adapter")
        if config.get("format") != FORMAT:
            raise InputError(
                f"{folder} has adapter format {config.get('format')}, expected {FORMAT}"
            )
        try:
            kind = KINDS[config["kind"]]
            with torch.random.fork_rng(devices=[]):  # starting points are drawn and overwritten
                by_layer = {int(k): kind.identity(**c) for k, c in config["layers"].items()}
            location, fit, info = config["location"], config["fit"], config["info"]
            _ = POINTS[location]
            positions = Positions.parse(config["positions"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder / CONFIG} describes no known adapter: {error}") from error
        _fill(by_layer, tensors, folder / WEIGHTS)
        return cls(location, by_layer, fit, info, positions)

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

    def _repr_html_(self) -> str:
        return html.card("Steering adapters", html.facts(facts(self._config)))

    @property
    def _config(self) -> dict[str, Any]:
        """Return the content of ``adapters.json``."""
        return {
            "format": FORMAT,
            "location": self.location,
            "point": POINTS[self.location],
            "positions": str(self.positions),
            "kind": self.kind,
            "rank": self.rank,
            "fit": self.fit,
            "layers": {str(layer): a.config for layer, a in sorted(self.by_layer.items())},
            "parameters": self.parameters,
            "info": self.info,
        }


def _fill(by_layer: dict[int, Adapter], tensors: dict[str, Tensor], path: Path) -> None:
    """Put `tensors` into the adapters, which are of the same names and shapes or refused."""
    expected = {
        f"{layer}.{name}": tensor
        for layer, adapter in by_layer.items()
        for name, tensor in adapter.state_dict().items()
    }
    if different := sorted(expected.keys() ^ tensors.keys()):
        state = "missing" if different[0] in expected else "unexpected"
        raise InputError(f"{path}: tensor {different[0]!r} is {state}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"{path}: {name!r} is {list(tensors[name].shape)}, the config says "
                f"{list(tensor.shape)}"
            )
    for layer, adapter in by_layer.items():
        own = {name: tensors[f"{layer}.{name}"] for name in adapter.state_dict()}
        adapter.to(next(iter(own.values())).dtype).load_state_dict(own)
