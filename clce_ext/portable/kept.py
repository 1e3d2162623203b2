"""The logits of a small problem, which the forward leaves to the backward: to compute them again would take a
fifth of the step.

They lie behind the statistics, in the same memory. What copies the statistics leaves them behind, and then
the backward computes them again, to the same bits.
"""

from __future__ import annotations

from torch import Tensor

from clce_ext.arguments import Statistics

# Pairs: 4 MiB of logits in float32, 8 in float64.
MOST_KEPT = 2**20


def with_room(rows: Tensor, total: int, numbers: int) -> tuple[Tensor, Tensor]:
    """New statistics [9, total], and room for so many numbers."""
    shape = (len(Statistics._fields), total)
    size = shape[0] * total
    memory = rows.new_empty(size + numbers)
    return memory[:size].view(shape), memory[size:]


def found(statistics: Tensor, numbers: int) -> Tensor | None:
    """What :func:`with_room` gave room for, with these statistics; None behind a copy of them."""
    size, storage = statistics.numel(), statistics.untyped_storage()
    if storage.nbytes() != (size + numbers) * statistics.itemsize or statistics.storage_offset() != 0:
        return None
    return statistics.as_strided((numbers,), (1,), size)
