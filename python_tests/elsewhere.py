"""A device of its own kind, "elsewhere": torch's private-use key with the CPU's operations behind it.

Importing it registers the device for the whole process, so tests do it in a process of their own. It stands
for devices that clce_ext has no kernels for: what is not told to move stays there, and no CPU tensors mix in.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")

# By its storage: a tensor there (kept, or the address would be used again), and one here with its data.
_tensors: dict[int, tuple[Tensor, Tensor]] = {}
_library = torch.library.Library("aten", "IMPL")


def there(tensor: Tensor) -> Tensor:
    """A tensor elsewhere, of that CPU tensor's memory."""
    result = torch._C._acc.create_empty_tensor(tensor.shape, tensor.dtype)
    _tensors[result.untyped_storage()._cdata] = (result, tensor)
    return result


def here(tensor: Tensor) -> Tensor:
    return _tensors[tensor.untyped_storage()._cdata][1]


def _run(op, *args, **kwargs):
    """The op on the tensors here; tensors that it gives back are there."""
    given = {}

    def unwrap(x):
        if isinstance(x, Tensor) and x.device.type == "elsewhere":
            given[id(here(x))] = x
            return here(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    if op is torch.ops.aten._copy_from.default:
        plain_args[1].copy_(plain_args[0])
        return args[1]
    for x in plain_args:
        if isinstance(x, Tensor) and not any(x is here(y) for y in given.values()):
            assert x.dim() == 0, f"{op}: a CPU tensor among those elsewhere"
    result = op(*plain_args, **plain_kwargs)
    if kwargs.get("device") == torch.device("cpu"):
        return result
    wrap = lambda x: given[id(x)] if id(x) in given else there(x)  # noqa: E731
    return tree_map(lambda x: wrap(x) if isinstance(x, Tensor) else x, result)


def _register() -> None:
    """All operations that are not made of others."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op_name = name.partition("::")
        if namespace != "aten" or any(
            torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
            for key in ("CompositeImplicitAutograd", "PrivateUse1")
        ):
            continue
        packet, _, overload = op_name.partition(".")
        try:
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        except AttributeError:  # not for Python
            continue
        _library.impl(op_name, functools.partial(_run, op), "PrivateUse1")


_register()
