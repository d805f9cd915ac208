"""Reading, replacing and bypassing activations: the only file that registers hooks.

Every function is a context manager. When it exits, by error or not, the modules are as they were.

A state is `[batch, length, width]`, or all tokens in one row. Where parallel streams pass a block
together (Gemma 3n), `[streams, batch, length, width]`, the first of them is the state, and the
others are carried beside it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
# What blocks leave for later ones beside the hidden state: parallel streams, and what stands in the
# mappings among their arguments, by its name and key (Gemma 4: keys and values).
Carried = dict[tuple[str, Any], Any]
_STREAMS = ("", "parallel streams")


class Site(NamedTuple):
    """Name a tensor of a live model: the first input, or the (first) output, of a module.

    Of parallel streams it is the first, or, with `whole`, all of them.
    """

    module: nn.Module
    side: Literal["input", "output"]
    whole: bool = False


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
    handle = register(site.module, edit if site.whole else _in_first_stream(edit))
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


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """Take away, however this ends, the hooks and forwards that `models` did not have before.

    Every context does so itself. But Ctrl-C may come between a registration and the ``try`` whose
    end would undo it.
    """
    modules = {module for model in models for module in model.modules()}
    with_own_forward = {module for module in modules if "forward" in vars(module)}
    every = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    known = [set(hooks) for hooks in every]
    try:
        yield
    finally:
        for hooks, keys in zip(every, known, strict=True):
            for key in hooks.keys() - keys:
                del hooks[key]
        for module in modules - with_own_forward:
            vars(module).pop("forward", None)


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
    given = _given(call)
    return given[0] if _is_parallel(given) else given


def has_more(call: Call) -> bool:
    """Tell whether earlier blocks have left a block more than the hidden state."""
    mappings = (v for v in call.kwargs.values() if isinstance(v, MutableMapping))
    return _is_parallel(_given(call)) or any(len(mapping) > 0 for mapping in mappings)


def run_on(forward: Callable[..., Any], call: Call, hidden: Tensor, carried: Carried) -> Tensor:
    """Return what a block's `forward` makes of `call` with another hidden state, `[..., width]`.

    `carried` is what earlier blocks left beside it, to which this one adds. The call can be
    replayed: its mappings are copied.
    """
    kwargs = {
        name: copy.copy(value) if isinstance(value, MutableMapping) else value
        for name, value in call.kwargs.items()
    }
    mappings = {name: v for name, v in kwargs.items() if isinstance(v, MutableMapping)}
    for (name, key), value in carried.items():
        if name:
            mappings[name][key] = value
    given = {name: dict(mapping) for name, mapping in mappings.items()}
    args, kwargs = _with_given(Call(call.args, kwargs), beside(call, hidden, carried))
    output = first(forward(*args, **kwargs))
    for name, mapping in mappings.items():
        for key, value in mapping.items():
            if given[name].get(key) is not value:
                carried[name, key] = value
    if not _is_parallel(output):
        return output
    carried[_STREAMS] = output[1:].clone()
    return output[0]


def beside(call: Call, hidden: Tensor, carried: Carried) -> Tensor:
    """Return `hidden` with the parallel streams that go with it, if there are any."""
    given = _given(call)
    if not _is_parallel(given):
        return hidden
    return torch.cat([hidden[None], carried.get(_STREAMS, given[1:])])


def _given(call: Call) -> Tensor:
    return call.args[0] if call.args else call.kwargs["hidden_states"]


def _with_given(call: Call, tensor: Tensor) -> Call:
    if call.args:
        return Call((tensor, *call.args[1:]), call.kwargs)
    return Call((), {**call.kwargs, "hidden_states": tensor})


def _is_parallel(tensor: Tensor) -> bool:
    return tensor.ndim == 4


def _in_first_stream(edit: Edit) -> Edit:
    def edited(tensor: Tensor) -> Tensor:
        if not _is_parallel(tensor):
            return edit(tensor)
        return torch.cat([edit(tensor[0])[None], tensor[1:]])

    return edited


def first(output: Any) -> Tensor:
    """A module's output tensor, where some families return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _identity(size: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = _given(Call(args, kwargs))
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
        return tuple(_with_given(call, edit(_given(call))))  # type: ignore[return-value]

    return module.register_forward_pre_hook(hook, with_kwargs=True)
