"""Labels that no caller gives: of images without labels, and of a queue's entries that count for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a queue's entries that were enqueued without labels: no other image has it.
UNLABELLED = torch.iinfo(torch.int64).min
# Of a queue's entries that are empty or were enqueued to be ignored, whatever the loss's ignore_index is.
IGNORED = UNLABELLED + 1


def own_class_labels(images: int, ignore_index: int, device: torch.device, rank: int = 0) -> Tensor:
    """[images] labels that make each image a class of its own, among all ranks and beside any queue.

    None of them is ``ignore_index``.
    """
    labels = torch.arange(images, device=device) + (rank << 40)
    return labels if ignore_index < 0 else ~labels
