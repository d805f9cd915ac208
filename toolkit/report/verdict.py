"""The verdict: what the recovery that a run reports lets one expect of training.

Its thresholds are those that the study of ``docs/validity.md`` supports, on tiny models: of the
cells in which closed form recovered `STEERABLE` or more, nine in ten were trained to .9; of those
with `IN_PART` or more, nine in ten to .5. What closed form recovers is a floor, so *not shown* says
nothing against steering.
"""

from typing import Any

STEERABLE, IN_PART = 0.9, 0.5
STUDY = "docs/validity.md"


def verdict(recommendation: dict[str, Any] | None) -> dict[str, str] | None:
    """Return the verdict of a run and what it rests on; None for a run that reports no interval.

    It is about the lower end of the interval, so that few prompts show little.
    """
    if not recommendation or "reported" not in recommendation:
        return None
    low = recommendation["reported"]["low"]
    if low is None:
        return _of("not shown", "one prompt gives no interval")
    share = f"at least {low:.2f} of the fine-tune is recovered".replace("-", "−")
    if low >= STEERABLE:
        return _of(
            "steerable at this size", f"{share}: trained, nine in ten such adapters reached .9"
        )
    if low >= IN_PART:
        return _of("steerable in part", f"{share}: trained, nine in ten such adapters reached .5")
    why = f"no more than {low:.2f} is sure".replace("-", "−")
    return _of(
        "not shown", f"{why}; below {IN_PART:g}, closed form does not tell what training reaches"
    )


def _of(name: str, why: str) -> dict[str, str]:
    return {"name": name, "why": why, "study": STUDY}
