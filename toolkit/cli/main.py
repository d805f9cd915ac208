"""The command line: ``oracle diagnose``, ``demo``, ``weights``; the rest is in files of its own."""

import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table as Grid

from toolkit.cli import distil as _distil  # noqa: F401 - registers its command
from toolkit.cli.compare import compare
from toolkit.cli.export import export
from toolkit.cli.figures import figures
from toolkit.cli.options import MODEL, Device, Quiet
from toolkit.cli.steer import TestFile, finetune, steer_app, table
from toolkit.cli.steer import show as show_rows
from toolkit.errors import InputError
from toolkit.runtime.console import bad_input, console, errors
from toolkit.runtime.output import own_file

if TYPE_CHECKING:
    from toolkit.jobs.diagnose import Job

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(steer_app, name="steer")
app.command()(finetune)
app.command()(table)
app.command()(export)
app.command()(figures)
app.command()(compare)

BaseArgument = Annotated[str | None, typer.Argument(help=MODEL, metavar="BASE")]
TunedArgument = Annotated[
    str | None, typer.Argument(help="As BASE, or a PEFT adapter's folder.", metavar="TUNED")
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help='JSON lines ("text" or "prompt", "response") or text.')
]
TrainData = Annotated[
    Path | None,
    typer.Option(
        "--train",
        help="Instead of TUNED: prompts and responses, to estimate by short training.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", help="Steps of each short training.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for the results.")]
FromOption = Annotated[
    Path | None, typer.Option("--from", help="Redo analyses and report of this finished run.")
]
Positions = Annotated[str, typer.Option(help="Which tokens count: all, response or last.")]
MaxLength = Annotated[int, typer.Option(help="Tokens at which a document is cut.")]
NewTokens = Annotated[int, typer.Option(help="Tokens generated for each held-out prompt.")]
MaxPrompts = Annotated[int | None, typer.Option(help="Number of held-out prompts at most.")]
Sample = Annotated[int, typer.Option(help="Tokens a block for reachability; 0 leaves it out.")]
SharedSample = Annotated[
    int, typer.Option(help="Tokens a block that fit one steering map for all; 0 leaves it out.")
]
MaxKL = Annotated[
    float | None,
    typer.Option("--max-kl", help="Find the smallest ranks within so many nats a token."),
]
Recover = Annotated[
    float, typer.Option("--recover", help="Recovery that the answer's adapters are to reach.")
]
Distil = Annotated[
    int | None,
    typer.Option(
        "--distil", help="Steps of distillation at every place; 0: none (300 with a GPU, else 0)."
    ),
]
CrossFit = Annotated[
    int,
    typer.Option(
        "--cross-fit", help="Folds in which all documents judge forced maps, say 5; 0: none."
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="Measure accuracy on this task, named as for oracle steer eval."),
]
AnswersFile = Annotated[
    Path | None, typer.Option("--answers", help="Or on these JSON lines: prompt, answer.")
]
NQuestions = Annotated[
    int | None,
    typer.Option("--questions", help="Number of test questions at most.", show_default="200"),
]
Elsewhere = Annotated[
    list[Path] | None,
    typer.Option("--elsewhere", help="Prompts that the fine-tune is not about; repeatable."),
]
BatchTokens = Annotated[int, typer.Option(help="Tokens in a batch at most.")]
Sketch = Annotated[
    int | None, typer.Option(help="Width of a random projection for spectra and fits.")
]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16 or auto.")]
Seed = Annotated[int, typer.Option(help="Seed of the token sample.")]
Keep = Annotated[bool, typer.Option("--keep-statistics", help="Keep about 20·d² numbers a block.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the cost in work, memory and time; run nothing.")
]
MemoryCheck = Annotated[
    bool, typer.Option(help="Refuse a run that needs more memory than is free.")
]
OffloadOption = Annotated[
    bool, typer.Option("--offload", help="Read blocks from disk when they are reached.")
]

ESTIMATED = ("max_length", "recover", "dtype", "seed", "device")  # options of an estimate, too
DEMO_SHARED_SAMPLE = 64  # a quarter of the default: the demonstration is to end within minutes


def _show_version(asked: bool) -> None:
    if asked:
        console.print(metadata.version("oracle-toolkit"), highlight=False)
        raise typer.Exit


@app.callback()
def _oracle(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Find where in a language model activation steering could have done what fine-tuning did."""


@app.command()
# many parameters: a command's options are its parameters
def diagnose(
    ctx: typer.Context,
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
    recover: Recover = 0.9,
    distil: Distil = None,
    cross_fit: CrossFit = 0,
    train: TrainData = None,
    steps: Steps = 100,
    task: TaskOption = None,
    test: TestFile = None,
    answers: AnswersFile = None,
    questions: NQuestions = None,
    elsewhere: Elsewhere = None,
    batch_tokens: BatchTokens = 2048,
    sketch: Sketch = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    keep_statistics: Keep = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    memory_check: MemoryCheck = True,
    offload: OffloadOption = False,
) -> None:
    """Compare BASE with TUNED on the documents of --data, and write tables, figures and a report.

    An interrupted run goes on where it stopped when the same command is given again. Without a
    fine-tune, BASE --train FILE estimates places and sizes by short trainings.
    """
    with bad_input():
        if from_ is not None:
            _take(ctx, "--from", ("from_", "out", "overwrite", "quiet"))
            _redo(from_, out or from_, overwrite)
            return
        if train is not None:
            if tuned or data or not (base and out):
                raise InputError("expected BASE --train FILE --out DIR, without TUNED and --data")
            _take(ctx, "--train", ("base", "train", "steps", "out", *ESTIMATED, "quiet"))
            asked = {"max_length": max_length, "recover": recover, "dtype": dtype, "seed": seed}
            _estimate(base, train, steps, out, not quiet, {**asked, "device": device})
            return
        if not (base and tuned and data and (out or dry_run)):
            raise InputError("expected BASE TUNED --data FILE --out DIR (or --from DIR)")
        if "--steps" in _given(ctx):
            raise InputError("--steps belongs to --train: leave it out (or give --distil STEPS)")
        from toolkit.diagnosis.options import DISTIL_STEPS, Options
        from toolkit.diagnosis.other_data import OtherFiles
        from toolkit.jobs.diagnose import Job, plan_job

        if distil is None:
            distil = 0 if device == "cpu" else DISTIL_STEPS
        options = Options(
            positions=positions,  # type: ignore[arg-type]
            max_length=max_length,
            new_tokens=new_tokens,
            max_prompts=max_prompts,
            sample=sample,
            shared_sample=shared_sample,
            max_kl=max_kl,
            recover=recover,
            distil=distil,
            folds=cross_fit,
            batch_tokens=batch_tokens,
            sketch=sketch,
            seed=seed,
        )
        if keep_statistics and sketch:
            raise InputError("sketched statistics are not kept: leave out one of the options")
        job = Job(
            base,
            tuned,
            data,
            out or Path(),
            options,
            dtype,
            device,
            keep_statistics,
            overwrite,
            not quiet,
            memory_check,
            offload,
            OtherFiles(task, test, answers, questions, tuple(elsewhere or ())),
        )
        if dry_run:
            console.print(plan_job(job))
        else:
            _run(job)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path(
        "oracle-demo"
    ),
    quiet: Quiet = False,
) -> None:
    """Diagnose the pair that ships: SmolLM2-135M-Instruct and its LoRA fine-tune on GSM8K."""
    with bad_input():
        from toolkit.diagnosis.options import Options
        from toolkit.diagnosis.other_data import OtherFiles
        from toolkit.jobs.diagnose import Job
        from toolkit.runtime.shipped import ADAPTER, BASE, ELSEWHERE, PROMPTS, shipped

        errors.print(f"base: {BASE} (from the package index, converted once)")
        errors.print(f"tuned: its rank-8 LoRA fine-tune on GSM8K, {shipped(ADAPTER)}")
        asked = Options(shared_sample=DEMO_SHARED_SAMPLE)
        tuned, prompts = str(shipped(ADAPTER)), shipped(PROMPTS)
        other = OtherFiles(elsewhere=(shipped(ELSEWHERE),))
        show = not quiet
        _run(Job(BASE, tuned, prompts, out, asked, overwrite=True, show=show, other=other))


@app.command()
def weights(
    base: Annotated[str, typer.Argument(help="Folder, .gguf file or packaged model.")],
    tuned: Annotated[str, typer.Argument(help="As BASE, or a LoRA's folder.")],
    out: Annotated[Path, typer.Option("--out", help="CSV file for the table.")] = Path(
        "weights.csv"
    ),
) -> None:
    """Spectra and ranks of every matrix's change, from the files, one matrix at a time."""
    with bad_input():
        from toolkit.diagnosis.weight_rows import StreamedWeights
        from toolkit.tables.table import Table

        own_file(out, "layer,module,")
        found = StreamedWeights(base, tuned)
        table = Table.of("weights", list(found))
        if found.unserved:
            names = ", ".join(found.unserved)
            errors.print(f"no rows for what is no matrix of a numbered block: {names}")
        if table.frame.empty:
            raise InputError(
                f"{base} and {tuned} share no matrix of a block that can be read from files alone: "
                "the table `weights` of `oracle diagnose` reads the models"
            )
        table.frame.to_csv(out, index=False, lineterminator="\n")
        console.print(table.finding(), soft_wrap=True)
        console.print(f"table: {out.resolve()}", soft_wrap=True)


def _run(job: "Job") -> None:
    from toolkit.jobs.diagnose import run_job

    run = run_job(job)
    if run:
        show_answer(run, job.out)


def _given(ctx: typer.Context) -> dict[str, str]:
    """Return the options that stand on the command line, with the names of their parameters."""
    named = [(parameter.opts[0], str(parameter.name)) for parameter in ctx.command.params]
    sources = {name: ctx.get_parameter_source(name) for _, name in named}
    # By the word: which package has the enumeration depends on typer's version.
    return {o: n for o, n in named if (found := sources[n]) and found.name == "COMMANDLINE"}


def _take(ctx: typer.Context, way: str, names: tuple[str, ...]) -> None:
    """Raise InputError where an option is given that has no meaning with `way`."""
    if others := [option for option, name in _given(ctx).items() if name not in names]:
        raise InputError(f"{way} takes no {', '.join(others)}: leave out what it does not do")


def _redo(source: Path, out: Path, overwrite: bool) -> None:
    from toolkit.report.folder import read_run, republish

    run = read_run(source)
    republish(run, source, out, overwrite)
    show_answer(run, out)


def _estimate(
    base: str, train: Path, steps: int, out: Path, show: bool, asked: dict[str, Any]
) -> None:
    from toolkit.jobs.estimate import EstimateRequest, estimate

    found = estimate(EstimateRequest(base, train, steps, **asked), out, show)
    columns = ("method", "parameters", "loss", "gain", "share of the most")
    rows = [
        (row.method, f"{row.parameters:,}", f"{row.loss:.3f} ± {row.loss_sem:.3f}",
         f"{row.gain:.3f} ± {row.gain_sem:.3f}", f"{row.share:.2f}")
        for row in found.frame.itertuples()
    ]  # fmt: skip
    show_rows(columns, rows)
    console.print()
    console.print(found.headline, style="bold", soft_wrap=True)
    console.print(f"page: {(out / 'estimate.html').resolve()}", soft_wrap=True)


def show_answer(run: Any, out: Path) -> None:
    """Show the answer, the best few candidates, failed checks, and where the report is."""
    from toolkit.report import page as report

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
    if run.rank_search:
        from toolkit.diagnosis.headline import smallest_set

        console.print(smallest_set(run.rank_search), soft_wrap=True)
        if run.rank_search.ranks:
            console.print(f"ranks by block: {' '.join(map(str, run.rank_search.ranks))}")
    for check in run.checks:
        if check.status == "failed":
            console.print(f"check failed: {check.name}: {check.detail}", soft_wrap=True)
    console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True)


def main() -> None:
    """Run the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
