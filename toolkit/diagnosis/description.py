"""The content of ``run.json``: what ran, on what, with what, and what it cost."""

from dataclasses import asdict
from typing import Any

import torch

from toolkit.diagnosis.options import Options
from toolkit.documents.corpus import Corpus
from toolkit.documents.phases import ThinkingMarks, count_phases
from toolkit.documents.tokens import DAY, tells_the_date
from toolkit.models.loading import dtype_name
from toolkit.models.pair import ModelPair
from toolkit.runtime.placement import analysis_device
from toolkit.runtime.provenance import Stages, commit, machine, versions


def describe_run(
    pair: ModelPair,
    options: Options,
    corpus: Corpus,
    n_prompts: int,
    stages: Stages,
    noise: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of ``run.json``: what ran, on what, with what, and what it cost."""

    def side(held_out: bool) -> dict[str, Any]:
        counted = sum(int(b.counted.sum()) for b in corpus.batches if b.held_out == held_out)
        documents = [d for d in corpus.encoded if d.held_out == held_out]
        phases = count_phases(documents, corpus.positions, ThinkingMarks.of(pair.tokenizer))
        return {"documents": len(documents), "tokens": counted, "phases": phases}

    def model(name: str, live: torch.nn.Module, sha256: str) -> dict[str, str]:
        dtype = dtype_name(next(live.parameters()).dtype)
        return {"name": name, "sha256": sha256, "dtype": dtype}

    return {
        "versions": versions(),
        "commit": commit(),
        "base": model(pair.base_name, pair.base, pair.hashes[0]),
        "tuned": model(pair.tuned_name, pair.tuned, pair.hashes[1]),
        "family": type(pair.base).__name__,
        "parameters": pair.n_parameters,
        "layers": pair.n_layers,
        "data": {
            "fit": side(False),
            "held_out": side(True),
            "prompts": n_prompts,
            **({"template_date": f"{DAY:%Y-%m-%d}"} if tells_the_date(pair.tokenizer) else {}),
        },
        "statistics_dtype": "float64",
        "device": str(pair.device),
        "analyses_on": str(analysis_device(pair.device)),
        "machine": machine(),
        "seed": options.seed,
        "options": asdict(options),
        "noise_floor": noise,
        "not_applicable": pair.unavailable,
        "stages": stages.figures,
    }
