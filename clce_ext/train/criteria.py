"""What a stage minimises, and the halves of it that the records show."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clce_ext


class Criterion(nn.Module):
    """Keeps the values of its last call in ``parts``: ``ce``, ``contrast``, or both.

    ``queue``, where it is set, holds embeddings of past steps as further keys; every call adds its own.
    """

    contrasts = True  # images with each other, so that the whole batch is needed at once

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.queue: clce_ext.EmbeddingQueue | None = None
        self.parts: dict[str, Tensor] = {}

    @property
    def spans_processes(self) -> bool:
        """Whether the loss is of the images of all processes."""
        return self.loss is not None and self.loss.options.get("distributed") is not None

    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        if self.queue is not None:
            self.queue.enqueue(embeddings, labels, gather=self.spans_processes)


class CrossEntropy(Criterion):
    """Cross-entropy of logits [B, C] or [B, V, C] with labels [B], or soft ``targets`` [B, C]."""

    contrasts = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        goal = labels if targets is None else targets
        if logits.dim() == 3:
            logits, goal = logits.flatten(0, 1), goal.repeat_interleave(logits.shape[1], dim=0)
        loss = F.cross_entropy(logits, goal, label_smoothing=self.label_smoothing)
        self.parts = {"ce": loss.detach()}
        return loss


class Contrast(Criterion):
    """A loss of the family on embeddings [B, D] or [B, V, D]."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(embeddings, labels, queue=self.queue)
        self.enqueue(embeddings, labels)
        self.parts = {"contrast": loss.detach()}
        return loss


class Joint(Criterion):
    """CLCE: both halves on one forward pass. With mixup the contrastive half takes each image's dominant
    class."""

    def __init__(self, loss: clce_ext.CLCELoss) -> None:
        super().__init__(loss)
        self.weight = loss.options["weight"]
        self.cross_entropy = CrossEntropy(loss.options["label_smoothing"])

    def forward(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        if targets is not None:
            labels = targets.argmax(dim=1)
        loss = self.loss(logits, embeddings, labels, targets=targets, queue=self.queue)
        self.enqueue(embeddings, labels)
        with torch.no_grad():  # the halves, for the records: a little work beside the loss's own
            ce = self.cross_entropy(logits.float(), labels, targets)
            self.parts = {"ce": ce}
            if self.weight > 0:
                # Over several processes the loss covers all images, ce only this process's. The records
                # average over the processes, and that average is right.
                self.parts["contrast"] = (loss.detach() - (1 - self.weight) * ce) / self.weight
        return loss
