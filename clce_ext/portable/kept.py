"""The logits of a small problem, which the forward leaves to the backward: to compute them again would take a
fifth of the step.

They lie behind the statistics, in the same memory. What copies the statistics leaves them behind, and then
the backward computes them again, to the same bits.
"""

from __future__ import annotations

from torch import Tensor

from clce_ext.arguments import Statistics

# 4 MiB of float32, 8 of float64.
MOST = 2**20


def with_room(rows: Tensor, total: int, numbers: int) -> tuple[Tensor, Tensor | None]:
    """New statistics [9, total] and, unless they are too many, room for so many numbers."""
    shape = (len(Statistics._fields), total)
    if not is_small(numbers):
        return rows.new_empty(shape), None
    size = shape[0] * total
    memory = rows.new_empty(size + numbers)
    return memory[:size].view(shape), memory[size:]


def found(statistics: Tensor, numbers: int) -> Tensor | None:
    """What :func:`with_room` gave room for, with these statistics."""
    size, storage = statistics.numel(), statistics.untyped_storage()
    is_whole = storage.nbytes() == (size + numbers) * statistics.itemsize
    if not is_small(numbers) or not is_whole or statistics.storage_offset() != 0:
        return None
    return statistics.as_strided((numbers,), (1,), size)


def is_small(numbers: int) -> bool:
    return 0 < numbers <= MOST
