"""The command line: ``oracle diagnose``, ``demo``, ``weights``; the rest is in files of its own."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table as Grid

from toolkit.console import bad_input, console, errors
from toolkit.errors import InputError
from toolkit.figures_cli import figures
from toolkit.training.cli import finetune, steer_app, table

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(steer_app, name="steer")
app.command()(finetune)
app.command()(table)
app.command()(figures)

BaseArgument = Annotated[
    str | None, typer.Argument(help="Hub id, folder, .gguf file or packaged model.", metavar="BASE")
]
TunedArgument = Annotated[
    str | None, typer.Argument(help="The same, or a PEFT adapter's folder.", metavar="TUNED")
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help='JSON lines ("text" or "prompt", "response") or text.')
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for the results.")]
FromOption = Annotated[
    Path | None, typer.Option("--from", help="Redo analyses and report of this finished run.")
]
Positions = Annotated[str, typer.Option(help="Which tokens count: all, response or last.")]
MaxLength = Annotated[int, typer.Option(help="Tokens at which a document is cut.")]
NewTokens = Annotated[int, typer.Option(help="Tokens generated for each held-out prompt.")]
MaxPrompts = Annotated[int | None, typer.Option(help="At most so many held-out prompts.")]
Sample = Annotated[int, typer.Option(help="Tokens a block for reachability; 0 leaves it out.")]
SharedSample = Annotated[
    int, typer.Option(help="Tokens a block that fit one steering map for all; 0 leaves it out.")
]
MaxKL = Annotated[
    float | None,
    typer.Option("--max-kl", help="Find the smallest ranks within so many nats a token."),
]
BatchTokens = Annotated[int, typer.Option(help="Tokens a batch.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16 or auto.")]
Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, ...")]
Seed = Annotated[int, typer.Option(help="Of the token sample.")]
Keep = Annotated[bool, typer.Option("--keep-statistics", help="Keep about 20·d² numbers a block.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it costs in work, memory and time; run nothing.")
]
MemoryCheck = Annotated[
    bool, typer.Option(help="Refuse a run that needs more memory than is free.")
]

DEMO_SHARED_SAMPLE = 64  # a quarter of the default: the demonstration is to end within minutes
DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")


@app.callback()
def _oracle() -> None:
    """Where in a language model could activation steering have done what fine-tuning did?"""


@app.command()
def diagnose(
    base: BaseArgument = None,
    tuned: TunedArgument = None,
    data: DataOption = None,
    out: OutOption = None,
    from_: FromOption = None,
    positions: Positions = "all",
    max_length: MaxLength = 512,
    new_tokens: NewTokens = 32,
    max_prompts: MaxPrompts = None,
    sample: Sample = 8,
    shared_sample: SharedSample = 256,
    max_kl: MaxKL = None,
    batch_tokens: BatchTokens = 2048,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    keep_statistics: Keep = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    memory_check: MemoryCheck = True,
) -> None:
    """Compare BASE with TUNED on the documents of --data, and write tables, figures and a report.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    with bad_input():
        if from_ is not None:
            _redo(from_, out or from_)
            return
        if not (base and tuned and data and (out or dry_run)):
            raise InputError("expected BASE TUNED --data FILE --out DIR (or --from DIR)")
        options = {
            "positions": positions,
            "max_length": max_length,
            "new_tokens": new_tokens,
            "max_prompts": max_prompts,
            "sample": sample,
            "shared_sample": shared_sample,
            "max_kl": max_kl,
            "batch_tokens": batch_tokens,
            "seed": seed,
        }
        if dry_run:
            show_plan(base, tuned, data, options, dtype, device, keep_statistics)
            return
        assert out is not None
        run_job(
            base, tuned, data, out, options, dtype, device, keep_statistics, overwrite, not quiet,
            memory_check,
        )  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path(
        "oracle-demo"
    ),
    quiet: Quiet = False,
) -> None:
    """Diagnose the pair that ships: SmolLM2-135M-Instruct and its LoRA fine-tune on GSM8K."""
    with bad_input():
        from toolkit.demo import ADAPTER, BASE, PROMPTS, shipped

        errors.print(f"base: {BASE} (from the package index, converted once)")
        errors.print(f"tuned: its rank-8 LoRA fine-tune on GSM8K, {shipped(ADAPTER)}")
        asked = {"shared_sample": DEMO_SHARED_SAMPLE}
        tuned, prompts = str(shipped(ADAPTER)), shipped(PROMPTS)
        run_job(BASE, tuned, prompts, out, asked, overwrite=True, show=not quiet)


@app.command()
def weights(
    base: Annotated[str, typer.Argument(help="Folder, .gguf file or packaged model.")],
    tuned: Annotated[str, typer.Argument(help="The same, or a LoRA adapter's folder.")],
    out: Annotated[Path, typer.Option("--out", help="CSV file for the table.")] = Path(
        "weights.csv"
    ),
) -> None:
    """Spectra and ranks of every matrix's change, from the files, one matrix at a time."""
    with bad_input():
        from toolkit.findings import FINDINGS
        from toolkit.table import Table
        from toolkit.weight_side import streamed_weight_rows

        table = Table.of("weights", list(streamed_weight_rows(base, tuned)))
        if table.frame.empty:
            raise InputError(f"{base} and {tuned} share no matrix of a numbered block")
        table.frame.to_csv(out, index=False, lineterminator="\n")
        console.print(FINDINGS["weights"](table.frame), soft_wrap=True)
        console.print(f"table: {out.resolve()}", soft_wrap=True)


def run_job(
    base: str,
    tuned: str,
    data: Path,
    out: Path,
    option_values: dict[str, Any],
    dtype: str = "float32",
    device: str = "cpu",
    keep_statistics: bool = False,
    overwrite: bool = False,
    show: bool = True,
    memory_check: bool = True,
) -> None:
    """The main job, from names to files."""
    from toolkit.diagnose import Listeners
    from toolkit.diagnose import diagnose as run_diagnosis
    from toolkit.documents import read_documents
    from toolkit.free_memory import require_memory
    from toolkit.pair import ModelPair
    from toolkit.planning import plan
    from toolkit.publish import publish
    from toolkit.run import Options
    from toolkit.store import Workspace, refuse_existing

    _require_dtype(dtype)
    refuse_existing(out, overwrite)
    options = Options(**option_values)
    documents = read_documents(data)
    if memory_check:
        planned = plan(base, tuned, documents, options, dtype, device, timed=False)
        require_memory(planned.places)
    pair = ModelPair.load(base, tuned, dtype, device)
    source = {"file": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
    request = {
        "base": pair.hashes[0],
        "tuned": pair.hashes[1],
        "data": source["sha256"],
        "options": vars(options),
        "keep_statistics": keep_statistics,
    }
    workspace = Workspace(out, request, keep_statistics)
    if workspace.open():
        errors.print(f"going on from the interrupted run in {workspace.folder}")
    try:
        listeners = Listeners(workspace.finished, workspace.resume, workspace.keep)
        run = run_diagnosis(pair, documents, options, show_progress=show, listeners=listeners)
    except InputError:
        workspace.abandon()
        raise
    except KeyboardInterrupt:
        errors.print(f"interrupted; the same command goes on from {workspace.folder}")
        raise typer.Exit(130) from None
    run.info["data"].update(source)
    publish(run, workspace.folder)
    workspace.close()
    show_answer(run, out)


def show_plan(
    base: str,
    tuned: str,
    data: Path,
    option_values: dict[str, Any],
    dtype: str,
    device: str,
    keep_statistics: bool,
) -> None:
    """What the main job would cost: nothing is loaded, nothing is written."""
    from toolkit.documents import read_documents
    from toolkit.planning import plan
    from toolkit.run import Options

    _require_dtype(dtype)
    documents, options = read_documents(data), Options(**option_values)
    console.print(
        plan(base, tuned, documents, options, dtype, device, keep_statistics=keep_statistics)
    )


def _require_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")


def _redo(source: Path, out: Path) -> None:
    from toolkit.publish import publish, read_run

    run = read_run(source)
    publish(run, out)
    show_answer(run, out)


def show_answer(run: Any, out: Path) -> None:
    """The answer, the best few candidates, the checks that failed, and where the report is."""
    from toolkit import report

    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in ("where", "kind", "rank", "fit", "layers", "parameters", "recovered"):
        grid.add_column(name, justify="right" if name in ("parameters", "recovered") else "left")
    frame = run.steerability.frame.query("kind in ('vector', 'linear')")
    for row in frame.sort_values("recovered", ascending=False).head(6).itertuples():
        recovered = f"{row.recovered:.3f} ± {row.recovered_sem:.3f}"
        cells = (row.location, row.kind, row.rank, row.fit, row.layers, row.parameters, recovered)
        grid.add_row(*map(str, cells))
    console.print(grid)
    console.print()
    console.print(report.summary(run)["headline"], style="bold", soft_wrap=True)
    if run.rank_set:
        from toolkit.findings import smallest_set

        console.print(smallest_set(run.rank_set), soft_wrap=True)
        if run.rank_set.ranks:
            console.print(f"ranks by block: {' '.join(map(str, run.rank_set.ranks))}")
    for check in run.checks:
        if check.status == "failed":
            console.print(f"check failed: {check.name}: {check.detail}", soft_wrap=True)
    console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True)


def main() -> None:
    """The entry point of the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
