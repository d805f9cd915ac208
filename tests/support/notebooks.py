"""Whether a notebook's committed outputs are what its code gives: words alike, numbers close.

What is printed on another machine differs in the last digits: sums are taken in another order. So
words must be the same, numbers with a fraction, an exponent or a percent sign agree within one
unit of the last printed digit or 2 %, whole numbers (counts, ranks, layers) within 2 %: below 50
they must be equal. Of a picture only that it is there can be compared: fonts differ.
"""

import re
from collections.abc import Iterator
from typing import Any

RELATIVE = 0.02
SHOWN = {"text/plain", "text/html", "image/png"}  # on any page; widgets need a live kernel
# A number that is no part of a word; a minus sign only where no word ends.
_NUMBER = re.compile(
    r"(?<![\w.,])(?P<sign>(?<!\w)[-−+])?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<rest>\.\d+)?"
    r"(?P<power>e[-+]?\d+)?(?![\w])(?P<percent> ?%)?"
)


def differences(committed: Any, executed: Any) -> list[str]:
    """What an execution of a notebook says that its committed outputs do not, cell by cell."""
    pairs = zip(code_cells(committed), code_cells(executed), strict=True)
    return [
        f"cell {place}: {difference}"
        for place, (ours, theirs) in enumerate(pairs, 1)
        for difference in _cell_differences(ours, theirs)
    ]


def unfit_outputs(notebook: Any) -> list[str]:
    """What must not be committed: cells that did not run, or not in order; errors and warnings."""
    found = []
    for place, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count != place:
            found.append(f"cell {place} was executed as {cell.execution_count}")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {place} has an error or a warning among its outputs")
            if live := output.get("data", {}).keys() - SHOWN:
                found.append(f"cell {place} shows {sorted(live)}, which not every reader sees")
        if "execution" in cell.metadata:
            found.append(f"cell {place} keeps the time when it was executed")
    return found


def code_cells(notebook: Any) -> list[Any]:
    """The cells that have something to run."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def text_differences(ours: str, theirs: str) -> Iterator[str]:
    """How two texts differ in words, or in numbers beyond what another machine explains."""
    if words(ours) != words(theirs):
        yield f"the words differ: {ours!r} was committed, {theirs!r} came out"
        return
    for a, b in zip(_NUMBER.finditer(ours), _NUMBER.finditer(theirs), strict=True):
        if not _close(a, b):
            yield f"{a.group().strip()} was committed, {b.group().strip()} came out"


def words(text: str) -> list[str]:
    """The text without its numbers; how they are aligned does not count."""
    return _NUMBER.sub(" # ", text).split()


def _cell_differences(ours: Any, theirs: Any) -> Iterator[str]:
    if _kinds(ours) != _kinds(theirs):
        yield f"{_kinds(ours)} was committed, {_kinds(theirs)} came out"
        return
    yield from text_differences(_text(ours), _text(theirs))


def _kinds(cell: Any) -> list[str]:
    """The kinds of what a cell shows, in order; what it prints in several goes is one text."""
    kinds: list[str] = []
    for output in _shown(cell):
        if output.output_type == "stream":
            kinds += [] if kinds[-1:] == ["text"] else ["text"]
        else:
            kinds.append(" and ".join(sorted(output.get("data", {}))) or output.output_type)
    return kinds


def _text(cell: Any) -> str:
    """What a cell prints, and its values in words."""
    return "\n".join(
        output.text if output.output_type == "stream" else output.get("data", {})["text/plain"]
        for output in _shown(cell)
    )


def _shown(cell: Any) -> list[Any]:
    """All outputs but warnings: whether a library warns depends on what else is installed."""
    return [output for output in cell.outputs if output.get("name") != "stderr"]


def _close(a: re.Match[str], b: re.Match[str]) -> bool:
    ours, theirs = _value(a), _value(b)
    rounded = bool(a["rest"] or a["power"] or a["percent"])
    unit = max(_unit(a), _unit(b)) if rounded else 0.0
    return abs(ours - theirs) <= max(1.001 * unit, RELATIVE * max(abs(ours), abs(theirs)))


def _value(number: re.Match[str]) -> float:
    digits = number["whole"].replace(",", "") + (number["rest"] or "") + (number["power"] or "")
    return -float(digits) if number["sign"] in ("-", "−") else float(digits)


def _unit(number: re.Match[str]) -> float:
    """One in the last digit that was printed."""
    decimals = len(number["rest"] or ".") - 1
    return 10.0 ** (int((number["power"] or "e0")[1:]) - decimals)
