"""The format ``reft``: a folder that ``pyreft.ReftModel.load`` reads."""

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from toolkit.adapters.affine import Affine, affine_maps
from toolkit.adapters.collection import Adapters
from toolkit.adapters.subspace import subspace
from toolkit.export.format import Base, Fidelity, Format, refused
from toolkit.models.locations import resolve

# What pyvene calls the output of a module of the block, and the locations that may be it.
COMPONENTS = {"post_block": "block_output", "post_mlp": "mlp_output"}
# The families whose modules pyvene 0.1.8 has a table of.
FAMILIES = ("llama", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "qwen2", "olmo")


@final
class Reft(Format):
    """Write LoReFT interventions; pyreft is told the positions when it is called."""

    name: ClassVar[str] = "reft"
    needs_base: ClassVar[bool] = True

    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Hold every affine adapter at the output of a block, or of an MLP without a norm."""
        assert base is not None
        if adapters.location not in COMPONENTS:
            return refused(f"pyvene has no component for the location {adapters.location}")
        family = base.model.config.model_type
        if family not in FAMILIES:
            return refused(f"pyvene has no table of the family {family}")
        maps = affine_maps(adapters.by_layer)
        if maps is None:
            return refused(f"a {adapters.kind} adapter is no affine map: LoReFT cannot do it")
        if not maps:
            return refused("the adapters change nothing")
        sites = resolve(base.model)
        for layer in adapters.by_layer:
            site, block = sites.at[adapters.location, layer], sites.blocks[layer]
            own = block if adapters.location == "post_block" else getattr(block, "mlp", None)
            if site.module is not own or site.side != "output":
                return refused(
                    f"{adapters.location} of block {layer} is not the output of a module that "
                    "pyvene knows"
                )
        component = COMPONENTS[adapters.location]
        return Fidelity(adapters, write=partial(_write, maps, component, base.model))


def _write(maps: dict[int, Affine], component: str, model: Any, out: Path) -> None:
    """Write ``config.json``, and a state dict a block, as pyreft 0.1 saves them."""
    representations, keys = [], []
    for layer, found in maps.items():
        form = subspace(found)
        key = f"layer_{layer}_comp_{component}_unit_pos_nunit_1#0"
        tensors = {
            "weight": form.target.float(),
            "bias": form.bias.float(),
            "rotate_layer": form.rows.T.contiguous().float(),
        }
        # A pickle: pyreft reads nothing else. This package writes it here, and reads none.
        torch.save(tensors, out / f"intkey_{key}.bin")
        representations.append([layer, component, "pos", 1, len(form.rows), *[None] * 9])
        keys.append(key)
    (out / "config.json").write_text(json.dumps(_config(model, representations, keys)))


def _config(model: Any, representations: list[list], keys: list[str]) -> dict[str, Any]:
    """Return pyvene's ``IntervenableConfig`` as it saves it."""
    width = model.config.get_text_config().hidden_size
    return {
        "architectures": None,
        "representations": representations,
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"] * len(keys),
        "mode": "parallel",
        "sorted_keys": keys,
        "intervention_dimensions": [width] * len(keys),
        "intervention_constant_sources": [True] * len(keys),
        "model_type": str(type(model)),
    }
