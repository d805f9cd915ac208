"""Shapes that are read without weights, against the real modules of every family."""

import pytest
import torch

from tests.support import tiny
from toolkit.blocks.read import mlps
from toolkit.models.locations import BRANCHES
from toolkit.planning.shapes import ModelShape


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shape_of_a_configuration_is_that_of_the_real_model(family):
    model = tiny.make_model(family)
    shape = ModelShape.of_config(tiny.FAMILIES[family]())
    assert shape == ModelShape.of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.n_layers == tiny.N_LAYERS
    for block, real in zip(shape.blocks, tiny.blocks_of(model), strict=True):
        assert block.parameters == sum(p.numel() for p in real.parameters())
    assert shape.branches == BRANCHES
    assert shape.vocabulary == tiny.N_VOCABULARY


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES.keys() - {"mixtral"}))
def test_mlp_is_that_which_is_read(family):
    model = tiny.make_model(family)
    shape = ModelShape.of(model)
    for block, (mlp, _) in zip(shape.blocks, mlps(model, model), strict=True):
        matrices = [m for m in (mlp.gate, mlp.up, mlp.down) if m is not None]
        assert block.d_ff == mlp.down.shape[1]
        assert block.mlp == sum(m.numel() for m in matrices)
        assert block.gated == (mlp.up is not None)


def test_a_mixture_has_no_mlp_to_read_and_routes_each_token_to_some_experts():
    (block, *_), mlp = ModelShape.of_config(tiny.FAMILIES["mixtral"]()).blocks, 3 * 16 * 40
    assert (block.mlp, block.d_ff, block.gated) == (0, 0, False)
    attention, router = 2 * 16 * 16 + 2 * 8 * 16, 3 * 16
    assert block.matrices == attention + router + 2 * mlp
    assert block.parameters == attention + router + 3 * mlp + 2 * 16


def test_keys_are_as_wide_as_the_cache_says():
    from transformers import DynamicCache

    for family in ("llama", "gemma3", "gpt2", "neox"):
        model, cache = tiny.make_model(family), DynamicCache()
        model(input_ids=torch.arange(5, 10)[None], past_key_values=cache, use_cache=True)
        keys = cache.layers[0].keys
        assert keys.numel() == ModelShape.of(model).kv_width * 5
