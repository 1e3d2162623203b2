"""The stages of a run: what the model gives in each, for how many epochs, and what is minimised."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import clce_ext

from .config import TrainConfig
from .objectives import OBJECTIVES


class Criterion(nn.Module):
    """Cross-entropy, a contrastive ``loss`` of the family, or CLCE, which is both.

    Called with the model's outputs (models.FineTuner) and labels [B]: with logits [B, C] or [B, V, C], with
    embeddings [B, D] or [B, V, D], or with both. Where images are mixed the cross-entropy takes soft
    ``targets`` [B, C], and contrast takes each image's dominant class.

    Keeps the values of its last call in ``parts``: ``ce``, ``contrast``, or both. ``queue``, where it is set,
    holds embeddings of past steps as further keys; every call adds its own.
    """

    def __init__(self, loss: nn.Module | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.loss, self.label_smoothing = loss, label_smoothing
        self.contrasts = loss is not None  # images with each other, so that the whole batch is needed at once
        self.spans_processes = self.contrasts and loss.options.get("distributed") is not None
        self.queue: clce_ext.EmbeddingQueue | None = None
        self.parts: dict[str, Tensor] = {}

    def forward(self, *inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        *outputs, labels = inputs
        if not self.contrasts:
            loss = self._cross_entropy(outputs[0], labels if targets is None else targets)
            self.parts = {"ce": loss.detach()}
            return loss
        goal = labels if targets is None else targets
        labels = labels if targets is None else targets.argmax(dim=1)
        is_joint = len(outputs) == 2
        mixed = {"targets": targets} if is_joint else {}
        loss = self.loss(*outputs, labels, queue=self.queue, **mixed)
        if self.queue is not None:
            self.queue.enqueue(outputs[-1], labels, gather=self.spans_processes)
        self.parts = {"contrast": loss.detach()}
        if is_joint:
            self.parts = self._halves(loss.detach(), outputs[0].detach(), goal)
        return loss

    def _halves(self, loss: Tensor, logits: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """Of CLCE, for the records: a little work beside the loss's own."""
        ce, weight = self._cross_entropy(logits.float(), goal), self.loss.options["weight"]
        if not weight:
            return {"ce": ce}
        # Over several processes the loss covers all images, ce only this process's. The records average over
        # the processes, and that average is right.
        return {"ce": ce, "contrast": (loss - (1 - weight) * ce) / weight}

    def _cross_entropy(self, logits: Tensor, goal: Tensor) -> Tensor:
        if logits.dim() == 3:
            logits, goal = logits.flatten(0, 1), goal.repeat_interleave(logits.shape[1], dim=0)
        return F.cross_entropy(logits, goal, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Stage:
    """One part of a run: ``mode`` names the model's outputs (models.FineTuner), ``criterion`` takes them."""

    name: str
    mode: str
    epochs: int
    views: int
    lr: float
    classifier_lr: float
    warmup_epochs: float
    criterion: Criterion

    @property
    def mixing(self) -> bool:
        """Whether mixup and CutMix apply: there is a cross-entropy, which takes mixed labels."""
        return self.mode != "contrast"


def stages(config: TrainConfig, world_size: int = 1) -> list[Stage]:
    """The stages of ``config.objective``, whose epochs add up to ``config.epochs``."""
    objective, smoothing = OBJECTIVES[config.objective], config.label_smoothing
    head_epochs = config.resolved_head_epochs if objective.two_stage else 0
    epochs = config.epochs - head_epochs
    loss = None
    if objective.loss is not None:
        # An option that was not given is left to the loss.
        names = [name for name in objective.options if name != "queue_size"]
        options = {name: value for name in names if (value := getattr(config, name)) is not None}
        if world_size > 1 and config.distributed_loss != "none":
            options["distributed"] = config.distributed_loss or "gather"
        loss = objective.loss(**options)
    first = Stage(
        "contrast" if objective.two_stage else "joint",
        objective.outputs,
        epochs,
        config.resolved_views,
        config.resolved_lr,
        config.resolved_head_lr,
        min(config.warmup_epochs, epochs / 2),
        Criterion(loss, smoothing),
    )
    head = Stage(
        "head",
        "head" if config.head_backbone == "frozen" else "logits",
        head_epochs,
        1,
        config.head_lr or config.resolved_lr,
        config.resolved_head_lr,
        min(config.warmup_epochs, head_epochs / 2),
        Criterion(label_smoothing=smoothing),
    )
    return [stage for stage in (first, head) if stage.epochs > 0 and config.epochs]
