"""The objectives: stages, what the model gives in each, and the loss. Each is a few lines on the loss family.

ce
    Cross-entropy.
clce
    (1 - lambda) cross-entropy + lambda LACLN on the embeddings that the classifier sees (CLCE, arXiv
    2402.14551).
lacvit
    Stage 1: two views, non-linear projection head, label-aware contrastive loss; stage 2: projection dropped,
    head trained with cross-entropy (LaCViT, arXiv 2303.18013). That the backbone rests in stage 2 is this
    project's reading; ``head_backbone: trained`` is the other one.
supcon
    The same two stages with the supervised contrastive loss (SupCon, arXiv 2004.11362) and its temperature.
schane
    Stage 1: one view, hard-negative contrastive loss on the embeddings themselves (SCHaNe, arXiv 2308.14893);
    stage 2: head trained with cross-entropy. The loss is the paper's; the two stages, without a projection
    head, are this project's reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clce_ext

from .config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One part of a run: ``mode`` names the model's outputs (models.FineTuner), ``criterion`` compares
    them."""

    name: str
    mode: str
    epochs: int
    views: int
    lr: float
    criterion: nn.Module
    mixing: bool = False  # mixup and CutMix apply


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

    def __init__(self, weight: float, label_smoothing: float, **options: Any) -> None:
        super().__init__()
        self.loss = clce_ext.CLCELoss(weight=weight, label_smoothing=label_smoothing, **options)
        self.weight = weight
        self.label_smoothing = label_smoothing
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
                # Over several processes the loss is all's and ce this one's: right in the mean, recorded.
                self.parts["contrast"] = (loss.detach() - (1 - self.weight) * ce) / self.weight
        return loss


def stages(config: TrainConfig) -> list[Stage]:
    """The stages of ``config.objective``, whose epochs add up to ``config.epochs``."""
    views = config.resolved_views
    if config.objective == "ce":
        criterion = CrossEntropy(config.label_smoothing)
        return [Stage("joint", "logits", config.epochs, views, config.lr, criterion, mixing=True)]
    options = _loss_options(config)
    if config.objective == "clce":
        criterion = Joint(config.weight, config.label_smoothing, **options)
        return [Stage("joint", "joint", config.epochs, views, config.lr, criterion, mixing=True)]
    if config.objective in ("supcon", "lacvit"):
        options.pop("beta", None)  # these weigh all negatives alike
    losses = {"supcon": clce_ext.SupConLoss, "lacvit": clce_ext.LaCViTLoss, "schane": clce_ext.SCHaNeLoss}
    contrast = Contrast(losses[config.objective](**options))
    head_epochs = config.resolved_head_epochs
    return [
        Stage("contrast", "contrast", config.epochs - head_epochs, views, config.lr, contrast),
        Stage(
            "head",
            "head" if config.head_backbone == "frozen" else "logits",
            head_epochs,
            1,
            config.head_lr or config.lr,
            CrossEntropy(config.label_smoothing),
            mixing=True,
        ),
    ]


def has_projection(config: TrainConfig) -> bool:
    return config.objective in ("supcon", "lacvit")


def _loss_options(config: TrainConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.temperature is not None:
        options["temperature"] = config.temperature
    if config.beta is not None:
        options["beta"] = config.beta
    if config.distributed_loss != "none":
        options["distributed"] = config.distributed_loss
    return options


def _per_view(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V, C] and [B] -> [B * V, C] and [B * V]."""
    if logits.dim() == 3:
        return logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1])
    return logits, labels
