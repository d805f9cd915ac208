"""What the adapters that one run recommends recover of another run's fine-tune."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from toolkit.documents.corpus import DataFile
from toolkit.errors import InputError
from toolkit.evaluation.candidates import ALWAYS, NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.evaluation.intervals import difference_interval, recovered_interval
from toolkit.evaluation.reference import Reference
from toolkit.models.pair import ModelPair
from toolkit.runs.finished import FinishedRun
from toolkit.runtime.heap import release_freed
from toolkit.runtime.progress import progress
from toolkit.tables.drawing import LOWEST, house_style, make_panels
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import share_words

Row = dict[str, Any]


def transfer_rows(
    runs: Sequence[FinishedRun], device: str = "cpu", show_progress: bool = True
) -> tuple[list[Row], list[str]]:
    """Return the rows of ``transfer.csv``, and what is left out of it and why.

    Each run's models and documents are read again from where the run had them, and must be the same
    as then. One pair is in memory at a time.
    """
    candidates = {
        run.name: Candidate.of(run.adapters, key=run.name) for run in runs if run.adapters
    }
    left_out = [
        f"{run.name} has no recommended adapters: none of its transfer to others"
        for run in runs
        if run.name not in candidates
    ]
    rows = []
    for run in runs:
        try:
            rows += _onto(run, candidates, device, show_progress)
        except InputError as error:
            left_out.append(f"no transfer onto the prompts of {run.name}: {error}")
        release_freed()
    return rows, left_out


def _onto(
    run: FinishedRun, candidates: dict[str, Candidate], device: str, show_progress: bool
) -> list[Row]:
    """Judge all adapters on the prompts of `run` that report, against its tuned model."""
    pair, prompts = _pair_and_prompts(run, device)
    reference = Reference(pair.tuned, pair.tokenizer, prompts, run.info["options"]["new_tokens"])
    n_steps = len(reference.batches) * (len(ALWAYS) + len(candidates))
    with progress(f"onto {run.name}", n_steps, show_progress) as advance:
        found = evaluate(pair, reference, list(candidates.values()), advance=advance).divergences
    base, rows = found[NONE, "tuned"], []
    own = candidates.get(run.name)
    for name, candidate in candidates.items():
        steered = found[candidate, "tuned"]
        share = recovered_interval(steered, base)
        more = difference_interval(steered, found[own, "tuned"], base) if own else None
        rows.append(
            {
                "adapters": name,
                "prompts": run.name,
                "n_prompts": share.n,
                "base_kl": base.mean,
                "kl": steered.mean,
                "kl_sem": steered.sem,
                "recovered": share.estimate,
                "recovered_sem": share.sem,
                "recovered_low": share.low,
                "recovered_high": share.high,
                "more_than_own": more.estimate if more else None,
                "more_than_own_low": more.low if more else None,
                "more_than_own_high": more.high if more else None,
            }
        )
    return rows


def _pair_and_prompts(run: FinishedRun, device: str) -> tuple[ModelPair, list[tuple[int, ...]]]:
    """Return the models of `run` and its prompts that report; all held-out ones if none are apart.

    Raises InputError where models or documents are gone, or are not those of the run.
    """
    info = run.info
    if "file" not in info["data"]:
        raise InputError("its documents were given in memory")
    data = DataFile.read(info["data"]["file"])
    if data.sha256 != info["data"]["sha256"]:
        raise InputError(f"{info['data']['file']} has changed since the run")
    base, tuned = info["base"], info["tuned"]
    pair = ModelPair.load(base["name"], tuned["name"], base["dtype"], device)
    for model, now in zip((base, tuned), pair.hashes, strict=True):
        if model["sha256"] != now:
            raise InputError(f"{model['name']} has changed since the run")
    options = info["options"]
    corpus = pair.corpus(data.documents, max_length=options["max_length"])
    most = options["max_prompts"]
    documents = corpus.reporting(most) or corpus.asked(most)
    return pair, [document.prompt_ids for document in documents]


@house_style("Transfer")
def plot(frame: pd.DataFrame) -> Figure:
    """Draw the matrix: whose adapters by rows, whose prompts by columns."""
    names = list(dict.fromkeys([*frame.adapters, *frame.prompts]))
    whose = [name for name in names if (frame.adapters == name).any()]
    onto = [name for name in names if (frame.prompts == name).any()]
    figure, (axes,) = make_panels(1, 1.7 + 0.55 * len(whose))
    tables = frame.pivot(index="adapters", columns="prompts")
    shares, low, high = (
        tables[name].loc[whose, onto].to_numpy(float)
        for name in ("recovered", "recovered_low", "recovered_high")
    )
    axes.imshow(np.clip(shares, LOWEST, 1), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for row, column in np.ndindex(*shares.shape):
        share = shares[row, column]
        color = "white" if abs(np.clip(share, LOWEST, 1)) > 0.6 else "black"
        text = share_words(share)
        if np.isfinite(low[row, column]):
            text += f"\n{share_words(low[row, column])} to {share_words(high[row, column])}"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=10.5)
    axes.set_xticks(range(len(onto)), onto)
    axes.set_yticks(range(len(whose)), whose)
    axes.grid(visible=False)
    axes.set(xlabel="prompts and tuned model of", ylabel="adapters of")
    axes.set_title("Recovered by one run's adapters of another's fine-tune")
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what own and others' adapters recover."""
    others = frame[frame.adapters != frame.prompts]
    own = frame[frame.adapters == frame.prompts]
    if others.empty:
        return "There are no adapters of another run."
    best = others.loc[others.recovered.idxmax()]
    text = f"Adapters recover {_range(others.recovered)} of another run's fine-tune"
    if len(own):
        text += f" and {_range(own.recovered)} of their own"
    text += f". The best transfer is of {best.adapters} to {best.prompts}: "
    text += share_words(best.recovered)
    if pd.notna(best.recovered_low):
        text += f" ({share_words(best.recovered_low)} to {share_words(best.recovered_high)})"
    if pd.notna(best.more_than_own_low):
        more = [best.more_than_own, best.more_than_own_low, best.more_than_own_high]
        words = [f"{value:+.2f}".replace("-", "−") for value in more]
        text += ", {} ({} to {}, paired) beside the adapters of its own".format(*words)
    return f"{text}."


def _range(shares: pd.Series) -> str:
    low, high = share_words(shares.min()), share_words(shares.max())
    return low if low == high else f"{low} to {high}"


SPEC = TableSpec(
    name="transfer",
    title="One run's adapters on another's prompts",
    reading=(
        "recovered = 1 − KL(tuned ‖ steered) / KL(tuned ‖ base) with the adapters of the row and "
        "the tuned model and reporting prompts of the column. The diagonal is each run's own "
        "answer; below each share is its 95 % interval over prompts. Blue recovers, white does "
        "nothing, red is worse than no steering."
    ),
    columns={
        "adapters": "the run whose recommended adapters steer",
        "prompts": "the run whose prompts are read and whose tuned model is to be reached",
        "n_prompts": "its prompts that report (all held-out ones where none are apart)",
        "base_kl": "`KL(tuned ‖ base)` on them, nats a token",
        "kl": "`KL(tuned ‖ steered)` on them, nats a token",
        "kl_sem": "its standard error, over prompts",
        "recovered": "`1 − kl / base_kl`",
        "recovered_sem": "its standard error, over prompts (jackknife)",
        "recovered_low": "lower end of its 95 % interval (t over prompts)",
        "recovered_high": "upper end of the same",
        "more_than_own": "`recovered` less that of the run's own adapters on the same prompts",
        "more_than_own_low": "lower end of its 95 % interval, paired over prompts",
        "more_than_own_high": "upper end of the same",
    },
    plot=plot,
    finding=finding,
    place=2,
)
