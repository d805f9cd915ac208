"""The format ``weights``: a plain model of transformers, the adapters in its weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from toolkit.adapters.collection import Adapters
from toolkit.adapters.weight_change import WeightChange, changed
from toolkit.export.format import Base, Fidelity, Format, on_every_token, refused
from toolkit.export.peft import in_weights
from toolkit.models.loading import dtype_name
from toolkit.models.locations import causal_lm, resolve

# What configurations call the choice of giving the MLP's, or attention's, matrices biases.
CHOICES = ("mlp_bias", "attention_bias")


@final
class Weights(Format):
    """Write a model's folder that ``AutoModelForCausalLM.from_pretrained`` loads."""

    name: ClassVar[str] = "weights"
    needs_base: ClassVar[bool] = True

    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Hold what a LoRA with biases holds, where the family's configuration keeps biases.

        In 16 bits the change is rounded with the weights, which a small one may not survive.
        """
        change = in_weights(adapters, base)
        if isinstance(change, Fidelity):
            return change
        assert base is not None
        placed = _with_places(causal_lm(base.model), change)
        if placed is None:
            return refused(
                "the adapters have a constant, and this family's configuration gives their "
                "matrices no bias: it would be lost when the model is loaded"
            )
        found = on_every_token(adapters, partial(_write, base, *placed))
        if found.held is None or base.model.dtype.itemsize > 2:
            return found
        rounded = f"in {dtype_name(base.model.dtype)} the change is rounded with the weights"
        reason = "; and ".join(filter(None, [rounded, found.reason]))
        return replace(found, reason=reason, attached=partial(changed, base.model, change))


def _write(base: Base, change: WeightChange, choice: str, out: Path) -> None:
    """Write the model with its changed weights, and the tokenizer."""
    model = causal_lm(base.model)
    with changed(model, change), _chosen(model.config, choice):
        model.save_pretrained(out)
    base.tokenizer.save_pretrained(out)


def _with_places(model: Any, change: WeightChange) -> tuple[WeightChange, str] | None:
    """Return `change` and the configuration's choice by which a saved model keeps its biases.

    The choice, empty where none is needed, gives other matrices a bias too: the change adds zeros
    there. None where no choice gives a bias to all that need one.
    """
    blocks = resolve(model).blocks
    needed = {(k, name) for k, name in change.biases if blocks[k].get_submodule(name).bias is None}
    if not needed:
        return change, ""
    for choice in CHOICES:
        if getattr(model.config, choice, None) is False:
            new = _new_biases(model, choice)
            places = {
                (layer, name): module
                for layer, block in enumerate(blocks)
                for name, module in block.named_modules()
                if module in new
            }
            if needed <= places.keys() and len(places) == len(new):
                return _zeros_elsewhere(change, places), choice
    return None


def _new_biases(model: Any, choice: str) -> set[Any]:
    """Return the modules that have a bias under `choice` and have none now."""
    config = copy.deepcopy(model.config)
    setattr(config, choice, True)
    with torch.device("meta"):
        twin = type(model)(config)
    new = twin.state_dict().keys() - model.state_dict().keys()
    return {model.get_submodule(name.removesuffix(".bias")) for name in new}


def _zeros_elsewhere(change: WeightChange, places: dict[tuple[int, str], Any]) -> WeightChange:
    """Return `change` with a bias of zeros for every module of `places` that has none in it."""
    biases, by_module = dict(change.biases), dict(change.by_module)
    for place, module in places.items():
        rows, columns = module.weight.shape
        zeros = torch.zeros(rows)
        biases.setdefault(place, zeros)
        by_module.setdefault(place, (torch.zeros(rows, 0), torch.zeros(0, columns)))
    return replace(change, by_module=by_module, biases=biases)


@contextmanager
def _chosen(config: Any, choice: str) -> Iterator[None]:
    """Let `config` have `choice`, if it is any, as long as the context lasts."""
    if not choice:
        yield
        return
    setattr(config, choice, True)
    try:
        yield
    finally:
        setattr(config, choice, False)
