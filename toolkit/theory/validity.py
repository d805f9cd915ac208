"""Statistics of the study in docs/validity.md: does a diagnosis predict what training achieves?

`cells` is a frame with a row for each fine-tune and cell: `fine_tune, location, rank, parameters`,
one column for each predictor, and ``trained``, the recovery that training achieves.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

PREDICTORS = (
    "closed_form", "sequential", "forced", "distilled_20", "distilled_100", "single_block",
    "shared_reach", "norm_share", "k90", "rank_over_k90", "parameters",
)  # fmt: skip
BASELINE = "parameters"
DRAWS = 10_000
BOUNDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def finished(
    tunes: pd.DataFrame, cells: pd.DataFrame, n_cells: int, least_kl: float = 0.01
) -> pd.DataFrame:
    """Return the cells that count: of whole fine-tunes that changed something, as many a base."""
    whole = cells.groupby("fine_tune").size().loc[lambda n: n == n_cells].index
    kept = tunes[tunes.fine_tune.isin(whole) & (tunes.kl >= least_kl)]
    fewest = kept.groupby("base").size().min()
    names = kept.groupby("base").head(fewest).fine_tune
    return cells[cells.fine_tune.isin(names)]


def rank_correlation(predicted: Sequence[float], trained: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where all that is predicted is the same."""
    if len(predicted) < 2 or np.ptp(trained) == 0:
        return float("nan")
    return 0.0 if np.ptp(predicted) == 0 else float(spearmanr(predicted, trained).statistic)


def correlations(cells: pd.DataFrame) -> pd.DataFrame:
    """Correlate every predictor with training: ``fine_tune, predictor, over, rho, baseline``.

    `over` is "all" cells or "places" at one size, a mean over sizes. `baseline` is the correlation
    of the number of parameters on the same cells: those for which the predictor is known.
    """
    return pd.DataFrame(
        {
            "fine_tune": name, "predictor": predictor, "over": over,
            "rho": _mean_correlation(predictor, groups),
            "baseline": _mean_correlation(BASELINE, groups),
        }
        for name, rows in cells.groupby("fine_tune", sort=False)
        for predictor in PREDICTORS
        for known in [rows.dropna(subset=[predictor])]
        for over, groups in (("all", [known]), ("places", _sizes(known)))
    )  # fmt: skip


def _mean_correlation(predictor: str, groups: Sequence[pd.DataFrame]) -> float:
    found = [rank_correlation(rows[predictor], rows.trained) for rows in groups if len(rows) > 1]
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def _sizes(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [size for _, size in rows.groupby("rank") if len(size) > 1]


def across(cells: pd.DataFrame, predictor: str) -> float:
    """Correlate over fine-tunes at each cell: the mean over cells that `predictor` is known for."""
    known = cells.dropna(subset=[predictor]).groupby(["rank", "location"])
    return float(np.mean([rank_correlation(c[predictor], c.trained) for _, c in known]))


def elsewhere(cells: pd.DataFrame) -> pd.Series:
    """Return, for each row, the mean of `trained` in the same cell of the other fine-tunes."""
    same = cells.groupby(["rank", "location"]).trained
    return (same.transform("sum") - cells.trained) / (same.transform("size") - 1)


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean and its 95 % percentile bootstrap interval."""
    found = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = found[rng.integers(0, len(found), (DRAWS, len(found)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(found.mean()), float(low), float(high)


def regrets(cells: pd.DataFrame) -> pd.DataFrame:
    """Return what choosers lose against the best cell: ``fine_tune, chooser, over, lost``.

    Choosers are the predictors that are known for all cells, ``post_block`` at the largest rank,
    and ``random``: the mean over the cells to choose from.
    """
    return pd.DataFrame(
        {"fine_tune": name, "chooser": chooser, "over": over,
         "lost": float(np.mean([lost[chooser] for lost in map(_lost, groups)]))}
        for name, rows in cells.groupby("fine_tune", sort=False)
        for over, groups in (("all", [rows]), ("places", _sizes(rows)))
        for chooser in _lost(rows)
    )  # fmt: skip


def _lost(rows: pd.DataFrame) -> dict[str, float]:
    best = rows.trained.max()
    choosers = [p for p in PREDICTORS if p != BASELINE and rows[p].notna().all()]
    found = {p: best - rows.trained[rows[p].idxmax()] for p in choosers}
    after = rows[rows.location == "post_block"]
    found["post_block"] = best - after.trained[after["rank"].idxmax()]
    return {**found, "random": best - rows.trained.mean()}


def place_ranges(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the best less the worst place at one size: ``fine_tune, rank, heads, range``.

    `heads`: whether they are among the places.
    """
    return pd.DataFrame(
        {"fine_tune": name, "rank": rank, "heads": heads, "range": float(np.ptp(kept.trained))}
        for (name, rank), rows in cells.groupby(["fine_tune", "rank"], sort=False)
        for heads in (True, False)
        for kept in [rows if heads else rows[rows.location != "heads"]]
    )


def thresholds(
    cells: pd.DataFrame, predictor: str = "closed_form", outcome: str = "trained"
) -> Iterator[dict[str, Any]]:
    """Yield, for each bound of `predictor`, what `outcome` is in cells at or above it, and below.

    Each row: ``bound, cells``, the least, the tenth percentile and the median of the outcome, and
    the shares of cells in which it is at least .5 and .9.
    """
    for bound in BOUNDS:
        reaching = cells[predictor] >= bound
        for side, rows in (("at least", cells[reaching]), ("below", cells[~reaching])):
            found = rows[outcome]
            yield {
                "bound": f"{side} {bound}",
                "cells": len(rows),
                "least": found.min(),
                "tenth": found.quantile(0.1),
                "median": found.median(),
                "at_half": (found >= 0.5).mean(),
                "at_nine_tenths": (found >= 0.9).mean(),
            }
