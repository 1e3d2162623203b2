"""The compiled part, where there is one: the kernels of torch.ops.clce_ext_backend, and how it was built.

It is a library without Python (``libclce_ext.so``) which registers its kernels when it is loaded. What else
Python needs of it goes through ctypes.
"""

from __future__ import annotations

import ctypes
import json
import sys
import warnings
from pathlib import Path

import torch

BUILD_IT = "`python setup.py build_ext --inplace` or `pip install --no-build-isolation .`"
PATH = Path(__file__).with_name("libclce_ext.dll" if sys.platform == "win32" else "libclce_ext.so")


class Library:
    """The library, loaded.

    Attributes:
        facts: how it was built, what it uses here, its constants.
    """

    def __init__(self, path: Path):
        torch.ops.load_library(path)
        self._functions = ctypes.CDLL(str(path))
        self._functions.clce_ext_facts.restype = ctypes.c_char_p
        self._functions.clce_ext_use_engine.restype = ctypes.c_bool
        self.facts: dict = json.loads(self._functions.clce_ext_facts())
        self.facts["cuda_archs"] = self.facts["cuda_archs"].split("+") if self.facts["cuda"] else []
        self._allow_tf32 = False

    def use_engine(self, name: str) -> None:
        """ "fused", "panels", or "" for the plan's choice."""
        if not self._functions.clce_ext_use_engine(name.encode()):
            raise ValueError(f"engine must be 'fused', 'panels' or '', got {name!r}")

    def allow_tf32(self, allowed: bool) -> None:
        """Whether float32 products on a GPU may round their operands to TF32, from now on."""
        if allowed != self._allow_tf32:
            self._allow_tf32 = allowed
            self._functions.clce_ext_allow_tf32(ctypes.c_bool(allowed))


def _load() -> Library | None:
    if not PATH.exists():
        return None
    try:
        return Library(PATH)
    except OSError as error:
        warnings.warn(
            f"clce_ext's compiled part does not load with torch {torch.__version__} (it needs 2.10 or "
            f"later), or is broken: build it again with {BUILD_IT}. Until then clce_ext computes in plain "
            f"torch operations. ({error})",
            stacklevel=4,
        )
        return None


# None where it is missing or does not load.
C = _load()

# Kinds of device that there are kernels for.
DEVICE_TYPES: frozenset[str] = frozenset(["cpu", *(["cuda"] if C.facts["cuda"] else [])] if C else [])
# What can be asked for by CLCE_ENGINE, apart from "portable".
ENGINES: tuple[str, ...] = (("fused", "panels") if C.facts["cuda"] else ("fused",)) if C else ()
