"""The losses of an epoch, summed where they are: on the device, which the host need not wait for."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import Processes


class RunningLosses:
    """Sums of this process's losses, each weighed by its count, and the first that was not finite."""

    def __init__(self, group: Processes, sums: dict[str, list[float]] | None = None) -> None:
        self.group = group
        self.names: list[str] = []
        self.count = 0.0
        self.totals: Tensor | None = None
        if sums:
            self.names = list(sums)
            totals, counts = zip(*sums.values(), strict=True)
            self.count = counts[0]
            self.totals = torch.tensor(totals, dtype=torch.float64, device=group.device)
        self.values: Tensor | None = None  # of the last step
        self.odd_values: Tensor | None = None  # of the first step that was not finite
        self.odd_step = torch.full((), -1, device=group.device)

    def add(self, losses: dict[str, Tensor], count: int, step: int) -> None:
        self.names = list(losses)
        self.values = torch.stack([value.double() for value in losses.values()])
        is_first = (self.odd_step < 0) & ~self.values.isfinite().all()
        self.odd_step = torch.where(is_first, step, self.odd_step)
        before = self.values if self.odd_values is None else self.odd_values
        self.odd_values = torch.where(is_first, self.values, before)
        added = self.values * count
        self.totals = added if self.totals is None else self.totals + added
        self.count += count

    def not_finite(self) -> tuple[int, dict[str, float]] | None:
        """The first step at which some process's losses were not finite, and these losses. All processes
        call this together; waits for the device."""
        latest = self.odd_step.clone()
        if self.group.world_size > 1:
            dist.all_reduce(latest, dist.ReduceOp.MAX)
        if int(latest) < 0:
            return None
        step = int(self.odd_step)
        found = self.group.gather((step, self._named(self.odd_values)) if step >= 0 else None)
        return min((one for one in found if one is not None), key=lambda one: one[0])

    def last(self) -> dict[str, float]:
        """Of the last step; waits for the device."""
        return self._named(self.values)

    def sums(self) -> dict[str, list[float]]:
        """(sum, count) by name; waits for the device."""
        return {name: [total, self.count] for name, total in self._named(self.totals).items()}

    def means(self) -> dict[str, float]:
        """Of all processes, which call this together, by name; waits for the device."""
        every = self.group.gather(self.sums())
        return {
            name: sum(sums[name][0] for sums in every) / sum(sums[name][1] for sums in every)
            for name in self.names
        }

    def _named(self, values: Tensor | None) -> dict[str, float]:
        return {} if values is None else dict(zip(self.names, values.tolist(), strict=True))
