"""The report: one self-contained HTML file, and the same for programs."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from toolkit.diagnosis.run import Run
from toolkit.evaluation.rank_search import RankSearch
from toolkit.report.headline import headline, smallest_set, ties
from toolkit.tables.findings import NAMES, finding
from toolkit.tables.table import Table

# Title and how to read it, in the order of the report.
SECTIONS = {
    "steerability": (
        "What steering recovers",
        "recovered = 1 − KL(tuned ‖ steered) / KL(tuned ‖ base) over the tokens that the tuned "
        "model generates on held-out prompts; ± is one standard error over prompts. 1 reproduces "
        "the tuned model, 0 is no better than no steering, below 0 is worse.",
    ),
    "sequential_kl": (
        "Divergence along the generation",
        "KL(tuned ‖ x) in nats at each generated token, mean over held-out prompts. Under tuned "
        "forcing all models read the tuned model's tokens; under own forcing each reads its own, "
        "so that after the first differing token they are asked about different texts.",
    ),
    "linear_fit": (
        "How much a linear map explains",
        "1 − E‖δ − f(x)‖² / E‖δ‖² on held-out documents, f fitted on the others. Uncentred: rank 0 "
        "is the fixed vector. All three locations are asked for the same: the forced delta of the "
        "block's output.",
    ),
    "spectrum": (
        "How concentrated the delta is",
        "k90: the fewest directions that hold 90% of E‖δ‖². Few directions do not make δ a linear "
        "function of the state. The free delta contains every change upstream, the forced one what "
        "the block alone contributes.",
    ),
    "norms": (
        "Which branch carries the change",
        "MLP/(MLP+Attn): the MLP's mean norm over the sum of both branches' mean norms.",
    ),
    "noise": (
        "How large rounding is",
        "The base model against itself in a higher precision, on a few documents: rms(state in the "
        "run's precision − state in the higher one) / rms(state). Free: rounding of all blocks so "
        "far, the noise of a free delta; forced: of this block alone, on one and the same input. A "
        "delta holds the rounding of two models, about √2 times this.",
    ),
    "first_order": (
        "What changed inside the MLP",
        "E⟨term, exact⟩ / E‖exact‖² of the first-order terms of ΔW_d, ΔW_g and ΔW_u at the base "
        "model's own MLP input; the remainder says whether first order may be trusted.",
    ),
    "reachability": (
        "What steering before the MLP could reach",
        "The least ‖v − A(h)Δ‖ / ‖v‖ over steering vectors Δ with ‖Δ‖ ≤ ρ‖h‖, a free vector for "
        "every token: a lower bound for what any map can leave. A(h) is the MLP's Jacobian.",
    ),
    "shared_reach": (
        "What one map before the MLP could reach",
        "1 − E‖v − J Δ‖² / E‖v‖² on held-out tokens, with one affine map Δ = B x + c for all "
        "tokens, fitted on others; J is each token's Jacobian. The band is one standard error over "
        "tokens. Quote this rather than the bound above.",
    ),
    "forced_reach": (
        "Which location reaches the block's change",
        "The share of the forced delta of the block's output that a free vector a token reaches, "
        "its size relative to the residual stream's. What is added after the MLP arrives as it is; "
        "before it, it passes through norm and MLP and round them.",
    ),
    "inner_pair": (
        "The other half of the post's condition",
        "1 − E‖t − W̄Δh‖² / E‖t‖² with W̄ = [W_g; W_u] and t = ΔW̄ h: whether one change of the "
        "MLP's input could replace the changes of gate and up.",
    ),
    "normalisation": (
        "What the norms let through",
        "The size of a change behind a norm, relative to the state there, over its size before, "
        "relative to the state before; root mean square over directions, median over tokens.",
    ),
    "first_order_scale": (
        "How far first order holds",
        "The share of the MLP's exact change that the first-order terms leave, with all of the "
        "MLP's weight changes multiplied by one number.",
    ),
    "mlp_fit": (
        "What an edit of the MLP's output could do",
        "The best reduced-rank map of the MLP's output on ΔW_d m, which is the most that a ReFT "
        "there explains; and R² of the best affine map of the MLP's input on its output.",
    ),
    "weights": (
        "The weights' side",
        "Singular values of every matrix's change; of a LoRA from its factors.",
    ),
}
STATUS_ORDER = ("failed", "passed", "not applicable")


def render(run: Run, figures: Mapping[str, str]) -> str:
    """The report of `run` as HTML; `figures` maps table names to SVG text, which is set inline."""
    environment = Environment(
        loader=PackageLoader("toolkit.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["error"] = _error
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:,.0f} MB"
    template = environment.get_template("report.html")
    return template.render(
        run=run,
        info=run.info,
        headline=_headline(run),
        ties=ties(run.recommendation),
        recommendation=run.recommendation,
        names=NAMES,
        sections=[_section(run, name, figures) for name in SECTIONS],
        candidates=_candidates(run),
        rank_search=run.rank_search,
        smallest_set=smallest_set(run.rank_search) if run.rank_search else "",
        checks=sorted(run.checks, key=lambda c: STATUS_ORDER.index(c.status)),
    )


def _error(sem: float | None, form: str) -> str:
    """A standard error; empty where one prompt alone gives none."""
    return "" if sem is None or sem != sem else f"± {sem:{form}}"


def summary(run: Run) -> dict[str, Any]:
    """What the report says, for programs."""
    tables = {table.name: table for table in run.tables}
    return {
        "headline": _headline(run),
        "ties": ties(run.recommendation),
        "findings": {name: finding(tables[name]) for name in SECTIONS},
        "tables": {n: f"tables/{n}.csv" for n in SECTIONS if tables[n].measured},
        "figures": {name: f"figures/{name}.svg" for name in SECTIONS},
        "adapters": "adapters" if run.adapters else None,
        "rank_set": _rank_search(run.rank_search) if run.rank_search else None,
    }


def _rank_search(found: RankSearch) -> dict[str, Any]:
    return {
        "max_kl": found.max_kl,
        "ranks": found.ranks,
        "finding": smallest_set(found),
        "adapters": "rank_set/adapters" if found.adapters else None,
    }


def _headline(run: Run) -> str:
    changed = bool(run.spectrum.frame.rms.any())
    return headline(run.recommendation, nothing_changed=not changed and run.recommendation is None)


def _section(run: Run, name: str, figures: Mapping[str, str]) -> dict[str, Any]:
    title, reading = SECTIONS[name]
    table: Table = getattr(run, name)
    return {
        "name": name,
        "title": title,
        "reading": reading,
        "finding": finding(table),
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
    """The rows of the steerability table that steer every block, best first."""
    frame = run.steerability.frame
    rows = frame[frame.kind.isin(["vector", "linear"]) & (frame.layers == "all")]
    return rows.sort_values("recovered", ascending=False).to_dict("records")
