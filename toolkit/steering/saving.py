"""Adapters on disk: safetensors and a config that holds all that is needed to rebuild them."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.errors import InputError
from toolkit.locations import POINTS
from toolkit.steering.adapters import Adapter, Adapters, FixedVector, Linear

CONFIG, WEIGHTS = "adapters.json", "adapters.safetensors"
FORMAT = 1


def save_adapters(adapters: Adapters, folder: str | Path) -> None:
    """Write `adapters` into `folder`, which is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{layer}.{name}": parameter.detach().contiguous()
        for layer, adapter in adapters.by_layer.items()
        for name, parameter in adapter.named_parameters()
    }
    config = {
        "format": FORMAT,
        "location": adapters.location,
        "point": POINTS[adapters.location],
        "kind": adapters.kind,
        "rank": adapters.rank,
        "fit": adapters.fit,
        "layers": sorted(adapters.by_layer),
        "parameters": adapters.parameters,
        "info": adapters.info,
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapters(folder: str | Path) -> Adapters:
    """The adapters in `folder`. Missing, extra or mis-shaped weights are an error."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} does not hold adapters ({error})") from error
    if config.get("format") != FORMAT:
        raise InputError(f"{folder} has adapter format {config.get('format')}, expected {FORMAT}")
    names = _names(config)
    expected = {f"{layer}.{name}" for layer in config["layers"] for name in names}
    if different := sorted(expected ^ tensors.keys()):
        state = "missing" if different[0] in expected else "unexpected"
        raise InputError(f"{folder / WEIGHTS}: tensor {different[0]!r} is {state}")
    by_layer = {
        layer: _rebuild(config, {name: tensors[f"{layer}.{name}"] for name in names}, folder)
        for layer in config["layers"]
    }
    return Adapters(config["location"], by_layer, config["fit"], config["info"])


def _names(config: dict) -> tuple[str, ...]:
    if config["kind"] == "vector":
        return ("bias",)
    return ("up", "bias") if config["rank"] == "full" else ("up", "down", "bias")


def _rebuild(config: dict, tensors: dict[str, Tensor], folder: Path) -> Adapter:
    d = len(tensors["bias"])
    r = d if config["rank"] == "full" else config["rank"]
    shapes = {"bias": (d,), "up": (d, r), "down": (r, d)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise InputError(
                f"{folder / WEIGHTS}: {name!r} is {list(tensor.shape)}, the config says "
                f"{list(shapes[name])}"
            )
    if config["kind"] == "vector":
        return FixedVector(tensors["bias"])
    return Linear(tensors["up"], tensors.get("down"), tensors["bias"])
