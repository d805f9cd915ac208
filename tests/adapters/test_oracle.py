"""The oracle put in place: the base model becomes the tuned one."""

import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from tests.support.steering import PROMPTS, generate
from toolkit.adapters.oracle import steer_by_oracle


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_oracle_in_every_block_is_the_tuned_model(family):
    """In a forward pass and in batched, cached generation."""
    base = tiny.make_model(family)
    tuned = tiny.tune(base)
    ids = torch.tensor(PROMPTS[:1])
    assert not torch.allclose(base(ids).logits, tuned(ids).logits, atol=1e-3)
    with restores(base), restores(tuned), steer_by_oracle(base, tuned):
        assert torch.allclose(base(ids).logits, tuned(ids).logits, atol=1e-12)
        said = generate(base)
    assert torch.equal(said, generate(tuned))


def test_one_block_alone_is_overwritten():
    """Blocks before it are the base model's own."""
    base = tiny.make_model("llama")
    tuned = tiny.tune(base)
    ids = torch.tensor(PROMPTS[:1])
    seen = lambda model: model(ids, output_hidden_states=True).hidden_states  # noqa: E731
    with steer_by_oracle(base, tuned, layers=[1]):
        steered = seen(base)
    assert torch.equal(steered[1], seen(base)[1])
    assert torch.equal(steered[2], seen(tuned)[2])
