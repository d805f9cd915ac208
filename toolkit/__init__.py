"""Where in a language model could activation steering have done what fine-tuning did?

The rooms of the package, each of which reads only those before it: errors, runtime, documents,
tables, statistics, models, blocks, lockstep, analysis, adapters, fitting, evaluation, training,
diagnosis, report, runs, planning, theory, export, jobs, cli. The docstring of each says what
happens there.

A run, from two models to an adapter that steers the base model::

    from toolkit import ModelPair, diagnose, read_documents, steer

    pair = ModelPair.load("SmolLM2-135M-Instruct", "data/smollm2-gsm8k-lora")
    run = diagnose(pair, read_documents("data/gsm8k-demo.jsonl"))
    run.spectrum.frame                  # tidy tables, one for each analysis
    run.spectrum.plot()                 # and their figures
    print(run.recommendation)           # where to steer, how, and what it recovers
    with steer(pair.base, run.adapters):
        inputs = pair.tokenizer("What is 2 + 3?", return_tensors="pt")
        pair.base.generate(**inputs, max_new_tokens=32)
"""

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.diagnosis.diagnose import diagnose
from toolkit.diagnosis.options import Options
from toolkit.diagnosis.run import Run
from toolkit.documents.documents import Document, read_documents
from toolkit.errors import InputError
from toolkit.evaluation.best_of import best_fit
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair
from toolkit.runtime.check import Check
from toolkit.tables.table import Table

__all__ = [
    "Adapters",
    "Check",
    "Document",
    "FitSpec",
    "InputError",
    "ModelPair",
    "Options",
    "Run",
    "Table",
    "best_fit",
    "diagnose",
    "fit_adapters",
    "read_documents",
    "steer",
]
