"""Families that are served and refused are those of the page, with the numbers of plain passes."""

import pytest
import torch

from tests.support import families
from toolkit import ModelPair, Options, diagnose


def test_the_page_is_what_loading_gives():
    """Row by row; versions and figures in reasons may be those of another machine."""
    committed = families.PAGE.read_text(encoding="utf-8").splitlines()
    stored = [line.split("|")[1:3] for line in committed if line.startswith("| `")]
    found = [[f" `{name}` ", f" {kind} "] for name, kind, _ in families.rows()]
    assert found == stored


FAMILIES = [
    "mamba", "jamba", "granite", "gemma3", "recurrent_gemma",
    "gemma3n_text", "gemma4_text",  # later blocks read earlier ones' keys; parallel streams
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_and_kl_are_those_of_plain_passes(family, tmp_path):
    """Each document alone and unpadded, greedy tokens one by one, without any cache."""
    families.save_pair(family, tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    texts = [" ".join(f"w{5 + (3 * i * j) % 50}" for j in range(8 + i)) for i in range(1, 9)]
    options = Options(new_tokens=3, sample=0, shared_sample=0)
    run = diagnose(pair, texts, options, show_progress=False)
    corpus = pair.corpus(texts)
    frame = run.spectrum.frame.query("location == 'post_block' and mode == 'free'")
    assert frame.rms.to_numpy() == pytest.approx(plain_rms(pair, corpus.encoded), rel=1e-4)
    kl = run.sequential_kl.frame.query("kind == 'none' and forcing == 'tuned'").kl_mean
    assert kl.to_numpy() == pytest.approx(plain_kl(pair, corpus.prompts(), 3), rel=1e-3, abs=1e-6)
    left = [check for check in run.checks if check.status == "failed"]
    assert {check.name for check in left} <= {"tokens against dimension"}


@torch.no_grad()
def plain_rms(pair, documents):
    """Return the free delta's root mean square after each block, `[n_layers]`."""
    total, n = 0.0, 0
    for document in documents:
        ids = torch.tensor([document.ids])
        states = [outputs(runner, ids) for runner in (pair.base_runner, pair.tuned_runner)]
        deltas = [(t - b).double()[0, 1:].square().sum() for b, t in zip(*states, strict=True)]
        total, n = total + torch.stack(deltas), n + ids.shape[1] - 1
    return (total / n).sqrt().numpy()


def outputs(runner, ids):
    """Return what leaves each block in a plain pass, `[1, length, d]` each."""
    found = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: found.append(state_of(out)))
        for block in runner.sites.blocks
    ]
    runner.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [state.clone() for state in found]


def state_of(output):
    """Return a block's state `[1, length, d]`: of Gemma 3n's parallel streams the first."""
    state = output[0] if isinstance(output, tuple) else output
    return state[0] if state.ndim == 4 else state


@torch.no_grad()
def plain_kl(pair, prompts, n_new):
    """Return KL(tuned ‖ base) of each generated token, `[n_new]`, over prompts that got there."""
    nats = [[] for _ in range(n_new)]
    for prompt in prompts:
        ids = list(prompt)
        for step in range(n_new):
            ours, theirs = (
                model(input_ids=torch.tensor([ids]), use_cache=False)
                .logits[0, -1]
                .double()
                .log_softmax(-1)
                for model in (pair.base, pair.tuned)
            )
            nats[step].append(float((theirs.exp() * (theirs - ours)).sum()))
            ids.append(int(theirs.argmax()))
            if ids[-1] == pair.tokenizer.eos_token_id:
                break
    return [sum(values) / len(values) for values in nats]
