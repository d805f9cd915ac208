"""Frames as they were before they were written: numbers are numbers, gaps are gaps."""

from typing import Any

import pandas as pd

WORDS = {"of", "location", "mode", "source", "target", "kind", "fit", "forcing", "module"}


def cleaned(frame: pd.DataFrame) -> pd.DataFrame:
    """Clean a table's frame: ranks and layers numbers or words, gaps NaN; return a copy.

    A rank is an int, "full" or None; `layers` an int or "all"; words that are missing are "".
    """
    frame = frame.copy()
    for name in frame:
        if name in ("rank", "layers"):
            frame[name] = pd.Series(map(_number, frame[name]), index=frame.index, dtype=object)
        elif name in WORDS:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "").astype(str)
        else:
            given = frame[name].notna() & (frame[name] != "")
            numbers = pd.to_numeric(frame[name], errors="coerce")
            if numbers[given].notna().all():  # else it is a column of words
                frame[name] = numbers
    return frame


def _number(value: Any) -> int | str | None:
    if value is None or value == "" or value != value:
        return None
    return str(value) if value in ("full", "all") else int(float(value))
