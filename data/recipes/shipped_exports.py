"""Exports the shipped LoReFT in every format that holds it, and generates with each one's reader.

    python data/recipes/shipped_exports.py        # about five minutes on two cores

The readers are PEFT's ``PeftModel``, and transformers' ``AutoModelForCausalLM`` for plain weights
and for the folder with code of its own, which this script trusts, as it has just written it. Each
reads and generates what the steered base does: the adapters at every token, and at all but each
sequence's first one as far as the format can leave that out. Writes ``data/exports/shipped.json``.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.positions import Positions
from toolkit.documents.corpus import Corpus, DataFile
from toolkit.errors import InputError
from toolkit.export import FORMATS, Base, export
from toolkit.models.generation import make_prompts
from toolkit.models.loading import model_folder
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.runtime.shipped import BASE, PROMPTS, shipped

ADAPTERS = "smollm2-gsm8k-reft"
N_PROMPTS, N_NEW = 4, 24
OUT = Path(__file__).parents[1] / "exports" / "shipped.json"


@torch.no_grad()
def said(model: Any, prompts: list[tuple[int, ...]], pad: int) -> tuple[Tensor, list[list[int]]]:
    """Return a model's logits after each prompt, `[n, vocabulary]`, and its greedy tokens."""
    batch = make_prompts(prompts, pad)
    asked = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    logits = model(**asked).logits[:, -1]
    tokens = model.generate(**asked, max_new_tokens=N_NEW, do_sample=False, pad_token_id=pad)
    return logits, tokens[:, batch.ids.shape[1] :].tolist()


def read(form: str, folder: Path) -> Any:
    """Return the model that the format's own reader makes of `folder`."""
    if form == "peft":
        plain = AutoModelForCausalLM.from_pretrained(model_folder(BASE), dtype=torch.float32)
        return PeftModel.from_pretrained(plain, folder).eval()
    trusted = form == "folder"
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trusted
    ).eval()


def main() -> None:
    started = time.perf_counter()
    base = Base.load(BASE)
    corpus = Corpus.of(DataFile.read(shipped(PROMPTS)).documents, base.tokenizer)
    prompts = corpus.prompts(N_PROMPTS)
    adapters = Adapters.from_pretrained(Path(__file__).parents[1] / ADAPTERS)
    rows = []
    for positions in ("all", "every"):
        asked = replace(adapters, positions=Positions.parse(positions))
        for form in FORMATS:
            row: dict[str, Any] = {"format": form, "positions": positions}
            rows.append(row)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                try:
                    record = export(asked, form, out, base, approximate=True, prompts=prompts)
                except InputError as error:
                    row.update(fidelity="refused", reason=str(error))
                    continue
                row.update({name: record[name] for name in ("fidelity", "reason", "loss")})
                if form not in ("peft", "weights", "folder"):
                    continue
                held = replace(adapters, positions=Positions.parse(record["exported"]["positions"]))
                with steer(base.model, held):
                    ours, our_tokens = said(base.model, prompts, corpus.pad_id)
                theirs, their_tokens = said(read(form, out), prompts, corpus.pad_id)
                row["largest_difference"] = float((ours - theirs).abs().max())
                row["largest_logit"] = float(ours.abs().max())
                row["same_tokens"] = our_tokens == their_tokens
            print(row, flush=True)
    OUT.parent.mkdir(exist_ok=True)
    about = {
        "adapters": f"data/{ADAPTERS}",
        "base": BASE,
        "prompts": N_PROMPTS,
        "new_tokens": N_NEW,
    }
    write_json({**about, "rows": rows, **stamp(started)}, OUT)


if __name__ == "__main__":
    main()
