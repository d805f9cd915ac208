"""One block of the base model steered by its oracle delta: what it does to the next five tokens.

Change of KL(· ‖ tuned) when a share alpha of the free oracle delta is added at one location of one
block. Maps show the best alpha > 0, dots what is more than two standard errors over prompts from 0.
Below, the mean of the five tokens by alpha in the block where it falls most (which flatters it a
little); and what a published sweep of 1B models says, in larger changes of larger divergences.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from toolkit.jobs.figures import PAIRS
from toolkit.tables import drawing as house
from toolkit.tables.drawing import LOCATION_STYLE, LOCATIONS
from toolkit.tables.table_figure import ROW, Section, clear, draw_section

COMMAND = "python data/recipes/oracle_sweep.py "
MADE_BY = (
    COMMAND + "--base SmolLM2-135M-Instruct --tuned data/smollm2-gsm8k-lora "
    "--out data/oracle-sweep/smollm2",
    COMMAND + "--base gemma-3-270m --tuned data/gemma3-gsm8k-lora --out data/oracle-sweep/gemma3",
)
SITES = ("pre_mlp", "post_mlp")
FAMILIES = {"smollm2": "Llama", "gemma3": "Gemma"}
NUMBERS = {"layer": "{:.0f}", "token": "{:.0f}", "delta_kl": "{:+g}"}  # of the published table
HEAD, WIDTHS = ("", "layer", "token", "change, nats", ""), (22, 10, 13, 20, 33)


def draw(data: Path) -> dict[str, Figure]:
    with rc_context(house.STYLE):
        return {name: _pair(data, name) for name in PAIRS}


def _pair(data: Path, name: str) -> Figure:
    frame = pd.read_csv(data / "oracle-sweep" / f"{name}.csv")
    published = pd.read_csv(data / "published" / "oracle_sweep.csv")
    rows = [_row(row) for _, row in published[published.family == FAMILIES[name]].iterrows()]
    section = Section("location", HEAD, rows)
    parts = (6.0, 3.6, ROW * section.n_rows + 0.5)
    figure = house.Plot(figsize=(house.WIDTH, sum(parts)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=parts)
    _maps(top, {site: _best(frame[frame.site == site]) for site in SITES})
    top.suptitle(PAIRS[name].name, x=0.01, ha="left", fontsize=13, color="#555555")
    _by_alpha(middle.subplots(), frame)
    axes = bottom.subplots()
    axes.set_title(f"Published: {FAMILIES[name]} of 1B parameters, read off maps")
    clear(axes, section.n_rows)
    draw_section(axes, section, WIDTHS, 0.5)
    return figure


def _row(row: pd.Series) -> tuple[str, ...]:
    """What was not said stays empty."""
    said = [
        form.format(row[name]) if row[name] == row[name] else "" for name, form in NUMBERS.items()
    ]
    return (LOCATIONS[row.location], *(word.replace("-", "−") for word in said), row.reading)


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    steered = rows[rows.alpha > 0].reset_index(drop=True)
    return steered.loc[steered.groupby(["layer", "token_index"]).delta_kl.idxmin()]


def _maps(part: SubFigure, best: dict[str, pd.DataFrame]) -> None:
    panels = part.subplots(2, 1)
    limit = max(table.delta_kl.abs().max() for table in best.values())
    colours: Any = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "shading": "nearest"}
    for axes, (site, table) in zip(panels, best.items(), strict=True):
        grid = table.pivot(index="token_index", columns="layer", values="delta_kl")
        image = axes.pcolormesh(grid.columns, grid.index + 1, grid, **colours)
        sure = table[table.delta_kl.abs() > 2 * table.delta_kl_sem]
        axes.plot(sure.layer, sure.token_index + 1, "ko", markersize=4, markeredgecolor="white")
        axes.set(ylabel="generated token", yticks=grid.index + 1, xticks=grid.columns[::3])
        axes.set_title(f"{LOCATIONS[site]}: the best alpha > 0")
        axes.invert_yaxis()
        axes.grid(False)
    panels[-1].set_xlabel(house.LAYER_LABEL)
    part.colorbar(image, ax=panels, label="change of KL, nats (blue: nearer)", aspect=30)


def _by_alpha(axes: Axes, frame: pd.DataFrame) -> None:
    for site in SITES:
        rows = frame[frame.site == site]
        # Tokens of one prompt are not independent: the mean of standard errors is the widest case.
        means = rows.groupby(["layer", "alpha"])[["delta_kl", "delta_kl_sem"]].mean().reset_index()
        layer = means.loc[means.delta_kl.idxmin(), "layer"]
        best = means[means.layer == layer]
        style = {"label": f"{LOCATIONS[site]}, layer {layer:.0f}", "capsize": 3}
        axes.errorbar(best.alpha, best.delta_kl, best.delta_kl_sem, **style, **LOCATION_STYLE[site])
    house.add_reference(axes, 0, "no steering")
    axes.set_title("Mean of five tokens, in the block where it falls most")
    house.finish(axes, "alpha: share of the oracle delta", "change of KL, nats")
