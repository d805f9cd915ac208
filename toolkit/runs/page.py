"""The page of several runs: one self-contained HTML file in the report's look."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from toolkit.report.page import inline_svg, template
from toolkit.runs.comparison import RunComparison
from toolkit.runs.finished import FinishedRun
from toolkit.runs.recovery import best_by_place, shown_rank
from toolkit.tables.drawing import LOCATIONS
from toolkit.tables.series import rank_words
from toolkit.tables.words import candidate_name, nats, plus_minus


def render(comparison: RunComparison, figures: Mapping[str, str]) -> str:
    """Write `comparison` as HTML; `figures` maps table names to SVG text, which is set inline."""
    recovery = comparison.recovery
    return template("toolkit.runs", "page.html").render(
        base=comparison.runs[0].info["base"],
        headline=headline(comparison),
        runs=[_row(run, comparison) for run in comparison.runs],
        same_data=len({run.info["data"].get("sha256") for run in comparison.runs}) == 1,
        places=[name for place, name in LOCATIONS.items() if (recovery.location == place).any()],
        size=rank_words(shown_rank(recovery)) if len(recovery) else "",
        sections=[
            {
                "name": spec.name,
                "title": spec.title,
                "reading": spec.reading,
                "finding": comparison.findings[spec.name],
                "figure": Markup(inline_svg(figures[spec.name], spec.name)),
            }
            for spec, _ in comparison.tables
        ],
        left_out=comparison.left_out,
        made=comparison.made,
    )


def headline(comparison: RunComparison) -> str:
    """Return what the runs have in common, and what differs, in a sentence."""
    n = len(comparison.runs)
    name = comparison.runs[0].info["base"]["name"]
    frame = comparison.recovery
    if frame.empty:
        return f"{n} runs of {name}: none of them has a table of what is recovered."
    doses = frame.groupby("run").base_kl.first()
    text = f"{n} fine-tunes of {name}, {doses.min():.2g} to {doses.max():.2g} nats a token from it"
    best = best_by_place(frame)
    if best.empty:
        return f"{text}."
    most = best.groupby("run").recovered.max()
    size = rank_words(shown_rank(frame))
    return (
        f"{text}: at {size} the best place recovers {most.min():.2f} to {most.max():.2f} of each."
    )


def _row(run: FinishedRun, comparison: RunComparison) -> dict[str, Any]:
    """Return what the page's first table says of a run, as words."""
    rows = comparison.recovery[comparison.recovery.run == run.name]
    best = best_by_place(comparison.recovery)
    best = best[best.run == run.name].set_index("location")
    chosen = run.recommendation
    shown = (chosen or {}).get("reported") or {}
    first = rows.iloc[0] if len(rows) else None
    return {
        "name": run.name,
        "tuned": run.info["tuned"]["name"],
        "data": run.info["data"].get("file", "documents in memory"),
        "prompts": run.info["data"]["prompts"],
        "dose": "" if first is None else nats(first.base_kl, first.base_kl_sem),
        "weights": (
            ""
            if first is None or first.weights_relative != first.weights_relative
            else f"{first.weights_relative:.2%}"
        ),
        "recovered": [
            plus_minus(best.recovered[place], best.recovered_sem[place])
            if place in best.index
            else ""
            for place in LOCATIONS
            if (comparison.recovery.location == place).any()
        ],
        "recommended": candidate_name(chosen) if chosen else "none",
        "reported": (
            f"{shown['estimate']:.2f} ({shown['low']:.2f} to {shown['high']:.2f})".replace("-", "−")
            if shown.get("low") is not None
            else ""
        ),
    }
