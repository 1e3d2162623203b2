"""What a stage minimises, and the halves of it that the records show.

Every criterion keeps the values of its last call in ``parts``: ``ce``, ``contrast``, or both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clce_ext


class CrossEntropy(nn.Module):
    """Cross-entropy of logits [B, C] or [B, V, C] with labels [B], or soft ``targets`` [B, C]."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.parts: dict[str, Tensor] = {}

    def forward(self, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        logits, labels = _per_view(logits, labels)
        loss = F.cross_entropy(
            logits, labels if targets is None else targets, label_smoothing=self.label_smoothing
        )
        self.parts = {"ce": loss.detach()}
        return loss


class Contrast(nn.Module):
    """A loss of the family on embeddings [B, D] or [B, V, D]."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.parts: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(embeddings, labels)
        self.parts = {"contrast": loss.detach()}
        return loss


class Joint(nn.Module):
    """CLCE: both halves on one forward pass. With mixup the contrastive half takes each image's dominant
    class."""

    def __init__(self, loss: clce_ext.CLCELoss) -> None:
        super().__init__()
        self.loss = loss
        self.weight = loss.options["weight"]
        self.label_smoothing = loss.options["label_smoothing"]
        self.parts: dict[str, Tensor] = {}

    def forward(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        if targets is not None:
            labels = targets.argmax(dim=1)
        loss = self.loss(logits, embeddings, labels, targets=targets)
        flat_logits, flat_labels = _per_view(logits, labels)
        with torch.no_grad():  # the halves, for the records: a little work beside the loss's own
            goal = flat_labels if targets is None else targets
            ce = F.cross_entropy(flat_logits.float(), goal, label_smoothing=self.label_smoothing)
            self.parts = {"ce": ce}
            if self.weight > 0:
                # Over several processes the loss covers all images, ce only this process's. The records
                # average over the processes, and that average is right.
                self.parts["contrast"] = (loss.detach() - (1 - self.weight) * ce) / self.weight
        return loss


def _per_view(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V, C] and [B] -> [B * V, C] and [B * V]."""
    if logits.dim() == 3:
        return logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1])
    return logits, labels
