"""Where in a language model could activation steering have done what fine-tuning did?

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

from toolkit.best_fit import best_fit
from toolkit.checks import Check
from toolkit.closed_form import Plan, fit_adapters
from toolkit.diagnose import diagnose
from toolkit.documents import Document, read_documents
from toolkit.errors import InputError
from toolkit.pair import ModelPair
from toolkit.run import Options, Run
from toolkit.steering import Adapters, load_adapters, save_adapters, steer
from toolkit.table import Table

__all__ = [
    "Adapters",
    "Check",
    "Document",
    "InputError",
    "ModelPair",
    "Options",
    "Plan",
    "Run",
    "Table",
    "best_fit",
    "diagnose",
    "fit_adapters",
    "load_adapters",
    "read_documents",
    "save_adapters",
    "steer",
]
