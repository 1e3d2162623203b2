"""Embeddings to rows: normalised and padded with columns of zeros; and their gradients back."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from clce_ext.arguments import padded

NORM_EPS = 1e-12  # as torch.nn.functional.normalize


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and gradients of rows of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache
def wide_dtype(device_type: str) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def prepare(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """[M, D] to rows [M, padded D], and the lengths [M] that they had: none where they keep them."""
    count, dim = x.shape
    z = x.new_empty((count, padded(dim)))
    z[:, dim:] = 0
    acc = acc_dtype(x.dtype)
    if not normalize:
        z[:, :dim] = x
        return z, x.new_empty(0, dtype=acc)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=acc)
    lengths = norms.clamp_min(NORM_EPS)[:, None]
    if z.dtype == acc:
        torch.div(x, lengths, out=z[:, :dim])
    else:
        z[:, :dim] = x / lengths
    return z, norms


def prepare_backward(
    dz: Tensor, z: Tensor, norms: Tensor, dim: int, order: Tensor | None = None, spare: Tensor | None = None
) -> Tensor:
    """The gradient [M, dim] of what :func:`prepare` was given, by that of its rows, which is overwritten.

    Empty ``norms`` say that rows were not normalised. ``dz[i]`` belongs to row ``order[i]``, or to row i;
    other rows have none. The gradient may be written to ``spare``.
    """
    grad, z, total, dtype = dz[:, :dim], z[:, :dim], z.shape[0], z.dtype
    count = grad.shape[0]

    def own(x: Tensor, of: slice = slice(None)) -> Tensor:
        """What ``x`` has of these rows."""
        return x[of] if order is None else x.index_select(0, order[of])

    if order is None and dz.dtype == dtype and grad.is_contiguous():
        out = grad  # no other memory has to be fetched for it
    elif spare is not None and spare.dtype == dtype and spare.shape == (total, dim):
        out = spare
    else:
        new = dz.new_empty if count == total else dz.new_zeros
        out = new((total, dim), dtype=dtype)
    normalized = norms.numel() > 0
    if normalized:
        norms = own(norms)
        lengths, tiny = norms.clamp_min(NORM_EPS)[:, None], norms < NORM_EPS
    # A few rows at a time, which stay in a CPU's cache.
    block = max(1, 2**17 // dim) if dz.is_cpu else max(1, count)
    for start in range(0, count, block):
        of = slice(start, start + block)
        g = grad[of]
        if normalized:
            row = own(z, of).to(g.dtype)
            # Normalisation drops what lies along the row, but a row shorter than eps was divided by eps, no
            # more.
            along = (g * row).sum(1).masked_fill_(tiny[of], 0)[:, None]
            g.addcmul_(row, along, value=-1).div_(lengths[of])
        if order is not None:
            out.index_copy_(0, order[of], g.to(dtype))
        elif out is not grad:
            out[of] = g
    few = torch.nonzero(tiny)[:, 0] if normalized else ()
    if len(few):
        # What was divided by eps is too large for a float16, and a zero vector must not make a step infinite.
        largest = torch.finfo(torch.float16 if dtype == torch.float16 else dz.dtype).max
        out[few if order is None else order[few]] = grad[few].clamp(-largest, largest).to(dtype)
    return out
