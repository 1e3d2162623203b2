"""Statistics of disjoint key sets, merged in float64 (csrc/family/statistics.h says what they are)."""

from __future__ import annotations

import torch
from torch import Tensor

from clce_ext.arguments import Statistics

_SUMS = ("n_pos", "n_neg", "sum_pos")
_LOGARITHMS = ("lse_pos", "lse_w", "lse_wn")  # of sums of exponentials; each has a low part


class MergedStatistics:
    """The statistics [9, M] of a growing set of keys."""

    def __init__(self, first: Tensor):
        self.only: Tensor | None = first
        self.dtype = first.dtype
        self.sums, self.logarithms = _in_float64(first)

    def add(self, statistics: Tensor):
        sums, logarithms = _in_float64(statistics)
        self.sums = self.sums + sums
        self.logarithms = torch.logaddexp(self.logarithms, logarithms)
        self.only = None

    def result(self) -> Tensor:
        """[9, M] in the dtype of what was merged."""
        if self.only is not None:
            return self.only
        high = self.logarithms.to(self.dtype)
        low = torch.where(high.isfinite(), self.logarithms - high, 0).to(self.dtype)
        rows = dict(zip(_SUMS, self.sums.to(self.dtype), strict=True))
        for name, high_part, low_part in zip(_LOGARITHMS, high, low, strict=True):
            rows[name], rows[f"{name}_low"] = high_part, low_part
        return torch.stack(Statistics(**rows))


def _in_float64(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """[3, M] counts and sums, and [3, M] logarithms with their low parts."""
    rows = Statistics(*statistics.double())
    sums = torch.stack([getattr(rows, name) for name in _SUMS])
    high = torch.stack([getattr(rows, name) for name in _LOGARITHMS])
    return sums, high + torch.stack([getattr(rows, f"{name}_low") for name in _LOGARITHMS])
