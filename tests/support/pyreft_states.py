"""Logits of a folder of the format ``reft``, in an environment with pyreft 0.1 and pyvene 0.1.8.

Run by itself: ``python pyreft_states.py BASE FOLDER IDS.json OUT.npy every|all``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from pyreft import ReftModel
from transformers import AutoModelForCausalLM


def load(folder, model):
    """Load with pyreft, then in float32: it makes W and b bfloat16 whatever the model is."""
    reft = ReftModel.load(folder, model)
    for key, intervention in reft.interventions.items():
        saved = torch.load(f"{folder}/intkey_{key}.bin", weights_only=True)
        intervention.learned_source.float().load_state_dict(saved, strict=False)
    reft.eval()
    return reft


@torch.no_grad()
def logits(base, folder, ids, first):
    """Logits of one sequence, whose tokens are steered from number `first` on."""
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    reft = load(folder, model)
    places = [[list(range(first, len(ids)))]] * len(reft.interventions)
    given = {"input_ids": torch.tensor([ids])}
    _, steered = reft(given, unit_locations={"sources->base": (None, places)})
    return steered.logits[0].numpy()


if __name__ == "__main__":
    base_folder, reft_folder, ids_file, out, positions = sys.argv[1:]
    tokens = json.loads(Path(ids_file).read_text())
    np.save(out, logits(base_folder, reft_folder, tokens, int(positions == "all")))
