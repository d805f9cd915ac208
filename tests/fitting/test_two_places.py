"""Two places at once, against whole models run again and least squares."""

import numpy as np
import torch

from tests.fitting.test_closed_form import DOCUMENTS, LAYERS, assert_maps, book_of, matrices
from tests.support import textbook, tiny
from toolkit.adapters.attach import steer
from toolkit.fitting.two_places import fit_two_places


def run_both(book, ids, before, after):
    """The states of the base model with maps before the MLP and after the block."""
    pair_model = book.base
    hooks = []
    for layer, map_ in before.items():
        attention = tiny.blocks_of(pair_model)[layer].self_attn

        def hook(_module, _args, output, map_=map_):
            A, b = map(torch.from_numpy, map_)
            value = output[0].clone()
            value[:, 1:] = value[:, 1:] + value[:, 1:] @ A.T + b
            return (value, *output[1:])

        hooks.append(attention.register_forward_hook(hook))
    try:
        return textbook.run(pair_model, ids, location="post_block", maps=after)
    finally:
        for handle in hooks:
            handle.remove()


def test_both_are_the_textbooks():
    pair, book = book_of("llama")
    first, second = fit_two_places(pair, DOCUMENTS, 2, 3)
    before, after = {}, {}
    for layer in LAYERS:
        for maps, location, point, rank in (
            (before, "pre_mlp", "resid_mid", 2),
            (after, "post_block", "post_block", 3),
        ):
            steered = [run_both(book, ids, before, after) for ids, _ in book.documents]
            X = book.rows(steered, location, layer, False)
            missing = book.states("tuned", point, layer, False)
            missing = missing - book.rows(steered, point, layer, False)
            maps[layer] = textbook.fit(X, missing, rank)
    assert_maps(first, before, 1e-8)
    assert_maps(second, after, 1e-8)


def test_both_leave_less_than_either_alone():
    pair, book = book_of("llama")
    first, second = fit_two_places(pair, DOCUMENTS, 2, 2)
    ids = torch.tensor([next(i for i, held_out in book.documents if not held_out)])
    tuned = pair.tuned(ids).logits
    gaps = []
    for both in ((), (first,), (first, second)):
        with torch.no_grad(), steer(pair.base, first) if both else torch.no_grad():
            if len(both) == 2:
                with steer(pair.base, second):
                    logits = pair.base(ids).logits
            else:
                logits = pair.base(ids).logits
        gaps.append(float((logits - tuned).norm()))
    assert gaps[2] < gaps[0]
    assert np.isfinite(gaps).all()
    assert matrices(second.by_layer[0])[0].shape == (tiny.D_MODEL, tiny.D_MODEL)
