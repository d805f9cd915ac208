"""``oracle finetune``, ``oracle steer fit|train|eval`` and ``oracle table``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table as Grid

from toolkit.cli.options import MODEL, Device, Quiet
from toolkit.errors import InputError
from toolkit.runtime.console import bad_input, console, errors, quiet_transformers
from toolkit.runtime.output import own_file, own_folder

steer_app = typer.Typer(no_args_is_help=True, help="Steering adapters: fit, train, judge.")

Base = Annotated[str, typer.Argument(help=MODEL)]
Out = Annotated[Path, typer.Option("--out", help="Folder for the result.")]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        help=(
            "listops, listops-worked, gsm8k, boolq, arc-easy, arc-challenge, winogrande, answers "
            "or jsonl."
        ),
    ),
]
TrainFile = Annotated[
    Path | None, typer.Option("--train", help="JSON lines: prompt, response, answer.")
]
TestFile = Annotated[
    Path | None,
    typer.Option("--test", help="JSON lines to be judged on: prompt, response, answer."),
]
Rates = Annotated[
    list[float] | None,
    typer.Option("--rate", help="Learning rate; several are judged on validation examples."),
]
Rank = Annotated[str, typer.Option(help='Rank of the adapter, or "full".')]
Location = Annotated[str, typer.Option(help="heads, pre_mlp, post_mlp or post_block.")]
Kind = Annotated[
    str,
    typer.Option(help="vector, linear, loreft, nonlinear, head_vector, head_affine, gated_heads."),
]
Positions = Annotated[str, typer.Option(help="all, every, last_prompt or first_last(k).")]
Epochs = Annotated[float, typer.Option(help="Passes over the training examples.")]
MaxSteps = Annotated[int, typer.Option(help="Steps after which training ends; -1: no such limit.")]
BatchSize = Annotated[int, typer.Option(help="Examples a step.")]
MicroBatch = Annotated[int | None, typer.Option(help="Examples at a time, if memory is short.")]
Examples = Annotated[int | None, typer.Option(help="Number of training examples at most.")]
Validation = Annotated[int, typer.Option(help="Validation examples that choose the rate.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of an example at most; none is ever cut.")]
Longer = Annotated[str, typer.Option(help="Longer examples: refuse the set, or skip them.")]
Seed = Annotated[int, typer.Option(help="Seed of starting points and of the order of examples.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]


# many parameters: a command's options are its parameters
def finetune(
    base: Base,
    task: TaskName,
    out: Out,
    method: Annotated[str, typer.Option(help="sft (all weights) or lora.")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")] = 8,
    train: TrainFile = None,
    test: TestFile = None,
    rate: Rates = None,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = -1,
    batch_size: BatchSize = 16,
    micro_batch: MicroBatch = None,
    examples: Examples = None,
    validation: Validation = 200,
    max_length: MaxLength = 512,
    longer: Longer = "refuse",
    seed: Seed = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Fine-tune BASE on a task: all weights (sft), or LoRA on all linear modules."""
    with bad_input():
        from toolkit.documents.tasks import make_task
        from toolkit.training.methods import Method

        if method not in ("sft", "lora"):
            raise InputError(f"--method is {method!r}: expected sft or lora")
        chosen = Method(method, method, rank=rank if method == "lora" else None)
        request = _request(
            make_task(task, train, test),
            chosen,
            rate,
            _options(epochs, batch_size, micro_batch, max_steps, seed),
            (examples, validation, max_length, longer),
        )
        _train(base, request, out, "float32", device, not quiet)


@steer_app.command("train")
# many parameters: a command's options are its parameters
def train_adapters(
    base: Base,
    task: TaskName,
    out: Out,
    location: Location = "post_block",
    kind: Kind = "linear",
    rank: Rank = "8",
    positions: Positions = "all",
    start: Annotated[
        Path | None, typer.Option(help="Adapters to go on from, such as fitted ones.")
    ] = None,
    train: TrainFile = None,
    test: TestFile = None,
    rate: Rates = None,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = -1,
    batch_size: BatchSize = 16,
    micro_batch: MicroBatch = None,
    examples: Examples = None,
    validation: Validation = 200,
    max_length: MaxLength = 512,
    longer: Longer = "refuse",
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Train steering adapters in every block of BASE on a task."""
    with bad_input():
        from toolkit.adapters.collection import Adapters
        from toolkit.adapters.kinds import KINDS
        from toolkit.documents.tasks import make_task
        from toolkit.training.methods import Method

        if kind not in KINDS:
            raise InputError(f"--kind is {kind!r}: expected one of {', '.join(KINDS)}")
        adapters = Adapters.from_pretrained(start) if start else None
        chosen = Method(f"{location} {kind}", kind, location, as_rank(rank), positions)
        if adapters is not None:
            chosen = Method.of(adapters)
        request = _request(
            make_task(task, train, test),
            chosen,
            rate,
            _options(epochs, batch_size, micro_batch, max_steps, seed),
            (examples, validation, max_length, longer),
        )
        request["start"] = adapters
        _train(base, request, out, dtype, device, not quiet)


@steer_app.command("fit")
# many parameters: a command's options are its parameters
def fit(
    base: Base,
    tuned: Annotated[
        str,
        typer.Argument(help="As BASE, or the folder of a PEFT adapter."),
    ],
    data: Annotated[Path, typer.Option("--data", help="Documents, as for oracle diagnose.")],
    out: Out,
    location: Location = "post_block",
    kind: Annotated[str, typer.Option(help="vector, linear, loreft or nonlinear.")] = "linear",
    rank: Rank = "8",
    fit: Annotated[str, typer.Option(help="forced, sequential, blended or best.")] = "best",
    blend: Annotated[float, typer.Option(help="Blended: 0 is forced, 1 sequential.")] = 0.5,
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Spread the ranks over blocks where they are missed.")
    ] = False,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Fit adapters of BASE to what TUNED does, block by block, without a gradient."""
    with bad_input():
        from toolkit.documents.documents import read_documents
        from toolkit.evaluation.allocation import allocated
        from toolkit.evaluation.best_of import best_fit, candidates_of
        from toolkit.fitting.closed_form import fit_adapters
        from toolkit.fitting.spec import FitSpec
        from toolkit.models.loading import parse_dtype
        from toolkit.models.pair import ModelPair

        out = own_folder(out, "adapters.json")
        documents = read_documents(data)
        pair = ModelPair.load(base, tuned, parse_dtype(dtype), device)
        best = fit == "best"
        form: Any = "sequential" if best else fit
        spec = FitSpec(location, kind, 0 if kind == "vector" else as_rank(rank), form, blend)
        corpus = pair.corpus(documents, max_length=max_length, seed=seed)
        if allocate:
            spec = allocated(pair, corpus, spec, not quiet)
        if best:
            found, shares = best_fit(pair, corpus, candidates_of(spec), show_progress=not quiet)
            rows = [
                (p.fit, f"{p.blend:g}", f"{share:.3f} ± {sem:.3f}")
                for p, (share, sem) in shares.items()
            ]
            show(("fit", "blend", "recovered, held out"), rows)
        else:
            found = fit_adapters(pair, corpus, [spec], show_progress=not quiet)[spec]
        found.info.update(base=base, tuned=tuned, data=str(data))
        found.save_pretrained(out)
        console.print(f"{found.parameters:,} numbers, rank {found.rank}: {out.resolve()}")


@steer_app.command("eval")
# many parameters: a command's options are its parameters
def evaluate(
    base: Base,
    task: TaskName,
    adapters: Annotated[
        list[Path] | None, typer.Option(help="Folder of adapters; several are judged in turn.")
    ] = None,
    tuned: Annotated[
        str | None, typer.Option(help="Fine-tune to compare with: accuracy, and KL(tuned ‖ x).")
    ] = None,
    train: TrainFile = None,
    test: TestFile = None,
    n: Annotated[int | None, typer.Option("--n", help="Number of test examples at most.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file for the figures.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Accuracy of BASE, of BASE with adapters, and of a fine-tune, with 95 % intervals."""
    with bad_input():
        from toolkit.jobs.evaluate import judge

        if out is not None:
            own_file(out, "{")
        found = judge(base, (task, train, test), adapters or [], tuned, n, dtype, device, not quiet)
        show(("who", "accuracy", "95 % interval", "KL(tuned ‖ x)", "recovered"), found["rows"])
        console.print(f"chance {found['chance']:.3f}, {found['questions']} questions")
        if out is not None:
            out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# many parameters: a command's options are its parameters
def table(
    out: Out = Path("oracle-table"),
    model: Annotated[
        str, typer.Option(help="tiny-listops, which ships, or a base model with --tuned.")
    ] = "tiny-listops",
    tuned: Annotated[str | None, typer.Option(help="The fine-tune to compare with.")] = None,
    task: TaskName = "listops",
    train: TrainFile = None,
    test: TestFile = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every method.")] = 3,
    workers: Annotated[int, typer.Option(help="Processes, a thread each; 0: as fits.")] = 0,
    examples: Examples = None,
    n_test: Annotated[int, typer.Option(help="Test examples.")] = 500,
    max_steps: MaxSteps = 200,
    batch_size: BatchSize = 32,
    device: Device = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run again what --out holds already.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare every method on one task, at its best learning rate, over seeds."""
    with bad_input():
        from toolkit.jobs.comparison import TableRequest, forget_runs, make_table

        request = TableRequest(
            model, tuned, task, train, test, examples, n_test, max_steps, batch_size, device
        )
        if overwrite:
            forget_runs(out)
        frame, chance = make_table(request, out, range(seeds), workers, not quiet)
        columns = ("method", "parameters", "learning_rate", "accuracy", "95 % interval",
                   "KL(tuned ‖ x)", "recovered")  # fmt: skip
        rows = [
            (
                row.method,
                f"{row.parameters:,}",
                "" if row.learning_rate != row.learning_rate else f"{row.learning_rate:g}",
                f"{row.accuracy:.3f}",
                f"{row.accuracy_low:.3f} to {row.accuracy_high:.3f}",
                f"{row.kl:.3f}",
                f"{row.recovered:.3f}",
            )
            for row in frame.itertuples()
        ]
        show(columns, rows)
        console.print(f"chance {chance:.3f}; table: {(out / 'table.csv').resolve()}")


def show(columns: tuple[str, ...], rows: list[Any]) -> None:
    """Rows of words on the terminal."""
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        grid.add_column(name, justify="right" if index else "left")
    for row in rows:
        grid.add_row(*map(str, row))
    console.print(grid)


def as_rank(text: str) -> Any:
    """A whole number above 0, or "full"."""
    if text == "full":
        return text
    if not text.isdigit() or int(text) == 0:
        raise InputError(f'--rank is {text!r}: expected a whole number above 0, or "full"')
    return int(text)


def _request(
    task: Any,
    method: Any,
    rates: list[float] | None,
    options: Any,
    examples: tuple[int | None, int, int, str],
) -> dict[str, Any]:
    """Collect the fields of a `TrainingRequest`; `examples` are those options of a command."""
    n_train, n_validation, max_length, longer = examples
    if longer not in ("refuse", "skip"):
        raise InputError(f"--longer is {longer!r}: expected refuse or skip")
    return {
        "task": task,
        "method": method,
        "rates": rates or method.rates,
        "options": options,
        "n_train": n_train,
        "n_validation": n_validation,
        "max_length": max_length,
        "skip_longer": longer == "skip",
    }


def _options(
    epochs: float, batch_size: int, micro_batch: int | None, max_steps: int, seed: int
) -> Any:
    from toolkit.training.trainer import TrainingOptions

    return TrainingOptions(1.0, epochs, batch_size, micro_batch, max_steps=max_steps, seed=seed)


def _train(
    base: str, request: dict[str, Any], out: Path, dtype: str, device: str, shown: bool
) -> None:
    """Load BASE, train what `request` asks for, and show the rates; it has the fields of
    `TrainingRequest`.
    """
    from toolkit.jobs.train import TrainingRequest, train_method
    from toolkit.models.loading import (
        load_model,
        load_tokenizer,
        parse_dtype,
    )

    precision = parse_dtype(dtype)
    with quiet_transformers():
        model, tokenizer = load_model(base, precision, device), load_tokenizer(base)
    asked = TrainingRequest(**request, about={"base": base})
    record = train_method(model, tokenizer, asked, out, shown)
    if n_longer := record["request"].get("longer"):
        errors.print(f"left out: {n_longer} examples longer than --max-length {asked.max_length}")
    rows = [
        (
            f"{r['learning_rate']:g}",
            f"{r['validation_accuracy']:.3f}",
            f"{r['validation_loss']:.3f}",
            f"{r['seconds']:.0f}",
        )
        for r in record["rates"]
    ]
    show(("rate", "validation accuracy", "validation loss", "seconds"), rows)
    errors.print(f"kept: rate {record['best']:g}, in {out.resolve()}")
