"""What one stage needs to update the model: batches, optimizer, schedule, loss, averaged weights."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from ..gradcache import GradCache
from ..queue import EmbeddingQueue
from .config import TrainConfig
from .data import Data, training_loader
from .errors import in_one_line
from .judge import autocast
from .models import FineTuner, parameter_groups
from .processes import Processes
from .stages import Stage

# Optimizers that torch has as one kernel for every device of ours.
_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


class Trainer:
    """Updates ``model`` as ``stage`` asks.

    An epoch is ``start_epoch``, then for every batch ``gradients`` and ``update``. None of these waits for a
    GPU, but for optimizers that torch does not fuse in float16: what they return lies on the device. Contrast
    across processes waits for the others, which tell each other on the host what they are about to do.
    """

    def __init__(
        self, stage: Stage, model: FineTuner, data: Data, config: TrainConfig, group: Processes
    ) -> None:
        model.set_mode(stage.mode)
        model.zero_grad(set_to_none=True)  # what the stage before left on parameters that now rest
        self.stage, self.model, self.config, self.device = stage, model, config, group.device
        self.group = group
        self.loader, self.sampler = training_loader(
            data.train, config, model.input, stage.views, group.rank, group.world_size
        )
        self.optimizer = self._optimizer()
        self.scheduler = self._scheduler()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")
        self.averaged = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.criterion = stage.criterion
        if config.queue_size and self.criterion.contrasts:
            self.criterion.queue = EmbeddingQueue(config.queue_size, model.contrast_dim)
        self.criterion.to(self.device)
        self.net = _wrapped(model, config, group)
        self.micro_batch = min(config.micro_batch_size or self.sampler.share, self.sampler.share)
        self.grad_cache = None
        if self.criterion.contrasts and self.micro_batch < self.sampler.share:
            self.grad_cache = GradCache(self.net, self._weighted_loss, self.micro_batch, self.scaler)
        # DistributedDataParallel averages over processes, some of which may have one image more.
        self.weight = 1.0
        if not self.criterion.spans_processes:
            self.weight = self.sampler.share * group.world_size / config.batch_size
        self.num_classes = len(data.classes)
        alphas = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if stage.mixing else ()
        kinds = [kind(alpha=alpha, num_classes=self.num_classes) for kind, alpha in alphas if alpha]
        self.mix = v2.RandomChoice(kinds) if kinds else None

    def _optimizer(self) -> torch.optim.Optimizer:
        stage, config = self.stage, self.config
        decay, name = config.weight_decay, config.opt
        groups = parameter_groups(self.model, stage.lr, decay, config.layer_decay, stage.classifier_lr)
        with in_one_line(f"--opt {name}: timm refuses: "):
            options: dict[str, Any] = {"lr": stage.lr, "weight_decay": decay}
            if config.amp == "float16":
                # Fused optimizers pass over gradients that are not finite by themselves; for others the host
                # has to read whether they are.
                made = get_optimizer_class(name.lower().removeprefix("lookahead_"), bind_defaults=False)
                options |= {"fused": True} if made in _FUSED else {}
            return create_optimizer_v2(groups, name, **options)

    def _scheduler(self) -> Scheduler:
        stage, config = self.stage, self.config
        with in_one_line(f"--sched {config.sched}: timm refuses: "):
            return create_scheduler_v2(
                self.optimizer,
                sched=config.sched,
                num_epochs=stage.epochs,
                warmup_epochs=stage.warmup_epochs,
                warmup_lr=min(config.warmup_lr, stage.lr),
                min_lr=min(config.min_lr, stage.lr),
                step_on_epochs=False,
                updates_per_epoch=self.sampler.steps,
            )[0]

    @property
    def evaluated_model(self) -> FineTuner:
        """The averaged weights, where there are any: these are evaluated, and the next stage starts there."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def learning_rate(self) -> float:
        """The largest of the backbone's, or the classifier's where it alone is trained."""
        groups = self.optimizer.param_groups
        return max(group["lr"] for group in [g for g in groups if "classifier" not in g] or groups)

    def start_epoch(self, epoch: int, first_batch: int) -> None:
        """``gradients`` then goes through the batches from ``first_batch`` on."""
        self.net.train()
        self.sampler.set_position(epoch, first_batch)
        self._items = iter(self.loader)

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Fills .grad for update ``step`` of the stage; returns the next batch's loss and its halves."""
        self.scheduler.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        images, labels, targets = self._batch()
        mixed = {} if targets is None else {"targets": targets}
        if self.grad_cache is not None:
            with autocast(self.device, self.config.amp):
                loss = self.grad_cache(images, labels, **mixed)
            return {"loss": loss / self.weight, **self.criterion.parts}
        # Micro-batch by micro-batch, each backward at once: exact for cross-entropy, a mean over images.
        parts: dict[str, Tensor] = {}
        for begin in range(0, len(images), self.micro_batch):
            rows = slice(begin, begin + self.micro_batch)
            waits = rows.stop < len(images) and hasattr(self.net, "no_sync")
            with self.net.no_sync() if waits else contextlib.nullcontext():
                with autocast(self.device, self.config.amp):
                    outputs = self.net(images[rows])
                    extra = {name: of[rows] for name, of in mixed.items()}
                    loss = self.criterion(*outputs, labels[rows], **extra)
                share = len(labels[rows]) / len(labels)
                self.scaler.scale(loss * (share * self.weight)).backward()
            for name, value in {"loss": loss.detach(), **self.criterion.parts}.items():
                parts[name] = parts.get(name, 0.0) + share * value
        return parts

    def update(self) -> None:
        """Moves the weights along .grad."""
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update(self.model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the model's weights. All processes call this together."""
        criteria = [{name: value.cpu() for name, value in self.criterion.state_dict().items()}]
        if not self.criterion.spans_processes:  # every process has a queue of its own
            criteria = self.group.gather(criteria[0])
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.module.state_dict() if self.averaged is not None else None,
            "criteria": criteria,
        }

    def restore(self, state: dict[str, Any]) -> None:
        # timm's schedules are functions of the number of updates: nothing of them needs saving.
        for group, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False):
            if "fused" in own:  # checkpoints of before float16's were fused say otherwise
                group["fused"] = own["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        criteria = state["criteria"]
        self.criterion.load_state_dict(criteria[self.group.rank if len(criteria) > 1 else 0])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(state["averaged"])

    def _batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's share of the next batch, on the device: images [B, C, H, W], or views [B, V, C, H,
        W], in uint8; labels [B]; soft targets [B, classes] where images are mixed."""
        images: Tensor | None = None
        labels, targets, filled = [], [], 0
        while filled < self.sampler.share:
            item, item_labels = (x.to(self.device, non_blocking=True) for x in next(self._items))
            if self.stage.views == 1:
                item = item[:, 0]
            if self.mix is not None:
                item, item_targets = self._mixed(item, item_labels)
                targets.append(item_targets)
            if images is None:  # one allocation, into which items go as they come
                images = item.new_empty(self.sampler.share, *item.shape[1:])
            images[filled : filled + len(item)] = item
            labels.append(item_labels)
            filled += len(item)
        return images, torch.cat(labels), torch.cat(targets) if targets else None

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours of an item mixed, which are in no order; [n, C, H, W] uint8 and [n, classes]."""
        if torch.rand(()) >= self.config.mix_prob:
            return images, F.one_hot(labels, self.num_classes).float()
        mixed, targets = self.mix(images.float(), labels)
        return mixed.round().to(torch.uint8), targets

    def _weighted_loss(self, *outputs: Tensor, **extra: Tensor) -> Tensor:
        return self.criterion(*outputs, **extra) * self.weight


class RunningLosses:
    """This process's losses of an epoch: ``sums`` has (sum over images, number of images) by name.

    What is added stays on the device, which the host need not wait for, until it is read.
    """

    def __init__(self, group: Processes, sums: dict[str, list[float]] | None = None) -> None:
        self.group, self.sums = group, dict(sums or {})
        self._added: list[tuple[int, int, dict[str, Tensor]]] = []  # step, images, means over these

    def add(self, losses: dict[str, Tensor], count: int, step: int) -> None:
        self._added.append((step, count, losses))

    def read(self) -> tuple[dict[str, float], tuple[int, dict[str, float]] | None]:
        """The losses of the last step; and the first step since the last call at which some process's losses
        were not finite, with these losses. All processes call this together; waits for the device."""
        values = torch.stack([v.double() for *_, losses in self._added for v in losses.values()]).tolist()
        found, odd, read = {}, None, iter(values)
        for step, count, losses in self._added:
            found = {name: next(read) for name in losses}
            for name, value in found.items():
                total, images = self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value * count, images + count]
            if odd is None and not all(map(math.isfinite, found.values())):
                odd = step, found
        self._added = []
        return found, min(filter(None, self.group.gather(odd)), key=lambda one: one[0], default=None)

    def means(self) -> dict[str, float]:
        """Over the images of all processes, which call this together, of what was read."""
        every = self.group.gather(self.sums)
        return {
            name: sum(of[name][0] for of in every) / sum(of[name][1] for of in every) for name in self.sums
        }


def _wrapped(model: FineTuner, config: TrainConfig, group: Processes) -> nn.Module:
    net: nn.Module = torch.compile(model) if config.compile else model
    if group.world_size == 1:
        return net
    return DistributedDataParallel(net, device_ids=[group.device] if group.device.type == "cuda" else None)
