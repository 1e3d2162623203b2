"""What this installation of clce_ext can run."""

from __future__ import annotations

from importlib import metadata

from clce_ext import backends
from clce_ext.compiled import C


def version() -> str:
    if C is not None:
        return C.facts["version"]
    try:
        return metadata.version("clce_ext")
    except metadata.PackageNotFoundError:  # a copy of the sources
        return "unknown"


def build_info() -> dict:
    """How clce_ext was built and what it uses here.

    Returns:
        dict with ``version``; ``torch``, the version it was built with; ``cpu_capability``, the instruction
        set its CPU kernels use on this machine ("avx512", "avx2" or "baseline"); ``blas``, what multiplies
        their tiles; ``cuda``, the toolkit's version or None for a build without CUDA kernels;
        ``cuda_archs``, the architectures those are compiled for; ``features``, a list of names;
        ``backends``, what computes on which kind of device: "kernels", or "portable", plain torch
        operations. Where nothing is compiled, what says how it was is None.
    """
    info = {"version": version(), "torch": None, "cuda": None, "cuda_archs": [], "blas": None}
    info["cpu_capability"] = None
    if C is not None:
        info |= {name: C.facts[name] for name in info}
    info["features"] = (["cpu"] if C else []) + (["cuda"] if info["cuda"] else [])
    kinds = ("cpu", "cuda", "mps", "xpu")
    info["backends"] = {kind: backends.serving(kind) for kind in kinds} | {"others": "portable"}
    return info
