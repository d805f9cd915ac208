"""A GPU that is not there: tensors that say they are on another device and compute on the CPU.

Inside `pretended_gpu` a tensor that is sent to, or made on, `GPU` is a wrapper around a CPU tensor
with its values. As on a real GPU, an operation that meets tensors of both devices is refused, but
for what CUDA allows: numbers without dimensions, indices on the CPU, and copies. The device is
torch's place for a backend of one's own, since a build without CUDA cannot pretend to have it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
INDEXED |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}


class _Module(_DummyBackendModule):
    def is_available(self) -> bool:  # or other libraries would train on it
        return False

    def device_count(self) -> int:
        return 0


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("pretended", _Module(), _Hook())
GPU = torch.device("pretended:0")


class OnGPU(Tensor):
    """A CPU tensor that says it is on `GPU`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"on a GPU: {self.inner!r}"

    def __format__(self, how: str) -> str:
        return format(self.cpu(), how)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Makes what is asked for on `GPU`; `waits` counts what the CPU would wait for it for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _run(func, args, kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, OnGPU)]
        if any(isinstance(tensor, OnGPU) for tensor in tensors) and not made:
            self.waits[str(func)] += 1
        return found


@contextmanager
def pretended_gpu() -> Iterator[Pretending]:
    """Pretend that there is a GPU, as long as the context lasts."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) comes through here
    try:
        with Pretending() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, OnGPU) for tensor in tensors)
    asked = kwargs.get("device")
    to_gpu = there if asked is None else torch.device(asked).type == GPU.type
    if not there and not to_gpu:
        return func(*args, **kwargs)
    # Torch's own rules of forward derivatives come as primitives, with tensors that they make.
    if there and func not in COPIES and func.namespace != "prims":
        _require_one_device(func, args, kwargs)
    if asked is not None:
        if kwargs.get("generator") is not None and to_gpu:
            raise RuntimeError(f"{func}: a generator of the CPU cannot draw on {GPU}")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain = pytree.tree_map_only(OnGPU, lambda tensor: tensor.inner, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if kwargs.get("out") is not None:
        return kwargs["out"]
    if args and isinstance(found, Tensor) and found is plain[0][0]:  # written in place
        return args[0]
    return pytree.tree_map_only(Tensor, OnGPU, found) if to_gpu else found


def _require_one_device(func: Any, args: Any, kwargs: Any) -> None:
    looked_at = (args[0], args[2:]) if func in INDEXED else (args, kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(looked_at) if isinstance(leaf, Tensor)]
    if any(not isinstance(tensor, OnGPU) and tensor.ndim for tensor in leaves):
        raise RuntimeError(f"{func}: expected all tensors to be on one device, found GPU and CPU")
