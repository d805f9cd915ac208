"""Writes the tables of docs/validity.md from the rows in data/validity.

    python data/recipes/validity_page.py

Between a page's marks ``<!-- NAME -->`` and ``<!-- end -->`` stands the table of that name.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit.runtime.records import read_lines
from toolkit.theory.validity import (
    BASELINE,
    PREDICTORS,
    across,
    correlations,
    elsewhere,
    finished,
    mean_interval,
    place_ranges,
    rank_correlation,
    regrets,
    thresholds,
)

ROOT = Path(__file__).parents[2]
DATA, PAGE = ROOT / "data" / "validity", ROOT / "docs" / "validity.md"
MARKED = re.compile(r"(<!-- ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
N_CELLS = 11
SHORT = "distilled_100"
FLOOR = 0.02  # closed form may exceed training by so much and still be its floor
NOT_CONVERGED = 0.02


class Rows:
    """The study's rows: fine-tunes, cells that count, and cells that were trained again."""

    def __init__(self, folder: Path = DATA) -> None:
        self.tunes, self.every, self.repeats = (
            pd.DataFrame(read_lines(folder / f"{name}.jsonl"))
            for name in ("fine-tunes", "cells", "repeats")
        )
        self.every[BASELINE] = np.log(self.every[BASELINE].astype(float))
        self.cells = finished(self.tunes, self.every, N_CELLS)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def interval(values: Sequence[float]) -> str:
    """Say the mean and its interval."""
    mean, low, high = mean_interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def fine_tunes(rows: Rows) -> str:
    """Return a row for each fine-tune that counts."""
    tunes = rows.tunes[rows.tunes.fine_tune.isin(rows.cells.fine_tune)]

    def line(tune: Any) -> list[Any]:
        cells = rows.cells[rows.cells.fine_tune == tune.fine_tune]
        best = cells.loc[cells.trained.idxmax()]
        said = tune.recommended
        answer = f"{said['location']} {said['rank']}" if said["location"] else "none"
        return [
            tune.base, tune.task, tune.method, tune.dose, f"{tune.kl:.3f}",
            f"{tune.accuracy_base:.2f}, {tune.accuracy_tuned:.2f}, {best.accuracy:.2f}",
            f"{best.location} {best['rank']}: {best.trained:.3f}", answer,
        ]  # fmt: skip

    header = ["base", "task", "trained", "dose", "KL", "accuracy of base, tuned, best cell",
              "best cell", "the diagnosis's answer"]  # fmt: skip
    return table(header, map(line, tunes.itertuples()))


def cells(rows: Rows) -> str:
    """Return a row for each cell: means over fine-tunes."""
    found = rows.cells.groupby(["rank", "location"], sort=True)
    return table(
        ["rank", "place", "closed form", "distilled 100", "trained", "least trained", "accuracy"],
        (
            [rank, place, *(f"{c[n].mean():.3f}" for n in ("closed_form", "distilled_100",
             "trained")), f"{c.trained.min():.3f}", f"{c.accuracy.mean():.3f}"]
            for (rank, place), c in found
        ),
    )  # fmt: skip


def predictors(rows: Rows) -> str:
    """Return a row for each predictor: rank correlations, and their gain on the baseline."""
    found = correlations(rows.cells)

    def line(name: str) -> list[str]:
        parts = []
        for over in ("all", "places"):
            some = found[(found.predictor == name) & (found.over == over)]
            gain = some.rho - some.baseline
            parts += [interval(some.rho), interval(gain) if name != BASELINE else ""]
        return [f"`{name}`", *parts]

    header = ["predictor", "all cells", "less baseline", "places at one size", "less baseline"]
    return table(header, map(line, PREDICTORS))


def exploratory(rows: Rows) -> str:
    """Return what was not planned: fine-tunes beside each other, and a prior from the others."""
    prior = elsewhere(rows.cells)
    found = correlations(rows.cells.assign(closed_form=prior))
    found = found[found.predictor == "closed_form"]
    lines = [
        [f"`{name}`, over fine-tunes at one cell", f"{across(rows.cells, name):.3f}"]
        for name in PREDICTORS
        if name != BASELINE
    ]
    for over in ("all", "places"):
        rho = interval(found[found.over == over].rho)
        lines.append([f"the cell's mean over the other fine-tunes, {over}", rho])
    without = rows.cells[rows.cells.location != "heads"]
    for name in ("closed_form", "forced", SHORT):
        some = correlations(without).query("predictor == @name and over == 'places'")
        lines.append([f"`{name}`, places at one size without heads", interval(some.rho)])
    lost = regrets(rows.cells.assign(closed_form=prior)).query("chooser == 'closed_form'")
    for over in ("all", "places"):
        lines.append([f"chosen by it: lost, {over}", interval(lost[lost.over == over].lost)])
    return table(["what", "rank correlation, or lost"], lines)


def regret(rows: Rows) -> str:
    """Return a row for each way to choose."""
    found = regrets(rows.cells)
    shares = [
        [f"`{name}`", *(interval(some[some.over == over].lost) for over in ("all", "places"))]
        for name, some in found.groupby("chooser", sort=False)
    ]
    return table(["chosen by", "lost over all cells", "lost at one size"], shares)


def places(rows: Rows) -> str:
    """Return the difference between best and worst place at one size."""
    found = place_ranges(rows.cells).groupby(["rank", "heads"])["range"]
    return table(
        ["rank", "places", "best less worst", "largest"],
        (
            [rank, "all four" if heads else "without heads", interval(some), f"{some.max():.3f}"]
            for (rank, heads), some in found
        ),
    )


def bounds(rows: Rows) -> str:
    """Return what training gives above and below each bound of closed form."""
    return bounds_table(rows.cells, "closed_form", "trained")


def other_bounds(rows: Rows) -> str:
    """Return the same, not planned, of distillation and of the better of two trainings."""
    cells = rows.cells.assign(achieved=achieved(rows.cells))
    return "\n".join(bounds_table(cells, name, "achieved") for name in ("closed_form", SHORT))


def bounds_table(cells: pd.DataFrame, predictor: str, outcome: str) -> str:
    """Return what `outcome` is above and below each bound of `predictor`."""
    header = [f"`{predictor}`", "cells", f"least `{outcome}`", "tenth percentile", "median",
              f"`{outcome}` ≥ .5", f"`{outcome}` ≥ .9"]  # fmt: skip
    return table(
        header,
        (
            [row["bound"], row["cells"],
             *(f"{row[name]:.3f}" for name in ("least", "tenth", "median")),
             *(f"{row[name]:.2f}" for name in ("at_half", "at_nine_tenths"))]
            for row in thresholds(cells, predictor, outcome)
        ),
    )  # fmt: skip


def achieved(cells: pd.DataFrame) -> pd.Series:
    """Return the better of two trainings, from the identity and from the fit."""
    return cells[["trained", "distilled_100_tested"]].max(axis=1)


def counts(rows: Rows) -> str:
    """Return what else is counted."""
    kept = rows.cells
    left = rows.every[~rows.every.fine_tune.isin(kept.fine_tune)]
    gained = kept.trained - kept.closed_form
    further = kept.distilled_100_tested - kept.trained
    seconds = kept.seconds.median(), kept.seconds_predicting.median()
    lines = [
        ["fine-tunes, cells", f"{kept.fine_tune.nunique()}, {len(kept)}"],
        ["cells of other fine-tunes, left out", len(left)],
        ["cells that still gained more than 2 %", int((kept.still_gaining > NOT_CONVERGED).sum())],
        ["`trained` at least `closed_form` − .02", f"{(gained >= -FLOOR).mean():.3f} of cells"],
        ["`trained` less `closed_form`: median, least",
         f"{gained.median():.3f}, {gained.min():.3f}"],
        ["rank correlation over all cells of all fine-tunes",
         f"{rank_correlation(kept.closed_form, kept.trained):.3f}"],
        ["the same with `achieved`", f"{rank_correlation(kept.closed_form, achieved(kept)):.3f}"],
        ["`distilled_100_tested` less `trained`: median, largest",
         f"{further.median():.3f}, {further.max():.3f}"],
        ["median standard error of `trained` over questions", f"{kept.trained_sem.median():.3f}"],
        ["median seconds a cell: training, short distillations",
         f"{seconds[0]:.0f}, {seconds[1]:.0f}"],
    ]  # fmt: skip
    if len(rows.repeats):
        both = rows.repeats.merge(rows.every, on=["fine_tune", "location"]).query("rank == 8")
        for name in ("other_seed", "twice_as_long"):
            change = both[name] - both.trained
            said = f"{change.mean():.3f}, {change.abs().max():.3f} ({len(both)} cells)"
            lines.append([f"{name.replace('_', ' ')}: mean change, largest", said])
    return table(["what", "found"], lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "fine tunes": fine_tunes, "cells": cells, "predictors": predictors, "regret": regret,
    "places": places, "bounds": bounds, "counts": counts, "exploratory": exploratory,
    "other bounds": other_bounds,
}  # fmt: skip


def with_tables(text: str, folder: Path = DATA) -> str:
    """Return the page with the tables that the rows in `folder` make."""
    rows = Rows(folder)
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](rows)}\n{m[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
