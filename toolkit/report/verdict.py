"""The verdict: what the recovery that a run reports lets one expect of training.

Its thresholds are those that the study of ``docs/validity.md`` supports, on 154 cells of 14
fine-tunes of tiny models: of the cells in which closed form recovered `STEERABLE` or more, nine in
ten were trained to .9; of those with `IN_PART` or more, nine in ten to .5. What closed form
recovers is a floor, so *not shown* says nothing against steering. Of three places at one size it
did not tell which is best.
"""

from typing import Any

STEERABLE, IN_PART = 0.9, 0.5
STUDY = "docs/validity.md"
PLACES = (
    "Size decides more than place: in the study closed form did not tell which of the three places "
    "is best at one size, and trained they differed by .03 to .05. Take the place as a default "
    f"({STUDY})."
)


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
        return _of("steerable at this size", f"{share}: in the study training then reached .9")
    if low >= IN_PART:
        return _of("steerable in part", f"{share}: in the study training then reached .5")
    sure = f"no more than {low:.2f} is sure".replace("-", "−")
    return _of("not shown", f"{sure}: training may reach far more, distil to know")


def _of(name: str, why: str) -> dict[str, str]:
    return {"name": name, "why": why, "study": STUDY}
