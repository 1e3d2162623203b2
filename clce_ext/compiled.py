"""The compiled part, where there is one: its kernels for torch.ops.clce_ext, and how it was built."""

from __future__ import annotations

import importlib
import warnings

import torch  # noqa: F401  (loads the libraries that _C links to)

BUILD_IT = "`python setup.py build_ext --inplace` or `pip install --no-build-isolation .`"

try:
    # clce_ext._C: importing it registers the kernels. None where it is missing or does not load.
    C = importlib.import_module("clce_ext._C")
except ModuleNotFoundError:  # no .so for this Python
    C = None
except ImportError as error:
    C = None
    warnings.warn(
        "clce_ext's compiled part was built for another torch, or is broken: build it again with "
        f"{BUILD_IT}. Until then clce_ext computes in plain torch operations. ({error})",
        stacklevel=2,
    )

# Kinds of device that there are kernels for.
DEVICE_TYPES: frozenset[str] = frozenset(C.DEVICE_TYPES if C else ())
# What can be asked for by CLCE_ENGINE, apart from "portable".
ENGINES: tuple[str, ...] = tuple(C.ENGINES) if C else ()
