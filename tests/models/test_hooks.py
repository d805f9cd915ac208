"""Every context manager acts inside and leaves nothing behind, by error or not."""

import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.vector import FixedVector
from toolkit.models.hooks import (
    Site,
    before,
    bypass,
    call_of,
    capture,
    left_as_found,
    replace,
    tuple_sizes,
)

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return tiny.make_model(request.param)


def logits(model):
    return model(IDS, use_cache=False).logits


def contexts(model):
    """Each context manager as a function of nothing, with whether it changes the logits."""
    blocks = tiny.blocks_of(model)
    sizes = tuple_sizes(blocks, lambda: logits(model))
    vector = FixedVector(torch.ones(tiny.D_MODEL, dtype=torch.float64))
    return {
        "capture": (lambda: capture({"a": Site(blocks[1], "output")}), False),
        "replace output": (lambda: replace(Site(blocks[1], "output"), lambda x: 2 * x + 1), True),
        "replace input": (lambda: replace(Site(blocks[1], "input"), lambda x: x.flip(-1)), True),
        "before": (lambda: before(blocks[1], lambda call: None), False),
        "bypass": (lambda: bypass(blocks[:2], sizes[:2]), True),
        "steer": (lambda: steer(model, Adapters("post_block", {1: vector}, "free")), True),
    }


@pytest.mark.parametrize("name", ["capture", "replace output", "replace input", "before", "bypass",
                                  "steer"])  # fmt: skip
def test_effect_inside_and_none_after(model, name):
    """The logits change inside if they should; after it, error or not, all is as it was."""
    make, changes = contexts(model)[name]
    plain = logits(model)
    with restores(model):
        with make():
            assert torch.equal(logits(model), plain) != changes
        assert torch.equal(logits(model), plain)
    with restores(model), pytest.raises(ZeroDivisionError), make():
        raise ZeroDivisionError
    assert torch.equal(logits(model), plain)


def test_the_property_itself_notices_what_is_left_behind(model):
    """`restores` fails for a hook, a forward and a weight that stay."""
    blocks = tiny.blocks_of(model)
    with pytest.raises(AssertionError), restores(model):
        handle = blocks[0].register_forward_hook(lambda *_: None)
    handle.remove()
    with pytest.raises(AssertionError), restores(model):
        blocks[0].forward = blocks[0].forward
    del blocks[0].forward
    with pytest.raises(AssertionError), restores(model):
        next(model.parameters())[0, 0] += 1e-9


def test_an_error_inside_the_forward_pass_leaves_nothing(model):
    def fail(_):
        raise ZeroDivisionError

    site = Site(tiny.blocks_of(model)[1], "output")
    with restores(model), pytest.raises(ZeroDivisionError), replace(site, fail):
        logits(model)
    with restores(model), pytest.raises(ZeroDivisionError):
        call_of(tiny.blocks_of(model)[1], lambda: fail(None))
    with restores(model), pytest.raises(ZeroDivisionError):
        tuple_sizes(tiny.blocks_of(model), lambda: fail(None))


def test_capture_sees_what_plain_hooks_see(model):
    """Inputs and outputs, and a copy of them that later computations cannot change."""
    block, seen = tiny.blocks_of(model)[1], {}
    handles = [
        block.register_forward_pre_hook(lambda m, args: seen.update(input=args[0])),
        block.register_forward_hook(
            lambda m, args, out: seen.update(output=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    sites = {side: Site(block, side) for side in ("input", "output")}
    with capture(sites) as captured:
        logits(model)
    for handle in handles:
        handle.remove()
    for side in sites:
        assert torch.equal(captured[side], seen[side])
        assert captured[side].data_ptr() != seen[side].data_ptr()


def test_edits_apply_in_the_order_in_which_they_were_attached(model):
    site = Site(tiny.blocks_of(model)[-1], "output")
    with (
        replace(site, lambda x: x + 1),
        replace(site, lambda x: x * 3),
        capture({"out": site}) as captured,
    ):
        logits(model)
    with capture({"out": site}) as plain:
        logits(model)
    assert torch.equal(captured["out"], (plain["out"] + 1) * 3)


def test_call_of_gives_the_arguments_and_ends_there(model):
    """The block can be called again with them; nothing behind it ran."""
    blocks, ran = tiny.blocks_of(model), []
    handle = blocks[2].register_forward_pre_hook(lambda *_: ran.append(True))
    with restores(model):
        call = call_of(blocks[1], lambda: logits(model))
    assert not ran
    handle.remove()
    with capture({"out": Site(blocks[1], "output")}) as captured:
        logits(model)
    output = blocks[1](*call.args, **call.kwargs)
    assert torch.equal(output[0] if isinstance(output, tuple) else output, captured["out"])


def test_call_of_says_when_a_module_was_not_called(model):
    with pytest.raises(RuntimeError, match="was not called"):
        call_of(tiny.blocks_of(model)[1], lambda: None)


def test_bypassed_blocks_hand_on_their_input(model):
    """With all blocks bypassed, the model is its embedding, its final norm and its head."""
    blocks = tiny.blocks_of(model)
    sizes = tuple_sizes(blocks, lambda: logits(model))
    ends = {"in": Site(blocks[0], "input"), "out": Site(blocks[-1], "input")}
    with bypass(blocks, sizes), capture(ends) as captured:
        logits(model)
    assert torch.equal(captured["in"], captured["out"])


def test_a_block_with_a_forward_of_its_own_is_refused(model):
    blocks = tiny.blocks_of(model)
    sizes = tuple_sizes(blocks, lambda: logits(model))
    blocks[1].forward = blocks[1].forward
    with (
        restores(model),
        pytest.raises(RuntimeError, match="forward of its own"),
        bypass(blocks, sizes),
    ):
        pass


def test_what_an_interrupt_left_is_taken_away(model):
    """And what was there before stays."""
    blocks, ran, plain = tiny.blocks_of(model), [], logits(model)
    own = blocks[0].register_forward_hook(lambda *_: ran.append("own"))
    never_left = [replace(Site(blocks[1], side), torch.zeros_like) for side in ("input", "output")]

    def interrupted():
        for context in never_left:
            context.__enter__()
        blocks[2].forward = lambda *args, **kwargs: None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), left_as_found(model):
        interrupted()
    assert torch.equal(logits(model), plain)
    assert ran == ["own"]
    own.remove()
