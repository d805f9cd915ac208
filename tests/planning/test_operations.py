"""Operations as formulas, against what torch counts while the real code runs.

Torch counts matrix products; the rest (LAPACK, elementwise work) is not counted, and is left out of
the comparison where a formula has it.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.support import tiny
from toolkit import FitSpec, ModelPair, Options, fit_adapters
from toolkit.adapters.collection import Adapters
from toolkit.adapters.vector import FixedVector
from toolkit.analysis.first_order import first_order_terms
from toolkit.blocks.jacobian import MLPJacobian
from toolkit.blocks.mlp import Change, MLPChange
from toolkit.blocks.parts import BlockParts, Sample
from toolkit.blocks.read import mlps
from toolkit.diagnosis.block_statistics import MODES, BlockStatistics, moment_pairs
from toolkit.diagnosis.close_look import Reporting, Shown, close_look
from toolkit.diagnosis.cross_fit import CrossFit, FoldStatistics
from toolkit.diagnosis.first_look import first_look
from toolkit.diagnosis.grid import grid_for
from toolkit.diagnosis.mlp_statistics import MLPStatistics
from toolkit.diagnosis.other_data import OtherData
from toolkit.diagnosis.reach_rows import shared_reach_rows
from toolkit.documents.batches import make_batches
from toolkit.documents.documents import Document
from toolkit.documents.tasks import make_task
from toolkit.documents.tasks.task import Example
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import FORCINGS, evaluate
from toolkit.evaluation.elsewhere import distances
from toolkit.evaluation.questions import Questions, task_rows
from toolkit.evaluation.reference import Reference
from toolkit.fitting.block_result import BlockResult
from toolkit.lockstep.march import March
from toolkit.models.edits import shift
from toolkit.planning import operations as cost
from toolkit.planning import prompt_operations as prompt_cost
from toolkit.planning.estimate import with_other, workload_of
from toolkit.planning.shapes import ModelShape
from toolkit.planning.stages import block_pass, head
from toolkit.planning.workload import BatchShape, Workload
from toolkit.statistics import MomentSums

COUNTED = ("llama", "gemma2", "gemma3", "qwen3", "olmo2", "phi3", "gpt2", "neox", "opt", "falcon",
           "granite")  # fmt: skip
NOTHING = Workload(batches=(), prompts=(), steered=(), everywhere=0, single=False)


def counted(work):
    """Operations of the matrix products in ``work()``."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def eager(family):
    """A tiny model whose attention is written as products: torch does not count the fused one."""
    config = tiny.FAMILIES[family]()
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def pair(tokenizer):
    """GPT-2: without rotations by position, whose angles are a product that is left out."""
    base = eager("gpt2")
    tuned = eager("gpt2")
    tuned.load_state_dict(tiny.tune(base).state_dict())
    return ModelPair.from_models(base, tuned, tokenizer)


@pytest.fixture
def batches(pair):
    return make_batches(encode_all(tiny.make_documents(12), pair.tokenizer), batch_tokens=64)


def shapes(batches):
    return tuple(BatchShape(*b.ids.shape, int(b.counted.sum()), b.held_out) for b in batches)


@pytest.mark.parametrize("family", COUNTED)
def test_a_blocks_pass_is_what_torch_counts(family, tokenizer):
    model = eager(family)
    shape, batch = ModelShape.of(model), BatchShape(2, 12)
    blocks = ModelPair.from_models(model, tiny.copy_of(model), tokenizer).base_runner
    ids = torch.arange(24).view(2, 12) + 5
    (real,) = make_batches(encode_all(texts(ids), tokenizer), batch_tokens=24)[:1]
    hidden = torch.randn(*real.ids.shape, shape.d)
    call = blocks.call(1, real)
    batch = BatchShape(*real.ids.shape)
    assert counted(lambda: blocks.run(1, call, hidden, ())) == block_pass(
        shape, shape.blocks[1], batch
    )


def texts(ids):
    return [{"text": " ".join(f"w{i}" for i in row)} for row in ids.tolist()] * 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_head_is_what_torch_counts(family):
    model = eager(family)
    hidden = torch.randn(7, 16)
    assert counted(lambda: model.get_output_embeddings()(hidden)) == head(ModelShape.of(model), 7)


@pytest.mark.parametrize("steered", [(), ("post_block", "post_mlp"), ("pre_mlp",)])
def test_the_march_is_its_passes(pair, batches, steered):
    work = replace(NOTHING, batches=shapes(batches), steered=steered)
    names = {f"{i}": location for i, location in enumerate(steered)}
    vector = FixedVector(torch.zeros(16))
    assert not pair.base_runner.parallel  # tried once, on four tokens

    def passes():
        march = March(pair.base_runner, pair.tuned_runner, batches, pair.branches, steered=names)
        for layer in march.layers():
            for _ in march.steps(layer):
                pass
            march.advance(layer, dict.fromkeys(names, vector))

    expected = sum(s.operations for s in cost.march(ModelShape.of(pair.base), work))
    assert counted(passes) == expected


@pytest.mark.parametrize("mode", MODES)
def test_products_of_moments_are_counted_once(mode):
    """The ideal count: what torch counts is at most a quarter of the symmetric products more."""
    pairs, d, n = moment_pairs(mode, ("pre_mlp", "post_mlp", "post_block")), 64, 10
    sums = MomentSums(pairs)
    values = {name: torch.randn(n, d) for pair in pairs for name in pair}
    ideal = n * cost.product_operations(pairs, d)
    assert ideal <= counted(lambda: sums.update(values)) <= 1.25 * ideal


def test_one_symmetric_product_has_as_many_operations_as_different_entries():
    different = {tuple(sorted((i, j))) for i in range(7) for j in range(7)}
    assert cost.product_operations([("x", "x")], 7) == 2 * len(different)
    assert cost.product_operations([("x", "y")], 7) == 2 * 49


def test_accumulators_are_those_of_the_survey(pair, batches):
    recipes = [r for r in grid_for(pair.branches, 16, True) if r.fit == "sequential"]
    work = replace(NOTHING, batches=shapes(batches), steered=tuple(r.location for r in recipes))
    sums = BlockStatistics(pair.branches, recipes)
    inner = MLPStatistics(BlockParts(*mlps(pair.base, pair.tuned)[0]))
    march = March(
        pair.base_runner,
        pair.tuned_runner,
        batches,
        pair.branches,
        ("mlp_in",),
        steered={r.name: r.location for r in recipes},
    )
    step = next(march.steps(0))
    sums.update(step)
    inner.update(step)
    d, total = 16, 0.0
    for batch in work.batches:
        kept = [sums.moments[mode, batch.held_out] for mode in MODES]
        kept += [] if batch.held_out else [fit.moments for fit in sums.fits.values()]
        kept.append(inner.moments[batch.held_out])
        total += sum(batch.counted * cost.product_operations(s.pairs, d) for s in kept)
    moments = cost.accumulators(ModelShape.of(pair.base), work)[0]
    assert moments.operations == pair.n_layers * total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("factored", [False, True])
def test_first_order_terms_are_what_torch_counts(family, factored):
    model = tiny.make_model(family)
    shape, (mlp, change) = ModelShape.of(model), mlps(model, tiny.tune(model))[0]
    adapter = None
    if factored:
        change = MLPChange(**{k: v and low_rank(v, 2) for k, v in vars(change).items()})
        parts = [part for part in vars(change).values() if part]
        entries = sum(f.numel() for part in parts for f in part.factors)
        # The down projection's change is applied twice, to the base's and the tuned inner state.
        entries += sum(f.numel() for f in change.down.factors)
        adapter = entries * shape.n_layers
    expected = 5 * cost.first_order(shape.blocks[0], shape, replace(NOTHING, adapter=adapter))
    h = torch.randn(5, 16, dtype=torch.float64)
    assert counted(lambda: first_order_terms(mlp, change, h)) == expected


def low_rank(change, rank):
    (matrix,) = change.factors
    rows, columns = matrix.shape
    return Change((matrix.new_ones(rows, rank), matrix.new_ones(rank, columns)), change.bias)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_jacobian_is_formed_and_applied_as_said(family):
    model = tiny.make_model(family)
    (mlp, _), d, f = mlps(model, model)[0], 16, tiny.D_FF
    jacobian = MLPJacobian.at(mlp, torch.randn(3, d, dtype=torch.float64))
    assert counted(jacobian.dense) == 3 * 2 * d * d * f
    inner = 3 if mlp.up is not None else 2
    vectors = torch.randn(3, d, dtype=torch.float64)
    assert counted(lambda: jacobian.push(vectors)) == 3 * 2 * inner * d * f


def test_shared_maps_take_no_more_than_said():
    """Fits stop early, and triangular systems are not counted: so the formula is a bound."""
    model = tiny.make_model("llama")
    shape, parts = ModelShape.of(model), mlps(model, tiny.tune(model))[0]
    shape = replace(shape, blocks=shape.blocks[:1], sublayer=False)
    batches = (BatchShape(1, 60, 60), BatchShape(1, 30, 30, True))
    work = replace(NOTHING, batches=batches, shared_sample=60)
    states = [Sample(torch.randn(n, 16, dtype=torch.float64)) for n in (60, 30)]
    found = counted(lambda: list(shared_reach_rows(BlockParts(*parts), *states)))
    (stage,) = cost.shared_maps(shape, work)
    assert 0.3 * stage.operations < found < stage.operations


@pytest.mark.parametrize("single", [False, True])
def test_replacement_is_what_torch_counts(pair, single):
    prompts = [range(5, 5 + n) for n in (4, 7, 7)]
    vectors = {layer: FixedVector(torch.ones(16)) for layer in range(pair.n_layers)}
    adapters = Adapters("post_block", vectors, "forced")
    candidates = [Candidate.of(adapters)]
    if single:
        candidates += [Candidate.of(adapters, layer) for layer in range(pair.n_layers)]
    work = replace(
        NOTHING,
        prompts=(BatchShape(2, 7), BatchShape(1, 4)),
        everywhere=2,
        single=single,
        new_tokens=5,
    )
    stages = prompt_cost.replacement(ModelShape.of(pair.base), work)
    expected = sum(s.operations for s in stages if s.kind != "logit")
    found = counted(lambda: evaluate(pair, prompts, candidates, 5, batch_size=2, forcings=FORCINGS))
    # A divergence is a row-by-row product with the vocabulary's probabilities, no matrix product.
    assert found == expected


def test_a_first_look_and_a_round_of_the_search_are_about_what_torch_counts(pair):
    """Products of the fits themselves, which are small here, are counted in one way only."""
    rng = np.random.default_rng(0)
    documents = [
        {"prompt": tiny.random_text(rng, 6), "response": tiny.random_text(rng, 10)}
        for _ in range(60)
    ]
    corpus, shape = pair.corpus(documents), ModelShape.of(pair.base)
    options = Options(new_tokens=4, sample=0, shared_sample=0)
    work = replace(workload_of(shape, corpus, options)[0], first_look=True, search=True)
    reference = Reference(pair.tuned, pair.tokenizer, corpus.prompts(), 4)
    look = counted(lambda: first_look(pair, corpus, reference))
    assert look == pytest.approx(products(cost.first_look(shape, work)), rel=0.02)

    specs = [FitSpec.linear("post_block", rank, "sequential") for rank in (1, 2, 3)]
    fitted = counted(lambda: fit_adapters(pair, corpus, specs))
    assert len(specs) == cost.AT_ONCE
    stages = cost.rank_search(shape, work)
    moments = sum(stage.operations for stage in stages if stage.kind == "moments")
    passes = cost.ROUNDS * (1 + cost.AT_ONCE) * passes_of_fit_documents(shape, work)
    assert fitted == pytest.approx((passes + moments) / cost.ROUNDS, rel=0.05)


def test_a_close_look_is_about_what_torch_counts(pair):
    """Base, tuned and two vectors, which have no products of their own, on prompts that report."""
    rng = np.random.default_rng(1)
    documents = [
        {"prompt": tiny.random_text(rng, n % 5 + 3), "response": tiny.random_text(rng, 6)}
        for n in range(150)
    ]
    corpus, shape = pair.corpus(documents), ModelShape.of(pair.base)
    work, _ = workload_of(shape, corpus, Options(new_tokens=4))
    one, other = (
        Candidate.of(Adapters(place, {0: FixedVector(torch.ones(16))}, "forced"), key=place)
        for place in ("post_mlp", "post_block")
    )
    shown = [Shown("base", NONE), Shown("tuned", None), Shown("recommended", one)]
    shown += [Shown("runner-up", other)]
    documents = corpus.reporting()
    said = evaluate(pair, [d.prompt_ids for d in documents], [], 4).tokens[None]
    reporting = Reporting(documents, said, apart=True, n_new=4)
    found = counted(lambda: close_look(pair, corpus, reporting, shown, OtherData()))
    assert found == pytest.approx(products(prompt_cost.close_look(shape, work)), rel=0.1)


def test_questions_and_prompts_from_elsewhere_are_about_what_torch_counts(pair):
    """Answers of random models seldom end early; the base's logits are made once."""
    rng = np.random.default_rng(2)
    texts = [tiny.random_text(rng, n % 4 + 3) for n in range(70)]
    task, shape = make_task("listops"), ModelShape.of(pair.base)
    examples = [Example(text, "1", "1") for text in texts]
    documents = [Document(prompt=text, response=".") for text in texts[:20]]
    other = OtherData(Questions(task, examples, 0), {"some.jsonl": documents})
    corpus = pair.corpus([{"prompt": t, "response": t} for t in texts])
    work, _ = workload_of(shape, corpus, Options(new_tokens=4))
    work = with_other(work, other, pair.tokenizer)
    models = {
        name: partial(Shown(name, NONE if name != "tuned" else None).model, pair)
        for name in ("base", "tuned", "recommended", "runner-up")
    }
    asked = counted(lambda: task_rows(models, pair.tokenizer, other.questions))
    assert asked == pytest.approx(products(prompt_cost.questions(shape, work)), rel=0.1)

    def look():
        for prompts in other.prompts(pair, 4).values():
            for batch in Reference(pair.tuned, pair.tokenizer, prompts, 4).batches:
                distances(models, batch)

    alone = replace(work, reporting=())
    assert counted(look) == pytest.approx(products(prompt_cost.elsewhere(shape, alone)), rel=0.05)


def test_cross_fitting_is_about_what_torch_counts(pair):
    """Products by fold are those of all tokens; every prompt is read under its own fold's maps."""
    corpus, options = pair.corpus(tiny.make_documents(24)), Options(folds=3, new_tokens=4)
    work, _ = workload_of(shape := ModelShape.of(pair.base), corpus, options)
    sums = FoldStatistics(grid_for(pair.branches, 16, True), options.folds)
    march = March(pair.base_runner, pair.tuned_runner, corpus.batches, pair.branches)
    steps = list(march.steps(0))
    moments, fits, *judging = cost.cross_fit(shape, work)
    found = pair.n_layers * counted(lambda: [sums.update(step) for step in steps])
    assert moments.operations <= found <= 1.25 * moments.operations
    maps = [task()[1] for task in sums.tasks(torch.float32)]
    assert fits.operations == pytest.approx(pair.n_layers * len(maps) * cost.FIT * 16**3)
    every = {spec: adapter for some in maps for spec, adapter in some.items()}
    blocks = [BlockResult(layer, adapters=every) for layer in range(pair.n_layers)]
    judged = counted(lambda: CrossFit(pair, corpus, options).rows(blocks))
    assert judged == pytest.approx(products(judging), rel=0.1)


def products(stages):
    return sum(stage.operations for stage in stages if stage.kind not in ("logit", "fit"))


def passes_of_fit_documents(shape, work):
    fit = [batch for batch in work.batches if not batch.held_out]
    return sum(block_pass(shape, block, batch) for batch in fit for block in shape.blocks)


def test_stages_grow_as_their_formulas_say():
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    batch = BatchShape(4, 10, 36)
    sides = (batch, replace(batch, held_out=True))
    work = Workload(sides, (BatchShape(2, 5),), ("post_block",), 3, True)
    once = {s.name: s.operations for s in cost.run(shape, work)}
    twice = {s.name: s.operations for s in cost.run(shape, replace(work, batches=2 * work.batches))}
    grows = {"passes of the march", "passes of steered streams", "moments"}
    grows |= {"first order of the MLPs", "shared maps"}
    assert {name for name in once if twice[name] > once[name]} == grows
    assert all(twice[name] == 2 * once[name] for name in grows - {"shared maps"})


def test_shift_is_left_out():
    """What is left out is small: a vector's shift has no product at all."""
    vector, mask = FixedVector(torch.ones(16)), torch.ones(2, 3, dtype=torch.bool)
    assert counted(lambda: shift(vector, torch.zeros(2, 3, 16), mask)) == 0


def test_forward_passes_are_those_that_the_first_block_sees(pair):
    """Candidates in a single block count for the share of the blocks that they run through."""
    vectors = {layer: FixedVector(torch.ones(16)) for layer in range(pair.n_layers)}
    adapters = Adapters("post_block", vectors, "forced")
    alone = [Candidate.of(adapters, layer) for layer in range(pair.n_layers)]
    passed = []
    handles = [
        block.register_forward_hook(lambda *_: passed.append(1))
        for blocks in (pair.base_runner, pair.tuned_runner)
        for block in blocks.sites.blocks
    ]
    candidates = [Candidate.of(adapters), *alone]
    prompts = [range(5, 9), range(5, 12)]
    evaluate(pair, prompts, candidates, 5, batch_size=2, forcings=FORCINGS)
    for handle in handles:
        handle.remove()
    work = replace(NOTHING, prompts=(BatchShape(2, 7),), everywhere=2, single=True, new_tokens=5)
    bypassed = sum(range(pair.n_layers))  # hooks see blocks that only hand on what they get
    expected = prompt_cost.forward_passes(ModelShape.of(pair.base), work) * pair.n_layers
    assert len(passed) - bypassed == expected
