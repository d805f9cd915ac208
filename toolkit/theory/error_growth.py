"""How an error put into one block grows on its way to the output: measured, and bounded.

Errors grow about the tuned model's own states, which perfect steering would give.
"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from toolkit.documents.batches import Batch
from toolkit.evaluation.injection import SIZE, Growth, Propagation
from toolkit.models.edits import steerable
from toolkit.models.pair import ModelPair
from toolkit.models.runner import BlockRunner
from toolkit.runtime.progress import progress
from toolkit.theory.block_gain import WeightBound, weight_bounds

LOCATIONS = ("pre_mlp", "post_mlp", "post_block")


def measure_growth(
    pair: ModelPair,
    batch: Batch,
    size: float = SIZE,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Gains of random errors by block and location, the worst case of each block, and its bound.

    One row a block and location: `error` after the block itself; `step_gain`, of its relative
    error in the next block; `end_gain`, to after the last block; `kl`; and, for `post_block`
    alone, of the block as a function of what enters it: `worst`, the largest gain of any error
    (power iteration on the first document: a lower bound of it), and `bound`, from weights and
    norms (NaN where a family's block cannot be read, with the reason in ``frame.attrs``).
    """
    blocks, generator = pair.tuned_runner, torch.Generator().manual_seed(seed)
    passed = Propagation(blocks, batch)
    locations = [location for location in LOCATIONS if location not in pair.unavailable]
    document = first_document(batch)
    entering = blocks.entering(document)
    bounds, reason = _bounds(pair, document)
    rows = []
    with progress("errors growing", pair.n_layers, show_progress) as advance:
        for layer in range(pair.n_layers):
            error = passed.random_error(layer, generator, size)
            for location in locations:
                growth = passed.inject(layer, location, error)
                rows.append({"layer": layer, "location": location, **_described(growth)})
            worst = worst_gain(blocks, layer, document, entering[layer])
            bound = bounds[layer].block if bounds else float("nan")
            rows[-1] |= {"worst": worst, "bound": bound}
            advance()
    frame = pd.DataFrame(rows)
    frame.attrs["no_bound"] = reason
    return frame


def _described(growth: Growth) -> dict[str, float]:
    return {
        "error": growth.errors[0],
        "step_gain": growth.to_next,
        "end_gain": growth.to_end,
        "kl": growth.kl,
    }


def _bounds(pair: ModelPair, document: Batch) -> tuple[Sequence[WeightBound] | None, str]:
    try:
        return weight_bounds(pair, document), ""
    except ValueError as error:
        return None, " ".join(str(error).split())


def first_document(batch: Batch) -> Batch:
    """Return the batch's first document alone, without its padding."""
    kept = batch.mask[0]
    ids, mask, counted = (part[:1, kept] for part in (batch.ids, batch.mask, batch.counted))
    return Batch(ids, mask, counted, batch.keys[: int(counted.sum())], batch.held_out)


def worst_gain(
    runner: BlockRunner, layer: int, document: Batch, entering: Tensor, steps: int = 15
) -> float:
    """The largest ``‖δout‖ / ‖δh‖`` of an error in block `layer`, at all tokens but the first.

    The 2-norm of the block's Jacobian at the states `entering` it on one unpadded document, by
    power iteration on ``JᵀJ``: from below, and the nearer the more steps.
    """
    with torch.no_grad():
        call = runner.call(layer, document, own=True)

    def block(state: Tensor) -> Tensor:
        return runner.run(layer, call, state, ())[0]

    return operator_norm(block, entering, steerable(document.mask)[..., None], steps)


def operator_norm(
    function: Callable[[Tensor], Tensor], x: Tensor, where: Tensor, steps: int, seed: int = 0
) -> float:
    """Return the 2-norm of the Jacobian of `function` at `x`, of changes `where` that is true."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape, generator=generator).to(x) * where
    norm = torch.ones(())
    # The attention whose derivative has a derivative: a forward product is two backward ones.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(steps):
            _, pushed = torch.autograd.functional.jvp(function, x, v / v.norm())
            norm = pushed.norm()
            if norm == 0:
                break
            _, v = torch.autograd.functional.vjp(function, x, pushed)
            v = v * where
    return float(norm)
