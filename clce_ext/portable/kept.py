"""Logits that the forward leaves to the backward: of a small problem all, of a large one those of the first
panels. To compute them again takes a small problem a fifth of its step.

They lie behind the statistics, in the same memory. What copies the statistics leaves them behind, and then
the backward computes them again, to the same bits.
"""

from __future__ import annotations

from torch import Tensor

from clce_ext.arguments import Statistics

# 4 MiB of float32.
MOST = 2**20


def with_room(rows: Tensor, total: int, numbers: int) -> tuple[Tensor, Tensor]:
    """New statistics [9, total], and room for at most so many numbers."""
    shape = (len(Statistics._fields), total)
    size = shape[0] * total
    memory = rows.new_empty(size + min(numbers, MOST))
    return memory[:size].view(shape), memory[size:]


def found(statistics: Tensor, numbers: int) -> Tensor | None:
    """What :func:`with_room` gave room for, with these statistics."""
    size, room = statistics.numel(), min(numbers, MOST)
    is_whole = statistics.untyped_storage().nbytes() == (size + room) * statistics.itemsize
    if not is_whole or statistics.storage_offset() != 0 or room == 0:
        return None
    return statistics.as_strided((room,), (1,), size)
