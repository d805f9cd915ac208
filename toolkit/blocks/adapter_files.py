"""What a LoRA's folder changes of each matrix of its base, read from the files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from toolkit.blocks.mlp import Change
from toolkit.errors import InputError
from toolkit.models.weight_files import WeightFiles, adapter_path

# How a LoRA may have started: beside the base's weights, or as a part of them that PEFT takes out.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
OWN_STARTS = ("pissa", "olora")
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
        start = self.config.get("init_lora_weights", True)
        if start not in PLAIN_STARTS and start not in OWN_STARTS:
            raise InputError(f"{folder} started from {start!r}: merge it into a model folder")
        for variant in ("alora_invocation_tokens", "kasa_config", "use_bdlora", "arrow_config"):
            if self.config.get(variant):
                raise InputError(f"{folder} is no plain LoRA ({variant}): merge it if it merges")
        self.files = WeightFiles([adapter_path(folder)])
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

    @property
    def changed(self) -> set[str]:
        """The names of the base's matrices that the adapter changes."""
        return {*self.saved, *(f"{module}.weight" for module in self.modules)}

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
        if self.config.get("init_lora_weights", True) in OWN_STARTS:
            return _whole(up @ down + self._taken_out(module, weights(name)))
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

    def _taken_out(self, module: str, weight: Tensor) -> Tensor:
        """Return what PEFT adds to the base's matrix on loading: less what the adapter began as.

        PiSSA and OLoRA start as the largest part of the matrix itself.
        """
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
        holder = nn.ModuleDict({"layer": layer})
        r, alpha = rank_and_alpha(self.config, module)
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,  # type: ignore[arg-type]
            use_rslora=bool(self.config.get("use_rslora")),
            init_lora_weights=self.config["init_lora_weights"],
            target_modules=["layer"],
        )
        inject_adapter_in_model(config, holder)
        return holder["layer"].base_layer.weight.detach() - weight.float()  # type: ignore

    def _factor_names(self, module: str) -> list[str]:
        parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        return [f"{_PREFIX}{module}.{part}" for part in parts]


def lora_scale(config: dict[str, Any], module: str) -> float:
    """Return ``alpha / r`` (``alpha / √r`` for rsLoRA) of `module`, as PEFT reads its patterns."""
    r, alpha = rank_and_alpha(config, module)
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def rank_and_alpha(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Return r and alpha of `module`, as PEFT reads its patterns."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(list(ranks), module), config["r"])
    return r, alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])


def _whole(delta: Tensor) -> Change:
    return Change((delta,), torch.zeros(len(delta)))
