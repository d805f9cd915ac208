"""The answer of the whole run, in a sentence."""

import math
from typing import Any

import pandas as pd

from toolkit.analysis.divergence import FLOOR_NATS
from toolkit.evaluation.rank_search import RankSearch
from toolkit.tables.words import NAMES, candidate_name, nats, plus_minus, share_words

PLACES = {
    "pre_mlp": "before the MLP (pre-MLP, the attention branch)",
    "post_mlp": "after the MLP (post-MLP, before the skip)",
    "post_block": "after the block (post-block)",
}
FITS = {
    "free": "fitted freely",
    "forced": "fitted block by block (forced)",
    "sequential": "fitted sequentially",
    "distilled": "distilled",
}


def headline(
    recommendation: dict[str, Any] | None, nothing_changed: bool, base_kl: float = math.nan
) -> str:
    """Return the answer of the whole run; `base_kl` are the nats a token without steering."""
    if nothing_changed:
        return "The two models agree everywhere: nothing changed."
    if base_kl < FLOOR_NATS:
        return (
            "On these prompts the tuned model predicts what the base model does "
            f"({base_kl:.1e} nats a token, which is rounding): there is nothing to recover here."
        )
    if recommendation is None:
        return (
            "None of the adapters that were fitted recovers anything of this fine-tune: on the "
            "prompts that choose, none brings the base model nearer to the tuned one than no "
            "steering does."
        )
    r = recommendation
    what = "a fixed vector" if r["kind"] == "vector" else f"a linear map of rank {r['rank']}"
    where = "in every block" if r["layers"] == "all" else f"in block {r['layers']} alone"
    adapter = f"{what} {PLACES[r['location']]} {where}, {FITS[r['fit']]}"
    cost = f"{_percent(r['parameters_percent'])}% of the parameters"
    if "reported" in r:
        return _reported(r, adapter, cost)
    found = f"{plus_minus(r['recovered'], r['recovered_sem'])}{_at_least(r)}"
    if "asked" not in r:  # a run of an earlier version
        return f"Steer with {adapter}: it recovers {found} of the fine-tune with {cost}."
    if r["reached"]:
        return (
            f"The smallest adapter shown to recover {r['asked']:g} of the fine-tune is {adapter}: "
            f"it recovers {found} with {cost}."
        )
    return (
        f"None of these adapters is shown to recover {r['asked']:g} of the fine-tune. The nearest "
        f"is {adapter}: it recovers {found} with {cost}."
    )


def _reported(r: dict[str, Any], adapter: str, cost: str) -> str:
    """Say what was chosen, and what the prompts that did not choose it show of it."""
    shown = r["reported"]
    n, apart, low = shown["n"], shown["apart"], shown["low"]
    confirmed = not apart or (low is not None and low >= r["asked"])
    found = f"It recovers {_interval(shown)} of the fine-tune with {cost}"
    if not r["reached"] and apart and confirmed:
        start = (
            f"On the {r['n_choosing']} prompts that choose, no candidate's lower bound reaches "
            f"{r['asked']:g}. The best there is {adapter}"
        )
    elif not r["reached"]:
        start = f"None of these adapters is shown to recover {r['asked']:g} of the fine-tune. The"
        start += f" nearest is {adapter}"
    elif confirmed:
        start = (
            f"The smallest adapter shown to recover {r['asked']:g} of the fine-tune is {adapter}"
        )
    else:
        start = f"Chosen as the smallest to recover {r['asked']:g} of the fine-tune is {adapter}"
    prompts = f"{n} prompts that had no part in choosing it" if apart else _together(n)
    end = f", which does not confirm {r['asked']:g}" if r["reached"] and not confirmed else ""
    return f"{start}. {found}, on {prompts}{end}."


def _together(n: int) -> str:
    """Say that the same prompts choose and report."""
    return "the one prompt that chose it" if n == 1 else f"the same {n} prompts that chose it"


def _interval(shown: dict[str, Any]) -> str:
    """Write an estimate with its interval, in as many digits as the interval's width asks for."""
    low, high = shown["low"], shown["high"]
    if low is None:
        return share_words(shown["estimate"])
    digits = 3 if high - low < 0.02 else 2
    numbers = (f"{value:.{digits}f}".replace("-", "−") for value in (shown["estimate"], low, high))
    return "{} (95 % interval {} to {})".format(*numbers)


def _at_least(r: dict[str, Any]) -> str:
    """Say the bound that holds over all candidates, where there is one."""
    lower = r.get("lower")
    if lower is None or math.isnan(lower):
        return ""
    return f" (at least {lower:.3f} at 95 %, over all {r['n_candidates']} candidates)"


def beside(recommendation: dict[str, Any] | None) -> str:
    """Return what stands beside the answer: the next smaller adapter, and what recovers most."""
    if recommendation is None or "asked" not in recommendation:
        return ""
    r, smaller, best = recommendation, recommendation["smaller"], recommendation["best"]
    parts = []
    if smaller and r["reached"]:
        parts.append(f"Of those with fewer numbers {_candidate(smaller)} comes nearest.")
    if any(best[name] != r[name] for name in ("location", "kind", "rank", "fit", "layers")):
        parts.append(f"The most is recovered by {_candidate(best)}.")
    if parts and r.get("reported", {}).get("apart"):
        parts.append("The prompts that choose found this; the figures in brackets are of all.")
    return " ".join([*parts, *_how_sure(r)])


def _how_sure(r: dict[str, Any]) -> list[str]:
    """Say how the chosen stands beside the runner-up, and what more prompts would buy."""
    shown, other = r.get("reported"), r.get("runner_up")
    if not shown or shown["low"] is None:
        return []
    parts = []
    if other and (more := shown["more_than_runner_up"]):
        numbers = [f"{more[name]:+.3f}".replace("-", "−") for name in ("estimate", "low", "high")]
        parts.append(
            f"Beside the runner-up, {candidate_name(other)}, it recovers {numbers[0]} "
            f"({numbers[1]} to {numbers[2]}, paired)."
        )
    half = (shown["high"] - shown["low"]) / 2
    parts.append(
        f"With four times as many reporting prompts the interval of ± {half:.3f} would be about "
        f"± {shown['half_width_of_four_times']:.3f}."
    )
    return parts


def floors(frame: pd.DataFrame, distillation: dict[str, Any] | None) -> str:
    """Say what closed form reaches at each place, and what distillation does beside it."""
    rows = frame[(frame.layers == "all") & frame.kind.isin(["vector", "linear"])]
    closed = rows[rows.fit.isin(["forced", "sequential"])]
    distilled = rows[rows.fit == "distilled"]
    parts = []
    for location, name in NAMES.items():
        for rank, size in ((0, "a vector"), (8, "rank 8")):
            here = closed[(closed.location == location) & (closed["rank"] == rank)].recovered
            more = distilled[(distilled.location == location) & (distilled["rank"] == rank)]
            if here.empty or here.isna().all():
                continue
            text = f"{size} {name} {share_words(here.max())}"
            if len(more):
                text += f", distillation {share_words(more.recovered.max())}"
            parts.append(text)
    if not parts:
        return ""
    if len(distilled):
        return f"Closed form reaches, with {'; '.join(parts)}."
    text = (
        f"Closed form reaches, with {'; '.join(parts)}. These are floors: what one fit reaches, "
        "not what a place can do."
    )
    if distillation and distillation.get("estimated_seconds"):
        text += (
            f" Distilling every place (--distil {distillation['would_be']}) measures more, and "
            f"would take about {_duration(distillation['estimated_seconds'])} here."
        )
    return text


def weights_beside(frame: pd.DataFrame) -> str:
    """Say what changes of the weights recover with the numbers of steering."""
    if "target" not in frame:  # a run of an earlier version
        return ""
    lora = frame[(frame.kind == "lora") & frame.recovered.notna()]
    parts = []
    for label, rows in lora.groupby("target", sort=False):
        best = rows.loc[rows.recovered.idxmax()]
        words = {"steering": "the numbers of steering of rank", "lora": "a LoRA of rank"}
        kind, _, rank = str(label).partition(" ")
        parts.append(
            f"{plus_minus(best.recovered, best.recovered_sem)} with {words.get(kind, kind)} {rank} "
            f"({best.parameters:,.0f})"
        )
    if not parts:
        return ""
    return f"The best low-rank change of the weights in closed form recovers {'; '.join(parts)}."


def _duration(seconds: float) -> str:
    for unit, size in (("seconds", 1), ("minutes", 60)):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} hours"


def smallest_set(found: RankSearch) -> str:
    """Return what was found of the smallest ranks within a KL."""
    bound, row = f"{found.max_kl:g} nats a token", found.chosen
    if found.ranks == ():
        return f"No steering is needed: the base model is within {bound} of the tuned one."
    prompts = f"{row.n_prompts:.0f} held-out prompts, which also chose"
    measured = f"{nats(row.kl, row.kl_sem)} nats on {prompts}"
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
    return f"{said} {smaller} leaves {nats(below.kl, below.kl_sem)}."


def _candidate(row: dict[str, Any]) -> str:
    return f"{candidate_name(row)} ({row['recovered']:.3f})"


def _percent(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:.3g}"
