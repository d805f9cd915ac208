"""Where a run's adapters come from and what they are worth, as their model card says it."""

from typing import Any

from toolkit.diagnosis.run import Run
from toolkit.tables.words import by_model


def origin(run: Run) -> dict[str, Any]:
    """Return what is kept beside the recommended adapters; what the run did not measure is not."""
    info, data = run.info, run.info["data"]
    found = {
        "base": info["base"]["name"],
        "tuned": info["tuned"]["name"],
        "data": data.get("file"),
        "data_sha256": data.get("sha256"),
        "versions": info["versions"],
        "task": info.get("other_data", {}).get("task", {}).get("name"),
        "recovered": _recovered((run.recommendation or {}).get("reported")),
        "accuracy": _accuracy(run),
    }
    return {name: value for name, value in found.items() if value is not None}


def _recovered(shown: dict[str, Any] | None) -> dict[str, float] | None:
    """Return the reported share; None where one prompt gives no interval."""
    if not shown or shown["low"] is None:
        return None
    return {"mean": shown["estimate"], **{name: shown[name] for name in ("sem", "low", "high")}}


def _accuracy(run: Run) -> dict[str, float] | None:
    row = by_model(run.task.frame).get("recommended")
    if row is None or row["accuracy"] != row["accuracy"]:
        return None
    return {"share": row["accuracy"], "low": row["accuracy_low"], "high": row["accuracy_high"]}
