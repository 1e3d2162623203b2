"""What one stage needs to update the model: batches, optimizer, schedule, loss, averaged weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..gradcache import GradCache
from .config import TrainConfig
from .data import Data, training_loader
from .errors import timm_makes
from .judge import autocast
from .models import FineTuner, parameter_groups
from .processes import Processes
from .stages import Stage


class Trainer:
    """Updates ``model`` as ``stage`` asks.

    ``loader`` gives the batches of the epoch that ``sampler`` is set to. A step is ``gradients``, then
    ``update``.
    """

    def __init__(
        self,
        stage: Stage,
        model: FineTuner,
        data: Data,
        config: TrainConfig,
        input_config: dict[str, Any],
        group: Processes,
    ) -> None:
        model.set_mode(stage.mode)
        model.zero_grad(set_to_none=True)  # what the stage before left on parameters that now rest
        self.stage, self.model, self.config, self.device = stage, model, config, group.device
        self.loader, self.sampler = training_loader(
            data.train, config, input_config, stage.views, group.rank, group.world_size
        )
        self.optimizer = _optimizer(stage, model, config)
        self.scheduler = _scheduler(stage, self.optimizer, len(self.sampler), config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")
        self.averaged = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
        self.criterion = stage.criterion.to(self.device)
        self.net = _wrapped(model, config, group)
        self.grad_cache = None
        if config.micro_batch_size and config.micro_batch_size < config.batch_size:
            self.grad_cache = GradCache(self.net, self.criterion, config.micro_batch_size, self.scaler)
        self.mixup = _mixup(config, len(data.classes)) if stage.mixing else None

    @property
    def evaluated_model(self) -> FineTuner:
        """The averaged weights, where there are any: these are evaluated, and the next stage starts there."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def learning_rate(self) -> float:
        """The largest of the backbone's, or the classifier's where it alone is trained."""
        groups = self.optimizer.param_groups
        return max(group["lr"] for group in [g for g in groups if "classifier" not in g] or groups)

    def gradients(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        """Fills .grad for update ``step`` of the stage; returns the whole batch's loss and its halves.

        Args:
            images: views [B, V, C, H, W].
            labels: [B].
            step: updates of this stage so far, which the schedule goes by.
        """
        self.scheduler.step_update(step)
        if self.stage.views == 1:
            images = images[:, 0]
        labels = labels.to(self.device, non_blocking=True)
        extra: dict[str, Tensor] = {}
        if self.mixup is not None:
            images, extra["targets"] = self.mixup(images.to(self.device), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(images, labels, extra)
        return {name: float(value) for name, value in {"loss": loss, **self.criterion.parts}.items()}

    def update(self, step: int) -> None:
        """Moves the weights along .grad."""
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update(self.model, step=step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the model's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.module.state_dict() if self.averaged is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        # timm's schedules are functions of the number of updates: nothing of them needs saving.
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(state["averaged"])

    def _backward(self, images: Tensor, labels: Tensor, extra: dict[str, Tensor]) -> Tensor:
        with autocast(self.device, self.config.amp):
            if self.grad_cache is not None:
                return self.grad_cache(images, labels, **extra)
            outputs = self.net(images.to(self.device, non_blocking=True))
            loss = self.criterion(*outputs, labels, **extra)
        self.scaler.scale(loss).backward()
        return loss.detach()


def _optimizer(stage: Stage, model: FineTuner, config: TrainConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, stage.lr, config.weight_decay, config.layer_decay, stage.classifier_lr)
    return timm_makes(f"--opt {config.opt}", create_optimizer_v2)(
        groups, config.opt, lr=stage.lr, weight_decay=config.weight_decay
    )


def _scheduler(
    stage: Stage, optimizer: torch.optim.Optimizer, updates_per_epoch: int, config: TrainConfig
) -> Scheduler:
    scheduler, _ = timm_makes(f"--sched {config.sched}", create_scheduler_v2)(
        optimizer,
        sched=config.sched,
        num_epochs=stage.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=min(config.warmup_lr, stage.lr),
        min_lr=min(config.min_lr, stage.lr),
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def _wrapped(model: FineTuner, config: TrainConfig, group: Processes) -> nn.Module:
    net: nn.Module = torch.compile(model) if config.compile else model
    if group.world_size == 1:
        return net
    return DistributedDataParallel(net, device_ids=[group.device] if group.device.type == "cuda" else None)


def _mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob,
        label_smoothing=0.0,  # the losses smooth the mixed targets
        num_classes=num_classes,
    )
