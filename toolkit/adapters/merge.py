"""Adapters that become part of the weights: a LoRA with biases, of the same logits."""

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.affine import affine
from toolkit.adapters.attach import require_fit
from toolkit.adapters.collection import Adapters
from toolkit.adapters.weight_change import WeightChange, apply
from toolkit.blocks.read import affine as weights_of
from toolkit.blocks.read import is_linear, is_transposed
from toolkit.errors import InputError
from toolkit.models.hooks import Site, replace, state_at
from toolkit.models.locations import Sites, causal_lm, resolve

# The location whose module is the matrix that reads, or that writes, the state that is steered.
READS = {"heads": "heads", "mlp_act": "mlp_act"}
WRITES = {"pre_mlp": "heads", "post_mlp": "mlp_act", "post_block": "mlp_act"}


def merge_into_weights(model: nn.Module, adapters: Adapters) -> None:
    """Put `adapters` into the weights of `model`, which then gives the steered model's logits.

    Where adapters have a constant, matrices get a bias; a family whose matrices have none forgets
    it when transformers saves and loads it (`oracle export --to weights` keeps it, or refuses).
    Raises InputError where weights cannot do what the adapters do, before anything is changed.
    """
    if str(adapters.positions) != "every":
        raise InputError(
            f"these adapters steer {adapters.positions} tokens: weights act on every token, a "
            "sequence's first one too. Train with positions every, or put "
            'positions=Positions.parse("every") into them and judge them again'
        )
    apply(model, weight_change_of(model, adapters))


@torch.no_grad()
def weight_change_of(model: nn.Module, adapters: Adapters) -> WeightChange:
    """Return the change of weights that does at every token what `adapters` do to their states.

    After a matrix it is ``A W``, the post's ΔW_d^eff, of the adapter's own rank; before it,
    ``W A``. A constant becomes a bias. Raises InputError where no matrix reads or writes the state,
    or where it is not the matrix alone that writes it (a norm or a scale comes after it).
    """
    sites, location = resolve(model), adapters.location
    blocks, inner = sites.blocks, causal_lm(model)
    require_fit(inner, adapters, sites)
    names = {module: name for name, module in inner.named_modules()}
    by_module, biases = {}, {}
    for layer, adapter in sorted(adapters.by_layer.items()):
        if (found := affine(adapter)) is None:
            raise InputError(f"a {adapter.kind} adapter is no affine map: no weights can do it")
        if location == "post_block" and len(found.down):
            raise InputError(
                f"a {adapter.kind} adapter at post_block reads the residual stream, which no one "
                "matrix writes"
            )
        module = _matrix(sites, location, layer)
        weight, bias = (part.double().cpu() for part in weights_of(module))
        if location in READS:
            up, down, constant = weight @ found.up, found.down, weight @ found.bias
        else:
            _require_direct(model, sites, location, layer)
            up, down = found.up, found.down @ weight
            constant = found.bias + found.up @ (found.down @ bias)
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        place = layer, names[module].removeprefix(f"{names[blocks[layer]]}.")
        by_module[place] = up.to(dtype), down.to(dtype)
        if constant.any():
            biases[place] = constant.to(dtype)
    return WeightChange(
        by_module,
        "exact",
        adapters.rank if isinstance(adapters.rank, int) else str(adapters.rank),
        tuple(names[block] for block in blocks),
        getattr(inner.config, "_name_or_path", ""),
        any(is_transposed(blocks[layer].get_submodule(name)) for layer, name in by_module),
        biases,
    )


def _matrix(sites: Sites, location: str, layer: int) -> Any:
    """Return the linear module that reads or writes the state at `location`."""
    carrier = (READS | WRITES).get(location)
    if carrier is None:
        raise InputError(f"no one matrix reads or writes the state at {location}")
    if reason := sites.unavailable.get(carrier):
        raise InputError(f"this model has no {carrier!r}: {reason}")
    module = sites.at[carrier, layer].module
    if not is_linear(module):
        raise InputError(f"block {layer} has a {type(module).__name__} there, not a matrix")
    return module


def _require_direct(model: nn.Module, sites: Sites, location: str, layer: int) -> None:
    """Raise InputError unless what is added to the matrix's output is added to the state."""
    module, device = sites.at[WRITES[location], layer].module, next(model.parameters()).device
    ids = torch.arange(3, device=device)[None]
    site = sites.at[location, layer]

    def run() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    plain = state_at(site, run).clone()
    push = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0))
    push = (plain.abs().max() * push.to(device)).to(plain.dtype)
    with replace(Site(module, "output"), lambda output: output + push):
        change = state_at(site, run) - plain
    bound = 0.05 if plain.dtype.itemsize == 2 else 1e-3
    if not (change - push).abs().max() <= bound * push.abs().max():
        raise InputError(
            f"block {layer} does not add the matrix's output to the stream as it is: a norm or a "
            f"scale stands between it and {location}"
        )
