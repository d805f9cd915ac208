"""Distances elsewhere against plain KL, each prompt by itself and without a cache."""

from contextlib import nullcontext

import pytest
import scipy.stats
import torch

from tests.support import tiny
from toolkit.evaluation.elsewhere import elsewhere_rows
from toolkit.evaluation.reference import Reference

N_NEW = 5


@torch.no_grad()
def plain(models, prompt):
    """KL(tuned ‖ x) and KL(base ‖ x) summed over the tuned model's tokens, and their number."""
    ids = list(prompt)
    while len(ids) < len(prompt) + N_NEW:
        ids.append(int(models["tuned"](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tiny.EOS:
            break
    n = len(ids) - len(prompt)
    log_p = {
        name: model(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1].double().log_softmax(-1)
        for name, model in models.items()
    }
    kl = lambda p, x: float((log_p[p].exp() * (log_p[p] - log_p[x])).sum())  # noqa: E731
    return {name: (kl("tuned", name), kl("base", name), n) for name in models}


def test_rows_are_those_of_plain_passes(tokenizer):
    base = tiny.make_model("llama")
    models = {"base": base, "tuned": tiny.tune(base), "recommended": tiny.tune(base, seed=5)}
    prompts = [(5, 6, 7, 8), (30, 11), (40, 21, 16, 5, 9, 33)]
    reference = Reference(models["tuned"], tokenizer, prompts, N_NEW, 2)
    named = {name: lambda model=model: nullcontext(model) for name, model in models.items()}
    rows = elsewhere_rows(named, {"a.jsonl": reference})
    book = [plain(models, prompt) for prompt in prompts]
    base_kl = sum(found["base"][0] for found in book)
    assert [(row["file"], row["model"]) for row in rows] == [("a.jsonl", m) for m in models]
    for row in rows:
        kl, from_base, n = (sum(f[row["model"]][i] for f in book) for i in range(3))
        assert row["n_tokens"] == n
        assert row["kl"] == pytest.approx(kl / n, rel=1e-8, abs=1e-12)
        assert row["kl_base"] == pytest.approx(from_base / n, rel=1e-8, abs=1e-12)
        assert row["recovered"] == pytest.approx(1 - kl / base_kl, rel=1e-8, abs=1e-12)
        width = scipy.stats.t.ppf(0.975, len(prompts) - 1) * row["recovered_sem"]
        assert row["recovered_high"] - row["recovered"] == pytest.approx(width)
