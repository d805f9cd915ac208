"""Places and sizes without a fine-tune: what short trainings gain (``oracle diagnose --train``).

The result is an estimate, and says so: nothing is compared with a model that was really tuned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from markupsafe import Markup
from torch import Tensor

from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import Divergences
from toolkit.diagnosis.workspace import TensorFolder
from toolkit.documents.corpus import Corpus, DataFile
from toolkit.documents.tokens import MAX_LENGTH, Encoded
from toolkit.errors import InputError
from toolkit.evaluation.response_loss import excess, response_batches
from toolkit.models.loading import fingerprint, load_model, load_tokenizer, parse_dtype
from toolkit.models.locations import resolve
from toolkit.models.readable import Readers
from toolkit.report.page import inline_svg, template
from toolkit.runtime.console import quiet_transformers
from toolkit.runtime.output import own_folder, own_request
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import versions
from toolkit.runtime.records import write_json
from toolkit.tables import drawing as draw
from toolkit.tables.trial_plot import gains
from toolkit.tables.words import nats, share_words
from toolkit.training.methods import Method
from toolkit.training.trainer import TrainingOptions
from toolkit.training.trials import (
    BASE,
    Trial,
    TrialBench,
    has_response,
    most_of,
    rate_of,
    smallest_with,
    training_rows,
    trial_methods,
    trial_row,
)

RECORD, TABLE, TRIALS, ADAPTERS = "estimate.json", "estimate.csv", "trials", "adapters"
PAGE = "estimate.html"
SIDES = ("choosing", "reporting")


@dataclass(frozen=True)
class EstimateRequest:
    """Hold what is estimated, on which documents, and how.

    train: a data file of prompts with responses. steps: of each training, of `batch_size` documents
    a step, `micro_batch` at a time. recover: the share of the largest gain that the answer's
    adapters are to reach.
    """

    base: str
    train: Path
    steps: int = 100
    batch_size: int = 8
    micro_batch: int | None = None
    max_length: int = MAX_LENGTH
    recover: float = 0.9
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.recover < 1:
            raise InputError(
                f"steps is {self.steps} and recover {self.recover}: expected 1 or more steps, and "
                "a share between 0 and 1"
            )


@dataclass(frozen=True)
class Estimate:
    """Hold the estimate: a row for each trial, the chosen one's name, and the answer in words."""

    frame: pd.DataFrame
    chosen: str | None
    headline: str


def estimate(request: EstimateRequest, out: Path, show_progress: bool = True) -> Estimate:
    """Train every place and size for a few steps; write ``estimate.html``, ``.csv``, ``.json``.

    The chosen adapters are in ``adapters``. Trainings that an interrupted run finished are not run
    again. Raises InputError where documents have no responses, or are too few.
    """
    out = own_folder(out, RECORD, TRIALS)
    data = DataFile.read(request.train)
    with quiet_transformers():
        model = load_model(request.base, parse_dtype(request.dtype), request.device)
        tokenizer = load_tokenizer(request.base)
    corpus = Readers((model,), tokenizer).checked(
        Corpus.of(data.documents, tokenizer, request.device, request.max_length)
    )
    choosing, reporting = sides(corpus)
    bench = TrialBench(
        model,
        resolve(model),
        _rows(corpus),
        response_batches(corpus, choosing),
        response_batches(corpus, reporting),
        corpus.pad_id,
    )
    asked = {
        **{k: v for k, v in asdict(request).items() if k not in ("train", "recover")},
        "base_sha256": fingerprint(sorted(model.state_dict().items())),
        "data": data.sha256,
    }
    own_request(out / TRIALS / "request.json", asked)
    trials = list(_trials(bench, request, out / TRIALS, show_progress))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    found = conclude(trials, request.recover, choosing is not reporting, n_parameters)
    about = {"train": str(request.train), "recover": request.recover, **asked}
    _write(out, found, {**about, "documents": len(bench.rows), "versions": versions()})
    return found


def sides(corpus: Corpus) -> tuple[list[Encoded], list[Encoded]]:
    """Return the held-out documents that choose and those that report; all both if they are few."""
    held = [d for d in corpus.held_out if has_response(d)]
    if not held:
        raise InputError(
            "--train has no held-out document with a response within --max-length: expected JSON "
            'lines with "prompt" and "response", a few dozen of them'
        )
    reporting = replace(corpus, encoded=tuple(held)).reporting()
    return ([d for d in held if not d.reports], reporting) if reporting else (held, held)


def _rows(corpus: Corpus) -> list[dict[str, list[int]]]:
    rows = training_rows(corpus.fit)
    if not rows:
        raise InputError("no document to train on has a response within --max-length")
    return rows


def _trials(
    bench: TrialBench, request: EstimateRequest, folder: Path, shown: bool
) -> Iterator[Trial]:
    """Yield the base's losses and those after each training; finished ones come from `folder`."""
    model: Any = bench.base
    width = model.config.get_text_config().hidden_size
    methods = [BASE, *trial_methods(bench.sites.unavailable)]
    finished = TensorFolder(folder)
    with progress("short trainings", len(methods), shown) as advance:
        for method in methods:
            name = _file_name(method.name)
            if name not in finished:
                options = TrainingOptions(
                    rate_of(method, width),
                    batch_size=request.batch_size,
                    micro_batch=request.micro_batch,
                    max_steps=request.steps,
                    seed=request.seed,
                )
                finished[name] = _tensors(bench.run(method, options, folder / name))
            advance()
            yield _trial(method, finished[name])


def _file_name(method: str) -> str:
    return method.replace(" ", "-").replace("=", "")


def _tensors(trial: Trial) -> dict[str, Tensor]:
    return {
        "parameters": torch.tensor(trial.parameters),
        **{
            f"{side}.{name}": tensor
            for side in SIDES
            for name, tensor in vars(getattr(trial, side)).items()
        },
    }


def _trial(method: Method, kept: Mapping[str, Tensor]) -> Trial:
    choosing, reporting = (
        Divergences(kept[f"{side}.nats"], kept[f"{side}.counted"]) for side in SIDES
    )
    return Trial(method, int(kept["parameters"]), choosing, reporting)


def conclude(trials: Sequence[Trial], share: float, apart: bool, n_parameters: int) -> Estimate:
    """Choose on the documents that choose, and say what the others show of it."""
    base, *trained = trials
    most, chosen = most_of(trials), smallest_with(trained, base, share)
    frame = pd.DataFrame([trial_row(trial, base, most, n_parameters) for trial in trials])
    if chosen is None:
        return Estimate(
            frame, None, "An estimate: no short training lowers the loss of held-out responses."
        )
    row = frame[frame.method == chosen.method.name].iloc[0]
    gain, largest = (excess(base.choosing, trial.choosing).mean for trial in (chosen, most))
    name = f"{chosen.method.name} ({chosen.parameters:,} parameters)"
    which = (
        f"the smallest adapter to gain {share:g} of the most that a short training gains is {name}"
        if gain >= share * largest
        else f"no adapter gains {share:g} of the most that a short training gains; most of them "
        f"gains {name}"
    )
    among = "that had no part in choosing it" if apart else "that chose it too"
    interval = f" (95 % interval {row.share_low:.2f} to {row.share_high:.2f})"
    if row.n_documents == 1:
        interval = ""
    return Estimate(
        frame,
        chosen.method.name,
        f"An estimate, without a fine-tune: {which}. It takes {row.gain:.3f} nats "
        f"a token off the loss of {row.loss + row.gain:.3f}, "
        f"{row.share:.2f}{interval} of what {most.method.name} does, on the responses of "
        f"{row.n_documents} documents {among}.",
    )


def page(found: Estimate, about: Mapping[str, Any], figure: str) -> str:
    """Write the estimate as HTML, in the report's look, with `figure`, which is SVG text."""
    rows = [
        {
            "method": row.method,
            "chosen": row.method == found.chosen,
            "parameters": f"{row.parameters:,}",
            "percent": f"{row.parameters_percent:.2g} %",
            "loss": nats(row.loss, row.loss_sem),
            "gain": nats(row.gain, row.gain_sem),
            "share": _share(row),
        }
        for row in found.frame.itertuples()
    ]
    return template("toolkit.report", "estimate.html").render(
        found=found,
        about=about,
        figure=Markup(inline_svg(figure, "estimate")),
        rows=rows,
        n_documents=int(found.frame.n_documents.iloc[0]),
    )


def _share(row: Any) -> str:
    if row.kind == "none":
        return ""
    return "{} ({} to {})".format(*map(share_words, (row.share, row.share_low, row.share_high)))


def _write(out: Path, found: Estimate, about: dict[str, Any]) -> None:
    """Write table, figure, record and the chosen adapters."""
    found.frame.to_csv(out / TABLE, index=False, lineterminator="\n")
    draw.save(gains(found.frame, found.chosen), out / "estimate")
    (out / PAGE).write_text(page(found, about, (out / "estimate.svg").read_text("utf-8")), "utf-8")
    if found.chosen:
        chosen = Adapters.from_pretrained(out / TRIALS / _file_name(found.chosen))
        # As model cards name them.
        chosen.info.update({**about, "data": about["train"], "data_sha256": about["data"]})
        chosen.save_pretrained(out / ADAPTERS)
    write_json({"headline": found.headline, "chosen": found.chosen, **about}, out / RECORD)
