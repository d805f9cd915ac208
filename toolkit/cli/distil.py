"""``oracle steer distil``: adapters trained through the whole network on the KL."""

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.options import Device, Quiet
from toolkit.cli.steer import (
    Base,
    Dtype,
    Kind,
    Location,
    MaxLength,
    MicroBatch,
    Out,
    Positions,
    Rank,
    Seed,
    as_rank,
    show,
    steer_app,
)
from toolkit.errors import InputError
from toolkit.runtime.console import bad_input, console
from toolkit.runtime.output import own_folder


@steer_app.command("distil")
# many parameters: a command's options are its parameters
def distil(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="As BASE, or the folder of a PEFT adapter.")],
    data: Annotated[Path, typer.Option("--data", help="Documents, as for oracle diagnose.")],
    out: Out,
    location: Location = "post_block",
    kind: Kind = "linear",
    rank: Rank = "8",
    positions: Positions = "all",
    start: Annotated[
        Path | None, typer.Option(help="Adapters to go on from, such as fitted ones.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of Adam.")] = 300,
    rate: Annotated[
        float | None, typer.Option(help="Learning rate; by default one that suits the width.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Documents a step.")] = 8,
    micro_batch: MicroBatch = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens that the tuned model samples after each prompt.")
    ] = 64,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Train adapters of BASE to predict what TUNED does, end to end, on KL(tuned ‖ steered)."""
    with bad_input():
        from toolkit.adapters.collection import Adapters
        from toolkit.adapters.kinds import KINDS
        from toolkit.documents.documents import read_documents
        from toolkit.jobs.distil import RECORD, DistilRequest, distil_adapters
        from toolkit.models.loading import parse_dtype
        from toolkit.models.pair import ModelPair
        from toolkit.training.methods import Method

        if kind not in KINDS:
            raise InputError(f"--kind is {kind!r}: expected one of {', '.join(KINDS)}")
        if min(steps, batch_size) < 1 or (rate is not None and rate <= 0):
            raise InputError("--steps, --batch-size and --rate must be above 0")
        own_folder(out, RECORD, "checkpoints")
        documents = read_documents(data)
        first = Adapters.from_pretrained(start) if start else None
        method = Method(f"{location} {kind}", kind, location, as_rank(rank), positions)
        if first is not None:
            method = Method.of(first)
        pair = ModelPair.load(base, tuned, parse_dtype(dtype), device)
        corpus = pair.corpus(documents, max_length=max_length, seed=seed)
        about = {"base": base, "tuned": tuned, "data": str(data)}
        asked = DistilRequest(method, first, steps, rate, batch_size, micro_batch,
                              new_tokens, seed=seed, about=about)  # fmt: skip
        found = distil_adapters(pair, corpus, asked, out, not quiet)
        share = found["recovered"]
        steered = f"{share['mean']:.3f} ± {share['sem']:.3f}"
        rows = [
            ("no steering", f"{found['kl_base']:.4g}", "0"),
            ("steered", f"{found['kl']:.4g}", steered),
        ]
        show(("who", "KL, nats a token", f"recovered, {found['prompts']} held-out prompts"), rows)
        console.print(f"{found['parameters']:,} numbers: {out.resolve()}")
