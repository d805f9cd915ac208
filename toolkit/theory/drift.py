"""Where the steered model goes, block by block, on the way from the base model to the tuned one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.documents.batches import Batch
from toolkit.models.deltas import delta
from toolkit.models.hooks import capture
from toolkit.models.pair import ModelPair
from toolkit.models.runner import BlockRunner


@dataclass(frozen=True)
class Drift:
    """The steered model's state after block `layer`, in units of ``sqrt(E‖tuned − base‖²)`` there.

    moved: ``sqrt(E‖steered − base‖²)``: 1 is as far as tuning moved it, above 1 overshoots.
    missed: ``sqrt(E‖steered − tuned‖²)``: 0 arrives, 1 is no nearer than the base model, above 1
        is further away than it.
    Both are 0 where tuning moved nothing and steering neither, and infinite where steering did.
    """

    layer: int
    moved: float
    missed: float


@torch.no_grad()
def drift(pair: ModelPair, adapters: Adapters, batches: Sequence[Batch]) -> list[Drift]:
    """The drift after every block over the counted tokens of `batches`, each model on its own."""
    energies = torch.zeros(pair.n_layers, 3, dtype=torch.float64)
    for batch in batches:
        base = _outputs(pair.base_runner, batch)
        tuned = _outputs(pair.tuned_runner, batch)
        with steer(pair.base, adapters, pair.base_runner.sites):
            steered = _outputs(pair.base_runner, batch)
        for layer, states in enumerate(zip(base, tuned, steered, strict=True)):
            energies[layer] += torch.stack(_energies(*states))
    return [
        Drift(layer, _ratio(moved, whole), _ratio(missed, whole))
        for layer, (whole, moved, missed) in enumerate(energies.tolist())
    ]


def _energies(base: Tensor, tuned: Tensor, steered: Tensor) -> list[Tensor]:
    pairs = ((tuned, base), (steered, base), (steered, tuned))
    return [delta(a, b).double().square().sum().cpu() for a, b in pairs]


def _ratio(energy: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if energy == 0 else float("inf")
    return float((energy / whole) ** 0.5)


def _outputs(runner: BlockRunner, batch: Batch) -> list[Tensor]:
    """Return the counted tokens' states after every block, `[n, d_model]` each."""
    with capture(runner.sites.outputs) as states:
        mask = batch.mask.long()
        # The whole language model: adapters look there for which tokens are new.
        runner.model(input_ids=batch.ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return [states[str(layer)][batch.counted] for layer in range(runner.sites.n_layers)]
