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


def prepare_backward(dz: Tensor, rows: Tensor, norms: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """The gradient [M, dim] of what :func:`prepare` was given, by that of its rows, which it may overwrite.

    Empty ``norms`` say that rows were not normalised.
    """
    grad = dz[:, :dim]
    if norms.numel() == 0:
        return grad.to(dtype).contiguous()
    rows = rows[:, :dim].to(grad.dtype)
    tiny = norms < NORM_EPS
    # Normalisation drops what lies along the row, but a row shorter than eps was divided by eps, no more.
    along = torch.where(tiny, 0, torch.linalg.vecdot(rows, grad))[:, None]
    grad.addcmul_(rows, along, value=-1).div_(norms.clamp_min(NORM_EPS)[:, None])
    # What was divided by eps is too large for a float16, and a zero vector must not make a step infinite.
    largest = torch.finfo(torch.float16 if dtype == torch.float16 else grad.dtype).max
    bound = torch.full_like(norms, torch.inf).masked_fill_(tiny, largest)[:, None]
    return grad.clamp_(-bound, bound).to(dtype).contiguous()
