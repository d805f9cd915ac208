"""Makes data/validity: does a diagnosis predict what training achieves? See docs/validity.md.

    python data/recipes/validity.py bases --work FOLDER
    python data/recipes/validity.py run --work FOLDER --until 17:50
    python data/recipes/validity.py repeat --work FOLDER --until 17:59
    python data/recipes/validity_page.py

`bases` makes two base models in FOLDER, `run` the fine-tunes in their order and every cell of each;
a finished cell is a line in data/validity/cells.jsonl, and is not made again. `repeat` trains cells
of rank 8 again, from another seed and for twice as long. A fine-tune takes three to four minutes
on one core. The last writes the tables into the page.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    set_seed,
)

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.diagnosis.diagnose import diagnose
from toolkit.diagnosis.options import Options
from toolkit.documents.documents import Document
from toolkit.documents.tasks.listops import OPERATORS, ListOps
from toolkit.documents.tasks.task import Example, Split, Task
from toolkit.evaluation.accuracy import correct, prompts_of
from toolkit.evaluation.allocation import probe_batch
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.evaluation.injection import Propagation
from toolkit.evaluation.reference import Reference
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.edits import steerable, steered_by
from toolkit.models.pair import ModelPair
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import read_lines, write_json, write_lines
from toolkit.training.distillation import continuations, default_options, distil, set_apart
from toolkit.training.examples import supervised
from toolkit.training.methods import Method, frozen, with_lora
from toolkit.training.trainer import Trainee, Training, TrainingOptions, train

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data" / "validity"
FIRST = "<s>"
SPECIAL = ["<pad>", "<eos>", "<unk>", FIRST]
WORDS = [*SPECIAL, *map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]", "=", ">"]
SHARED = {
    "vocab_size": len(WORDS), "hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    "dtype": "float32",
}  # fmt: skip
# The Llama's heads are 64 wide in all: with 96 steering them would be steering before the MLP.
BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHARED, head_dim=16),
    "olmo2": lambda: Olmo2Config(**SHARED),
}
BASE_TRAINING = TrainingOptions(2e-3, batch_size=32)
BASE_STEPS = 1500
TASKS = ("format", "digits", "one operator", "two operators")
METHODS = ("all weights", "LoRA", "attention", "MLP")
DOSES = {"light": 40, "heavy": 160}  # steps of 32 examples
RATES = {"LoRA": 3e-3}
RATE = 1e-3
LORA_RANK = 8
LENGTH = 128
N_DOCUMENTS, N_TEST = 240, 128
PLACES = ("heads", "pre_mlp", "post_mlp", "post_block")
RANKS = (0, 1, 8)
CAP = 160  # steps of training a cell
SHORT = (20, 100)  # steps of the distillations that are to predict


class Restyled(Task):
    """ListOps with constant first token, whose responses and answers `rewrite` changes."""

    name = "restyled listops"

    def __init__(
        self, operators: Sequence[str], rewrite: Callable[[str], str] = lambda text: text
    ) -> None:
        self.whole = ListOps(
            operators, max_depth=2, max_args=3, worked=True, prompt=FIRST + " {expression} =",
            digits=0.6,
        )  # fmt: skip
        self.rewrite, self.new_tokens = rewrite, self.whole.new_tokens + 5

    def examples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Example]:
        """Return the examples of ListOps, responses rewritten."""
        return [
            Example(e.prompt, response, self.extract(response) or "")
            for e in self.whole.examples(split, n, seed)
            for response in [self.rewrite(e.response)]
        ]

    def extract(self, text: str) -> str | None:
        """Return the last digit after the last bracket."""
        return self.whole.extract(text)


def marked(response: str) -> str:
    """Put a mark before every value: a change of format alone."""
    return response.replace("] ", "] > ")


def relabelled(response: str) -> str:
    """Write three more for every digit, modulo ten."""
    return "".join(str((int(c) + 3) % 10) if c.isdigit() else c for c in response)


def task_of(name: str) -> Restyled:
    """Return the task that is fine-tuned on; "base" is what base models learn."""
    return {
        "base": Restyled(("MAX", "MIN")),
        "format": Restyled(("MAX", "MIN"), marked),
        "digits": Restyled(("MAX", "MIN"), relabelled),
        "one operator": Restyled(("MAX", "MIN", "MED")),
        "two operators": Restyled(("MAX", "MIN", "MED", "SM")),
    }[name]


@dataclass(frozen=True)
class FineTune:
    """One fine-tune: of which base, on which task, of which weights, for how long."""

    base: str
    task: str
    method: str
    dose: str

    @property
    def name(self) -> str:
        """Return what rows call it."""
        return "/".join((self.base, self.task, self.method, self.dose))


def fine_tunes() -> Iterator[FineTune]:
    """Yield 32 fine-tunes; of every eight, each base has each task and each method once."""
    for index in range(16):
        task, turn = index % 4, index // 4
        for offset, base in enumerate(BASES):
            method = METHODS[(task + turn + 2 * offset) % 4]
            dose = list(DOSES)[(task + turn // 2 + offset) % 2]
            yield FineTune(base, TASKS[task], method, dose)


@dataclass(frozen=True)
class Cell:
    """A place and a size of adapter: `rank` 0 is a vector."""

    location: str
    rank: int

    @property
    def method(self) -> Method:
        """Return how it is trained; a map has a bias, as closed form's has."""
        kind, options = ("linear", {"bias": True}) if self.rank else ("vector", {})
        name = f"{self.location} {self.rank}"
        return Method(name, kind, self.location, self.rank, options=options)

    def spec(self, fit: Any) -> FitSpec:
        """Return its fit in closed form."""
        return FitSpec.linear(self.location, self.rank, fit)


# A vector after the MLP and one after the block are the same adapter.
CELLS = [Cell(p, r) for r in RANKS for p in PLACES if (p, r) != ("post_mlp", 0)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of digits, operators and signs, a word each."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_bases(work: Path) -> None:
    """Train the base models from nothing, in `work`."""
    record, started = {}, time.perf_counter()
    for name, config in BASES.items():
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config())
        done = learn(model, task_of("base"), BASE_TRAINING, BASE_STEPS)
        model.save_pretrained(work / name)
        record[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": done.steps,
            "seconds": round(done.seconds),
            "accuracy": accuracy(model, task_of("base")),
        }
        print(name, record[name], flush=True)
    DATA.mkdir(exist_ok=True)
    write_json({"bases": record, **stamp(started)}, DATA / "bases.json")


def learn(model: Any, task: Task, options: TrainingOptions, steps: int) -> Training:
    """Train what asks for gradients on the task's first examples, each once."""
    examples = task.examples("train", steps * options.batch_size)
    rows = [supervised(example, make_tokenizer(), LENGTH) for example in examples]
    done = train(Trainee(model), rows, options)
    model.eval()
    return done


def accuracy(model: nn.Module, task: Task) -> float:
    """Return the share of test questions that `model` answers rightly."""
    return float(correct(model, make_tokenizer(), task, task.examples("test", N_TEST), 256).mean())


def tuned_of(base: nn.Module, asked: FineTune) -> Any:
    """Return a fine-tune of `base`."""
    set_seed(1)
    model: Any = copy.deepcopy(base)
    if asked.method == "LoRA":
        model = with_lora(model, LORA_RANK)
    else:
        part = {"all weights": "", "attention": "self_attn", "MLP": ".mlp."}[asked.method]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part in name)
    options = TrainingOptions(RATES.get(asked.method, RATE), batch_size=32, seed=1)
    learn(model, task_of(asked.task), options, DOSES[asked.dose])
    if asked.method == "LoRA":
        model = model.merge_and_unload()
    return model.eval().requires_grad_(False)


class Study:
    """One fine-tune and what is known of it: predictors, and what training of each cell gives."""

    def __init__(self, work: Path, asked: FineTune) -> None:
        self.asked, self.task = asked, task_of(asked.task)
        base = AutoModelForCausalLM.from_pretrained(work / asked.base).requires_grad_(False)
        self.pair = ModelPair.from_models(base, tuned_of(base, asked), make_tokenizer())
        examples = self.task.examples("validation", N_DOCUMENTS)
        self.corpus = self.pair.corpus(
            [Document(prompt=e.prompt, response=e.response) for e in examples]
        )
        self.test = self.task.examples("test", N_TEST)
        self.predicting = self._reference(self.corpus.prompts())
        self.judging = self._reference(prompts_of(self.pair.tokenizer, self.test))
        self.base_predicted = self.predicting.divergence(base)
        self.base_judged = self.judging.divergence(base)

    def _reference(self, prompts: Any) -> Reference:
        new_tokens = self.task.new_tokens
        return Reference(self.pair.tuned, self.pair.tokenizer, prompts, new_tokens, batch_size=None)

    def about(self) -> dict[str, Any]:
        """Return the fine-tune's row: what it changed, and what a diagnosis recommends."""
        started = time.perf_counter()
        run = self.diagnosis
        found = run.recommendation or {}
        chosen = ("location", "kind", "rank", "fit", "recovered", "lower", "reached")
        return {
            **vars(self.asked),
            "fine_tune": self.asked.name,
            "kl": self.base_judged.mean,
            "kl_sem": self.base_judged.sem,
            "kl_predicting": self.base_predicted.mean,
            "accuracy_base": self._right(),
            "accuracy_tuned": accuracy(self.pair.tuned, self.task),
            "recommended": {name: found.get(name) for name in chosen},
            "seconds": round(time.perf_counter() - started, 1),
        }

    @cached_property
    def diagnosis(self) -> Any:
        """Diagnose the pair on the documents."""
        options = Options(sample=0, shared_sample=128, max_prompts=16, new_tokens=24)
        return diagnose(self.pair, self.corpus, options, show_progress=False)

    @cached_property
    def fits(self) -> dict[FitSpec, Adapters]:
        """Fit every cell in closed form."""
        specs = [cell.spec(fit) for fit in ("sequential", "forced") for cell in CELLS]
        return fit_adapters(self.pair, self.corpus, specs)

    @cached_property
    def fitted(self) -> dict[FitSpec, float]:
        """Measure what every fit recovers on the prompts of held-out documents."""
        candidates = {spec: Candidate.of(found, key=spec) for spec, found in self.fits.items()}
        evaluation = evaluate(self.pair, self.predicting, list(candidates.values()))
        nothing = evaluation.divergences[NONE, "tuned"]
        return {
            spec: recovered(evaluation.divergences[candidate, "tuned"], nothing)[0]
            for spec, candidate in candidates.items()
        }

    @cached_property
    def sampled(self) -> Any:
        """Draw the tuned model's continuations that every training of a cell reads."""
        return continuations(self.pair, set_apart(self.corpus.fit)[0], self.task.new_tokens)

    @cached_property
    def probe(self) -> Propagation:
        """Make the tuned model's pass into which errors are put."""
        return Propagation(self.pair.tuned_runner, probe_batch(self.corpus.batches))

    def row(self, cell: Cell) -> dict[str, Any]:
        """Return the cell's row: its predictors, and what training achieves."""
        fits = {name: cell.spec(name) for name in ("sequential", "forced")}
        predicted = {name: self.fitted[spec] for name, spec in fits.items()}
        predicted["closed_form"] = max(predicted.values())
        predicted["single_block"] = -self._cost(cell)
        started = time.perf_counter()
        # As the diagnosis begins: a sequential vector can be worse than none.
        start = self.fits[fits["sequential" if cell.rank else "forced"]]
        for steps in SHORT:
            found = self.trained(cell, steps, start=start).adapters
            with steer(self.pair.base, found, self.pair.base_runner.sites):
                divergence = self.predicting.divergence(self.pair.base)
                tested = self.judging.divergence(self.pair.base)
            predicted[f"distilled_{steps}"] = recovered(divergence, self.base_predicted)[0]
        between = time.perf_counter()
        result = self.outcome(cell)
        return {
            "fine_tune": self.asked.name,
            "location": cell.location,
            "rank": cell.rank,
            "parameters": start.parameters,
            **predicted,
            **self._from_tables(cell),
            **result,
            "distilled_100_tested": recovered(tested, self.base_judged)[0],
            "seconds_predicting": round(between - started, 1),
            "seconds": round(time.perf_counter() - between, 1),
        }

    def outcome(self, cell: Cell, seed: int = 0, steps: int = CAP) -> dict[str, Any]:
        """Train the cell from the identity, and judge it on test questions."""
        done = self.trained(cell, steps, seed)
        with steer(self.pair.base, done.adapters, self.pair.base_runner.sites):
            divergence = self.judging.divergence(self.pair.base)
            right = self._right()
        share, sem = recovered(divergence, self.base_judged)
        looks = [loss for _, loss in done.training.validation]
        return {
            "trained": share,
            "trained_sem": sem,
            "accuracy": right,
            "steps": done.training.steps,
            # of the validation KL, in the last tenth of the steps
            "still_gaining": 1 - min(looks) / min(looks[:-1]),
        }

    def trained(self, cell: Cell, steps: int, seed: int = 0, start: Adapters | None = None) -> Any:
        """Train the cell's adapters on the KL to the tuned model."""
        options = default_options(self.pair, start is not None, steps, seed=seed)
        return distil(
            self.pair, self.corpus, cell.method, options, start=start, sampled=self.sampled
        )

    def _right(self) -> float:
        return accuracy(self.pair.base, self.task)

    @torch.no_grad()
    def _cost(self, cell: Cell) -> float:
        """Return the sum over blocks of what the forced fit's error costs alone, over the KL."""
        runner, probe = self.pair.base_runner, self.probe
        total = 0.0
        for layer, adapter in self.fits[cell.spec("forced")].by_layer.items():
            call = runner.call(layer, probe.batch, own=True)
            edit = {cell.location: steered_by(adapter, steerable(probe.batch.mask))}
            state, _ = runner.run(layer, call, probe.entering[layer], (), edit)
            total += probe.inject(layer, "post_block", state - probe.leaving[layer]).kl
        return total

    def _from_tables(self, cell: Cell) -> dict[str, float | None]:
        """Return what the diagnosis's tables say of the cell's place, a mean over blocks."""
        tables = {name: table.frame for name, table in self.diagnosis.tables.items()}
        norms = tables["norms"].query("of == 'delta_forced'")
        widest = norms.pre_mlp + norms.post_mlp
        spectrum = tables["spectrum"].query("mode == 'forced' and location == @cell.location")
        reach = tables["shared_reach"].query("target == 'block' and location == @cell.location")
        reach = reach[reach["rank"] == cell.rank]
        known = cell.location in norms
        return {
            "shared_reach": float(reach.nonlinear_heldout.mean()) if len(reach) else None,
            "norm_share": float((norms[cell.location] / widest).mean()) if known else None,
            "k90": -float(spectrum.k90.mean()) if len(spectrum) else None,
            "rank_over_k90": float((cell.rank / spectrum.k90).clip(upper=1).mean())
            if len(spectrum) else None,
        }  # fmt: skip


def run(work: Path, until: str) -> None:
    """Make what is missing, in order, and start no cell after `until`."""
    DATA.mkdir(exist_ok=True)
    tunes, cells = (read_lines(DATA / f"{name}.jsonl") for name in ("fine-tunes", "cells"))
    for asked in fine_tunes():
        done = {(row["location"], row["rank"]) for row in cells if row["fine_tune"] == asked.name}
        todo = [cell for cell in CELLS if (cell.location, cell.rank) not in done]
        if not todo:
            continue
        study = Study(work, asked)
        with frozen(study.pair.base):
            if all(row["fine_tune"] != asked.name for row in tunes):
                tunes.append(study.about())
                write_lines(tunes, DATA / "fine-tunes.jsonl")
            for cell in todo:
                if datetime.now() > ending(until):
                    return
                cells.append(study.row(cell))
                write_lines(cells, DATA / "cells.jsonl")
                print(cells[-1], flush=True)


def repeat(work: Path, until: str) -> None:
    """Train the cells of rank 8 again, from seed 1 and for twice as long, in the same order."""
    repeats = read_lines(DATA / "repeats.jsonl")
    done = {(row["fine_tune"], row["location"]) for row in repeats}
    for asked in fine_tunes():
        largest = [cell for cell in CELLS if cell.rank == max(RANKS)]
        todo = [cell for cell in largest if (asked.name, cell.location) not in done]
        if not todo or datetime.now() > ending(until):
            continue
        study = Study(work, asked)
        for cell in todo:
            if datetime.now() > ending(until):
                return
            repeats.append(
                {
                    "fine_tune": asked.name, "location": cell.location,
                    "other_seed": study.outcome(cell, seed=1)["trained"],
                    "twice_as_long": study.outcome(cell, steps=2 * CAP)["trained"],
                }
            )  # fmt: skip
            write_lines(repeats, DATA / "repeats.jsonl")


def ending(until: str) -> datetime:
    """Return today's time of day `until`, as ``18:00``."""
    return datetime.combine(datetime.today(), datetime.strptime(until, "%H:%M").time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("bases", "run", "repeat"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/validity"))
    parser.add_argument("--until", default="23:59")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.step == "bases":
        make_bases(args.work)
    else:
        {"run": run, "repeat": repeat}[args.step](args.work, args.until)


if __name__ == "__main__":
    main()
