"""Adapters distilled through the network, on disk."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.documents.corpus import Corpus
from toolkit.evaluation.reference import Reference
from toolkit.models.pair import ModelPair
from toolkit.runtime.output import own_folder
from toolkit.runtime.provenance import versions
from toolkit.runtime.records import write_json
from toolkit.training.distillation import continuations, default_options, distil, set_apart
from toolkit.training.methods import Method

RECORD = "distillation.json"
JUDGED_TOKENS = 32  # generated for each held-out prompt, as a diagnosis does


@dataclass(frozen=True)
class DistilRequest:
    """Hold what is distilled and how.

    start: adapters to go on from (None: the identity). rate: learning rate (None: one that suits
    the width). about: what the record also says.
    """

    method: Method
    start: Adapters | None = None
    steps: int = 300
    rate: float | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    new_tokens: int = 64
    seed: int = 0
    about: dict[str, Any] | None = None


def distil_adapters(
    pair: ModelPair, corpus: Corpus, asked: DistilRequest, out: Path, show_progress: bool = True
) -> dict[str, Any]:
    """Train the adapters, judge them on the prompts of held-out documents, and keep both in `out`.

    An interrupted run goes on from its checkpoints. Returns the record, which is also
    ``out/distillation.json``.
    """
    out = own_folder(out, RECORD, "checkpoints")
    method, checkpoints = asked.method, out / "checkpoints"
    n_new = max(asked.new_tokens, JUDGED_TOKENS)
    pair.require_prompts([document.prompt_ids for document in corpus.encoded], n_new)
    fit, _ = set_apart(corpus.fit)
    sampled = continuations(pair, fit, asked.new_tokens, asked.seed, show_progress)
    options = default_options(
        pair, asked.start is not None, asked.steps, asked.batch_size, asked.seed
    )
    options = replace(
        options, learning_rate=asked.rate or options.learning_rate, micro_batch=asked.micro_batch
    )
    done = distil(
        pair, corpus, method, options, start=asked.start, sampled=sampled, folder=checkpoints,
        show_progress=show_progress,
    )  # fmt: skip
    adapters, how = done.adapters, {"options": asdict(options), **asdict(done.training)}
    record = {**(asked.about or {}), **how, **_judged(pair, corpus, adapters)}
    adapters.info.update(asked.about or {}, recovered=record["recovered"], versions=versions())
    adapters.save_pretrained(out)
    write_json({**record, "versions": versions()}, out / RECORD)
    return {**record, "parameters": adapters.parameters}


def _judged(pair: ModelPair, corpus: Corpus, adapters: Adapters) -> dict[str, Any]:
    """Return what the adapters recover on the prompts of held-out documents."""
    prompts = corpus.prompts()
    reference = Reference(pair.tuned, pair.tokenizer, prompts, JUDGED_TOKENS)
    base = reference.divergence(pair.base)
    with steer(pair.base, adapters, pair.base_runner.sites):
        steered = reference.divergence(pair.base)
    share, sem = recovered(steered, base)
    return {"recovered": {"mean": share, "sem": sem}, "kl": steered.mean, "kl_base": base.mean,
            "prompts": len(prompts)}  # fmt: skip
