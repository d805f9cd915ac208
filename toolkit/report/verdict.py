"""The verdict: what the recovery that a run reports lets one expect of training.

Its thresholds are those that the study of ``docs/validity.md`` supports, on 154 cells of 14
fine-tunes of tiny models: of the 16 cells in which closed form recovered `STEERABLE` or more, 15
were trained to .9; of the 80 with `IN_PART` or more all to .5. What closed form
recovers is a floor, so *not shown* says nothing against steering. Of three places at one size it
did not tell which is best.
"""

import math
from typing import Any

from toolkit.tables.words import share_words

STEERABLE, IN_PART = 0.9, 0.5
STUDY = "docs/validity.md"
PLACES = (
    "Size decides more than place: in the study closed form did not tell which of the three places "
    "is best at one size, and trained they differed by .03 to .05. Take the place as a default "
    f"({STUDY})."
)


def verdict(recommendation: dict[str, Any] | None) -> dict[str, str] | None:
    """Return the verdict of a run and what it rests on; None for a run that reports no interval.

    It is about the lower end of the interval, so that few prompts show little; where the same
    prompts choose and report, about the bound over all candidates. The study was of closed form:
    distilled adapters have no verdict.
    """
    r = recommendation
    if not r or "reported" not in r or r["fit"] == "distilled":
        return None
    low = r["reported"]["low"] if r["reported"]["apart"] else r["lower"]
    if low is None or math.isnan(low):
        return _of("not shown", "these prompts give no interval")
    number = share_words(low)
    share = f"at least {number} of the fine-tune is recovered"
    if low >= STEERABLE:
        return _of("steerable at this size", f"{share}: in the study training then reached .9")
    if low >= IN_PART:
        return _of("steerable in part", f"{share}: in the study training then reached .5")
    return _of("not shown", f"no more than {number} is sure; training may reach far more")


def _of(name: str, why: str) -> dict[str, str]:
    return {"name": name, "why": why, "study": STUDY}
