"""What computes on which device: compiled kernels where there are some, otherwise plain torch operations.

The ops of torch.ops.clce_ext_backend compute and check nothing; those of torch.ops.clce_ext (ops.py) check
their arguments and call them. Kernels are registered for their kinds of device by the compiled part, the
portable backend is registered here for all others (CompositeExplicitAutograd). So torch's dispatcher chooses,
and no call pays for it.

Environment:
    CLCE_ENGINE    "portable", or an engine of the compiled part ("fused", "panels"): compute in this way or
                   raise ValueError; for tests and benchmarks
    CLCE_PORTABLE  "0": NotImplementedError where only the portable backend could compute
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from clce_ext.compiled import BUILD_IT, DEVICE_TYPES, ENGINES, C
from clce_ext.portable.ops import OPS

_engine: str | None = None  # asked for by CLCE_ENGINE
# Of the kernels, where the portable backend shall replace them.
_overrides: torch.library.Library | None = None
_warned = False


def use_engine(engine: str | None) -> None:
    """As CLCE_ENGINE: None is the kernels where there are some. An error waits for the first call."""
    global _engine, _overrides
    _engine = engine
    if _overrides is not None:
        _overrides._destroy()  # the kernels are what they were
        _overrides = None
    if C is not None:
        C.use_engine(engine if engine in ENGINES else "")
    if engine is None or engine in ENGINES:
        return
    _overrides = torch.library.Library("clce_ext_backend", "IMPL")
    for name, op in OPS.items():
        for device_type in DEVICE_TYPES:
            _overrides.impl(name, _served(op), device_type.upper(), allow_override=True)


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """:func:`use_engine` for a while. Not for several threads."""
    before = _engine
    use_engine(name)
    try:
        yield
    finally:
        use_engine(before)


def serving(device_type: str) -> str:
    """What computes on a kind of device: "kernels", or "portable"."""
    return "kernels" if device_type in DEVICE_TYPES and _engine != "portable" else "portable"


def check_device(device: torch.device) -> None:
    """Refuses what a call with tensors on this device would be refused for."""
    if device.type not in DEVICE_TYPES or _overrides is not None:
        _allow_portable(device)


def register() -> None:
    """The portable backend for all devices without kernels; what CLCE_ENGINE says. Once, after schemas."""
    for name, op in OPS.items():
        _library.impl(name, _served(op), "CompositeExplicitAutograd")
    use_engine(os.environ.get("CLCE_ENGINE") or None)


def follow_switches(tensor: torch.Tensor) -> None:
    """Tells the kernels what torch's switches say, which they cannot ask for themselves. Before a forward."""
    if tensor.is_cuda and tensor.dtype == torch.float32 and C is not None:
        C.allow_tf32(torch.backends.cuda.matmul.fp32_precision == "tf32")


_library = torch.library.Library("clce_ext_backend", "IMPL")


def _served(op: Callable) -> Callable:
    """The op as the dispatcher calls it: if it may, and without autograd and autocast, as a kernel runs."""

    @functools.wraps(op)
    def call(*args):
        device = next(x for x in args if isinstance(x, torch.Tensor)).device
        _allow_portable(device)
        with torch.no_grad(), _no_autocast(device.type):
            return op(*args)

    return call


def _no_autocast(device_type: str) -> AbstractContextManager:
    if not torch.is_autocast_enabled(device_type):  # not all kinds of device know autocast
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _allow_portable(device: torch.device) -> None:
    global _warned
    if _engine not in (None, "portable"):
        if _engine in ENGINES:
            raise ValueError(f"CLCE_ENGINE={_engine!r} has no kernels for {device}")
        choices = ", ".join(repr(name) for name in (*ENGINES, "portable"))
        raise ValueError(f"CLCE_ENGINE must be one of {choices} here, got {_engine!r}")
    if os.environ.get("CLCE_PORTABLE") == "0":
        raise NotImplementedError(
            f"embeddings are on {device} but {_why(device.type)}, and CLCE_PORTABLE=0 forbids to compute in "
            "plain torch operations; clce_ext.build_info() tells more"
        )
    if _engine is None and not _warned:
        _warned = True
        warnings.warn(
            f"clce_ext computes on {device} in plain torch operations, which is slower than its kernels: "
            f"{_why(device.type)}; clce_ext.build_info() tells more, CLCE_PORTABLE=0 makes this an error",
            stacklevel=3,
        )


def _why(device_type: str) -> str:
    if C is None:
        return f"clce_ext's compiled part is missing (build it with {BUILD_IT})"
    if device_type == "cuda":
        return (
            "this clce_ext was built without CUDA kernels "
            "(install a CUDA torch and its toolkit, set CUDA_HOME, build again)"
        )
    return f"clce_ext has no kernels for this kind of device (but for {', '.join(sorted(DEVICE_TYPES))})"
