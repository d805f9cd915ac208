"""What each run recovers, by place and size, beside its dose: how far the fine-tune went."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.runs.finished import FinishedRun
from toolkit.tables.drawing import (
    EDGE,
    GREY,
    LOCATION_STYLE,
    LOCATIONS,
    LOWEST,
    REFERENCE,
    add_reference,
    by_location,
    clip_shares,
    finish,
    house_style,
    make_panels,
    number_at_edge,
    plain_ticks,
)
from toolkit.tables.model_points import draw_points
from toolkit.tables.series import rank_words
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import plus_minus

KEYS = ["location", "kind", "rank", "fit", "layers", "target"]
SHOWN_RANK = 8  # or the largest below it that every run has
CLOSED_FORM = ("forced", "sequential")
DOSE = "dose: KL(tuned ‖ base), nats a token"


def recovery_rows(runs: Sequence[FinishedRun]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of ``compare.csv``, and what is left out of it and why.

    A row for each of a run's fits in all blocks, and for its recommendation where that is one
    block. The numbers are those of the run's own tables.
    """
    rows: list[dict[str, Any]] = []
    left_out = []
    changes = weight_changes(runs)
    for run in runs:
        table = run.table("steerability")
        if not table.measured or not (table.frame.kind == "none").any():
            left_out.append(f"{run.name} has no table of what is recovered: none of its rows")
            continue
        if run.name not in changes:
            left_out.append(f"{run.name} has no table of weights: no relative change of them")
        columns = [*KEYS, "parameters", "parameters_percent", "kl", "kl_sem"]
        columns += ["recovered", "recovered_sem"]
        frame = table.frame.reindex(columns=columns)
        (base,) = frame[frame.kind == "none"].to_dict("records")
        dose = {
            "base_kl": base["kl"],
            "base_kl_sem": base["kl_sem"],
            "weights_relative": changes.get(run.name, float("nan")),
            "n_prompts": run.info["data"]["prompts"],
        }
        for row in frame[frame.kind.isin(["vector", "linear", "lora"])].to_dict("records"):
            chosen = _is_recommended(row, run)
            if row["layers"] == "all" or chosen:
                shown = _reported(run) if chosen else {}
                rows.append({"run": run.name, **row, "recommended": chosen, **shown, **dose})
    return rows, left_out


def _is_recommended(row: dict[str, Any], run: FinishedRun) -> bool:
    chosen = run.recommendation
    return chosen is not None and all(row[key] == chosen[key] for key in KEYS if key in chosen)


def _reported(run: FinishedRun) -> dict[str, Any]:
    """Return what the prompts that report say of the recommendation; nothing of an earlier run."""
    reported = (run.recommendation or {}).get("reported") or {}
    names = {"reported": "estimate", "reported_low": "low", "reported_high": "high"}
    return {name: reported.get(key) for name, key in names.items()}


def weight_changes(runs: Sequence[FinishedRun]) -> dict[str, float]:
    """Return ``‖ΔW‖_F / ‖W‖_F`` over all matrices that any of the runs changed, by run.

    So the denominator is one for all. Runs without the table ``weights`` are missing.
    """
    tables = {run.name: run.table("weights").frame for run in runs}
    frames = {name: frame for name, frame in tables.items() if len(frame)}
    squares: dict[tuple[int, str], float] = {}  # of the base's matrices that changed
    for frame in frames.values():
        for row in frame[frame.relative > 0].itertuples():
            squares[row.layer, row.module] = (row.norm_fro / row.relative) ** 2
    whole = sum(squares.values())
    return {
        name: float(np.sqrt(frame.norm_fro.pow(2).sum() / whole)) if whole else 0.0
        for name, frame in frames.items()
    }


def shown_rank(frame: pd.DataFrame) -> Any:
    """Return the rank at which places are drawn: 8, or the largest below that all runs have."""
    linear = closed_form(frame)
    common = set.intersection(
        *(set(rows["rank"]) for _, rows in linear.groupby("run")), {*range(9)}
    )
    return max(common, default=None)


def closed_form(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of closed form in all blocks that supply what is missing."""
    kinds = frame.kind.isin(["vector", "linear"])
    return frame[kinds & frame.fit.isin(CLOSED_FORM) & (frame.layers == "all")]


def best_by_place(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the best closed form of each run and place at `shown_rank`, by dose."""
    rows = closed_form(frame)
    rows = rows[(rows["rank"] == shown_rank(frame)) & rows.recovered.notna()]
    best = rows.loc[rows.groupby(["run", "location"]).recovered.idxmax()]
    return best.sort_values(["base_kl", "run"], kind="stable")


@house_style("What is recovered, by dose")
def plot(frame: pd.DataFrame) -> Figure:
    """Draw what is recovered over the base's distance from the tuned model, a line a place."""
    figure, (axes,) = make_panels(1, 4.6)
    best = best_by_place(frame)
    best = best[best.base_kl > 0]
    for location, rows in by_location(best, "location"):
        style = {**LOCATION_STYLE[location], "linestyle": "-", "label": LOCATIONS[location]}
        low = rows.recovered < LOWEST
        sem = rows.recovered_sem.mask(low, 0)
        draw_points(axes, rows.base_kl, rows.recovered.mask(low, EDGE), sem, sem, **style)
        for row in rows[low].itertuples():
            number_at_edge(axes, row.base_kl, row.recovered, style["color"])
    clip_shares(axes)
    if len(best):
        size = rank_words(shown_rank(frame))
        axes.set_title(f"Recovered by closed form in all blocks, {size}")
        add_reference(axes, 1, "")
        add_reference(axes, 0, "no steering")
        _dose_axis(axes, best.drop_duplicates("run"))
    finish(axes, DOSE, "recovered (1: the tuned model)", 3)
    return figure


def _dose_axis(axes: Axes, doses: pd.DataFrame) -> None:
    """Make x logarithmic, and name the runs above their doses, in rows where they stand close."""
    margin = max(1.1, (doses.base_kl.max() / doses.base_kl.min()) ** 0.15)
    low, high = doses.base_kl.min() / margin, doses.base_kl.max() * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    plain_ticks(axes.xaxis, doses.base_kl)
    ends: list[float] = []  # where the last name of each row of names ends, as a share of the width
    for run, dose in zip(doses.run, doses.base_kl, strict=True):
        axes.axvline(dose, color=GREY, linewidth=0.6, linestyle=":", label=REFERENCE)
        place, half = np.log(dose / low) / np.log(high / low), 0.0075 * len(run)
        row = next((i for i, end in enumerate(ends) if end < place - half), len(ends))
        ends[row:] = [place + half, *ends[row + 1 :]]
        axes.annotate(
            run, (dose, 1), xycoords=("data", "axes fraction"), xytext=(0, 3 + 13 * row),
            textcoords="offset points", ha="center", fontsize=10.5, color="#555555",
        )  # fmt: skip
    axes.set_title(axes.get_title(loc="left"), pad=9 + 14 * len(ends))


def finding(frame: pd.DataFrame) -> str:
    """Say what is recovered at the shown size, by place, from the least dose to the largest."""
    best = best_by_place(frame)
    if best.empty:
        return "No size of closed form is in the tables of all runs."
    said = []
    for location, rows in by_location(best, "location"):
        shares = ", ".join(
            f"{plus_minus(row.recovered, row.recovered_sem)} ({row.run})"
            for row in rows.itertuples()
        )
        said.append(f"{LOCATIONS[location]} {shares}")
    size = rank_words(shown_rank(frame))
    return f"Recovered at {size}, from the least dose to the largest: {'; '.join(said)}."


SPEC = TableSpec(
    name="compare",
    title="Recovered by place and size, beside the dose",
    reading=(
        "The x axis is the dose: how far fine-tuning moved the base on the run's own held-out "
        "prompts. Points are the best closed form (forced or sequential) of that size at each "
        "place; bars are one standard error over prompts. Runs of one dose at different heights "
        "differ in kind, not in size."
    ),
    columns={
        "run": "the run, by its folder's name",
        "location": "where",
        "kind": "`vector`, `linear` or `lora`",
        "rank": "the map's rank",
        "fit": "how it was fitted, as in `steerability.csv`",
        "layers": "`all`; of a recommendation in one block the block",
        "target": "as in `steerability.csv`",
        "parameters": "numbers in the adapters",
        "parameters_percent": "the same in per cent of the model's",
        "kl": "`KL(tuned ‖ steered)`, nats a token, all held-out prompts of the run",
        "kl_sem": "its standard error, over prompts",
        "recovered": "`1 − KL(tuned ‖ steered) / KL(tuned ‖ base)`, on the same prompts",
        "recovered_sem": "its standard error, over prompts",
        "recommended": "whether the run recommends it",
        "reported": "of the recommended: what the prompts that had no part in the choice show",
        "reported_low": "lower end of its 95 % interval",
        "reported_high": "upper end of the same",
        "base_kl": "the dose: `KL(tuned ‖ base)`, nats a token, on the same prompts as `kl`",
        "base_kl_sem": "its standard error, over prompts",
        "weights_relative": (
            "the dose in weights: `‖ΔW‖_F / ‖W‖_F` over all matrices that any of the runs changed"
        ),
        "n_prompts": "held-out prompts of the run",
    },
    plot=plot,
    finding=finding,
    place=0,
)
