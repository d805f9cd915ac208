"""The report: one self-contained HTML file, and the same for programs."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from toolkit.diagnosis.headline import beside, floors, smallest_set, weights_beside
from toolkit.diagnosis.run import Run
from toolkit.evaluation.rank_search import RankSearch
from toolkit.report.next_steps import code, commands
from toolkit.report.verdict import PLACES, verdict
from toolkit.report.where import where_it_sits
from toolkit.tables.spec import specs
from toolkit.tables.words import NAMES

STATUS_ORDER = ("failed", "passed", "not applicable")


def render(run: Run, figures: Mapping[str, str]) -> str:
    """The report of `run` as HTML; `figures` maps table names to SVG text, which is set inline."""
    return template("toolkit.report", "report.html").render(
        run=run,
        info=run.info,
        headline=run.headline,
        beside=_beside(run),
        verdict=verdict(run.recommendation),
        recommendation=run.recommendation,
        code=code(run),
        commands=commands(run),
        names=NAMES,
        where=where_it_sits(run),
        sections=[_section(run, name, figures) for name in specs()],
        candidates=_candidates(run),
        rank_search=run.rank_search,
        smallest_set=smallest_set(run.rank_search) if run.rank_search else "",
        checks=sorted(run.checks, key=lambda c: STATUS_ORDER.index(c.status)),
    )


def template(package: str, name: str) -> Template:
    """Return the page `name` of `package`, which may stand in the report's frame."""
    loaders = [PackageLoader(folder, ".") for folder in (package, "toolkit.report")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["error"] = _error
    environment.filters["parted"] = _parted
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:,.0f} MB"
    return environment.get_template(name)


def _parted(headline: str) -> tuple[str, str]:
    """Split a headline into its first sentence, which is the page's title, and the others."""
    first, _, rest = headline.partition(". ")
    return (f"{first}." if rest else first), rest


def _error(sem: float | None, form: str) -> str:
    """A standard error; empty where one prompt alone gives none."""
    return "" if sem is None or sem != sem else f"± {sem:{form}}"


def summary(run: Run) -> dict[str, Any]:
    """Return what the report says, for programs."""
    tables = run.tables
    return {
        "headline": run.headline,
        "beside": _beside(run),
        "verdict": verdict(run.recommendation),
        "findings": {name: tables[name].finding() for name in specs()},
        "tables": {n: f"tables/{n}.csv" for n in specs() if tables[n].measured},
        "figures": {name: f"figures/{name}.svg" for name in specs()},
        "adapters": "adapters" if run.adapters else None,
        "rank_set": _rank_search(run.rank_search) if run.rank_search else None,
        "code": code(run),
        "commands": commands(run),
    }


def _rank_search(found: RankSearch) -> dict[str, Any]:
    return {
        "max_kl": found.max_kl,
        "ranks": found.ranks,
        "finding": smallest_set(found),
        "adapters": "rank_set/adapters" if found.adapters else None,
    }


def _beside(run: Run) -> list[str]:
    """Return the sentences that stand beside the answer."""
    frame = run.steerability.frame
    said = (
        beside(run.recommendation),
        floors(frame, run.info.get("distillation")),
        weights_beside(frame),
        PLACES if verdict(run.recommendation) else "",
    )
    return [sentence for sentence in said if sentence]


def _section(run: Run, name: str, figures: Mapping[str, str]) -> dict[str, Any]:
    spec, table = specs()[name], run.tables[name]
    return {
        "name": name,
        "title": spec.title,
        "reading": spec.reading,
        "finding": table.finding(),
        "measured": table.measured,
        "figure": Markup(inline_svg(figures[name], name)),
    }


def inline_svg(text: str, name: str) -> str:
    """An SVG file's element, its ids made unique to `name`, sized by its page."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-title"', 1)


def _candidates(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the steerability table that steer every block, best first."""
    frame = run.steerability.frame
    rows = frame[frame.kind.isin(["vector", "linear", "lora"]) & (frame.layers == "all")]
    return rows.sort_values("recovered", ascending=False).to_dict("records")
