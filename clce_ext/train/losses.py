"""The losses of an epoch, summed where they are: on the device, which the host need not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Processes


class RunningLosses:
    """Sums of this process's losses, each weighed by its count, and the first that was not finite."""

    def __init__(self, group: Processes, sums: dict[str, list[float]] | None = None) -> None:
        self.group, self.names = group, list(sums or {})
        totals, counts = zip(*sums.values(), strict=True) if sums else ((0.0,), (0.0,))
        self.totals = torch.tensor(totals, dtype=torch.float64, device=group.device)
        self.count = counts[0]
        self.values = torch.zeros_like(self.totals)  # of the last step
        self.odd = torch.full_like(self.totals[:1], -1)  # step and values of the first that was not finite

    def add(self, losses: dict[str, Tensor], count: int, step: int) -> None:
        self.names = list(losses)
        self.values = torch.stack([value.double() for value in losses.values()])
        is_first = (self.odd[0] < 0) & ~self.values.isfinite().all()
        now = torch.cat([torch.full_like(self.values[:1], step), self.values])
        self.odd = torch.where(is_first, now, self.odd)
        self.totals = self.totals + self.values * count
        self.count += count

    def not_finite(self) -> tuple[int, dict[str, float]] | None:
        """The first step at which some process's losses were not finite, and these losses. All processes
        call this together; waits for the device."""
        step, *values = self.odd.tolist()
        found = self.group.gather((int(step), dict(zip(self.names, values, strict=False))))
        return min((one for one in found if one[0] >= 0), key=lambda one: one[0], default=None)

    def last(self) -> dict[str, float]:
        """Of the last step; waits for the device."""
        return self._named(self.values)

    def sums(self) -> dict[str, list[float]]:
        """(sum, count) by name; waits for the device."""
        return {name: [total, self.count] for name, total in self._named(self.totals).items()}

    def means(self) -> dict[str, float]:
        """Of all processes, which call this together, by name; waits for the device."""
        every = self.group.gather(self.sums())
        count = sum(sums[self.names[0]][1] for sums in every)
        return {name: sum(sums[name][0] for sums in every) / count for name in self.names}

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=False))
