"""What a LoRA's folder changes of each matrix of its base, read from the files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from toolkit.blocks.mlp import Change
from toolkit.errors import InputError
from toolkit.models.weight_files import WeightFiles

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_A\.weight$")

Weights = Callable[[str], Tensor]  # the base's matrix of that name, `[out, in]`


class AdapterFiles:
    """The changes that the LoRA in `folder` makes, by the names of the base's matrices.

    Served are LoRA and rsLoRA with ranks and scales of their own for some modules, DoRA, and whole
    modules that were trained beside it. `unserved` names what is no change of a matrix: biases,
    trained tokens. Raises InputError for adapters of another kind.
    """

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "adapter_config.json").read_text())
        if self.config.get("peft_type") != "LORA":
            kind = self.config.get("peft_type")
            raise InputError(f"{folder} is not a LoRA ({kind}): merge it into a model folder")
        self.files = WeightFiles(folder)
        names = self.files.names
        self.modules = {found[1] for name in names if (found := _FACTOR.match(name))}
        whole = set(self.config.get("modules_to_save") or ())
        self.saved = {
            name.removeprefix(_PREFIX): name
            for name in names
            if name.endswith(".weight") and set(name.split(".")) & whole
        }
        served = {*self.saved.values(), *(f for m in self.modules for f in self._factor_names(m))}
        self.unserved = sorted(name.removeprefix(_PREFIX) for name in names if name not in served)

    def __contains__(self, name: str) -> bool:
        return name in self.saved or name.removesuffix(".weight") in self.modules

    def change(self, name: str, weights: Weights, transposed: bool = False) -> Change:
        """Return what the adapter changes of the base's matrix `name`, which `weights` reads.

        `transposed` says that the family's files hold this matrix as `[in, out]`.

        A LoRA's factors stay factors; DoRA's ``W' = m ⊙ (W + BA) / ‖W + BA‖`` is a whole matrix.
        """
        if name in self.saved:
            saved = self.files[self.saved[name]].float()
            return _whole((saved.T if transposed else saved) - weights(name).float())
        module = name.removesuffix(".weight")
        up, down = self._factors(module)
        magnitude = f"{_PREFIX}{module}.lora_magnitude_vector"
        if magnitude not in self.files:
            return Change((up, down), up.new_zeros(len(up)))
        weight = weights(name).float()
        moved = weight + up @ down
        # PEFT divides by the norm of each output's row.
        scale = self.files[magnitude].float() / moved.norm(dim=1)
        return _whole(scale[:, None] * moved - weight)

    def _factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B, times the scale, and A."""
        up, down = (
            self.files[f"{_PREFIX}{module}.lora_{side}.weight"].float() for side in ("B", "A")
        )
        return up * lora_scale(self.config, module), down

    def _factor_names(self, module: str) -> list[str]:
        parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        return [f"{_PREFIX}{module}.{part}" for part in parts]


def lora_scale(config: dict[str, Any], module: str) -> float:
    """Return ``alpha / r`` (``alpha / √r`` for rsLoRA) of `module`, as PEFT reads its patterns."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(list(ranks), module), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def _whole(delta: Tensor) -> Change:
    return Change((delta,), torch.zeros(len(delta)))
