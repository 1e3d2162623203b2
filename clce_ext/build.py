"""What this installation of clce_ext can run."""

from __future__ import annotations

from clce_ext import _C


def build_info() -> dict:
    """How clce_ext was built and what it uses here.

    Returns:
        dict with ``version``; ``torch``, the version it was built with; ``cpu_capability``, the instruction
        set its CPU kernels use on this machine ("avx512", "avx2" or "baseline"); ``blas``, what multiplies
        their tiles; ``cuda``, the toolkit's version or None for a build without CUDA kernels;
        ``cuda_archs``, the architectures those are compiled for; ``features``, a list of names.
    """
    info = _C.build()
    info["cpu_capability"] = _C.cpu_capability()
    info["features"] = ["cpu"] + (["cuda"] if info["cuda"] else [])
    return info
