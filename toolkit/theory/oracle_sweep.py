"""The single-layer oracle sweep: one site of one block steered by a share of the free oracle delta.

The tuned model says five tokens, and all models read the prompt and those tokens. In one block of
the base model the state s of one site becomes ``s + alpha (s_tuned − s_base)`` at every token but
each document's first, and ``delta_kl = KL(steered ‖ tuned) − KL(base ‖ tuned)`` is taken at each of
the five tokens, in nats; the columns ``_reverse`` hold ``KL(tuned ‖ steered) − KL(tuned ‖ base)``.

Besides the toolkit's own locations the sweep steers what is easily taken for them, the outputs of
modules that carry one name in several families. Names of one tensor are swept once, under the first
name of `SITES`:

    site                       Llama, Qwen     Gemma-3
    pre_mlp                    pre_mlp         pre_mlp
    mlp_in                     mlp_in          mlp_in
    post_mlp                   post_mlp        post_mlp
    post_attention_layernorm   = mlp_in        = pre_mlp
    attn_out_raw               = pre_mlp       its own: in front of the norm on attention's output
    mlp_out_raw                = post_mlp      its own: in front of the norm on the MLP's output
    raw_delta_at_pre_mlp       = pre_mlp       its own: see below

`raw_delta_at_pre_mlp` is a mix-up: the delta is taken at attn_out_raw and added at pre_mlp. Where a
norm lies between the two, the delta has the scale of the one and the state that of the other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from toolkit.analysis.divergence import Divergences, kl_divergence
from toolkit.models.deltas import delta
from toolkit.models.edits import steerable, steered_by
from toolkit.models.generation import (
    Generated,
    Prompts,
    end_tokens,
    greedy,
    make_prompts,
    prefill,
    whole_logits,
)
from toolkit.models.hooks import Site, capture, replace
from toolkit.models.locations import Sites
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress

ALPHAS = (0.0, 0.1, 0.25, 0.5, 1.0)
N_NEW = 5
# Module outputs that are easily taken for a location, by the module's name inside a block.
RAW = {
    "post_attention_layernorm": "post_attention_layernorm",
    "attn_out_raw": "self_attn",
    "mlp_out_raw": "mlp",
}
# Deltas that are added where they were not taken: where they are taken, and where added.
MIXED = {"raw_delta_at_pre_mlp": ("attn_out_raw", "pre_mlp")}
SITES = ("pre_mlp", "mlp_in", "post_mlp", *RAW, *MIXED)

Key = tuple[str, int]  # a site's name and the layer


@dataclass(frozen=True)
class Reading:
    """Hold what both models make of the prompts and of the tuned model's own first tokens.

    `where` bool `[n, length]`: the tokens that are steered. `entering`: the base model's state in
    front of each block; `base`, `tuned`, `stream`: the states at the swept sites, and the base
    model's residual stream between attention and MLP; all `[n, length, d_model]`. Logits are
    `[n, n_new, vocabulary]`.
    """

    prompts: Prompts
    generated: Generated
    where: Tensor
    entering: list[Tensor]
    base: dict[Key, Tensor]
    tuned: dict[Key, Tensor]
    stream: dict[int, Tensor]
    base_logits: Tensor
    tuned_logits: Tensor

    def delta(self, key: Key) -> Tensor:
        """The free oracle delta at `key`, `[n, length, d_model]`."""
        taken, _ = places(key)
        return delta(self.tuned[taken], self.base[taken])


@dataclass(frozen=True)
class Sweep:
    """`changes` and `sites` are the two tables; `same` names, for a site left out, the one kept."""

    reading: Reading
    changes: pd.DataFrame
    sites: pd.DataFrame
    same: dict[str, str]


def places(key: Key) -> tuple[Key, Key]:
    """Tell where the delta for `key` is taken, and where it is added."""
    taken, added = MIXED.get(key[0], (key[0], key[0]))
    return (taken, key[1]), (added, key[1])


def find_sites(sites: Sites, names: Iterable[str]) -> dict[Key, Site]:
    """Tell where each of `names`, locations or keys of `RAW`, is in every block."""
    names = set(names)
    found = {key: site for key, site in sites.at.items() if key[0] in names}
    for name in RAW.keys() & names:
        for layer, block in enumerate(sites.blocks):
            found[name, layer] = Site(block.get_submodule(RAW[name]), "output")
    return found


@torch.no_grad()
def read(
    pair: ModelPair, prompts: Sequence[Sequence[int]], names: Sequence[str], n_new: int = N_NEW
) -> Reading:
    """Let the tuned model say `n_new` tokens behind each prompt, and both models read all of it."""
    batch = make_prompts(prompts, pair.tokenizer.pad_token_id or 0, pair.device)
    ends = end_tokens(pair.tuned_runner.model, pair.tokenizer)
    generated, _ = greedy(pair.tuned, batch, prefill(pair.tuned, batch), n_new, ends)
    base_sites = pair.base_runner.sites
    wanted = {site for name in names for site in MIXED.get(name, (name,))}
    base_at = find_sites(base_sites, {*wanted, "resid_mid"})
    with capture(base_sites.inputs | _labelled(base_at)) as base:
        base_logits = new_logits(pair.base_runner.model, batch, generated)
    with capture(_labelled(find_sites(pair.tuned_runner.sites, wanted))) as tuned:
        tuned_logits = new_logits(pair.tuned_runner.model, batch, generated)
    swept = [key for key in base_at if key[0] in wanted]
    layers = range(pair.n_layers)
    return Reading(
        batch,
        generated,
        steerable(torch.cat([batch.mask, batch.mask.new_ones(len(batch.mask), n_new - 1)], 1)),
        [base[str(layer)] for layer in layers],
        {key: base[_label(key)] for key in swept},
        {key: tuned[_label(key)] for key in swept},
        {layer: base[_label(("resid_mid", layer))] for layer in layers},
        base_logits,
        tuned_logits,
    )


def new_logits(model: Any, prompts: Prompts, generated: Generated) -> Tensor:
    """The logits by which `model` would choose each generated token, `[n, n_new, vocabulary]`."""
    # The head is handed a slice of the states, for which torch would read its weights once a
    # prompt: of Gemma's 262,144 tokens that takes longer than nine blocks.
    head = Site(model.get_output_embeddings(), "input")
    with replace(head, Tensor.contiguous):
        return whole_logits(model, prompts, generated)


def same_sites(reading: Reading, names: Sequence[str]) -> dict[str, str]:
    """For each of `names` that an earlier one coincides with in all layers, that earlier one."""
    same: dict[str, str] = {}
    for index, name in enumerate(names):
        kept = [earlier for earlier in names[:index] if earlier not in same]
        found = (k for k in kept if _all_equal(_states(reading, k), _states(reading, name)))
        first = next(found, None)
        if first is not None:
            same[name] = first
    return same


def _states(reading: Reading, name: str) -> list[Tensor]:
    """The base model's states where the deltas for `name` are taken and added, in all blocks."""
    return [
        reading.base[key] for layer in range(len(reading.entering)) for key in places((name, layer))
    ]


def _all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def steered_logits(pair: ModelPair, reading: Reading, key: Key, alpha: float) -> Tensor:
    """The base model's logits with `alpha` of the delta added at `key`, `[n, n_new, vocabulary]`.

    Blocks in front of the steered one are not run again.
    """
    shift = alpha * reading.delta(key)
    _, added = places(key)
    site = find_sites(pair.base_runner.sites, added[:1])[added]
    with (
        pair.base_runner.started_at(key[1], reading.entering[key[1]]),
        replace(site, steered_by(lambda _: shift, reading.where)),
    ):
        return new_logits(pair.base_runner.model, reading.prompts, reading.generated)


class Divergence:
    """By how much a model is nearer to the tuned one than the base model is, both ways round."""

    def __init__(self, reading: Reading) -> None:
        self._tuned, self._counted = reading.tuned_logits, reading.generated.counted
        self.base = self._both(reading.base_logits)

    def changes(self, logits: Tensor) -> list[dict[str, Any]]:
        """One row for each token index: what `logits` change of the base model's KL, in nats."""
        forward, reverse = (
            Divergences(nats - of_base, self._counted).curve()
            for nats, of_base in zip(self._both(logits), self.base, strict=True)
        )
        return [
            {
                "token_index": index,
                "delta_kl": mean,
                "delta_kl_sem": sem,
                "delta_kl_reverse": reverse_mean,
                "delta_kl_reverse_sem": reverse_sem,
                "n_prompts": n,
            }
            for (index, mean, sem, n), (_, reverse_mean, reverse_sem, _) in zip(
                forward, reverse, strict=True
            )
        ]

    def of_base(self) -> dict[str, list[float]]:
        """KL(base ‖ tuned) and KL(tuned ‖ base) by token index, means over prompts."""
        curves = [Divergences(nats, self._counted).curve() for nats in self.base]
        names = ("kl_base_tuned", "kl_tuned_base")
        return {n: [row[1] for row in curve] for n, curve in zip(names, curves, strict=True)}

    def _both(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return kl_divergence(logits, self._tuned), kl_divergence(self._tuned, logits)


def run_sweep(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str] = SITES,
    alphas: Sequence[float] = ALPHAS,
    layers: Sequence[int] | None = None,
    shown: bool = False,
) -> Sweep:
    """Steer each of `layers` (all) at each of `names`, all of which the family must have."""
    reading = read(pair, prompts, names)
    same = same_sites(reading, names)
    layers = range(pair.n_layers) if layers is None else layers
    keys = [(name, layer) for layer in layers for name in names if name not in same]
    divergence = Divergence(reading)
    with progress("oracle sweep", len(keys) * len(alphas), shown) as advance:
        rows = [
            {"layer": key[1], "site": key[0], "alpha": alpha, **row}
            for key in keys
            for alpha in alphas
            for row in _measured(pair, reading, divergence, key, alpha, advance)
        ]
    sites = pd.DataFrame([site_norms(reading, key) for key in keys])
    return Sweep(reading, pd.DataFrame(rows), sites, same)


def site_norms(reading: Reading, key: Key) -> dict[str, Any]:
    """How large the base state and the delta at `key` are: medians over steered tokens."""
    name, layer = key
    base = reading.base[places(key)[1]][reading.where].double().norm(dim=-1)
    change = reading.delta(key)[reading.where].double().norm(dim=-1)
    stream = reading.stream[layer][reading.where].double().norm(dim=-1)
    return {
        "layer": layer,
        "site": name,
        "base_norm": float(base.median()),
        "delta_norm": float(change.median()),
        "relative_delta": float((change / base).median()),
        "stream_ratio": float((base / stream).median()) if name == "pre_mlp" else None,
    }


def _measured(
    pair: ModelPair,
    reading: Reading,
    divergence: Divergence,
    key: Key,
    alpha: float,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    rows = divergence.changes(steered_logits(pair, reading, key, alpha))
    advance()
    return rows


def _labelled(sites: dict[Key, Site]) -> dict[str, Site]:
    return {_label(key): site for key, site in sites.items()}


def _label(key: Key) -> str:
    return f"{key[0]} of {key[1]}"
