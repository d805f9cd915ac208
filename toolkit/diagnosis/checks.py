"""Whether a run's numbers mean anything: noise, enough tokens, blocks that nothing changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from toolkit.analysis.divergence import FLOOR_NATS, Divergences
from toolkit.models.pair import ModelPair
from toolkit.models.runner import BlockRunner
from toolkit.runtime.check import Check, check
from toolkit.tables.words import QUANTISED

TOKENS_PER_DIMENSION = 10
ABOVE_NOISE = (
    3.0  # how many times the noise a delta's rms must be; toolkit/diagnosis/noise.py says why
)
ENOUGH_SEEN = 0.95


def first_changed_block(pair: ModelPair) -> int | None:
    """The first block of which any weight differs; -1 if the embeddings differ, None if none does.

    An adapter's factors count as a change unless one of them is zero.
    """
    base_in = pair.base_runner.model.get_input_embeddings()
    tuned_in = pair.tuned_runner.model.get_input_embeddings()
    if _changed(base_in, tuned_in):
        return -1
    ours, theirs = (blocks.sites.blocks for blocks in (pair.base_runner, pair.tuned_runner))
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
    """Check that there are enough fit tokens for a full-rank map."""
    return check(
        "tokens against dimension",
        n_fit >= TOKENS_PER_DIMENSION * d_model,
        f"{n_fit} fit tokens for {d_model} dimensions; full-rank fits want "
        f"{TOKENS_PER_DIMENSION * d_model}",
    )


def check_noise(spectrum: pd.DataFrame, noise: pd.DataFrame, reason: str = "") -> Check:
    """Check that every delta that is not zero stands above the noise of the precision.

    `spectrum` and `noise` are those tables; `reason` says why the second is empty.
    """
    title = "noise floor of the precision"
    if reason:
        return Check(title, "not applicable", reason)
    return _above(title, "rounding noise of the base model", spectrum, noise)


def check_quantisation(
    spectrum: pd.DataFrame, noise: pd.DataFrame, share: float | None
) -> list[Check]:
    """Check the same for what storing the base's weights as float8 did.

    `share` is that of the blocks' matrices whose grid was found (None: it was not looked for, and
    there is nothing to check).
    """
    title = "quantisation of the base"
    if share is None:
        return []
    rows = noise[noise["mode"].str.endswith(QUANTISED)]
    if rows.empty:
        reason = "the base was float8, and its weights are on no grid that is known: how large its "
        return [Check(title, "not applicable", f"{reason}noise is was not measured")]
    rows = rows.assign(mode=rows["mode"].str.removesuffix(QUANTISED))
    noisy = "noise of the base model's float8 weights"
    found = _above(title, noisy, spectrum, rows)
    more = f"; {share:.0%} of the blocks' matrices were found to be float8"
    return [replace(found, detail=found.detail + more)]


def _above(title: str, what: str, spectrum: pd.DataFrame, noise: pd.DataFrame) -> Check:
    """Check that deltas are larger than the noise at their place and in their mode."""
    rows = spectrum[spectrum.rms > 0].merge(noise, on=["layer", "location", "mode"])
    if rows.empty:
        return Check(title, "not applicable", "the delta is zero everywhere")
    ratio = rows.relative_rms / rows.noise_relative
    worst, n_below = rows.loc[ratio.idxmin()], int((ratio < ABOVE_NOISE).sum())
    below = f"; {n_below} of {len(rows)} deltas are below {ABOVE_NOISE:g} times theirs"
    return check(
        title,
        n_below == 0,
        f"the delta is at least {ratio.min():.3g} times the {what} "
        f"(least at {worst.location} in block {worst.layer}, {worst['mode']}, where the noise is "
        f"{worst.noise_relative:.1e} of the state){below if n_below else ''}",
    )


def check_sketch(width: int, shares: Sequence[Mapping[str, Any]]) -> Check:
    """Check that the random projection saw nearly all variance of states and deltas."""
    worst = min(shares, key=lambda row: min(row["state"], row["delta"]))
    least = min(worst["state"], worst["delta"])
    return check(
        "sketched moments",
        least >= ENOUGH_SEEN,
        f"projections of width {width} see {least:.1%} of the variance or more (least at "
        f"{worst['location']} of block {worst['layer']}, {worst['mode']}); what they do not see is "
        "missing from fits, and enters spectra as if dimensions did not vary together",
    )


def check_oracle(oracle: Divergences, base: Divergences, after_blocks: bool) -> Check:
    """Check that the oracle leaves no divergence unless the final norm or the head was tuned.

    `after_blocks` says that they were: every fine-tune of all weights does it. What is left is then
    what no adapter in a block can supply, and no fault of the run.
    """
    share = oracle.mean / base.mean if base.mean > 0 else 0.0
    left = f"KL left when every block output is the tuned model's: {oracle.mean:.1e} nats per token"
    if oracle.mean < FLOOR_NATS:
        return check("oracle floor", True, f"{left} (bound {FLOOR_NATS:.0e})")
    why = (
        f"the final norm or the head was tuned, and {share:.2%} of the fine-tune is there"
        if after_blocks
        else f"nothing after the blocks was tuned, so at most {FLOOR_NATS:.0e} was expected"
    )
    return check("oracle floor", after_blocks, f"{left}: {why}")


def changed_after_blocks(pair: ModelPair) -> bool:
    """Return whether a parameter outside the blocks and the token embeddings differs."""

    def outside(runner: BlockRunner) -> list[torch.Tensor]:
        embeddings = runner.model.get_input_embeddings().parameters()
        inside = {id(p) for block in runner.sites.blocks for p in block.parameters()}
        head = {id(p) for p in runner.model.get_output_embeddings().parameters()}
        apart = {id(p) for p in embeddings} - head  # a tied head is both
        return [p for p in runner.model.parameters() if id(p) not in inside | apart]

    ours, theirs = outside(pair.base_runner), outside(pair.tuned_runner)
    return len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs))


def check_upstream(spectrum: pd.DataFrame, changed: int | None) -> Check:
    """Check that deltas before the first changed weight are exactly zero."""
    title = "zero delta upstream of the first changed weight"
    if changed is None:
        nonzero = spectrum.query("rms > 0")
        return check(title, nonzero.empty, "no weight of a block differs, and no delta is there")
    if changed <= 0:
        where = "the embeddings" if changed < 0 else "block 0"
        return Check(title, "not applicable", f"{where} changed: nothing lies upstream")
    nonzero = spectrum.query("mode == 'free' and layer < @changed and rms > 0")
    return check(title, nonzero.empty, f"the first changed block is {changed}")
