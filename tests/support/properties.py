"""Named properties that many tests assert."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from tests.support.members import reduced

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _condition(model: torch.nn.Module) -> dict[str, Any]:
    """All that a context manager may have changed but not its weights."""
    modules = dict(model.named_modules())
    return {
        "hooks": {n: [len(getattr(m, hook)) for hook in HOOKS] for n, m in modules.items()},
        "forward": {n: "forward" in vars(m) for n, m in modules.items()},
        "training": {n: m.training for n, m in modules.items()},
        "grad": {n: p.requires_grad for n, p in model.named_parameters()},
    }


@contextmanager
def restores(model: torch.nn.Module) -> Iterator[None]:
    """`model` leaves the context as it came: no hook, no forward of its own, the same weights."""
    before = _condition(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert _condition(model) == before
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def numbers(result: Any) -> dict[Any, np.ndarray]:
    """Every number of a result, by where it stands."""
    if is_dataclass(result):
        result = {f.name: getattr(result, f.name) for f in fields(result)}
    if isinstance(result, dict):
        nested = {key: numbers(value) for key, value in result.items()}
        return {(key, *inner): v for key, found in nested.items() for inner, v in found.items()}
    return {(): np.array(result, dtype=float)}


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-12) -> None:
    """The same numbers; each array's scale is its largest entry."""
    ours, theirs = numbers(ours), numbers(theirs)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = np.abs(value).max(initial=0)
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=rtol * scale, err_msg=str(key))


def assert_reducible(
    make: Callable[[], Any], updates: Sequence[tuple], state: bool = False, rtol: float = 1e-12
) -> None:
    """The accumulator's whole contract, for one that `make` makes and `updates` feed.

    `state`: it can also be written down and rebuilt.
    """

    def fed(some: Sequence[tuple]) -> Any:
        accumulator = make()
        for arguments in some:
            accumulator.update(*arguments)
        return accumulator

    whole = fed(updates).result()
    for n_members in (1, 2, 5):
        members = [fed(updates[member::n_members]) for member in range(n_members)]
        for member in reduced(members):
            assert_close(member.result(), whole, rtol)

    for order in ([fed(updates), make()], [make(), fed(updates)]):  # one had no document
        for member in reduced(order):
            assert_close(member.result(), whole, 0)

    ours, theirs = reduced([fed(updates[:2]), fed(updates[2:])])
    received = copy.deepcopy(numbers(theirs.result()))
    ours.update(*updates[0])
    assert_close(ours.result(), fed([*updates, updates[0]]).result(), rtol)
    assert all(np.array_equal(v, received[k]) for k, v in numbers(theirs.result()).items())

    accumulator = fed(updates)
    result = accumulator.result()
    kept = copy.deepcopy(numbers(result))
    accumulator.update(*updates[0])
    assert all(np.array_equal(value, kept[key]) for key, value in numbers(result).items())
    reduced([accumulator, fed(updates)])
    assert all(np.array_equal(value, kept[key]) for key, value in numbers(result).items())

    if state:
        rebuilt = make().from_state(fed(updates).state())
        assert_close(rebuilt.result(), whole, 0)
        rebuilt.update(*updates[0])
        assert_close(rebuilt.result(), fed([*updates, updates[0]]).result(), rtol)


def assert_identity_at_start(
    model: torch.nn.Module, attached: Callable[[], AbstractContextManager], **inputs: Any
) -> None:
    """In the context `attached` the model's logits are bit for bit those it has without."""
    bare = model(**inputs).logits
    with attached():
        assert torch.equal(model(**inputs).logits, bare)
