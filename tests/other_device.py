"""A device that is not the host, for tests without one: operations compute on the CPU, and mixing devices raises.

Its name is PyTorch's device without data, `meta`, because autograd takes that without a driver. Tensors on it carry
their values in a CPU tensor inside. As on a GPU, an operation takes tensors of one device, but for single numbers and
for indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.lift_fresh.default}
_TAKES_HOST_INDICES = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._unsafe_index.Tensor,
}

_NEEDS_VALUES = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
_waits: list[str] | None = None


class OtherTensor(Tensor):
    """A tensor on the other device; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def other_device(waits: list[str] | None = None) -> Iterator[torch.device]:
    """While the block runs, tensors can be moved to and made on the returned device.

    `waits` gets the name of every operation for which the host would wait for a GPU: its result is needed here, or its
    size depends on values there, or values go there without ``non_blocking``.
    """
    make = torch.tensor
    autocast = torch.autocast

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(data, **options)  # on `meta`, torch itself would leave the values out
        return made if device is None else made.to(device)

    def new_tensor(self: Tensor, data: Any, **options: Any) -> Tensor:
        return tensor(data, **{"device": self.device, "dtype": self.dtype, **options})

    def without_meta(device_type: str, **options: Any) -> Any:
        return nullcontext() if device_type == DEVICE.type else autocast(device_type, **options)

    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr("tests.other_device._waits", waits)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(Tensor, "new_tensor", new_tensor)
        patch.setattr(torch, "autocast", without_meta)
        patch.setattr(torch, "inference_mode", torch.no_grad)  # made to hold ordinary tensors only
        # A module takes the moved tensors as its parameters; else it would put their values into the old ones.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield DEVICE
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    others = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
    if _waits is not None and _host_waits(func, args, kwargs, others):
        _waits.append(str(func))
    if others and func not in _MOVES | _TAKES_HOST_INDICES:
        on_host = [tensor for tensor in tensors if tensor.dim() > 0 and not isinstance(tensor, OtherTensor)]
        if on_host:
            raise RuntimeError(f"{func} takes tensors of two devices: {[tuple(tensor.shape) for tensor in on_host]}")
    result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if func is torch.ops.aten.copy_.default:
        stays = isinstance(args[0], OtherTensor)
    elif kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == DEVICE.type
    else:
        stays = bool(others)
    return tree_map(lambda value: _outside(value, others), result) if stays else result


def _host_waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], others: list[OtherTensor]) -> bool:
    if func is torch.ops.aten._to_copy.default:
        goes_there = torch.device(kwargs.get("device") or args[0].device).type == DEVICE.type
        return goes_there != bool(others) and not (goes_there and kwargs.get("non_blocking"))
    if func is torch.ops.aten.copy_.default:
        return len(others) == 1
    if others and func in _TAKES_HOST_INDICES:
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        return any(index.dtype == torch.bool or not isinstance(index, OtherTensor) for index in indices)
    return bool(others) and func in _NEEDS_VALUES


def _inside(value: Any) -> Any:
    if isinstance(value, OtherTensor):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _outside(value: Any, others: list[OtherTensor]) -> Any:
    """A result on the other device; an operation in place gives back the very tensor that it was given."""
    if not isinstance(value, Tensor):
        return value
    return next((other for other in others if other.inner is value), OtherTensor(value))
