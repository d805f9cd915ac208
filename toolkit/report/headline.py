"""The answer of the whole run, in a sentence."""

import math
from typing import Any

from toolkit.evaluation.rank_search import RankSearch
from toolkit.tables.words import NAMES, plus_minus

PLACES = {
    "pre_mlp": "before the MLP (pre-MLP, the attention branch)",
    "post_mlp": "after the MLP (post-MLP, before the skip)",
    "post_block": "after the block (post-block)",
}
FITS = {"free": "freely", "forced": "block by block (forced)", "sequential": "sequentially"}


def headline(recommendation: dict[str, Any] | None, nothing_changed: bool) -> str:
    """Return the answer of the whole run."""
    if nothing_changed:
        return "The two models agree everywhere: nothing changed."
    if recommendation is None:
        return (
            "Steering in closed form recovers nothing of this fine-tune: no map that was fitted "
            "brings the base model nearer to the tuned one than no steering does."
        )
    r = recommendation
    what = "a fixed vector" if r["kind"] == "vector" else f"a linear map of rank {r['rank']}"
    where = "in every block" if r["layers"] == "all" else f"in block {r['layers']} alone"
    return (
        f"Steer {PLACES[r['location']]} with {what} {where}, fitted {FITS[r['fit']]}: it recovers "
        f"{plus_minus(r['recovered'], r['recovered_sem'])} of the fine-tune with "
        f"{_percent(r['parameters_percent'])}% of the parameters."
    )


def ties(recommendation: dict[str, Any] | None) -> str:
    """Return whether the choice was clear, and what recovers most."""
    if recommendation is None:
        return ""
    best, tied = recommendation["best"], recommendation["tied"]
    if not tied:
        return (
            "No smaller choice comes within one standard error of it on the same held-out prompts."
        )
    names = "; ".join(_candidate(row) for row in tied)
    return (
        f"Within one standard error of the difference on the same held-out prompts it cannot be "
        f"told from {names}. The smallest is recommended; the most is recovered by "
        f"{_candidate(best)}."
    )


def smallest_set(found: RankSearch) -> str:
    """Return what was found of the smallest ranks within a KL."""
    bound, row = f"{found.max_kl:g} nats a token", found.chosen
    if found.ranks == ():
        return f"No steering is needed: the base model is within {bound} of the tuned one."
    measured = f"{_nats(row.kl, row.kl_sem)} nats on {row.n_prompts:.0f} held-out prompts"
    if found.ranks is None:
        return (
            f"No set of ranks that was tried comes within {bound}: the nearest, "
            f"{row.total:.0f} ranks in all, leaves {measured}."
        )
    least, most = min(found.ranks), max(found.ranks)
    each = f"{least} a block" if least == most else f"{least} to {most} a block"
    said = (
        f"Within {bound}: {row.total:.0f} ranks after the blocks ({each}), "
        f"{row.parameters:,.0f} parameters, {measured}."
    )
    below = found.next_smaller
    if below is None:
        return said
    smaller = f"The next smaller set that was tried, {below.total:.0f} ranks,"
    smaller = smaller if below.total else "No steering"
    return f"{said} {smaller} leaves {_nats(below.kl, below.kl_sem)}."


def _candidate(row: dict[str, Any]) -> str:
    kind = "vector" if row["kind"] == "vector" else f"rank {row['rank']}"
    layers = "" if row["layers"] == "all" else f" in block {row['layers']}"
    return f"{NAMES[row['location']]} {kind} {row['fit']}{layers} ({row['recovered']:.3f})"


def _nats(kl: float, sem: float) -> str:
    """To three digits, which stand beside a bound that may be small."""
    return f"{kl:.3g}" if math.isnan(sem) else f"{kl:.3g} ± {sem:.2g}"


def _percent(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:.3g}"
