"""``oracle export``: adapters in the formats of those who serve models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.cli.options import MODEL, Device
from toolkit.cli.steer import Dtype, Out
from toolkit.errors import InputError
from toolkit.runtime.console import bad_input, console


# many parameters: a command's options are its parameters
def export(
    adapters: Annotated[Path, typer.Argument(help="Folder of adapters, as runs leave them.")],
    to: Annotated[
        str, typer.Option("--to", help="peft, weights, folder, gguf, reft or easysteer.")
    ],
    out: Out,
    base: Annotated[
        str | None, typer.Option("--base", help=f"{MODEL} By default what the adapters name.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Documents on whose prompts a loss is measured.")
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(help="Number of held-out prompts at most.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Write what the format cannot hold exactly, too.")
    ] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Write ADAPTERS in a format that others load: exactly, or with what is lost measured."""
    with bad_input():
        from toolkit.adapters.collection import Adapters
        from toolkit.documents.corpus import Corpus
        from toolkit.documents.documents import read_documents
        from toolkit.export.format import Base
        from toolkit.export.formats import FORMATS
        from toolkit.export.write import export as write

        if max_prompts is not None and max_prompts < 1:
            raise InputError(f"--max-prompts is {max_prompts}: expected 1 or more")
        found = Adapters.from_pretrained(adapters)
        documents = read_documents(data) if data else None
        named = base or found.info.get("base")
        needed = to in FORMATS and (FORMATS[to].needs_base or base or documents is not None)
        model = Base.load(named, dtype, device) if named and needed else None
        prompts = None
        if documents is not None and model is not None:
            prompts = Corpus.of(documents, model.tokenizer).prompts(max_prompts)
        record = write(found, to, out, model, prompts, approximate)
        _show(record, out)


def _show(record: dict[str, Any], out: Path) -> None:
    from toolkit.adapters.card import recovered_words
    from toolkit.tables.words import nats

    level, reason = record["fidelity"], record["reason"]
    console.print(f"{record['format']}: {level}{': ' if reason else ''}{reason}", soft_wrap=True)
    if found := record["loss"]:
        console.print(
            f"KL(steered ‖ exported) {nats(found['kl'], found['kl_sem'])} nats a token on "
            f"{found['prompts']} prompts; KL(steered ‖ base) {found['kl_base']:.3g}",
            soft_wrap=True,
        )
    elif level == "approximate":
        console.print("the loss is not measured: that takes --base and --data", soft_wrap=True)
    if ours := recovered_words(record["recovered"]):
        console.print(f"the adapters themselves recover {ours}", soft_wrap=True)
    console.print(f"export: {out.resolve()}", soft_wrap=True)
