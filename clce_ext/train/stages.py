"""The stages of a run: what the model gives in each, for how many epochs, and what is minimised."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .config import TrainConfig
from .criteria import Contrast, CrossEntropy, Joint
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
    criterion: nn.Module
    mixing: bool  # mixup and CutMix apply


def stages(config: TrainConfig) -> list[Stage]:
    """The stages of ``config.objective``, whose epochs add up to ``config.epochs``."""
    objective = OBJECTIVES[config.objective]
    head_epochs = config.resolved_head_epochs if objective.two_stage else 0
    first = Stage(
        "contrast" if objective.two_stage else "joint",
        objective.outputs,
        config.epochs - head_epochs,
        config.resolved_views,
        config.lr,
        config.resolved_head_lr,
        _criterion(objective, config),
        mixing=objective.soft_targets,
    )
    if not objective.two_stage:
        return [first]
    head = Stage(
        "head",
        "head" if config.head_backbone == "frozen" else "logits",
        head_epochs,
        1,
        config.head_lr or config.lr,
        config.resolved_head_lr,
        CrossEntropy(config.label_smoothing),
        mixing=True,
    )
    return [first, head]


def _criterion(objective: Objective, config: TrainConfig) -> nn.Module:
    if objective.loss is None:
        return CrossEntropy(config.label_smoothing)
    options = {name: getattr(config, name) for name in objective.options}
    if config.distributed_loss != "none":
        options["distributed"] = config.distributed_loss
    # An option that was not given is left to the loss.
    loss = objective.loss(**{name: value for name, value in options.items() if value is not None})
    return Joint(loss) if objective.outputs == "joint" else Contrast(loss)
