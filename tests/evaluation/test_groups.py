"""Candidates that go through the model side by side, each in rows of its own."""

import pytest
import torch

from tests.support import families, tiny
from tests.support.properties import restores
from tests.support.steering import random_adapters
from toolkit import ModelPair
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.positions import Positions
from toolkit.evaluation import candidates as groups
from toolkit.evaluation.candidates import Candidate, in_groups
from toolkit.evaluation.compare import FORCINGS, evaluate
from toolkit.evaluation.distributions import distributions

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32, 33], [7, 7, 40]]
# OPT hands its MLP all tokens in one row; Gemma 3n has parallel streams, Gemma 4 shares keys; those
# of state spaces read every token anew.
FAMILIES = ["llama", "gemma3", "opt", "falcon", "gemma3n_text", "gemma4_text", "jamba"]
PLACES = ["post_mlp", "post_block", "pre_mlp"]


def make_pair(family, tokenizer, folder):
    if family in tiny.FAMILIES:
        return tiny.make_pair(family, torch.float64, tokenizer)
    families.save_pair(family, folder)
    return ModelPair.load(folder / "base", folder / "tuned")  # Jamba's experts have no float64


def candidate_at(place, pair):
    """A candidate of random maps of rank 2."""
    generator, d = torch.Generator().manual_seed(len(place)), pair.d_model

    def drawn(*shape):
        return 0.2 * torch.randn(*shape, generator=generator).to(pair.dtype)

    by_layer = {k: Linear(drawn(d, 2), drawn(2, d), drawn(d)) for k in range(pair.n_layers)}
    return Candidate.of(Adapters(place, by_layer, "free"), key=place)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_gives_what_each_gives_alone(family, tokenizer, monkeypatch, tmp_path):
    """At other places, too: divergences and own tokens under both forcings."""
    pair = make_pair(family, tokenizer, tmp_path)
    tried = [candidate_at(place, pair) for place in PLACES if place not in pair.unavailable]
    with restores(pair.base), restores(pair.tuned):
        together = evaluate(pair, PROMPTS, tried, n_new=5, forcings=FORCINGS)
    monkeypatch.setattr(groups, "ROWS", 1)
    alone = evaluate(pair, PROMPTS, tried, n_new=5, forcings=FORCINGS)
    assert together.tokens == alone.tokens
    assert together.divergences.keys() == alone.divergences.keys()
    for key, found in alone.divergences.items():
        assert torch.equal(together.divergences[key].counted, found.counted)
        nats = together.divergences[key].nats
        atol = 1e-9 if pair.dtype == torch.float64 else 1e-4
        assert torch.allclose(nats[found.counted], found.nats[found.counted], atol=atol)
    kls = [alone.divergences[candidate, "own"].mean for candidate in tried]
    assert len(set(kls)) == len(tried)  # or rows could be anybody's


def test_each_steers_the_positions_that_it_asks_for(llama_pair, monkeypatch):
    everywhere = random_adapters("post_block")
    last = Candidate.of(
        type(everywhere)(
            "post_block", everywhere.by_layer, "free", positions=Positions.parse("last_prompt")
        ),
        key="last",
    )
    tried = [Candidate.of(everywhere, key="all"), last]
    together = evaluate(llama_pair, PROMPTS, tried, n_new=5, forcings=FORCINGS)
    monkeypatch.setattr(groups, "ROWS", 1)
    alone = evaluate(llama_pair, PROMPTS, tried, n_new=5, forcings=FORCINGS)
    for key, found in alone.divergences.items():
        assert torch.allclose(together.divergences[key].nats, found.nats, atol=1e-9)
    assert together.divergences[last, "tuned"].mean != together.divergences[tried[0], "tuned"].mean


def test_distributions_of_a_group_are_those_of_each_alone(llama_pair, monkeypatch):
    tried = [Candidate.of(random_adapters(place), key=place) for place in PLACES]
    answers = evaluate(llama_pair, PROMPTS, [], n_new=5).tokens[None]
    together = distributions(llama_pair, PROMPTS, answers, tried, 5)
    monkeypatch.setattr(groups, "ROWS", 1)
    alone = distributions(llama_pair, PROMPTS, answers, tried, 5)
    for candidate in tried:
        ours, theirs = together.likeness[candidate], alone.likeness[candidate]
        assert ours.answers == theirs.answers
        for path, other in ((ours.forward, theirs.forward), (ours.reverse, theirs.reverse)):
            assert path.tokens == other.tokens
            assert torch.allclose(path.divergences.nats, other.divergences.nats, atol=1e-9)
        assert torch.allclose(ours.variation.nats, theirs.variation.nats, atol=1e-9)


def test_what_is_kept_of_a_group_in_part_is_completed(llama_pair):
    """An interrupted run may have kept some of a group: the others come out the same."""
    tried = [Candidate.of(random_adapters(place), key=place) for place in PLACES]
    kept = {}
    whole = evaluate(llama_pair, PROMPTS, tried, n_new=5, forcings=FORCINGS, kept=kept)
    some = {name: found for index, (name, found) in enumerate(sorted(kept.items())) if index != 4}
    again = evaluate(llama_pair, PROMPTS, tried, n_new=5, forcings=FORCINGS, kept=some)
    assert some.keys() == kept.keys()
    for key, found in whole.divergences.items():
        assert torch.equal(again.divergences[key].nats, found.nats)


@pytest.mark.parametrize(
    ("shares", "n_prompts", "expected"),
    [
        ([False, True, False, True, True, True], 16, [[0], [1, 3, 4], [2], [5]]),
        ([True] * 7, 8, [[0, 1, 2, 3, 4, 5], [6]]),
        ([True, True], 49, [[0], [1]]),
        ([], 8, []),
    ],
)
def test_groups_hold_at_most_so_many_rows(shares, n_prompts, expected):
    assert in_groups(shares, n_prompts) == expected
