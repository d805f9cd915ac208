"""The table of methods: each at its best learning rate, over seeds, with its uncertainty.

Learning rates are chosen on validation examples, by accuracy and then by loss, with the first
seed; the chosen one is run with the other seeds. Test examples choose nothing.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.documents.documents import Document
from toolkit.documents.tasks.task import Example, Task
from toolkit.documents.tokens import Positions
from toolkit.evaluation.accuracy import bootstrap, correct, merit, prompts_of
from toolkit.evaluation.reference import Reference
from toolkit.fitting.closed_form import fit_adapters
from toolkit.models.generation import end_tokens
from toolkit.models.locations import causal_lm
from toolkit.models.pair import ModelPair
from toolkit.training.examples import supervise_all
from toolkit.training.methods import Adapted, Method, adapted
from toolkit.training.trainer import Training, TrainingOptions, response_loss, train


@dataclass(frozen=True)
class Setting:
    """Hold what a table is made on: `pair` whose tuned half is the reference, a task, and sizes.

    Adapters are fitted on `n_fit` of the training examples, at `fit_positions`; divergences from
    the tuned model are taken on the first `n_kl` test prompts.
    """

    pair: ModelPair
    task: Task
    options: TrainingOptions
    n_train: int | None = None
    n_validation: int = 300
    n_test: int = 500
    n_fit: int = 600
    n_kl: int = 128
    max_length: int = 512
    batch_size: int = 128
    fit_positions: Positions = "all"


@dataclass(frozen=True)
class Outcome:
    """One run: where its questions came out right, and what it cost."""

    method: str
    learning_rate: float | None
    seed: int
    parameters: int
    right: str
    validation_accuracy: float
    validation_loss: float
    kl: float | None
    recovered: float | None
    steps: int
    tokens: int
    train_seconds: float
    fit_seconds: float
    losses: tuple[tuple[int, float], ...] = ()


class Bench:
    """A `Setting` made ready: examples as tokens, and the tuned model's answers to compare with."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.pair, self.task = setting, setting.pair, setting.task
        self.tokenizer = self.pair.tokenizer
        self.train_examples = self.task.examples("train", setting.n_train)
        self.validation = self.task.examples("validation", setting.n_validation)
        self.test = self.task.examples("test", setting.n_test)
        self.rows = self._supervised(self.train_examples)
        self.validation_rows = self._supervised(self.validation)
        prompts = prompts_of(self.tokenizer, self.test[: setting.n_kl])
        self.reference = Reference(
            self.pair.tuned, self.tokenizer, prompts, self.task.new_tokens, batch_size=None
        )
        self.base_divergence = self.reference.divergence(self.pair.base)

    def run(self, method: Method, rate: float | None, seed: int) -> Outcome:
        """Fit, train and judge one method at one learning rate from one seed."""
        if method.kind == "tuned":
            whole = sum(p.numel() for p in self.pair.tuned.parameters())
            there = Adapted(self.pair.tuned, None, None, whole)
            return self._judge(method, None, seed, there, Training(0, 0, 0.0, ()), 0.0)
        start, fit_seconds = self._start(method, seed)
        done = Training(0, 0, 0.0, ())
        sites = self.pair.base_runner.sites
        with adapted(self.pair.base, method, sites, seed, start) as found:
            if found.trainee is not None:
                assert rate is not None
                options = replace(self.setting.options, learning_rate=rate, seed=seed)
                done = train(found.trainee, self.rows, options, self.pad_id)
            return self._judge(method, rate, seed, found, done, fit_seconds)

    @property
    def pad_id(self) -> int:
        return self.pair.pad_id

    def right(self, model: Any, examples: Sequence[Example]) -> np.ndarray:
        return correct(model, self.tokenizer, self.task, examples, self.setting.batch_size)

    def _supervised(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        ends = end_tokens(causal_lm(self.pair.base), self.tokenizer)
        return supervise_all(examples, self.tokenizer, self.setting.max_length, ends=ends)[0]

    def _start(self, method: Method, seed: int) -> tuple[Adapters | None, float]:
        """The method's adapters as they are fitted, and the seconds it took; each seed its own
        documents.
        """
        if method.start == "identity":
            return None, 0.0
        chosen = np.random.default_rng(seed).permutation(len(self.train_examples))
        documents = [_document(self.train_examples[i]) for i in chosen[: self.setting.n_fit]]
        spec = method.spec
        started = time.perf_counter()
        fitted = fit_adapters(
            self.pair, documents, [spec], positions=self.setting.fit_positions, seed=seed
        )
        return fitted[spec], time.perf_counter() - started

    def _judge(
        self,
        method: Method,
        rate: float | None,
        seed: int,
        found: Adapted,
        done: Training,
        fit_seconds: float,
    ) -> Outcome:
        model = found.model
        divergence = self.reference.divergence(model)
        return Outcome(
            method=method.name,
            learning_rate=rate,
            seed=seed,
            parameters=found.parameters,
            right="".join(str(int(r)) for r in self.right(model, self.test)),
            validation_accuracy=float(self.right(model, self.validation).mean()),
            validation_loss=response_loss(model, self.validation_rows, self.pad_id),
            kl=divergence.mean,
            recovered=recovered(divergence, self.base_divergence)[0],
            steps=done.steps,
            tokens=done.tokens,
            train_seconds=done.seconds,
            fit_seconds=fit_seconds,
            losses=done.losses,
        )


class Record:
    """The finished runs, one line of JSON each: what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.outcomes = [Outcome(**json.loads(line)) for line in lines if line.endswith("}")]

    def find(self, method: Method, rate: float | None, seed: int) -> Outcome | None:
        key = (method.name, rate, seed)
        return next((o for o in self.outcomes if (o.method, o.learning_rate, o.seed) == key), None)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def run_method(
    bench: Bench,
    method: Method,
    rates: Sequence[float],
    seeds: Sequence[int],
    record: Record,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Return the method with every seed at the rate that validation examples choose."""

    def once(rate: float | None, seed: int) -> Outcome:
        outcome = record.find(method, rate, seed)
        if outcome is None:
            outcome = bench.run(method, rate, seed)
            record.add(outcome)
        advance()
        return outcome

    if not method.learns:
        return [once(None, seed) for seed in (seeds if method.start != "identity" else seeds[:1])]
    swept = [once(rate, seeds[0]) for rate in rates]
    best = max(swept, key=lambda o: merit(o.validation_accuracy, o.validation_loss))
    return [best, *(once(best.learning_rate, seed) for seed in seeds[1:])]


def row_of(method: Method, outcomes: Sequence[Outcome], n_parameters: int) -> dict[str, Any]:
    """One row of the table: means over seeds, and the interval over seeds and questions."""
    right = np.array([[int(r) for r in o.right] for o in outcomes])
    low, high = bootstrap(right)
    mean = lambda name: float(np.mean([getattr(o, name) for o in outcomes]))  # noqa: E731
    return {
        "method": method.name,
        "kind": method.kind,
        "location": method.location,
        "rank": method.rank,
        "positions": method.positions,
        "start": method.start,
        "learning_rate": outcomes[0].learning_rate,
        "parameters": outcomes[0].parameters,
        "parameters_percent": 100 * outcomes[0].parameters / n_parameters,
        "accuracy": right.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "seeds": len(outcomes),
        **{
            name: mean(name)
            for name in ("validation_accuracy", "kl", "recovered", "steps", "tokens",
                         "train_seconds", "fit_seconds")
        },
    }  # fmt: skip


def _document(example: Example) -> Document:
    return Document(prompt=example.prompt, response=example.response)
