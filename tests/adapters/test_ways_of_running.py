"""Steered tokens are the same tokens however the model is run, or the run is refused."""

import threading

import pytest
import torch

from tests.support import families, tiny
from toolkit import Adapters, InputError, ModelPair, steer

IDS = torch.randint(5, 30, (1, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tokenizer):
    return tiny.make_pair("llama", torch.float64, tokenizer).base


def adapters(model, location="pre_mlp", positions="all"):
    """Random linear adapters of rank 4 in every block."""
    n_layers, width = model.config.num_hidden_layers, model.config.hidden_size
    found = Adapters.identity("linear", location, range(n_layers), width, positions, rank=4)
    found.modules.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in found.modules.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).double()
        parameter.requires_grad_(True)
    return found


@pytest.mark.parametrize("location", ["pre_mlp", "post_mlp", "post_block"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_several_passes_before_one_backward_with_checkpointing(model, location, reentrant):
    """The second pass has padding on the left; what the first recomputes is the first's."""
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:, :6]], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    places = torch.arange(10)[None]  # one tensor, given to both passes

    def gradients():
        found = adapters(model, location)
        with steer(model, found):
            loss = 0.0
            for ids, attended in ((IDS, torch.ones_like(IDS)), (padded, mask)):
                batch = {"input_ids": ids, "attention_mask": attended, "position_ids": places}
                loss = loss + model(**batch, use_cache=False).logits.square().sum()
            loss.backward()
        return torch.cat([p.grad.flatten() for p in found.modules.parameters()])

    model.train()
    model.enable_input_require_grads()  # reentrant checkpointing needs inputs with gradients
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.allclose(gradients(), plain, rtol=1e-12)


def test_sequences_packed_into_one_row_are_steered_as_each_alone(model):
    """Each one's first token stays as it is."""
    seen = []
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    found = adapters(model, "post_block")
    with steer(model, found):
        hook = model.model.layers[0].register_forward_hook(lambda _m, _a, o: seen.append(o))
        model(input_ids=IDS, position_ids=places, use_cache=False)
        hook.remove()
    hook = model.model.layers[0].register_forward_hook(lambda _m, _a, o: seen.append(o))
    model(input_ids=IDS, position_ids=places, use_cache=False)
    hook.remove()
    steered, plain = (s[0] if isinstance(s, tuple) else s for s in seen)
    moved = (steered - plain).abs().sum(-1)[0] > 0
    assert moved.tolist() == (places[0] > 0).tolist()


def test_prompt_positions_in_packed_rows_are_refused(model):
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with (
        steer(model, adapters(model, positions="last_prompt")),
        pytest.raises(InputError, match="several sequences"),
    ):
        model(input_ids=IDS, position_ids=places, use_cache=False)


def test_two_threads_at_once_are_refused(model):
    """Whose tokens are steered would depend on who comes first."""
    entered, done, errors = threading.Event(), threading.Event(), []

    def wait(*_):
        entered.set()
        done.wait(10)

    with steer(model, adapters(model)):
        hook = model.model.layers[0].register_forward_pre_hook(wait)
        first = threading.Thread(target=lambda: model(input_ids=IDS, use_cache=False))
        first.start()
        entered.wait(10)
        hook.remove()
        try:
            model(input_ids=IDS, use_cache=False)
        except RuntimeError as error:
            errors.append(str(error))
        done.set()
        first.join()
    assert "two threads" in errors[0]


def test_a_prompt_read_in_pieces_is_steered_as_in_one(model):
    """Chunked prefill: the same logits with a cache, piece by piece."""
    with torch.no_grad(), steer(model, adapters(model)):
        whole = model(input_ids=IDS, use_cache=False).logits
        cache, parts = None, []
        for ids in IDS.split(3, dim=1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-9)


def test_blocks_that_run_on_the_last_tokens_alone_are_steered_there(tmp_path):
    """Generation with Gemma 4: blocks that read earlier ones' keys see the last token only."""
    families.save_pair("gemma4_text", tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned", dtype="float64")
    ids = 5 + IDS % 50
    with steer(pair.base, adapters(pair.base, "post_block")):
        said = pair.base.generate(
            ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        whole = pair.base(input_ids=said.sequences, use_cache=False).logits[:, 9:-1]
    assert torch.allclose(torch.stack(said.logits, 1).double(), whole, atol=1e-6)
    plain = pair.base(input_ids=said.sequences, use_cache=False).logits[:, 9:-1]
    assert (plain - whole).abs().max() > 1e-3
