"""The single-layer oracle sweep of data/recipes/, on tiny models."""

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from tests.support.recipes import load_recipe
from toolkit import ModelPair
from toolkit.errors import InputError
from toolkit.theory import oracle_sweep

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33], [7, 7, 40]]
LAST = tiny.N_LAYERS - 1
KL = ["delta_kl", "delta_kl_reverse"]
MIXED = "raw_delta_at_pre_mlp"


recipe = load_recipe("oracle_sweep")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def swept(request, tokenizer):
    """The family's name, a pair and its whole sweep; the models are left as they were."""
    pair = tiny.make_pair(request.param, torch.float64, tokenizer)
    with restores(pair.base), restores(pair.tuned):
        return request.param, pair, oracle_sweep.run_sweep(pair, PROMPTS)


def test_every_distinct_site_is_swept_once(swept):
    """The names coincide as transformers' modelling files say, and both tables are complete."""
    family, _, sweep = swept
    llama = {
        "attn_out_raw": "pre_mlp",
        "mlp_out_raw": "post_mlp",
        "raw_delta_at_pre_mlp": "pre_mlp",
        "post_attention_layernorm": "mlp_in",
    }
    assert sweep.same == (llama if family == "llama" else {"post_attention_layernorm": "pre_mlp"})
    names = set(oracle_sweep.SITES) - set(sweep.same)
    assert set(sweep.changes.site) == names
    keys = ["layer", "site", "alpha", "token_index"]
    assert not sweep.changes.duplicated(keys).any()
    n_tokens = sweep.reading.generated.counted.any(0).sum()
    assert len(sweep.changes) == tiny.N_LAYERS * len(names) * len(oracle_sweep.ALPHAS) * n_tokens
    assert len(sweep.sites) == tiny.N_LAYERS * len(names)


def test_alpha_zero_is_the_base_model_exactly(swept):
    changes = swept[2].changes
    assert (changes[changes.alpha == 0][KL] == 0).all(axis=None)
    assert (changes[changes.alpha > 0][KL].abs().groupby(changes.site).max() > 1e-3).all(axis=None)


def test_the_whole_delta_behind_the_last_block_is_the_tuned_model(swept):
    """KL(steered ‖ tuned) is then 0: what changes is all that there was."""
    pair = swept[1]
    sweep = oracle_sweep.run_sweep(pair, PROMPTS, ["post_block"], [1.0], [LAST])
    of_base = oracle_sweep.Divergence(sweep.reading).of_base()
    for column, nats in zip(KL, of_base.values(), strict=True):
        assert min(nats) > 1e-2
        np.testing.assert_allclose(sweep.changes[column], -np.array(nats), atol=1e-10)


@pytest.mark.parametrize("site", ["pre_mlp", "attn_out_raw", "mlp_in", "mlp_out_raw", MIXED])
def test_textbook(swept, site):
    """One prompt at a time, unpadded, with a hook of one's own on the whole model."""
    family, pair, sweep = swept
    layer, alpha = 1, 0.25
    taken, added = ("attn_out_raw", "pre_mlp") if site == MIXED else (site, site)
    module, index = _module(pair.base, family, added, layer)
    nats = []
    for prompt in PROMPTS:
        ids = _greedy(pair.tuned, prompt)
        ours, theirs = (
            _state(model, *_module(model, family, taken, layer), ids)
            for model in (pair.base, pair.tuned)
        )
        shift = alpha * (theirs - ours)
        shift[:, 0] = 0
        base, tuned = _log_p(pair.base, ids), _log_p(pair.tuned, ids)

        def add(_module, _args, output, shift=shift):
            return (output[0] + shift, *output[1:]) if index is not None else output + shift

        handle = module.register_forward_hook(add)
        steered = _log_p(pair.base, ids)
        handle.remove()
        nats.append(_kl(steered, tuned) - _kl(base, tuned))
    kept = sweep.changes.site == sweep.same.get(site, site)
    rows = sweep.changes[kept].query(f"layer == {layer} and alpha == {alpha}")
    counted = sweep.reading.generated.counted.numpy()
    assert len(rows) == counted.any(0).sum()
    for row in rows.itertuples():
        # A prompt that ended early counts no further.
        values = np.array(nats)[counted[:, row.token_index], row.token_index]
        assert row.n_prompts == len(values)
        assert row.delta_kl == pytest.approx(values.mean(), abs=1e-10)
        sem = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        assert row.delta_kl_sem == pytest.approx(sem, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_lies_in_front_of_the_change_has_no_delta(family, tokenizer):
    """Only the last block's attention differs: no delta and no change of the KL in front of it."""
    base = tiny.make_model(family)
    tuned = tiny.copy_of(base)
    tuned.model.layers[LAST].self_attn.o_proj.weight *= 1.5
    sweep = oracle_sweep.run_sweep(ModelPair.from_models(base, tuned, tokenizer), PROMPTS)
    earlier = sweep.sites.layer < LAST
    assert (sweep.sites.delta_norm[earlier] == 0).all()
    assert (sweep.sites.delta_norm[~earlier] > 0).all()
    assert (sweep.changes.loc[sweep.changes.layer < LAST, KL] == 0).all(axis=None)
    assert (sweep.changes.loc[sweep.changes.layer == LAST, KL] != 0).any(axis=None)


def test_sizes_of_states_and_deltas(swept):
    """Medians over steered tokens, against NumPy."""
    sweep = swept[2]
    reading, where = sweep.reading, sweep.reading.where.numpy()
    for row in sweep.sites.itertuples():
        taken, added = ("attn_out_raw", "pre_mlp") if row.site == MIXED else (row.site, row.site)
        base, tuned = (
            states[taken, row.layer].numpy()[where] for states in (reading.base, reading.tuned)
        )
        change = np.linalg.norm(tuned - base, axis=-1)
        own = np.linalg.norm(reading.base[added, row.layer].numpy()[where], axis=-1)
        assert row.base_norm == pytest.approx(_lower_median(own))
        assert row.delta_norm == pytest.approx(_lower_median(change))
        assert row.relative_delta == pytest.approx(_lower_median(change / own))
        if row.site == "pre_mlp":
            stream = np.linalg.norm(reading.stream[row.layer].numpy()[where], axis=-1)
            assert row.stream_ratio == pytest.approx(_lower_median(own / stream))
        else:
            assert np.isnan(row.stream_ratio)


def test_too_few_held_out_prompts_are_refused(tmp_path, tokenizer):
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "w5 w6"}\n{"text": "w7 w8 w9"}\n')
    with pytest.raises(InputError, match="held-out"):
        recipe.held_out_prompts(path, tokenizer, 8)


def _module(model, family, site, layer):
    """The module whose output is `site`, and which part of the output (None: all)."""
    block = model.model.layers[layer]
    gemma = family == "gemma3"
    if site == "pre_mlp" and gemma:
        return block.post_attention_layernorm, None
    if site == "mlp_in":
        return block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm, None
    return (block.mlp, None) if site == "mlp_out_raw" else (block.self_attn, 0)


def _state(model, module, index, ids):
    kept = []
    handle = module.register_forward_hook(lambda _m, _a, output: kept.append(output))
    model(input_ids=ids)
    handle.remove()
    return kept[0] if index is None else kept[0][index]


def _greedy(model, prompt):
    """The prompt and the tuned model's tokens, but for the last, which nobody reads."""
    ids = torch.tensor([prompt])
    for _ in range(oracle_sweep.N_NEW - 1):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def _log_p(model, ids):
    return model(input_ids=ids).logits[0, -oracle_sweep.N_NEW :].log_softmax(-1)


def _kl(p, q):
    return (p.exp() * (p - q)).sum(-1).numpy()


def _lower_median(values):
    """torch's median: of an even number the lower of the middle two."""
    return np.sort(values)[(len(values) - 1) // 2]
