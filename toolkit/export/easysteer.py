"""The format ``easysteer``: a steering request of EasySteer, a fork of vLLM (arXiv:2509.25175).

As its ``SteeringSpec`` and payloads read it (``vllm/model_hooks/steering/``, wire version 1): the
map is the algorithm ``lm_steer``, ``h + (h P1) P2ᵀ``, and then its constant ``direct``, ``h + v``.
"""

import base64
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from torch import Tensor

from toolkit.adapters.affine import Affine, affine_maps
from toolkit.adapters.collection import Adapters
from toolkit.adapters.positions import Positions
from toolkit.export.format import Base, Fidelity, Format, refused

FILE = "steering.json"
WIRE_VERSION = 1


@final
class EasySteer(Format):
    """Write ``steering.json``, which a request, or the engine's default, carries as it is."""

    name: ClassVar[str] = "easysteer"
    needs_base: ClassVar[bool] = False

    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Hold affine maps after blocks, at all positions."""
        if adapters.location != "post_block":
            return refused(f"it steers after blocks alone, not at {adapters.location}")
        maps = affine_maps(adapters.by_layer)
        if maps is None:
            return refused(f"a {adapters.kind} adapter is no affine map: no payload holds it")
        if not maps:
            return refused("the adapters change nothing")
        return Fidelity(adapters, write=partial(_write, maps, adapters.positions))


def _write(maps: dict[int, Affine], positions: Positions, out: Path) -> None:
    """Write ``steering.json`` with the vectors in order: each block's map, then all constants."""
    apply, vectors, constants = _apply(positions), [], {}
    for layer, found in maps.items():
        if len(found.down):
            data = _payload("lowrank", {"projector1": found.down.T, "projector2": found.up})
            vectors.append({"algorithm": "lm_steer", "layers": [layer], "data": data})
        if found.bias.any():
            constants[f"layer.{layer}"] = found.bias
    if constants:
        vectors.append({"algorithm": "direct", "data": _payload("direction", constants)})
    spec = {"conflict": "sequential", "vectors": [{**v, "apply": apply} for v in vectors]}
    (out / FILE).write_text(json.dumps(spec))


def _apply(positions: Positions) -> dict[str, Any]:
    """Return the ``ApplySpec`` that selects the tokens of `positions`."""
    first = {} if positions.sink else {"exclude_prompt_positions": [0]}
    if positions.first is None or positions.last is None:
        return {"prompt": "all", "generation": "all", **first}
    start = [("prompt_window", [1, positions.first + 1])] if positions.first else []
    return dict(start) | {"prompt_positions": [-n - 1 for n in range(positions.last)], **first}


def _payload(kind: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a payload as JSON carries it: float32 in base64, with the hash of its content."""
    digest = hashlib.sha256(f"{kind}:{WIRE_VERSION}".encode())
    written = {}
    for name, tensor in sorted(tensors.items()):
        values = np.ascontiguousarray(tensor.float().numpy())
        digest.update(name.encode() + str(values.shape).encode() + values.tobytes())
        data = base64.b64encode(values.tobytes()).decode()
        written[name] = {"shape": list(values.shape), "data": data}
    return {
        "version": WIRE_VERSION,
        "kind": kind,
        "tensors": written,
        "extra": {},
        "sha256": digest.hexdigest(),
    }
