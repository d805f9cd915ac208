"""One method trained for use: the best of some learning rates, on disk."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from toolkit.adapters.collection import Adapters
from toolkit.documents.corpus import pad_token
from toolkit.documents.tasks.task import Task
from toolkit.errors import InputError
from toolkit.evaluation.accuracy import bootstrap, correct, merit
from toolkit.models.generation import end_tokens
from toolkit.models.locations import n_embeddings, resolve
from toolkit.runtime.output import own_folder
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import versions
from toolkit.runtime.records import write_json
from toolkit.training.examples import supervise_all
from toolkit.training.methods import Adapted, Method, adapted
from toolkit.training.trainer import TrainingOptions, response_loss, train

RECORD = "training.json"


@dataclass(frozen=True)
class TrainingRequest:
    """Hold what to train, on which examples, and how.

    rates: learning rates, of which validation examples choose one. n_train: at most so many
    training examples (None: all). n_validation: how many examples choose. max_length: tokens of an
    example; `skip_longer` leaves longer training examples out instead of refusing all. start:
    adapters to go on from. about: what the record also says.
    """

    task: Task
    method: Method
    rates: Sequence[float]
    options: TrainingOptions
    n_train: int | None = None
    n_validation: int = 200
    max_length: int = 512
    skip_longer: bool = False
    start: Adapters | None = None
    about: dict[str, Any] = field(default_factory=dict)


def train_method(
    base: Any, tokenizer: Any, asked: TrainingRequest, out: Path, show_progress: bool = True
) -> dict[str, Any]:
    """Train at each of the rates that are asked for; keep in `out` what does best.

    Best on validation examples is the highest accuracy, then the lowest loss. An interrupted run
    goes on: finished rates are in the record, the unfinished one in its checkpoints. Returns the
    record, which is also ``out/training.json``; `longer` in it counts the examples left out.
    """
    out = own_folder(out, RECORD)
    task, method, options, start = asked.task, asked.method, asked.options, asked.start
    validation = task.examples("validation", asked.n_validation)
    examples = task.examples("train", asked.n_train)
    limits = asked.max_length, asked.skip_longer, end_tokens(base, tokenizer)
    rows, n_longer = supervise_all(examples, tokenizer, *limits)
    judged, _ = supervise_all(validation, tokenizer, *limits)
    pad_id = pad_token(tokenizer, n_embeddings(base))
    request = {
        "task": task.name,
        "method": asdict(method),
        "options": asdict(options),
        "examples": len(rows),
        "start": start.info if start else None,
        **({"longer": n_longer} if n_longer else {}),
        **asked.about,
    }
    record = _opened(out, request)
    sites = resolve(base)
    for rate in asked.rates:
        if any(done["learning_rate"] == rate for done in record["rates"]):
            continue
        with adapted(base, method, sites, options.seed, start) as found:
            assert found.trainee is not None
            chosen = TrainingOptions(**{**asdict(options), "learning_rate": rate})
            checkpoints = out / "checkpoints" / f"{rate:g}"
            done = train(found.trainee, rows, chosen, pad_id, checkpoints, show_progress)
            with progress("validation", -(-len(validation) // 64), show_progress) as advance:
                right = correct(found.model, tokenizer, task, validation, 64, advance)
            result = {
                "learning_rate": rate,
                "validation_accuracy": float(right.mean()),
                "validation_interval": bootstrap(right),
                "validation_loss": response_loss(found.model, judged, pad_id),
                "parameters": found.parameters,
                **asdict(done),
            }
            if all(_score(result) > _score(other) for other in record["rates"]):
                record["best"] = rate
                _save(found, tokenizer, out, {"learning_rate": rate, **request})
            record["rates"].append(result)
            _write(out, record)
    return record


def _score(result: dict[str, Any]) -> tuple[float, float]:
    return merit(result["validation_accuracy"], result["validation_loss"])


def _opened(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return the record of an interrupted run of the same request, or a new one."""
    path = out / RECORD
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["request"] != json.loads(json.dumps(request)):
            raise InputError(f"{out} holds another training ({path}): choose another --out")
        return record
    out.mkdir(parents=True, exist_ok=True)
    record = {"request": request, "rates": [], "best": None, "versions": versions()}
    _write(out, record)
    return record


def _write(out: Path, record: dict[str, Any]) -> None:
    write_json(record, out / RECORD)


def _save(found: Adapted, tokenizer: Any, out: Path, info: dict[str, Any]) -> None:
    """Adapters as the toolkit keeps them; LoRA as PEFT does; a whole model as transformers does."""
    if found.adapters is not None:
        kept = Adapters(
            found.adapters.location,
            found.adapters.by_layer,
            "trained",
            info,
            found.adapters.positions,
        )
        kept.save_pretrained(out)
    if found.weights_changed:
        model: Any = found.model
        if isinstance(model, PeftModel) and "base" in info:
            model.peft_config["default"].base_model_name_or_path = info["base"]
        model.save_pretrained(out)
        if not isinstance(model, PeftModel):
            tokenizer.save_pretrained(out)
