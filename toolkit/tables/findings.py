"""What each table says about this pair, in one plain sentence with its numbers."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from toolkit.tables.table import Table

NAMES = {"pre_mlp": "pre-MLP", "post_mlp": "post-MLP", "post_block": "post-block"}
NOT_IN_RUN = "Not measured in this run, which was made before there was such a table."
UNMEASURED = "Not applicable: nothing was measured here."
NOTHING = "Nothing changed: every delta is zero."
NO_PATH = "Not applicable: the path from attention through the MLP cannot be read."


def _norms(frame: pd.DataFrame) -> str:
    share = frame.dropna(subset=["mlp_share"]).groupby("of").mlp_share
    if not share.ngroups:
        return "Not applicable: this family's branches cannot be told apart."
    if not frame.query("of == 'delta_free'").post_block.any():
        return NOTHING
    low, high, median = share.min(), share.max(), share.median()
    return (
        f"In the base model the MLP supplies {low['base']:.0%} to {high['base']:.0%} of the two "
        f"branches' norms, depending on the block; of what fine-tuning changed in a block by "
        f"itself (the forced delta) {low['delta_forced']:.0%} to {high['delta_forced']:.0%} "
        f"(median {median['delta_forced']:.0%}), and that is what steering after the MLP covers."
    )


def _spectrum(frame: pd.DataFrame) -> str:
    rows = frame.query("location == 'post_block' and mode == 'free'").dropna(subset=["rms"])
    if rows.empty:
        return UNMEASURED
    if not rows.rms.any():
        return NOTHING
    return (
        f"After the block the delta is {rows.relative_rms.min():.3g} to "
        f"{rows.relative_rms.max():.3g} of the state's size; 90% of its energy lies in "
        f"{rows.k90.min():.0f} to {rows.k90.max():.0f} dimensions (median {rows.k90.median():.0f}),"
        f" and a fixed vector could explain {rows.mean_share.median():.0%} (median)."
    )


def _noise(frame: pd.DataFrame) -> str:
    rows = frame[frame.location == "post_block"].dropna(subset=["noise_relative"])
    if rows.empty:
        return "Not applicable: no noise can be measured (the check of the noise floor says why)."
    free, forced = (rows[rows["mode"] == mode].noise_relative for mode in ("free", "forced"))
    return (
        f"Rounding moves the base model's state after a block by {free.min():.1e} to "
        f"{free.max():.1e} of its size, all blocks so far taken together, and by "
        f"{forced.min():.1e} to {forced.max():.1e} within one block. A free or a forced delta of "
        "that size says nothing."
    )


def _linear_fit(frame: pd.DataFrame) -> str:
    rows = frame[(frame["mode"] == "forced") & (frame.target == "block")]
    if not rows.explained_fit.notna().any():
        return UNMEASURED
    if not rows.explained_fit.any():
        return NOTHING
    parts = []
    for source in ("pre_mlp", "post_mlp", "post_block"):
        by_rank = rows[rows.source == source].groupby("rank").explained_heldout.median()
        shown = [f"{by_rank[r]:.0%} at rank {r}" for r in (0, 8, 32) if r in by_rank]
        if shown:
            full = f", {by_rank['full']:.0%} at full rank" if "full" in by_rank else ""
            parts.append(f"{NAMES[source]} {', '.join(shown)}{full}")
    return (
        "Of what a block must add to the stream, a linear map explains on held-out documents "
        f"(median over blocks) from {'; from '.join(parts)}."
    )


def _first_order(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "Not applicable: this family's MLP cannot be read as matrices."
    if not frame.relative_change.notna().any():
        return UNMEASURED
    if not frame.relative_change.any():
        return "Nothing changed in any MLP."
    rows = frame[frame.relative_change > 0]
    median = rows[["down", "gate", "up"]].median()
    return (
        f"Of the MLP's own change the down projection makes {median['down']:.0%}, the gate "
        f"{median['gate']:.0%} and the up projection {median['up']:.0%} (medians over blocks); "
        f"what the three first-order terms leave is at most {rows.remainder.max():.1e} of its "
        "energy."
    )


def _reachability(frame: pd.DataFrame) -> str:
    rows = frame.query("target == 'down'").dropna(subset=["residual_median"])
    if rows.empty:
        return "Not applicable: no tokens were sampled, or no down projection changed."
    median = rows.groupby("budget").residual_median.median()
    real = rows.groupby("budget").nonlinear_residual_median.median()
    return (
        "A steering vector of 3% of the MLP input's norm leaves "
        f"{_share(median[0.03])} of the down projection's change, one of 30% leaves "
        f"{_share(median[0.3])} (medians over blocks, one free vector a token, to first order; "
        "through the real MLP "
        f"{_share(real[0.03])} and {_share(real[0.3])})."
    )


def _sequential_kl(frame: pd.DataFrame) -> str:
    tuned = frame[frame.forcing == "tuned"]
    base = tuned[tuned.kind == "none"]
    if not base.kl_mean.notna().any():
        return UNMEASURED
    if not base.kl_mean.any():
        return "Nothing changed: every model says the same with the same certainty."

    def mean(fit: str, rank: Any) -> float | None:
        rows = tuned[
            (tuned.location == "post_block")
            & (tuned.fit == fit)
            & (tuned["rank"] == rank)
            & (tuned.layers == "all")
        ]
        return _weighted(rows) if len(rows) else None

    shown = [("free", 8), ("free", "full"), ("forced", 8), ("sequential", 8)]
    nats = {(fit, rank): mean(fit, rank) for fit, rank in shown}
    parts = [
        f"{value:.3g} with the {fit} {'full-rank fit' if rank == 'full' else f'fit of rank {rank}'}"
        for (fit, rank), value in nats.items()
        if value is not None
    ]
    oracle = _weighted(tuned[tuned.kind == "oracle"])
    free, forced = nats["free", 8], nats["forced", 8]
    overshoots = free is not None and forced is not None and free > forced
    why = " The free fit adds at every block what earlier blocks were already steered to supply."
    return (
        f"The base model is {_weighted(base):.3g} nats per generated token from the tuned one; "
        f"post-block in all blocks it is {', '.join(parts)}, and {oracle:.1e} with the "
        f"oracle.{why if overshoots else ''}"
    )


def _weighted(rows: pd.DataFrame) -> float:
    """The mean over all tokens: every prompt that reaches an index counts once there."""
    return float((rows.kl_mean * rows.n_prompts).sum() / rows.n_prompts.sum())


def _steerability(frame: pd.DataFrame) -> str:
    rows = frame[frame.kind.isin(["vector", "linear"])]
    if not rows.kl.notna().any():
        return UNMEASURED
    if not frame[frame.kind == "none"].kl.any():
        return NOTHING
    everywhere, single = rows[rows.layers == "all"], rows[rows.layers != "all"]
    parts = []
    for location in ("pre_mlp", "post_mlp", "post_block"):
        for fit in ("forced", "sequential", "free"):
            match = everywhere[
                (everywhere.location == location)
                & (everywhere.fit == fit)
                & (everywhere["rank"] == 8)
            ]
            for row in match.itertuples():
                share = plus_minus(row.recovered, row.recovered_sem)
                parts.append(f"{NAMES[location]} {fit} {share}")
    text = f"Recovered at rank 8 in all blocks: {'; '.join(parts)}."
    if len(single):
        best = single.loc[single.recovered.idxmax()]
        share = plus_minus(best.recovered, best.recovered_sem)
        text += f" The best single block is {best.layers}, with {share}."
    return text


def plus_minus(value: float, sem: float | None) -> str:
    """A share with its standard error, to the error's digits; one prompt alone has none."""
    if sem is None or math.isnan(sem):
        return f"{value:.2f}".replace("-", "−")
    digits = 2 if sem >= 0.005 else 3
    return f"{value:.{digits}f} ± {sem:.{digits}f}".replace("-", "−")


def _share(value: float) -> str:
    return "less than 1%" if 0 < value < 0.005 else f"{value:.0%}"


def _shared_reach(frame: pd.DataFrame) -> str:
    rows = frame[frame["rank"] == 8].dropna(subset=["explained_heldout"])
    if len(rows) and not frame.explained_fit.any():
        return NOTHING
    parts = []
    for location, target, words in (
        ("mlp_in", "down", "of the down projection's change, steered at the MLP's input"),
        ("mlp_in", "exact", "of the MLP's whole change, steered there"),
        ("pre_mlp", "block", "of the block's forced delta, steered before the MLP"),
        ("post_mlp", "block", "of the same, steered after the MLP"),
    ):
        found = rows[(rows.location == location) & (rows.target == target)].explained_heldout
        if found.notna().any():
            low, high = found.min(), found.max()
            parts.append(f"{found.median():.0%} {words} ({low:.0%} to {high:.0%})")
    if not parts:
        return "Not applicable: no tokens were sampled, or nothing changed."
    return (
        "One map of rank 8 for all tokens explains, on held-out tokens (median and range over "
        f"blocks), {'; '.join(parts)}. This is what an adapter can do; a free vector for every "
        "token is only a bound for it."
    )


def _forced_reach(frame: pd.DataFrame) -> str:
    rows = frame[frame.target == "block"].dropna(subset=["explained"])
    if rows.empty:
        return NO_PATH
    if not rows.explained.any():
        return NOTHING
    by_place = rows.groupby(["location", "budget"]).explained.median()
    parts = [
        f"{100 * budget:g}% of the stream's norm reaches {by_place['pre_mlp', budget]:.0%} from "
        f"before the MLP and {by_place['post_block', budget]:.0%} from after it"
        for budget in (0.03, 0.1, 0.3)
        if ("pre_mlp", budget) in by_place
    ]
    real = rows[(rows.location == "pre_mlp") & (rows.budget == 0.03)].nonlinear_residual_median
    heads = f" Through the real block the 3% before the MLP leave {_share(real.median())}."
    best = rows[(rows.location == "heads") & (rows.budget == 0.3)].groupby("layer").explained.max()
    if len(best):
        heads += f" The best single head reaches {best.median():.0%} with 30%."
    return (
        "Of the block's own change, a free vector a token of "
        f"{'; of '.join(parts)} (medians over blocks, first order).{heads}"
    )


def _normalisation(frame: pd.DataFrame) -> str:
    frame = frame.dropna(subset=["norm_gain"])
    if frame.empty:
        return NO_PATH
    low, high = frame.norm_gain.min(), frame.norm_gain.max()
    return (
        f"A change of 1% of the stream becomes one of {low:.2g}% to {high:.2g}% of the MLP's input;"
        f" along the stream itself of at most {frame.radial_gain.max():.1e}%: the norm takes that "
        f"out. Attention contributes {frame.attention_share.min():.1%} to "
        f"{frame.attention_share.max():.0%} of the stream."
    )


def _inner_pair(frame: pd.DataFrame) -> str:
    full = frame[frame["rank"] == "full"].explained_heldout
    if not full.notna().any():
        return "Not applicable: neither gate nor up projection changed."
    if not full.any():
        return NOTHING
    return (
        f"One change of the MLP's input gives gate and up {full.median():.0%} (median over blocks; "
        f"{full.min():.0%} to {full.max():.0%}) of what fine-tuning gave them, whether it is free "
        "for every token or one linear map: the two have far more rows than the input has "
        "dimensions."
    )


def _first_order_scale(frame: pd.DataFrame) -> str:
    if not frame.relative_change.notna().any():
        return UNMEASURED
    if not frame.relative_change.any():
        return "Nothing changed in any MLP."
    worst = frame.groupby("scale").remainder.max()
    words = ", ".join(f"{value:.1e} at {scale:g}" for scale, value in worst.items())
    return (
        "What first order leaves of the MLP's change, in the worst block, at multiples of the "
        f"update: {words}. Above a few per cent the linear story misleads."
    )


def _mlp_fit(frame: pd.DataFrame) -> str:
    frame = frame.dropna(subset=["explained_heldout"])
    bound = frame[frame.target == "down"].groupby("rank").explained_heldout.median()
    linear = frame[frame.target == "mlp_out"].explained_heldout
    if linear.empty:
        return UNMEASURED
    shown = [f"{bound[rank]:.0%} at rank {rank}" for rank in (1, 8, 32) if rank in bound]
    reft = f"A ReFT on the MLP's output explains at most {', '.join(shown)} of ΔW_d m. "
    return (
        f"{reft if shown else ''}The best affine map of the MLP's input has a held-out R² of "
        f"{linear.median():.2f} (median over blocks, {linear.min():.2f} to {linear.max():.2f}): "
        "the nearer to 1, the more linear the MLP is on these tokens."
    )


def _weights(frame: pd.DataFrame) -> str:
    if not frame.norm_2.notna().any():
        return UNMEASURED
    rows = frame[frame.norm_2 > 0]
    if rows.empty:
        return "Nothing changed in any matrix of any block."
    largest = rows.loc[rows.norm_2.idxmax()]
    downs = rows[rows.module.str.contains("down|c_proj|4h_to_h|fc2")]
    share = f"At most {downs.outside.max():.1%} of a down projection's change"
    outside = f" {share} lies outside its column space." if len(downs) else ""
    return (
        f"{len(rows)} of {len(frame)} matrices changed, by {rows.relative.min():.2%} to "
        f"{rows.relative.max():.1%} of their norm; numerical ranks {rows['rank'].min():.0f} to "
        f"{rows['rank'].max():.0f}. The largest 2-norm, {largest.norm_2:.3g}, has {largest.module} "
        f"of block {largest.layer:.0f}.{outside}"
    )


FINDINGS: dict[str, Callable[[pd.DataFrame], str]] = {
    "norms": _norms,
    "spectrum": _spectrum,
    "noise": _noise,
    "linear_fit": _linear_fit,
    "first_order": _first_order,
    "reachability": _reachability,
    "sequential_kl": _sequential_kl,
    "steerability": _steerability,
    "shared_reach": _shared_reach,
    "forced_reach": _forced_reach,
    "normalisation": _normalisation,
    "inner_pair": _inner_pair,
    "first_order_scale": _first_order_scale,
    "mlp_fit": _mlp_fit,
    "weights": _weights,
}


def finding(table: Table) -> str:
    """What `table` says, or that its run has none."""
    return FINDINGS[table.name](table.frame) if table.measured else NOT_IN_RUN


NOT_IN_RUN = "Not measured in this run, which was made before there was such a table."
