"""Whether a run's numbers mean anything: noise, enough tokens, blocks that nothing changed."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toolkit.analysis.sequential_kl import Divergences
from toolkit.checks import Check, check
from toolkit.documents import Batch
from toolkit.hooks import Call, first, with_hidden_state
from toolkit.lockstep import Blocks, steerable
from toolkit.pair import ModelPair
from toolkit.weights import one_line

TOKENS_PER_DIMENSION = 10
ABOVE_NOISE = 3.0  # how many times the floor a delta's rms must be
FLOOR_NATS = 1e-6
ENOUGH_SEEN = 0.95


@torch.no_grad()
def noise_floor(blocks: Blocks, batch: Batch) -> list[float] | str:
    """How far rounding alone moves each block's output: rms of the change over rms of the state.

    The model marches over `batch` in its own precision and, beside it, in the next higher one
    (float32 for half precisions, float64 for float32), a block at a time. Norm layers that compute
    in float32 whatever their input keep doing so: in float32 the figure is a slight underestimate.
    Where a block has no form in the higher precision, the reason.
    """
    counted = steerable(batch.mask)
    hidden = blocks.embed(batch)
    higher = torch.float32 if hidden.dtype.itemsize < 4 else torch.float64
    exact = hidden.to(higher)
    floor = []
    for layer, block in enumerate(blocks.sites.blocks):
        call = blocks.call(layer, batch)
        hidden, _ = blocks.run(layer, call, hidden, ())
        twin = with_hidden_state(_cast(call, higher), exact)
        with blocks.resident(layer):
            twin_block: Any = copy.deepcopy(block).to(higher)
        try:
            exact = first(twin_block(*twin.args, **twin.kwargs))
        except RuntimeError as error:  # mixtures of experts have no kernel for float64
            return f"this model does not run in {higher}: {one_line(error)}"
        change = (hidden.to(higher) - exact)[counted].square().sum()
        floor.append(float((change / exact[counted].square().sum()).sqrt()))
    return floor


def _cast(call: Call, dtype: torch.dtype) -> Call:
    def cast(value):
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(cast, call)


def first_changed_block(pair: ModelPair) -> int | None:
    """The first block of which any weight differs; -1 if the embeddings differ, None if none does.

    An adapter's factors count as a change unless one of them is zero.
    """
    base_in = pair.base_blocks.model.get_input_embeddings()
    tuned_in = pair.tuned_blocks.model.get_input_embeddings()
    if _changed(base_in, tuned_in):
        return -1
    ours, theirs = (blocks.sites.blocks for blocks in (pair.base_blocks, pair.tuned_blocks))
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        with pair.resident(layer):
            if _changed(a, b):
                return layer
    return None


def _changed(base: nn.Module, tuned: nn.Module) -> bool:
    ours = dict(base.named_parameters())
    for name, parameter in tuned.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in ours:
            if not torch.equal(ours[plain], parameter):
                return True
        elif "lora_A" not in name and bool(parameter.any()):
            return True  # an adapter's own tensor; a LoRA acts through lora_B
    return False


def check_tokens(n_fit: int, d_model: int) -> Check:
    """Enough fit tokens for a full-rank map."""
    return check(
        "tokens against dimension",
        n_fit >= TOKENS_PER_DIMENSION * d_model,
        f"{n_fit} fit tokens for {d_model} dimensions; full-rank fits want "
        f"{TOKENS_PER_DIMENSION * d_model}",
    )


def check_noise(spectrum: pd.DataFrame, floor: list[float] | str) -> Check:
    """The block output's free delta stands above the noise of the precision, where it is not 0."""
    rows = spectrum.query("location == 'post_block' and mode == 'free' and rms > 0")
    title = "noise floor of the precision"
    if isinstance(floor, str):
        return Check(title, "not applicable", floor)
    if rows.empty:
        return Check(title, "not applicable", "the delta is zero everywhere")
    ratio = rows.relative_rms / rows.layer.map(dict(enumerate(floor)))
    worst = int(rows.layer[ratio.idxmin()])
    return check(
        title,
        bool(ratio.min() >= ABOVE_NOISE),
        f"the delta is at least {ratio.min():.3g} times the rounding noise of the base model "
        f"(least in block {worst}, where the noise is {floor[worst]:.1e} of the state)",
    )


def check_sketch(width: int, shares: Sequence[Mapping[str, Any]]) -> Check:
    """The random projection saw nearly all variance of states and deltas in every block."""
    worst = min(shares, key=lambda row: min(row["state"], row["delta"]))
    least = min(worst["state"], worst["delta"])
    return check(
        "sketched moments",
        least >= ENOUGH_SEEN,
        f"projections of width {width} see {least:.1%} of the variance or more (least at "
        f"{worst['location']} of block {worst['layer']}, {worst['mode']}); what they do not see is "
        "missing from fits, and enters spectra as if dimensions did not vary together",
    )


def check_oracle(oracle: Divergences) -> Check:
    """The oracle leaves no divergence unless the final norm or the head was tuned."""
    return check(
        "oracle floor",
        oracle.mean < FLOOR_NATS,
        f"KL left when every block output is the tuned model's: {oracle.mean:.1e} nats per token "
        f"(bound {FLOOR_NATS:.0e}; more means that the final norm or the head was tuned)",
    )


def check_upstream(spectrum: pd.DataFrame, changed: int | None) -> Check:
    """Deltas before the first changed weight are exactly zero."""
    title = "zero delta upstream of the first changed weight"
    if changed is None:
        nonzero = spectrum.query("rms > 0")
        return check(title, nonzero.empty, "no weight of a block differs, and no delta is there")
    if changed <= 0:
        where = "the embeddings" if changed < 0 else "block 0"
        return Check(title, "not applicable", f"{where} changed: nothing lies upstream")
    nonzero = spectrum.query("mode == 'free' and layer < @changed and rms > 0")
    return check(title, nonzero.empty, f"the first changed block is {changed}")
