"""What the sentences of several tables say alike: names, shares, errors, and why there is none."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

QUANTISED = "_quantised"  # the end of the modes of noise that storing weights as float8 made
NOT_APPLICABLE, NOT_MEASURED = "not applicable to this pair", "not measured in this run"
NOT_IN_RUN = "Not measured in this run, which was made before there was such a table."
OWN_PROMPTS = "own prompts"  # in place of a file's name
NAMES = {"pre_mlp": "pre-MLP", "post_mlp": "post-MLP", "post_block": "post-block"}
UNMEASURED = "Not applicable: nothing was measured here."
NOTHING = "Nothing changed: every delta is zero."
NO_PATH = "Not applicable: the path from attention through the MLP cannot be read."


def share_words(value: float) -> str:
    """Write a share with two digits and a minus sign."""
    return f"{value:.2f}".replace("-", "−")


def plus_minus(value: float, sem: float | None) -> str:
    """A share with its standard error, to the error's digits; one prompt alone has none."""
    if sem is None or math.isnan(sem):
        return share_words(value)
    digits = 2 if sem >= 0.005 else 3
    return f"{value:.{digits}f} ± {sem:.{digits}f}".replace("-", "−")


def nats(value: float, sem: float) -> str:
    """A divergence with its standard error, to three digits, as it may be small."""
    return f"{value:.3g}" if math.isnan(sem) else f"{value:.3g} ± {sem:.2g}"


def candidate_name(row: Mapping[str, Any]) -> str:
    """Name adapters briefly, by location, kind, rank, fit and layers."""
    if row["kind"] == "lora":
        return f"low-rank change of the weights ({row['fit']})"
    kind = "vector" if row["kind"] == "vector" else f"rank {row['rank']}"
    layers = "" if row["layers"] == "all" else f" in block {row['layers']}"
    return f"{NAMES[row['location']]} {kind} {row['fit']}{layers}"


def by_model(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return a table's rows by the name of the model; of those that share one the last."""
    return {row["model"]: row for row in frame.to_dict("records")}


def percent(value: float) -> str:
    """Write a share as a percentage."""
    return "less than 1%" if 0 < value < 0.005 else f"{value:.0%}"
