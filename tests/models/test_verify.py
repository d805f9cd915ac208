"""The proofs hold for every family, and fail where they should."""

import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from tests.support.recorders import install_recorders
from tests.support.textbook import branch_modules, mlp_input_module
from toolkit.models.hooks import Site
from toolkit.models.locations import BRANCHES, resolve
from toolkit.models.runner import BlockRunner
from toolkit.models.verify import certify, prove

FAMILIES = ["llama", "gemma2", "gemma3", "olmo2", "qwen3", "phi3", "gpt2", "neox", "opt", "falcon",
            "mixtral"]  # fmt: skip
N_PROOFS = 6  # captured states, write-back, march identity, own document, cache, residual identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_proof_passes(family, dtype):
    """Base and tuned, every identity, in place or not; and the models are as they were."""
    if family == "mixtral" and dtype == torch.float64:
        pytest.skip("transformers has no float64 experts")
    base = tiny.make_model(family, dtype)
    tuned = tiny.tune(base)
    for model in (base, tuned):
        install_recorders(model)
    with restores(base), restores(tuned):
        checks, refused = prove(
            BlockRunner(base, resolve(base)), BlockRunner(tuned, resolve(tuned))
        )
    assert [check for check in checks if check.status != "passed"] == []
    assert len(checks) == 2 * N_PROOFS
    assert not refused


def test_scaled_branches_are_refused_with_the_figure():
    """Granite multiplies what it adds to the stream: the branches' outputs do not add up."""
    model = tiny.make_model("granite")
    checks, refused = prove(*[BlockRunner(model, resolve(model))] * 2)
    assert set(refused) == {"pre_mlp", "post_mlp"}
    assert all("of the largest entry" in reason for reason in refused.values())
    failed = {check.name for check in checks if check.status != "passed"}
    assert failed == {"residual identity (base)", "residual identity (tuned)"}


def test_a_wrong_location_is_found():
    """With pre_mlp resolved to the MLP instead of attention, the residual identity fails."""
    model = tiny.make_model("llama")
    sites = resolve(model)
    sites.at["pre_mlp", 1] = Site(tiny.blocks_of(model)[1].mlp, "output")
    checks, refused = prove(BlockRunner(model, sites), BlockRunner(model, resolve(model)))
    assert "residual identity (base)" in {c.name for c in checks if c.status != "passed"}
    assert "pre_mlp" in refused


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "neox"])
def test_locations_are_the_modules_known_by_hand(family):
    """Of the branches and the MLP's input: outputs that are added, and what enters the MLP."""
    model = tiny.make_model(family)
    sites = resolve(model)
    assert sites.n_layers == tiny.N_LAYERS
    for layer, block in enumerate(tiny.blocks_of(model)):
        assert sites.blocks[layer] is block
        for location in BRANCHES:
            site = sites.at[location, layer]
            assert (site.module, site.side) == (branch_modules(block)[location], "output")
        assert sites.at["mlp_in", layer][:2] == (mlp_input_module(block), "input")


def test_resolving_does_not_freeze_a_model_that_trains():
    model = tiny.make_model("llama").requires_grad_(True).train()
    with restores(model):
        resolve(model)


def test_a_missing_location_has_a_reason():
    """NeoX's parallel blocks have no state between their branches."""
    sites = resolve(tiny.make_model("neox"))
    assert set(sites.unavailable) == {"resid_mid"}
    assert len(sites.unavailable["resid_mid"]) > 20
    assert sites.of_layer(0, ("resid_mid", "post_block")).keys() == {"post_block"}


PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_prompts_are_read_alike_alone_padded_and_cached(family):
    found = certify("base", tiny.make_model(family), PROMPTS, tiny.PAD)
    assert found.status == "passed", found.detail
    assert "through the cache" in found.detail


@pytest.mark.parametrize("broken", ["batch", "cache"])
def test_a_model_that_looks_at_how_it_is_read_fails_with_the_numbers(broken):
    model = tiny.make_model("llama")

    def looks(_, __, output):
        seen = len(output) > 1 if broken == "batch" else output.shape[1] == 1
        return output * 1.01 if seen else output

    with model.lm_head.register_forward_hook(looks):
        found = certify("base", model, PROMPTS, tiny.PAD)
    assert found.status == "failed"
    assert "beyond it" in found.detail
