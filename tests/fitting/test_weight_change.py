"""Low-rank changes of weights against inputs gathered by whole passes, and known LoRAs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support import tiny
from tests.support.live_bytes import LiveBytes
from tests.support.members import reduced
from tests.support.properties import restores
from toolkit import InputError, ModelPair
from toolkit.adapters.weight_change import changed
from toolkit.blocks.read import is_transposed
from toolkit.documents.tokens import encode_all
from toolkit.fitting.weight_change import (
    InputSums,
    WeightSpec,
    changes_of,
    fit_weight_changes,
    linear_modules,
    require_followed,
)
from toolkit.lockstep.march import March
from toolkit.lockstep.single import SingleMarch

FAMILIES = ("llama", "gpt2")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
DOCUMENTS = tiny.make_documents(24)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
LAYERS = range(tiny.N_LAYERS)


def lora_pair(family, shares=False, rank=3):
    """A base and a LoRA of known rank on all of its matrices; sharing tensors, or a copy."""
    base = tiny.make_model(family)
    shared = {id(p): p for p in (*base.parameters(), *base.buffers())} if shares else {}
    config = LoraConfig(
        r=rank, lora_alpha=5, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2"
    )
    tuned = get_peft_model(copy.deepcopy(base, shared), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.2 * drawn
    return ModelPair.from_models(base, tuned.requires_grad_(False), tiny.make_tokenizer())


def merged(pair):
    """The same pair with a tuned model that is no adapter any more."""
    tuned = copy.deepcopy(pair.tuned).merge_and_unload()
    return ModelPair.from_models(pair.base, tuned, pair.tokenizer)


def matrix(module):
    weight = module.weight.detach().numpy()
    return weight.T if is_transposed(module) else weight


def places_of(pair):
    """Base and tuned matrix of every linear module, by block and name."""
    return {
        (layer, name): (
            matrix(module),
            matrix(tiny.blocks_of(pair.tuned)[layer].get_submodule(name)),
        )
        for layer in LAYERS
        for name, module in linear_modules(tiny.blocks_of(pair.base)[layer]).items()
    }


def inputs_of(pair, held_out=False, positions="all"):
    """Gather what each module of the tuned model is given in whole passes, by document."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, place=(layer, name): found.setdefault(place, []).append(args[0])
        )
        for layer in LAYERS
        for name, module in linear_modules(tiny.blocks_of(pair.tuned)[layer]).items()
    ]
    counted = []
    with torch.no_grad():
        for document in encode_all(DOCUMENTS, pair.tokenizer):
            if document.held_out == held_out and len(document.ids) > 1:
                pair.tuned(torch.tensor([document.ids]))
                counted += document.counted(positions)
    for hook in hooks:
        hook.remove()
    return {
        place: np.concatenate([x.reshape(-1, x.shape[-1]).numpy() for x in rows])[counted]
        for place, rows in found.items()
    }


def numbers_at(pair, rank):
    modules = [m for block in tiny.blocks_of(pair.base) for m in linear_modules(block).values()]
    return rank * sum(sum(module.weight.shape) for module in modules)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_recovered_at_its_rank_and_at_its_budget(family, shares, tmp_path):
    pair = lora_pair(family, shares)
    budget = numbers_at(pair, 3)
    with restores(pair.base), restores(pair.tuned):
        found = fit_weight_changes(pair, DOCUMENTS, [budget], [3, 8])
    assert len(found) == 6
    wanted = pair.tuned(IDS).logits
    for spec, change in found.items():
        assert change.parameters == budget
        assert change.rank == (spec.rank or "3")
        with restores(pair.base), changed(pair.base, change):
            torch.testing.assert_close(pair.base(IDS).logits, wanted, rtol=0, atol=1e-9)
    change.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.copy_of(pair.base), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_in_the_weights_is_recovered_too(family):
    pair = merged(lora_pair(family))
    for change in fit_weight_changes(pair, DOCUMENTS, [], [3]).values():
        with changed(pair.base, change):
            wanted = pair.tuned(IDS).logits
            torch.testing.assert_close(pair.base(IDS).logits, wanted, rtol=0, atol=1e-9)


def textbook(D, C, rank):
    """The best matrix of a rank in the metric of C (None: plainly)."""
    root = np.eye(D.shape[1])
    if C is not None:
        ridge = 1e-6 * np.trace(C) / len(C)
        root = np.linalg.cholesky(C + ridge * np.eye(len(C)))
    U, s, Vt = np.linalg.svd(D @ root)
    return U[:, :rank] * s[:rank] @ Vt[:rank] @ np.linalg.inv(root), s**2


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("family", [*FAMILIES, "falcon", "opt"])
def test_a_uniform_rank_is_the_textbooks(family, positions):
    pair = tiny.make_pair(family, torch.float64, tiny.make_tokenizer())
    found = fit_weight_changes(pair, DOCUMENTS, [], [2], batch_tokens=100, positions=positions)
    inputs, weights = inputs_of(pair, positions=positions), places_of(pair)
    for spec, change in found.items():
        assert change.by_module.keys() == weights.keys()
        for place, (up, down) in change.by_module.items():
            D, x = weights[place][1] - weights[place][0], inputs[place]
            C = x.T @ x / len(x) if spec.fit == "metric" else None
            best, _ = textbook(D, C, 2)
            np.testing.assert_allclose(up @ down, best, rtol=0, atol=1e-7 * np.abs(D).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_is_shared_out_by_gain_per_number(family):
    """All pieces in one row, the best first; each is taken if what is left of the budget allows."""
    pair = tiny.make_pair(family, torch.float64, tiny.make_tokenizer())
    budget = numbers_at(pair, 2) + 17
    found = fit_weight_changes(pair, DOCUMENTS, [budget])
    inputs, weights = inputs_of(pair), places_of(pair)
    for fit in ("metric", "plain"):
        change, row = found[WeightSpec(fit, budget=budget)], []
        for place, (W, tuned) in weights.items():
            x = inputs[place]
            C = x.T @ x / len(x) if fit == "metric" else None
            energy = np.square(x @ tuned.T).sum() / len(x) if fit == "metric" else (tuned**2).sum()
            cost = sum(W.shape)
            row += [(gain / energy / cost, cost, place) for gain in textbook(tuned - W, C, 0)[1]]
        ranks, left = dict.fromkeys(weights, 0), budget
        for _, cost, place in sorted(row, reverse=True):
            if cost <= left:
                ranks[place], left = ranks[place] + 1, left - cost
        assert {place: len(down) for place, (_, down) in change.by_module.items()} == {
            place: rank for place, rank in ranks.items() if rank
        }
        assert change.parameters == budget - left
        mean = sum(ranks.values()) / len(ranks)
        assert change.rank == f"{mean:.3g}"
        assert len(set(ranks.values())) > 1


def test_the_metric_is_never_worse_on_the_fit_documents():
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    found = fit_weight_changes(pair, DOCUMENTS, [], [1, 4])
    inputs, weights = inputs_of(pair), places_of(pair)
    for rank in (1, 4):
        metric, plain = (found[WeightSpec(fit, rank=rank)] for fit in ("metric", "plain"))
        for place, (W, tuned) in weights.items():
            x, D = inputs[place], tuned - W
            errors = [
                np.square(x @ (D - (c.by_module[place][0] @ c.by_module[place][1]).numpy()).T).sum()
                for c in (metric, plain)
            ]
            assert errors[0] <= errors[1] + 1e-6 * np.square(x @ D.T).sum()


def test_nothing_changed_needs_nothing():
    base = tiny.make_model("llama")
    pair = ModelPair.from_models(base, tiny.copy_of(base), tiny.make_tokenizer())
    for change in fit_weight_changes(pair, DOCUMENTS, [1000], [2]).values():
        assert change.parameters == 0
        with changed(base, change):
            assert torch.equal(base(IDS).logits, pair.tuned(IDS).logits)


@pytest.mark.parametrize("adapter", [True, False])
def test_weights_from_disk_give_the_same(tmp_path, adapter):
    tiny.save_pair(tmp_path)
    folders = tmp_path / "base", tmp_path / "tuned"
    if adapter:
        pair = ModelPair.load(*folders)
        change = fit_weight_changes(pair, DOCUMENTS, [], [2])[WeightSpec("metric", rank=2)]
        change.save_pretrained(tmp_path / "lora")
        folders = tmp_path / "base", tmp_path / "lora"
    ours, theirs = (
        fit_weight_changes(ModelPair.load(*folders, offload=offload), DOCUMENTS, [500], [1])
        for offload in (True, False)
    )
    for spec, change in theirs.items():
        assert ours[spec].by_module.keys() == change.by_module.keys()
        for place, parts in change.by_module.items():
            assert all(map(torch.equal, ours[spec].by_module[place], parts))


def test_half_precision_models_get_factors_in_float32():
    pair = tiny.make_pair("llama", torch.bfloat16, tiny.make_tokenizer())
    found = fit_weight_changes(pair, DOCUMENTS, [], [2])
    parts = [
        part for change in found.values() for both in change.by_module.values() for part in both
    ]
    assert {part.dtype for part in parts} == {torch.float32}
    assert all(part.isfinite().all() for part in parts)


# --- the sums


def moments_of(sums):
    """The second moment of every group, by its modules, to each of which it belongs."""
    found = {names: [sums.second_moment(name) for name in names] for names in sums.groups()}
    assert all(torch.equal(C, first) for first, *more in found.values() for C in more)
    return {names: first for names, (first, *_) in found.items()}


def gathered(pair, march):
    """Every block's groups: the modules that share their inputs, and their second moment."""
    blocks = []
    for layer in march.layers():
        with InputSums.of(pair, layer) as sums:
            for step in march.steps(layer):
                sums.update(step)
        blocks.append(moments_of(sums))
        march.advance(layer, {})
    return blocks


def test_any_march_can_be_listened_to():
    """One of both models over all documents too: held-out ones have no part."""
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    corpus, inputs = pair.corpus(DOCUMENTS), inputs_of(pair)
    single = SingleMarch(pair.tuned_runner, corpus.fit_batches, ())
    both = March(pair.base_runner, pair.tuned_runner, corpus.batches, pair.branches)
    for march in (single, both):
        with restores(pair.tuned):
            blocks = gathered(pair, march)
        for layer, groups in enumerate(blocks):
            assert list(groups) == [
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            ]
            for names, C in groups.items():
                x = inputs[layer, names[0]]
                np.testing.assert_allclose(C, x.T @ x / len(x), rtol=0, atol=1e-11 * float(C.max()))


def test_sums_of_several_processes_add_up():
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    batches = pair.corpus(DOCUMENTS, batch_tokens=100).fit_batches
    parts = []
    for some in (batches[::2], batches[1::2], batches):
        march = SingleMarch(pair.tuned_runner, some, ())
        with InputSums.of(pair, 0) as sums:
            for step in march.steps(0):
                sums.update(step)
        parts.append(sums)
    *members, whole = parts
    # Processes take the first one's frames; here each had begun by itself.
    frames = members[0]._sums._frames
    with InputSums.of(pair, 0) as second:
        second._begin(members[0].shared, {})
        second._sums._start(frames)
        for step in SingleMarch(pair.tuned_runner, batches[1::2], ()).steps(0):
            second.update(step)
    for member in reduced([members[0], second]):
        ours, theirs = moments_of(member), moments_of(whole)
        assert list(ours) == list(theirs)
        for names, D in theirs.items():
            torch.testing.assert_close(ours[names], D, rtol=0, atol=1e-12 * float(D.max()))


class Fed:
    """A step that gives the hooked modules what it is told to."""

    def __init__(self, batch):
        self.layer, self.batch = 0, batch


def test_modules_that_are_not_given_every_token_once_are_refused():
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    step = Fed(pair.corpus(DOCUMENTS).fit_batches[0])
    linear = torch.nn.Linear(3, 3)
    states = torch.zeros(*step.batch.ids.shape, 3)
    for given, message in (
        ([], "called 0 times"),
        ([states, states], "called 2 times"),
        ([states[:, :2]], "inputs of experts"),
    ):
        with InputSums({"expert": linear}) as sums:
            for x in given:
                linear(x)
            with pytest.raises(InputError, match=message):
                sums.update(step)


def test_whether_inputs_can_be_followed_is_found_out_in_one_pass():
    """Without a sum: those of all blocks at a time would be larger than all else."""
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    corpus = pair.corpus(DOCUMENTS[:5])
    batch = corpus.together(corpus.fit[:1])
    with LiveBytes() as reading, torch.no_grad():
        pair.tuned_runner.read(batch)
    with restores(pair.tuned), LiveBytes() as live, torch.no_grad():
        require_followed(pair, batch)
    assert live.peak == reading.peak
    mlp = pair.tuned_runner.sites.blocks[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[:, :1]
    with torch.no_grad():
        require_followed(pair, batch)  # what a module gives is nobody's business
    mlp.forward = lambda x: mlp.down_proj((mlp.gate_proj(x) * mlp.up_proj(x))[:, :1])
    with pytest.raises(InputError, match="inputs of experts"), torch.no_grad():
        require_followed(pair, batch)


def test_a_tensor_that_was_written_into_is_another():
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    step = Fed(pair.corpus(DOCUMENTS).fit_batches[0])
    modules = {name: torch.nn.Linear(3, 3).double() for name in "abc"}
    states = torch.ones(*step.batch.ids.shape, 3, dtype=torch.float64)
    with InputSums(modules) as sums, torch.no_grad():
        modules["a"](states)
        modules["b"](states)
        states *= 2
        modules["c"](states)
        sums.update(step)
    found = moments_of(sums)
    assert list(found) == [("a", "b"), ("c",)]
    torch.testing.assert_close(found["a", "b"], torch.ones(3, 3).double())
    torch.testing.assert_close(found["c",], 4 * torch.ones(3, 3).double())


# --- what cannot be asked for


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fit": "magic", "rank": 1}, "fit is 'magic'"),
        ({"fit": "plain"}, "either a budget"),
        ({"fit": "plain", "rank": 1, "budget": 1}, "either a budget"),
        ({"fit": "metric", "rank": 0}, "is 0: expected"),
        ({"fit": "metric", "budget": 2.5}, "is 2.5: expected"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        WeightSpec(**fields)


def test_changes_are_cut_from_pieces_that_were_kept():
    """So another march may gather them."""
    pair = lora_pair("llama")
    assert changes_of(pair, {"metric": {}, "plain": {}}, []) == {}


def test_documents_of_which_no_token_counts_are_refused():
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    corpus = pair.corpus(DOCUMENTS)
    held_out = dataclasses.replace(corpus, encoded=tuple(corpus.held_out))
    with pytest.raises(InputError, match="no token of the fit documents"):
        fit_weight_changes(pair, held_out, [], [1])
