"""The column tables of docs/numbers.md and docs/compare.md, from the specs.

python -m tests.support.numbers_page
"""

import re
from pathlib import Path

from toolkit.runs.comparison import SPECS
from toolkit.tables.spec import specs

DOCS = Path(__file__).parents[2] / "docs"
PAGE, COMPARE_PAGE = DOCS / "numbers.md", DOCS / "compare.md"
MARKED = re.compile(r"(<!-- columns of (\w+) -->\n\n).*?(\n\n<!-- end of columns -->)", re.DOTALL)


def column_table(columns: dict[str, str]) -> str:
    """Write `columns` as a Markdown table; neighbours of one meaning share a row."""
    rows: list[tuple[list[str], str]] = []
    for name, meaning in columns.items():
        if rows and rows[-1][1] == meaning:
            rows[-1][0].append(name)
        else:
            rows.append(([name], meaning))
    lines = [f"| {', '.join(f'`{n}`' for n in names)} | {meaning} |" for names, meaning in rows]
    return "\n".join(["| column | meaning |", "|---|---|", *lines])


def with_tables(text: str) -> str:
    """Replace what stands between the markers of `text` by what the specs say."""
    known = specs() | {spec.name: spec for spec in SPECS}
    return MARKED.sub(lambda m: m[1] + column_table(known[m[2]].columns) + m[3], text)


if __name__ == "__main__":
    for page in (PAGE, COMPARE_PAGE):
        page.write_text(with_tables(page.read_text("utf-8")), "utf-8")
