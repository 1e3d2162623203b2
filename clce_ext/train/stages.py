"""The stages of a run: what the model gives in each, for how many epochs, and what is minimised."""

from __future__ import annotations

from dataclasses import dataclass

from .config import TrainConfig
from .criteria import Contrast, Criterion, CrossEntropy, Joint
from .objectives import OBJECTIVES, Objective


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
    mixing: bool  # mixup and CutMix apply: the criterion has a cross-entropy that takes mixed labels


def stages(config: TrainConfig, world_size: int = 1) -> list[Stage]:
    """The stages of ``config.objective``, whose epochs add up to ``config.epochs``."""
    objective = OBJECTIVES[config.objective]
    if not config.epochs:
        return []
    head_epochs = config.resolved_head_epochs if objective.two_stage else 0
    first_epochs = config.epochs - head_epochs
    first = Stage(
        "contrast" if objective.two_stage else "joint",
        objective.outputs,
        first_epochs,
        config.resolved_views,
        config.resolved_lr,
        config.resolved_head_lr,
        min(config.warmup_epochs, first_epochs / 2),
        _criterion(objective, config, world_size),
        mixing=not objective.two_stage,
    )
    if not objective.two_stage:
        return [first]
    head = Stage(
        "head",
        "head" if config.head_backbone == "frozen" else "logits",
        head_epochs,
        1,
        config.head_lr or config.resolved_lr,
        config.resolved_head_lr,
        min(config.warmup_epochs, head_epochs / 2),
        CrossEntropy(config.label_smoothing),
        mixing=True,
    )
    return [first, head]


def _criterion(objective: Objective, config: TrainConfig, world_size: int) -> Criterion:
    if objective.loss is None:
        return CrossEntropy(config.label_smoothing)
    # An option that was not given is left to the loss.
    options = {name: getattr(config, name) for name in objective.options if name != "queue_size"}
    options = {name: value for name, value in options.items() if value is not None}
    if world_size > 1 and config.distributed_loss != "none":
        options["distributed"] = config.distributed_loss or "gather"
    return (Joint if objective.outputs == "joint" else Contrast)(objective.loss(**options))
