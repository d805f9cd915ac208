"""Writing adapters in a format: exactly, or approximately with the loss measured, or not at all."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.adapters.attach import require_fit
from toolkit.adapters.collection import Adapters
from toolkit.errors import InputError
from toolkit.export.format import Base
from toolkit.export.formats import FORMATS
from toolkit.export.loss import loss
from toolkit.models.locations import causal_lm, resolve
from toolkit.runtime.console import quiet_transformers
from toolkit.runtime.output import made_whole, own_folder
from toolkit.runtime.provenance import versions
from toolkit.runtime.records import write_json

RECORD = "export.json"


# many parameters: they are the options of `oracle export`
def export(
    adapters: Adapters,
    to: str,
    out: str | Path,
    base: Base | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    approximate: bool = False,
) -> dict[str, Any]:
    """Write `adapters` in the format `to` into the folder `out`; return what ``export.json`` says.

    What the format cannot hold exactly is refused with an InputError that says why, or, where it
    has nearest adapters, written if `approximate`; the loss is then measured on `prompts` (tokens)
    where they are given.
    """
    if to not in FORMATS:
        raise InputError(f"--to is {to!r}: expected one of {', '.join(FORMATS)}")
    form, out = FORMATS[to], Path(out)
    if base is None and form.needs_base:
        raise InputError(f"{to} needs the model that the adapters steer: give --base")
    if (out / RECORD).exists():
        raise InputError(f"{out} holds an export already: give --out another name")
    out = own_folder(out, RECORD)
    if base is not None:
        require_fit(causal_lm(base.model), adapters, resolve(base.model))
    found = form.fidelity(adapters, base)
    if found.held is None:
        raise InputError(f"{to} cannot hold these adapters: {found.reason}")
    if found.level == "approximate" and not approximate:
        raise InputError(
            f"{to} holds these adapters only approximately: {found.reason}. Give --approximate to "
            "write it all the same, with --base and --data to have the loss measured"
        )
    measured = None
    if found.level == "approximate" and base is not None and prompts:
        measured = asdict(loss(base, adapters, found, prompts))
    record = {
        "format": to,
        "fidelity": found.level,
        "reason": found.reason,
        "adapters": _described(adapters),
        "exported": _described(found.held),
        "base": base.name if base else adapters.info.get("base", ""),
        "loss": measured,
        "recovered": adapters.info.get("recovered"),
        "versions": versions(),
    }
    with made_whole(out, RECORD):
        with quiet_transformers():
            found.write(out)
        write_json(record, out / RECORD)
    return record


def _described(adapters: Adapters) -> dict[str, Any]:
    return {
        "location": adapters.location,
        "kind": adapters.kind,
        "rank": adapters.rank,
        "fit": adapters.fit,
        "positions": str(adapters.positions),
        "layers": sorted(adapters.by_layer),
        "parameters": adapters.parameters,
    }
