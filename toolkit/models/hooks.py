"""Reading, replacing and bypassing activations: the only file that registers hooks.

Every function is a context manager. When it exits, by error or not, the modules are as they were.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """A tensor of a live model: the first input, or the (first) output, of a module."""

    module: nn.Module
    side: Literal["input", "output"]


class Call(NamedTuple):
    """The arguments with which a module was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stopped(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a forward pass that has served its purpose."""


@contextmanager
def capture(
    sites: Mapping[str, Site], read: Edit = torch.Tensor.clone
) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that holds, after a forward pass, what `read` takes at each of `sites`.

    By default the whole tensor. What `read` returns must share no memory with what it is given:
    Falcon adds to its MLP's output in place. A later pass in the same context overwrites it.
    """
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Edit:
        def edit(tensor: Tensor) -> Tensor:
            captured[name] = read(tensor)
            return tensor

        return edit

    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(replace(site, keep(name)))
        yield captured


@contextmanager
def replace(site: Site, edit: Edit) -> Iterator[None]:
    """Put ``edit(tensor)`` in place of the tensor at `site` in every forward pass.

    Edits of one site apply in the order in which they were attached.
    """
    register = _replace_input if site.side == "input" else _replace_output
    handle = register(site.module, edit)
    try:
        yield
    finally:
        handle.remove()


def constant(value: Tensor) -> Edit:
    """Return the edit that puts `value` in place of whatever is there."""
    return lambda _: value


@contextmanager
def before(module: nn.Module, listen: Callable[[Call], None]) -> Iterator[None]:
    """Call `listen` with the arguments of every call of `module`, before it runs."""
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: listen(Call(args, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def within(
    module: nn.Module, enter: Callable[[Call], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Call `enter` before every call of `module` and `leave` after it, error or not."""
    handle = module.register_forward_hook(lambda *_: leave(), always_call=True)
    try:
        with before(module, enter):
            yield
    finally:
        handle.remove()


def call_of(module: nn.Module, run: Callable[[], Any]) -> Call:
    """The arguments of the first call of `module` in ``run()``, which is ended at that point."""
    return _ended(lambda stop: before(module, stop), run)


def state_at(site: Site, run: Callable[[], Any]) -> Tensor:
    """Return the tensor at `site` in ``run()``, which is ended at that point."""
    return _ended(lambda stop: replace(site, stop), run)


def _ended(attach: Callable[[Callable[[Any], Any]], AbstractContextManager], run: Callable) -> Any:
    """What the function given to `attach` is first called with in ``run()``, which then ends."""
    reached: list[Any] = []

    def stop(value: Any) -> None:
        reached.append(value)
        raise _Stopped

    with attach(stop):
        try:
            run()
        except _Stopped:
            return reached[0]
    raise RuntimeError("the module that was waited for was not called")


@contextmanager
def bypass(modules: Iterable[nn.Module], tuple_sizes: Iterable[int]) -> Iterator[None]:
    """Let `modules` hand on their hidden state untouched.

    `tuple_sizes` holds, for each module, how long a tuple its forward returns (0: a bare tensor).
    """
    changed: list[nn.Module] = []
    try:
        for module, size in zip(modules, tuple_sizes, strict=True):
            if "forward" in vars(module):
                raise RuntimeError(f"{type(module).__name__} already has a forward of its own")
            module.forward = _identity(size)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def tuple_sizes(modules: Iterable[nn.Module], run: Callable[[], Any]) -> list[int]:
    """Return how long a tuple each module's forward returns in ``run()`` (0: a bare tensor)."""
    sizes: dict[nn.Module, int] = {}

    def look(module: nn.Module, _args: Any, output: Any) -> None:
        sizes[module] = len(output) if isinstance(output, tuple) else 0

    modules = list(modules)
    handles = [module.register_forward_hook(look) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [sizes[module] for module in modules]


def hidden_state(call: Call) -> Tensor:
    """Return the hidden state among a block's arguments: the first one."""
    return call.args[0] if call.args else call.kwargs["hidden_states"]


def with_hidden_state(call: Call, hidden: Tensor) -> Call:
    """`call` on another hidden state."""
    if call.args:
        return Call((hidden, *call.args[1:]), call.kwargs)
    return Call((), {**call.kwargs, "hidden_states": hidden})


def first(output: Any) -> Tensor:
    """A module's output tensor, where some families return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _identity(size: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_state(Call(args, kwargs))
        return (hidden, *[None] * (size - 1)) if size else hidden

    return forward


def _replace_output(module: nn.Module, edit: Edit) -> torch.utils.hooks.RemovableHandle:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        edited = edit(first(output))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return module.register_forward_hook(hook)


def _replace_input(module: nn.Module, edit: Edit) -> torch.utils.hooks.RemovableHandle:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call = Call(args, kwargs)
        return tuple(with_hidden_state(call, edit(hidden_state(call))))  # type: ignore[return-value]

    return module.register_forward_pre_hook(hook, with_kwargs=True)
