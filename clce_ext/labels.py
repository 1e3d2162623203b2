"""Labels that no caller gives, of images and of a queue's entries; what wrong shapes were meant to be."""

from __future__ import annotations

from collections.abc import Sequence

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


def shape_hint(labels: Tensor, shape: Sequence[int]) -> str:
    """What was probably meant where ``labels`` are not [B] for embeddings or logits of ``shape`` [B, ...]."""
    if labels.dim() == 2 and labels.shape[0] == shape[0]:
        return "; one-hot or one-column labels become class indices by labels.argmax(dim=1) or labels[:, 0]"
    if labels.dim() == 1 and len(shape) == 3 and labels.shape[0] == shape[1]:
        return (
            f"; {list(shape)} looks like [views, images, ...], and [images, views, ...] is wanted: "
            "transpose(0, 1)"
        )
    if labels.dim() == 1 and len(shape) == 2 and shape[0] == 2 * labels.shape[0] > 0:
        return "; two views of each image are given as [images, 2, ...]: torch.stack([first, second], dim=1)"
    return ""


def check_shape(labels: Tensor, shape: Sequence[int]) -> None:
    """Refuses labels that are not [B] for embeddings or logits of ``shape`` [B, ...] (ValueError)."""
    if labels.dim() != 1 or labels.shape[0] != shape[0]:
        raise ValueError(
            f"labels must have shape [{shape[0]}], one label per image, got {list(labels.shape)}"
            + shape_hint(labels, shape)
        )
