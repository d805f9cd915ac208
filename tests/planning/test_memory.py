"""Bytes as formulas, against the tensors of the real code."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import families, tiny
from tests.support.live_bytes import LiveBytes
from toolkit import ModelPair
from toolkit.adapters.collection import Adapters
from toolkit.adapters.vector import FixedVector
from toolkit.adapters.weight_change import WeightChange, changed
from toolkit.analysis.linear_fit import LinearFit
from toolkit.blocks.parts import BlockParts
from toolkit.blocks.read import mlps
from toolkit.diagnosis.block_statistics import BlockStatistics
from toolkit.diagnosis.cross_fit import FoldStatistics
from toolkit.diagnosis.grid import grid_for
from toolkit.diagnosis.mlp_statistics import MLPStatistics
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.candidates import Candidate
from toolkit.evaluation.compare import FORCINGS, evaluate
from toolkit.fitting.from_moments import adapter_from
from toolkit.lockstep.march import March
from toolkit.planning.memory import (
    STAGES,
    adapters,
    carried,
    changes,
    disk,
    generation,
    memory,
    moments,
    n_products,
    streams,
    sums,
    weights,
    widened,
)
from toolkit.planning.shapes import ModelShape
from toolkit.planning.workload import BatchShape, Workload

NOTHING = Workload(batches=(), prompts=(), steered=(), everywhere=0, single=False)


def bytes_of(tensors):
    """Of different storages: what is shared counts once."""
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(stores.values())


def change(pair, layer):
    """The tensors of one MLP's change."""
    _, found = mlps(pair.base, pair.tuned)[layer]
    for part in filter(None, vars(found).values()):
        yield from part.factors


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_weights_are_both_halves_and_one_mlps_change(family, tokenizer):
    pair = tiny.make_pair(family, torch.float32, tokenizer)
    live = [p for half in (pair.base, pair.tuned) for p in half.parameters()]
    found = bytes_of(live) + sum(f.nbytes for f in change(pair, 0))
    assert weights(ModelShape.of(pair.base), NOTHING, 4) == found


def test_a_lora_costs_its_factors_alone(tmp_path, tokenizer):
    base = tiny.make_model("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = get_peft_model(tiny.copy_of(base), LoraConfig(r=2, target_modules="all-linear"))
    lora.save_pretrained(tmp_path / "lora")
    pair = ModelPair.load(tmp_path / "base", tmp_path / "lora")
    live = [p for half in (pair.base, pair.tuned) for p in half.parameters()]
    entries = sum(p.numel() for name, p in pair.tuned.named_parameters() if "lora_" in name)
    shape = ModelShape.of(pair.base)
    assert weights(shape, replace(NOTHING, adapter=entries), 4) == bytes_of(live)


def test_offloaded_weights_are_one_block_of_each_half():
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    blocks = sum(block.parameters for block in shape.blocks)
    one = shape.blocks[0]
    expected = 2 * (shape.parameters - blocks + one.parameters) + one.mlp
    assert weights(shape, NOTHING, 2, offload=True) == 2 * expected
    assert memory(shape, workload_of([]), 2, offload=True).at("march") < memory(
        shape, workload_of([]), 2
    ).at("march")


def workload_of(batches, steered=()):
    found = tuple(BatchShape(*b.ids.shape, int(b.counted.sum()), b.held_out) for b in batches)
    return replace(NOTHING, batches=found or (BatchShape(2, 8, 14),), steered=steered)


@pytest.fixture
def batches(tokenizer):
    return make_batches(encode_all(tiny.make_documents(12), tokenizer), batch_tokens=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_are_the_marchs(dtype, batches, tokenizer):
    pair = tiny.make_pair("llama", dtype, tokenizer)
    named = {"a": "post_block", "b": "post_mlp", "c": "pre_mlp"}
    march = March(pair.base_runner, pair.tuned_runner, batches, pair.branches, steered=named)
    live = (*march._streams.values(), *march._scratch.values())
    work = workload_of(batches, tuple(named.values()))
    assert streams(ModelShape.of(pair.base), work, dtype.itemsize) == sum(
        stream.nbytes for stream in live
    )


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "llama"])
def test_what_blocks_carry_is_in_the_plan(family, batches, tmp_path, tokenizer):
    """Parallel streams, and keys and values that later blocks share, as the march keeps them."""
    families.save_pair(family, tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    march = March(
        pair.base_runner, pair.tuned_runner, batches, pair.branches, steered={"a": "post_block"}
    )
    held = 0
    for layer in march.layers():
        for _ in march.steps(layer):
            pass
        last = layer == pair.n_layers - 1
        if last:
            kept = [t for found in march._carried.values() for v in found.values() for t in flat(v)]
            held = sum(t.nbytes for t in kept)
        march.advance(layer, {"a": lambda states: torch.zeros_like(states)})
    found = carried(ModelShape.of(pair.base), workload_of(batches, ("post_block",)), 4)
    assert found == held
    assert bool(held) == (family != "llama")


def flat(value):
    """The tensors of what is carried: one, or keys and values."""
    return [value] if isinstance(value, torch.Tensor) else list(value)


def test_accumulators_are_the_surveys_sums_and_moments(batches, llama_pair):
    pair, d = llama_pair, tiny.D_MODEL
    fits = [spec for spec in grid_for(pair.branches, d, True) if spec.is_steered]
    named = {spec.name: spec.location for spec in fits}
    march = March(
        pair.base_runner, pair.tuned_runner, batches, pair.branches, ("mlp_in",), steered=named
    )
    running, inner = (
        BlockStatistics(pair.branches, fits),
        MLPStatistics(BlockParts(*mlps(pair.base, pair.tuned)[0])),
    )
    for step in march.steps(0):
        running.update(step)
        inner.update(step)
    live = [
        *running.moments.values(),
        *(fit.moments for fit in running.fits.values()),
        *inner.moments.values(),
    ]
    squares = [t for part in live for k, t in part.state().items() if k.startswith("product:")]
    shape, work = ModelShape.of(pair.base), workload_of(batches, tuple(named.values()))
    assert n_products(shape, work) == len(squares)
    assert sums(shape, work) == sum(t.nbytes for t in squares)
    x, t = "post_mlp.state", "post_block.delta"
    pairs = [(x, x), (t, x), (t, t)]  # what one fit reads of each side
    read = [running.moments["forced", side].result(pairs) for side in (False, True)]
    made = [part for found in read for part in found.covariance.values()]
    assert moments(shape, work) == sum(t.nbytes for t in made)


def test_folds_hold_sums_of_their_own(batches, llama_pair):
    pair = llama_pair
    folds = FoldStatistics(grid_for(pair.branches, tiny.D_MODEL, True), 3)
    march = March(pair.base_runner, pair.tuned_runner, batches, pair.branches)
    folds.update(next(march.steps(0)))
    live = [part.moments for parts in folds.sums.values() for part in parts]
    held = [t for m in live for name, t in m.state().items() if name.startswith("product:")]
    shape, work = ModelShape.of(pair.base), workload_of(batches)
    added = sums(shape, replace(work, folds=3)) - sums(shape, work)
    assert added == sum(t.nbytes for t in held) > 0


def test_adapters_are_those_that_are_fitted():
    d = tiny.D_MODEL
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    fit = LinearFit(torch.zeros(d), torch.zeros(d), torch.eye(d), torch.eye(d)[:, :8])
    ranks = [0, 8, "full"]
    live = [p for r in ranks for p in adapter_from(fit, r, torch.float32).parameters()]
    assert adapters(shape, ranks, 4) == shape.n_layers * sum(p.nbytes for p in live)


def test_disk_holds_streams_twice_and_statistics_where_kept(batches):
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    work = workload_of(batches, ("post_block",))
    once = disk(shape, work, 4, [8])
    assert once.streams == 2 * streams(shape, work, 4)
    assert once.total == once.streams + adapters(shape, [8], 4)
    kept = disk(shape, work, 4, [8], keep_statistics=True)
    assert kept.total - once.total == shape.n_layers * 2 * 20 * tiny.D_MODEL**2 * 8


def test_a_change_of_the_weights_is_a_second_set_of_matrices():
    model = tiny.make_model("llama", torch.float32)
    shape, work = ModelShape.of(model), replace(NOTHING, weights=True)
    places = {
        (layer, name): (torch.ones(len(module.weight), 1), torch.ones(1, module.weight.shape[1]))
        for layer, block in enumerate(model.model.layers)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    with changed(model, WeightChange(places, "plain", 1)):
        made = [model.model.layers[i].get_submodule(name).weight for i, name in places]
        assert changes(shape, work, 4) == bytes_of(made)
    assert changes(shape, work, 4, offload=True) == changes(shape, NOTHING, 4) == 0


def test_a_mlp_is_widened_in_half_precision_alone(tokenizer):
    pair = tiny.make_pair("llama", torch.bfloat16, tokenizer)
    found = MLPStatistics(BlockParts(*mlps(pair.base, pair.tuned)[0]))
    parts = (found.mlp.gate, found.mlp.up, found.mlp.down)
    made = [*parts, *(f for part in vars(found.change).values() for f in part.factors)]
    shape = ModelShape.of(pair.base)
    assert widened(shape, NOTHING, 2) == bytes_of(made)
    assert widened(shape, NOTHING, 4) == 0


def test_what_is_freed_counts_where_it_lies_in_the_heap():
    """A wide model's tensors are asked of the system one by one, and given back."""
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    few = replace(NOTHING, batches=(BatchShape(2, 8, 14),))
    planned = memory(shape, few, 4)
    by_name = {part.name: part.bytes for part in planned.parts}
    made = (by_name["activations"], by_name["moments"] + by_name["analyses"])
    assert by_name["freed"] == max(made)
    many = replace(few, batches=(BatchShape(1, 2**24, 2**24),), prompts=(BatchShape(1, 2**24),))
    wide = replace(shape, d=2**12, vocabulary=2**20)
    parts = {part.name: part.bytes for part in memory(wide, many, 4).parts}
    assert parts["freed"] == 0


def test_mapped_streams_are_of_the_size_and_need_not_be_free():
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    planned = memory(shape, workload_of([]), 4, process=5.0)
    assert planned.mapped == 2 * streams(shape, workload_of([]), 4) > 0
    assert planned.size_at("march") == 5 + planned.at("march") + planned.mapped
    assert planned.size_at("replacement") == 5 + planned.at("replacement")
    assert planned.peak == max(planned.at(stage) for stage in STAGES)


@pytest.mark.parametrize("n", [1, 4])
def test_generation_side_by_side_is_about_what_is_alive(tokenizer, n):
    """Logits, keys and values of every candidate's copy of the prompts, and the tuned model's."""
    pair, asked, n_new = tiny.make_pair("llama", torch.float32, tokenizer), 8, 24
    prompts = [[5 + k % 40 for k in range(40)]] * asked
    candidates = [
        Candidate.of(
            Adapters(
                "post_block", {0: FixedVector(torch.full((tiny.D_MODEL,), 0.1 * k))}, "forced"
            ),
            key=k,
        )
        for k in range(n)
    ]
    work = replace(
        NOTHING,
        prompts=(BatchShape(asked, 40),),
        everywhere=n + 1,
        new_tokens=n_new,
    )
    with LiveBytes() as live:
        evaluate(pair, prompts, candidates, n_new, forcings=FORCINGS)
    planned = generation(ModelShape.of(pair.base), work, 4)
    assert 0.6 < live.peak / planned < 1.15
