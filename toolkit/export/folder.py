"""The format ``folder``: a model of transformers with the adapters inside, and code of its own."""

import json
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import transformers
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.affine import DIAGONAL, affine, diagonal
from toolkit.adapters.collection import Adapters
from toolkit.adapters.nonlinear import NonLinear
from toolkit.export.format import Base, Fidelity, Format, refused
from toolkit.models.hooks import state_at
from toolkit.models.locations import causal_lm, resolve

CODE = "modeling_steered"


@final
class Folder(Format):
    """Write a model's folder that ``AutoModelForCausalLM`` loads with `trust_remote_code`.

    It holds every kind at every location and all positions. The code is a page long and imports
    torch and transformers alone. Without trust in it nothing is loaded, rather than the base.
    """

    name: ClassVar[str] = "folder"
    needs_base: ClassVar[bool] = True

    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Hold whatever steers a model that is one of transformers' own classes."""
        assert base is not None
        model, sites = causal_lm(base.model), resolve(base.model)
        if not all(hasattr(transformers, type(part).__name__) for part in (model, model.config)):
            return refused(f"a {type(model).__name__} is no class of transformers to build upon")
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        site = sites.at[adapters.location, min(adapters.by_layer)]
        if state_at(site, lambda: model(input_ids=ids, use_cache=False)).ndim > 3:
            return refused(
                "parallel streams pass this model's blocks, which its code does not know"
            )
        return Fidelity(adapters, write=partial(_write, adapters, base))


def _write(adapters: Adapters, base: Base, out: Path) -> None:
    """Write the model and the adapters' tensors, their places, the code, and the tokenizer."""
    model, sites = causal_lm(base.model), resolve(base.model)
    names = {module: name for name, module in model.named_modules()}
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for layer, adapter in sorted(adapters.by_layer.items()):
        parts, activation = _parts_of(adapter)
        site = sites.at[adapters.location, layer]
        layers[str(layer)] = {
            "module": names[site.module],
            "side": site.side,
            "activation": activation,
            "shapes": {name: list(part.shape) for name, part in parts.items()},
        }
        tensors.update({f"steering.{layer}.{n}": p.contiguous() for n, p in parts.items()})
    # The names that the model's class itself has: the steered class is not in the table by which
    # transformers renames old files' tensors.
    state = {**model.state_dict(), **tensors}
    model.save_pretrained(out, state_dict=state, save_original_format=False)
    base.tokenizer.save_pretrained(out)
    _write_code(out, model)
    _write_config(out, layers, adapters)


@torch.no_grad()
def _parts_of(adapter: Adapter) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of ``up σ(down h + inner) + scale ⊙ h + bias`` and the name of σ.

    A tensor that the adapter does not need is left out, as is σ where it is the identity. As an
    affine map a scale would be a matrix of the width's square.
    """
    activation, dtype = None, next(adapter.parameters()).dtype
    parts: dict[str, Tensor | None]
    if isinstance(adapter, NonLinear):
        activation = adapter.activation
        parts = {"up": adapter.up, "down": adapter.down, "inner": adapter.inner_bias,
                 "bias": adapter.bias}  # fmt: skip
    elif isinstance(adapter, DIAGONAL):
        scale, bias = diagonal(adapter)
        parts = {"scale": scale if scale.any() else None, "bias": bias}
    elif found := affine(adapter):
        bias, down = found.bias, found.down
        parts = {"bias": bias if bias.any() or not len(down) else None}
        if len(down):
            full = torch.equal(down, torch.eye(len(bias)).to(down))
            parts |= {"up": found.up, "down": None if full else down}
    else:
        raise TypeError(f"a {adapter.kind} adapter has no parts that the code knows")
    return {n: p.detach().to("cpu", dtype) for n, p in parts.items() if p is not None}, activation


def _write_code(out: Path, model: Any) -> None:
    code = files("toolkit.export").joinpath(f"{CODE}.txt").read_text("utf-8")
    names = {
        "BASE_MODEL": type(model).__name__,
        "BASE_CONFIG": type(model.config).__name__,
        "BASE_TYPE": model.config.model_type,
    }
    for placeholder, name in names.items():
        code = code.replace(placeholder, name)
    (out / f"{CODE}.py").write_text(code, encoding="utf-8")


def _write_config(out: Path, layers: dict[str, Any], adapters: Adapters) -> None:
    path, positions = out / "config.json", adapters.positions
    config = json.loads(path.read_text("utf-8"))
    config["model_type"] = f"steered_{config['model_type']}"
    config["architectures"] = ["SteeredForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"{CODE}.SteeredConfig",
        "AutoModelForCausalLM": f"{CODE}.SteeredForCausalLM",
    }
    rule = {"first": positions.first, "last": positions.last, "sink": positions.sink}
    config["steering"] = {"positions": rule, "layers": layers}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
