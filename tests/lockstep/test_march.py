"""The march runs each model's own blocks, and steers what it says it steers."""

import copy

import pytest
import torch

from tests.support import families, tiny
from tests.support.properties import restores
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.lockstep.march import March
from toolkit.models.deltas import delta
from toolkit.models.edits import steerable
from toolkit.models.hooks import capture
from toolkit.models.locations import resolve
from toolkit.models.pair import ModelPair
from toolkit.models.runner import BlockRunner


def batches_for(pair, n=8, batch_tokens=60):
    return make_batches(encode_all(tiny.make_documents(n), pair.tokenizer), "all", batch_tokens)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "neox", "falcon"])
def pair(request, tokenizer):
    """Models that no test here changes."""
    return tiny.make_pair(request.param, torch.float64, tokenizer)


def test_delta_is_tuned_minus_base():
    """In float32 or better: bfloat16 states are widened before they are subtracted."""
    tuned, base = torch.tensor([1.0078125]).bfloat16(), torch.tensor([0.001]).bfloat16()
    assert delta(tuned, base).dtype == torch.float32
    assert delta(tuned, base) == tuned.float() - base.float()
    assert delta(tuned.double(), base.double()).dtype == torch.float64


def test_streams_hold_the_models_own_states(pair):
    """After each block, base and tuned streams are the models' own hidden states, to the bit."""
    march = March(pair.base_runner, pair.tuned_runner, batches_for(pair), ("post_block",))
    for layer in march.layers():
        for step in march.steps(layer):
            for model, states in ((pair.base, step.base), (pair.tuned, step.tuned)):
                if layer < pair.n_layers - 1:  # the last hidden state is normed
                    own = model(
                        step.batch.ids,
                        attention_mask=step.batch.mask.long(),
                        output_hidden_states=True,
                        use_cache=False,
                    ).hidden_states
                    assert torch.equal(states["post_block"], step.batch.of_counted(own[layer + 1]))
        march.advance(layer, {})


def test_forced_deltas_add_up(pair):
    """From one input, delta(post_block) = delta(pre_mlp) + delta(post_mlp)."""
    march = March(pair.base_runner, pair.tuned_runner, batches_for(pair), pair.branches)
    for layer in march.layers():
        for step in march.steps(layer):
            parts = step.delta("forced", "pre_mlp") + step.delta("forced", "post_mlp")
            assert torch.allclose(parts, step.delta("forced", "post_block"), atol=1e-12)
        march.advance(layer, {})


@pytest.mark.parametrize("left_out", ["free", "forced"])
def test_without_one_mode_the_other_is_the_same(pair, left_out):
    places = pair.base_runner, pair.tuned_runner, batches_for(pair), pair.branches
    whole, part = March(*places), March(*places, **{left_out: False})
    kept = {"free": "forced", "forced": "free"}[left_out]
    for layer in whole.layers():
        for ours, theirs in zip(part.steps(layer), whole.steps(layer), strict=True):
            assert not {"free": ours.base, "forced": ours.forced}[left_out]
            for location in pair.branches:
                assert torch.equal(ours.delta(kept, location), theirs.delta(kept, location))
        for march in (whole, part):
            march.advance(layer, {})


@pytest.mark.parametrize("location", ["pre_mlp", "post_mlp", "post_block"])
def test_a_steered_stream_is_the_steered_model(pair, location):
    """What enters block l + 1 is what the base model computes with adapters up to block l."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    d = tiny.D_MODEL
    maps = {i: Linear(0.1 * draw(d, 3), 0.1 * draw(3, d), draw(d)) for i in range(pair.n_layers)}
    march = March(
        pair.base_runner,
        pair.tuned_runner,
        batches_for(pair),
        pair.branches,
        steered={"s": location},
    )
    for layer in march.layers():
        for step in march.steps(layer):
            if step.batch.held_out:  # adapters are fitted on the others
                assert not step.steered
                continue
            adapters = Adapters(location, {i: maps[i] for i in range(layer)}, "free")
            site = {location: pair.base_runner.sites.at[location, layer]}
            with steer(pair.base, adapters), capture(site) as seen:
                pair.base(step.batch.ids, attention_mask=step.batch.mask.long(), use_cache=False)
            expected = seen[location][step.batch.counted]
            assert torch.allclose(step.steered["s"][location], expected, atol=1e-12)
        march.advance(layer, {"s": maps[layer]})


def test_steering_with_zero_is_the_base_stream(llama_pair):
    """A steered stream whose adapters add nothing is the base stream, at every location."""
    names = {name: name for name in llama_pair.branches}
    march = March(
        llama_pair.base_runner,
        llama_pair.tuned_runner,
        batches_for(llama_pair),
        llama_pair.branches,
        steered=names,
    )
    zero = FixedVector(torch.zeros(tiny.D_MODEL, dtype=torch.float64))
    for layer in march.layers():
        for step in march.steps(layer):
            for name in step.steered:
                assert torch.equal(step.steered[name][name], step.base[name])
                missing = step.delta("free", "post_block")
                if name == "pre_mlp":  # what the stream misses before the MLP adds to it
                    missing = missing - step.delta("free", "post_mlp")
                assert torch.allclose(step.sequential_delta(name, name), missing, atol=1e-12)
        march.advance(layer, dict.fromkeys(names, zero))


@pytest.mark.parametrize("layer", range(tiny.N_LAYERS))
def test_a_model_started_at_a_block_gives_the_same_logits(pair, layer):
    """With what enters block l put there, the earlier blocks are not needed; and it is undone."""
    batch = batches_for(pair)[0]
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
    whole = pair.base(**arguments).logits
    hidden = pair.base_runner.embed(batch)
    for i in range(layer):
        hidden, _ = pair.base_runner.run(i, pair.base_runner.call(i, batch), hidden, ())
    with restores(pair.base), pair.base_runner.started_at(layer, hidden):
        assert torch.equal(pair.base(**arguments).logits, whole)
        assert layer == 0 or "forward" in vars(pair.base_runner.sites.blocks[0])


def test_steps_and_advance_restore_the_models(llama_pair):
    batches = batches_for(llama_pair)
    with restores(llama_pair.base), restores(llama_pair.tuned):
        march = March(llama_pair.base_runner, llama_pair.tuned_runner, batches, llama_pair.branches)
        for layer in march.layers():
            for _ in march.steps(layer):
                pass
            march.advance(layer, {})


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_and_padding_are_not_steerable(side):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    if side == "left":
        mask = mask.flip(1)
        expected = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(steerable(mask), expected)


def test_a_stream_on_disk_is_the_stream_in_memory(llama_pair, tmp_path):
    """Memory-mapped streams give the same deltas, and their files hold the states."""
    batches = batches_for(llama_pair)
    blocks = llama_pair.base_runner, llama_pair.tuned_runner
    marches = [
        March(*blocks, batches, ("post_block",), steered={"s": "post_block"}, folder=folder)
        for folder in (None, tmp_path)
    ]
    adapter = FixedVector(torch.ones(tiny.D_MODEL, dtype=torch.float64))
    for layer in range(llama_pair.n_layers):
        for ours, theirs in zip(*(march.steps(layer) for march in marches), strict=True):
            for mode in ("free", "forced"):
                assert torch.equal(ours.delta(mode, "post_block"), theirs.delta(mode, "post_block"))
            if ours.steered:
                pair = (step.sequential_delta("s", "post_block") for step in (ours, theirs))
                assert torch.equal(*pair)
        for march in marches:
            march.advance(layer, {"s": adapter})
    names = [f"{name}.stream.{side}" for name in ("base", "s", "tuned") for side in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:  # a batch begins on a page of its own
        sizes = [
            b.ids.numel() * tiny.D_MODEL * 8 for b in batches if name[0] != "s" or not b.held_out
        ]
        assert (tmp_path / name).stat().st_size == sum(-(-size // 4096) * 4096 for size in sizes)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_a_block_that_did_not_change_has_no_forced_delta(family, tmp_path):
    """Whatever it reads beside its state: keys of earlier blocks, parallel streams."""
    families.save_pair(family, tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    tuned = copy.deepcopy(pair.base)
    blocks = BlockRunner(tuned, resolve(tuned))
    with torch.no_grad():
        for parameter in blocks.sites.blocks[0].parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    batch = pair.corpus(["w8 w9 w10 w11 w12 w13", "w9 w20 w30 w40"] * 8).fit_batches[0]
    march = March(pair.base_runner, blocks, [batch], ("post_block",))
    moved = []
    for layer in march.layers():
        (step,) = march.steps(layer)
        moved.append(float(step.delta("forced", "post_block").abs().max()))
        assert step.delta("free", "post_block").abs().max() > 1e-3
        march.advance(layer, {})
    assert moved[0] > 1e-3
    assert moved[1:] == [0.0, 0.0, 0.0]
