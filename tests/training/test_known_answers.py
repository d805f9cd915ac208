"""A tuned model that is a steered base: its adapters are found again, fitted and trained."""

from contextlib import contextmanager

import pytest
import torch

from tests.support import tiny
from toolkit import ModelPair
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.analysis.divergence import recovered
from toolkit.evaluation.reference import Reference
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.training.distillation import default_options, distil
from toolkit.training.methods import Method

PLACES = ("pre_mlp", "post_mlp", "post_block")
DOCUMENTS = tiny.make_documents(80)


@contextmanager
def made(place, rank=2, dtype=torch.float64):
    """A pair whose tuned half is the base with a map of `rank` added at `place` in every block."""
    base = tiny.make_model("llama", dtype)
    pair = ModelPair.from_models(base, tiny.copy_of(base), tiny.make_tokenizer())
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    d = tiny.D_MODEL
    by_layer = {
        layer: Linear(0.3 * draw(d, rank), draw(rank, d) / d**0.5, 0.1 * draw(d))
        for layer in range(tiny.N_LAYERS)
    }
    with steer(pair.tuned, Adapters(place, by_layer, "identity")):
        yield pair


def share(pair, corpus, adapters):
    """Measure what is recovered on the prompts of held-out documents."""
    reference = Reference(pair.tuned, pair.tokenizer, corpus.prompts(), 6)
    base = reference.divergence(pair.base)
    with steer(pair.base, adapters):
        return recovered(reference.divergence(pair.base), base)[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_map_of_rank_2_in_every_block_is_recovered_by_sequential_fits_of_rank_2(place):
    with made(place) as pair:
        corpus = pair.corpus(DOCUMENTS)
        specs = [FitSpec.linear(place, rank, "sequential") for rank in (1, 2)]
        less, found = fit_adapters(pair, corpus, specs).values()
        assert share(pair, corpus, found) > 0.999
        assert share(pair, corpus, less) < 0.99


@pytest.mark.parametrize("place", PLACES)
def test_distillation_from_nothing_reaches_what_the_construction_has(place):
    with made(place, dtype=torch.float32) as pair:
        corpus = pair.corpus(DOCUMENTS)
        options = default_options(pair, steps=400, batch_size=16)
        method = Method("known", "linear", place, 2, options={"bias": True})
        found = distil(pair, corpus, method, options, new_tokens=6)
        assert found.adapters.fit == "distilled"
        assert share(pair, corpus, found.adapters) > 0.97
        assert found.training.validation[0][1] > 20 * min(v for _, v in found.training.validation)


def test_distillation_that_gains_nothing_leaves_the_start():
    """At a rate that destroys everything the start is what comes back."""
    with made("post_block", dtype=torch.float32) as pair:
        corpus = pair.corpus(DOCUMENTS)
        start = fit_adapters(pair, corpus, [FitSpec.linear("post_block", 2, "sequential")])
        (start,) = start.values()
        options = default_options(pair, True, steps=20)
        wild = type(options)(**{**vars(options), "learning_rate": 30.0})
        method = Method("known", "linear", "post_block", 2)
        found = distil(pair, corpus, method, wild, start=start, new_tokens=6)
        for layer, adapter in start.by_layer.items():
            for name, tensor in adapter.state_dict().items():
                assert torch.equal(found.adapters.by_layer[layer].state_dict()[name], tensor)
