"""A diagnosis as a user writes it: forward hooks, numpy, and scikit-learn's ridge regression."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from common import LOCATIONS, RIDGE, counted, report, task
from sklearn.linear_model import Ridge
from transformers import AutoModelForCausalLM

RANKS = (0, 8, 32, 576)


def module_at(model, layer, location):
    block = model.model.layers[layer]
    return dict(zip(LOCATIONS, (block.self_attn, block.mlp, block), strict=True))[location]


def all_states(model, batches):
    """Capture what leaves every layer's modules, `[n, d]` each, in one pass a batch."""
    found, handles = {}, []
    for layer in range(len(model.model.layers)):
        for location in LOCATIONS:
            kept = found[layer, location] = []

            def keep(_module, _args, output, kept=kept):
                kept.append(counted(output[0] if isinstance(output, tuple) else output))

            handles.append(module_at(model, layer, location).register_forward_hook(keep))
    for ids in batches:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return {place: np.concatenate(kept) for place, kept in found.items()}


def fitted(x, t):
    """Maps of every rank from x to t: the ridge's, cut to the leading directions it explains."""
    n, d = x.shape
    variance = np.square(x - x.mean(0)).sum() / n / d
    ridge = Ridge(alpha=n * RIDGE * variance).fit(x, t)
    seen = ridge.predict(x) - t.mean(0)
    leading = np.linalg.svd(seen, full_matrices=False)[2]
    maps = {}
    for rank in RANKS:
        weight = leading[:rank].T @ leading[:rank] @ ridge.coef_
        maps[rank] = weight, t.mean(0) - weight @ x.mean(0)
    return maps


def steered(model, location, maps):
    """Add each block's map of its own state, to all tokens but the first."""
    handles = []
    for layer, (weight, bias) in maps.items():
        w, b = (torch.from_numpy(part).float() for part in (weight, bias))

        def add(_module, _args, output, w=w, b=b):
            state = output[0] if isinstance(output, tuple) else output
            state[:, 1:] += state[:, 1:] @ w.T + b
            return output

        handles.append(module_at(model, layer, location).register_forward_hook(add))
    return handles


def log_probabilities(model, prompt, said):
    ids = torch.tensor([prompt + said[:-1]])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(said)).logits[0]
    return logits.double().log_softmax(-1)


def divergence(model, prompts, said, tuned):
    nats = []
    for prompt, tokens, log_p in zip(prompts, said, tuned, strict=True):
        log_q = log_probabilities(model, prompt, tokens)
        nats.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(nats).mean())


def continuations(model, prompts, n_new, end):
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=end,
        )
        said.append(out[0, len(prompt) :].tolist())
    return said


def run(models, batches, prompts, n_new):
    base, tuned = models
    x, other = (all_states(model, batches) for model in models)
    rows, maps = [], {}
    for place in sorted(x):
        states, delta = x.pop(place).astype(np.float64), other.pop(place).astype(np.float64)
        delta = delta - states
        sizes = np.square(np.linalg.svd(delta, compute_uv=False)) / len(delta)
        rows.append([f"{place} rms", float(sizes.sum() ** 0.5)])
        rows.append([f"{place} participation", float(sizes.sum() ** 2 / np.square(sizes).sum())])
        maps[place] = fitted(states, delta)
    said = continuations(tuned, prompts, n_new, tuned.generation_config.eos_token_id)
    predictions = [log_probabilities(tuned, p, s) for p, s in zip(prompts, said, strict=True)]
    rows.append(["base", divergence(base, prompts, said, predictions)])
    layers = sorted({layer for layer, _ in maps})
    for location in LOCATIONS:
        for rank in RANKS:
            every = {layer: maps[layer, location][rank] for layer in layers}
            handles = steered(base, location, every)
            rows.append([f"{location} {rank}", divergence(base, prompts, said, predictions)])
            for handle in handles:
                handle.remove()
    return rows


@torch.no_grad()
def main():
    *folders, batches = task()
    asked = json.loads((Path(sys.argv[1]) / "prompts.json").read_text())
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    report(
        transformers.__version__,
        lambda: run(models, batches, asked["prompts"], asked["new_tokens"]),
        lambda: [model(input_ids=batches[0][:1], use_cache=False) for model in models],
    )


main()
