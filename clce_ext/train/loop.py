"""A run from its options to its results: stages, epochs, checkpoints, resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..gradcache import GradCache
from . import checkpoint, evaluation, models, objectives, report
from .config import TrainConfig, flag, read_yaml
from .data import Data, evaluation_loader, load_data, subset, training_loader
from .errors import TrainingError, timm_makes
from .processes import Processes, processes
from .records import Mean, Records, epoch_line, progress_bar

# Options that may differ between a run and its continuation: they do not change what is computed.
_FREE_TO_CHANGE = {
    "checkpoint_epochs", "checkpoint_steps", "data_dir", "device", "download", "keep_checkpoints",
     "output", "overwrite", "progress", "resume", "tensorboard", "workers",
}  # fmt: skip
_KEPT_PIXELS = 64 << 20


def train(config: TrainConfig, with_map: bool = True) -> dict[str, Any]:
    """Runs ``config`` and returns what it writes to ``results.json``; ``with_map``: draw its embeddings.

    ``config.output`` then holds config.yaml, metrics.csv, tensorboard/, checkpoints/, model.safetensors (the
    backbone, as timm loads it), embeddings.safetensors, results.json and report.html.

    Raises:
        TrainingError: anything that the user can put right, a loss that is not finite among it.
    """
    with processes(config) as group:
        folder = Path(config.output)
        finished = group.from_main(_prepare_folder(folder, config) if group.is_main else None)
        if finished is not None:
            if group.is_main:
                print(f"{folder}: finished before; nothing to do")
            return finished
        return _Run(config, group, folder, with_map).execute()


@dataclass
class Position:
    """Where a run stands: ``batch`` batches of ``epoch`` of ``stage`` are done."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0  # updates since the run began
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # of training, without evaluation


class _Run:
    def __init__(self, config: TrainConfig, group: Processes, folder: Path, with_map: bool) -> None:
        self.with_map = with_map
        self.config, self.group, self.folder, self.device = config, group, folder, group.device
        _seed(config.seed)  # the same weights in every process
        self.data: Data = group.main_first(load_data, config) if config.download else load_data(config)
        self.stages = objectives.stages(config)
        self.model = models.create_model(config, len(self.data.classes), objectives.has_projection(config))
        self.model.to(self.device)
        self.input = models.input_config(self.model, config)
        self.batches: dict[str, Iterable] = {}  # of evaluation
        self.last_outputs: evaluation.Outputs | None = None  # of the validation images, after the last epoch
        self.averaged: ModelEmaV3 | None = None
        self.position = Position()
        self.mean = Mean()
        self.optimizer_state: dict[str, Any] | None = None
        rows: list[dict[str, Any]] = []
        if config.resume and checkpoint.checkpoints(folder):
            rows = self._restore(checkpoint.checkpoints(folder)[-1])
        self.rows = rows
        self.records = Records(folder, config.tensorboard, rows) if group.is_main else None
        if group.is_main and not rows and self.position.step == 0:
            checkpoint.write_text(folder / "config.yaml", config.dump())

    # The run

    def execute(self) -> dict[str, Any]:
        try:
            while self.position.stage < len(self.stages):
                self._train_stage(self.stages[self.position.stage])
                self.position = dataclasses.replace(
                    self.position, stage=self.position.stage + 1, epoch=0, batch=0, epoch_seconds=0.0
                )
                if self.averaged is not None:  # the next stage goes on from the averaged weights
                    self.model.load_state_dict(self.averaged.module.state_dict())
                    self.averaged = None
                self.optimizer_state = None
            return self._finish()
        finally:
            if self.records is not None:
                self.records.close()

    def _train_stage(self, stage: objectives.Stage) -> None:
        config = self.config
        self.model.set_mode(stage.mode)
        self.model.zero_grad(set_to_none=True)  # what the last stage left on parameters that now rest
        self.loader, self.sampler = training_loader(
            self.data.train, config, self.input, stage.views, self.group.rank, self.group.world_size
        )
        self._prepare_optimizer(stage)
        self.criterion = stage.criterion.to(self.device)
        self.net = self._wrapped_model()
        self.grad_cache = None
        if config.micro_batch_size and config.micro_batch_size < config.batch_size:
            self.grad_cache = GradCache(self.net, self.criterion, config.micro_batch_size, self.scaler)
        self.mixup = None
        if stage.mixing and (config.mixup or config.cutmix):
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_prob,
                label_smoothing=0.0,  # the losses smooth the mixed targets
                num_classes=len(self.data.classes),
            )
        while self.position.epoch < stage.epochs:
            self._train_epoch(stage)
            self._end_epoch(stage)

    def _prepare_optimizer(self, stage: objectives.Stage) -> None:
        config = self.config
        groups = models.parameter_groups(self.model, stage.lr, config.weight_decay, config.layer_decay)
        self.optimizer = timm_makes(f"--opt {config.opt}", create_optimizer_v2)(
            groups, config.opt, lr=stage.lr, weight_decay=config.weight_decay
        )
        # timm's schedules are functions of the number of updates: nothing of them needs saving.
        self.scheduler, _ = timm_makes(f"--sched {config.sched}", create_scheduler_v2)(
            self.optimizer,
            sched=config.sched,
            num_epochs=stage.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=min(config.warmup_lr, stage.lr),
            min_lr=min(config.min_lr, stage.lr),
            step_on_epochs=False,
            updates_per_epoch=len(self.sampler),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")
        if config.ema and self.averaged is None:
            self.averaged = ModelEmaV3(self.model, decay=config.ema, use_warmup=True)
        if self.averaged is not None:
            self.averaged.module.set_mode(stage.mode)
        if self.optimizer_state is not None:
            self.optimizer.load_state_dict(self.optimizer_state["optimizer"])
            self.scaler.load_state_dict(self.optimizer_state["scaler"])
            self.optimizer_state = None

    def _wrapped_model(self) -> nn.Module:
        net: nn.Module = self.model
        if self.config.compile:
            net = torch.compile(net)
        if self.group.world_size > 1:
            net = DistributedDataParallel(
                net, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        return net

    # An epoch

    def _train_epoch(self, stage: objectives.Stage) -> None:
        position = self.position
        self.last_outputs = None
        self.net.train()
        # A stage starts its own order of images, so stages count their epochs on.
        epoch = position.epoch + sum(s.epochs for s in self.stages[: position.stage])
        self.sampler.set_position(epoch, position.batch)
        per_batch = self.sampler.global_batch
        bar = progress_bar(
            len(self.sampler) * per_batch,
            position.batch * per_batch,
            f"{stage.name} {position.epoch + 1}/{stage.epochs}",
            self.config.progress and self.group.is_main,
        )
        with bar:
            start = time.perf_counter()
            for images, labels in self.loader:
                parts = self._train_step(stage, images, labels)
                self.mean.add(parts, len(labels))
                position.batch += 1
                position.step += 1
                now = time.perf_counter()
                position.epoch_seconds += now - start
                start = now
                bar.set_postfix({k: f"{v:.4f}" for k, v in parts.items()}, refresh=False)
                bar.update(per_batch)
                every = self.config.checkpoint_steps
                if every and position.step % every == 0 and position.batch < len(self.sampler):
                    self._save()
                    start = time.perf_counter()

    def _train_step(self, stage: objectives.Stage, images: Tensor, labels: Tensor) -> dict[str, float]:
        # Dropout, drop-path and mixup are functions of (seed, process, step): a resumed run repeats them.
        _seed(self.config.seed, self.group.rank, self.position.step)
        self.scheduler.step_update(self._stage_step())
        if stage.views == 1:
            images = images[:, 0]
        labels = labels.to(self.device, non_blocking=True)
        extra: dict[str, Tensor] = {}
        if self.mixup is not None:
            images, extra["targets"] = self.mixup(images.to(self.device), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(images, labels, extra)
        parts = {name: float(value) for name, value in {"loss": loss, **self.criterion.parts}.items()}
        if not all(math.isfinite(value) for value in parts.values()):
            self._stop_on_non_finite(stage, parts)
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update(self.model, step=self._stage_step())  # its warm-up is each stage's own
        return parts

    def _stage_step(self) -> int:
        return self.position.batch + self.position.epoch * len(self.sampler)

    def _gradients(self, images: Tensor, labels: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Fills .grad and returns the loss of this process's whole batch."""
        with evaluation.autocast(self.device, self.config.amp):
            if self.grad_cache is not None:
                return self.grad_cache(images, labels, **extra)
            outputs = self.net(images.to(self.device, non_blocking=True))
            loss = self.criterion(*outputs, labels, **extra)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _stop_on_non_finite(self, stage: objectives.Stage, parts: dict[str, float]) -> None:
        values = ", ".join(f"{name} {value}" for name, value in parts.items())
        raise TrainingError(
            f"the loss is not finite ({values}) in stage {stage.name}, epoch {self.position.epoch + 1}, "
            f"step {self.position.step}, at learning rate {self.optimizer.param_groups[-1]['lr']:.3g}; the "
            "weights "
            "before this step are untouched in the last checkpoint. Try a lower --lr, --clip-grad 1, longer "
            "--warmup-epochs, or --amp bfloat16 or none in place of float16"
        )

    def _end_epoch(self, stage: objectives.Stage) -> None:
        position = self.position
        sums = [Mean(s) for s in self.group.gather(self.mean.sums)]
        for other in sums[1:]:
            for name, (total, count) in other.sums.items():
                sums[0].add({name: total / count}, count)
        images = len(self.sampler) * self.sampler.global_batch
        is_last = position.epoch + 1 == stage.epochs
        judged = is_last or (position.epoch + 1) % self.config.eval_every == 0
        row = {
            "stage": stage.name,
            "epoch": position.epoch,
            "step": position.step,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            **sums[0].values(),
            **(self._evaluate(stage, self.config.eval_embeddings == "epoch") if judged else {}),
            "seconds": round(position.epoch_seconds, 3),
            "images_per_second": round(images / max(position.epoch_seconds, 1e-9), 1),
        }
        position.seconds += position.epoch_seconds
        position.epoch, position.batch, position.epoch_seconds = position.epoch + 1, 0, 0.0
        self.mean = Mean()
        self.rows.append(row)
        if self.records is not None:
            self.records.add(row)
            left = sum(s.epochs for s in self.stages[position.stage :]) - position.epoch
            if self.config.progress:
                print(epoch_line(row, stage.epochs, left * row["seconds"]), flush=True)
        if is_last or position.epoch % self.config.checkpoint_epochs == 0:
            self._save()

    # Evaluation

    def _evaluate(self, stage: objectives.Stage, embeddings: bool) -> dict[str, Any]:
        model = self.model if self.averaged is None else self.averaged.module
        result = self.last_outputs = self._pass(model, "val")
        values: dict[str, Any] = {}
        if stage.mode != "contrast":
            values |= result.classification(len(self.data.classes))
        if embeddings:
            values |= evaluation.neighbours(self._pass(model, "train"), result)
        return values

    def _pass(self, model: models.FineTuner, split: str) -> evaluation.Outputs:
        """The outputs of all validation images, or of at most ``eval_images`` training images."""
        if split not in self.batches:
            images = self.data.val
            if split == "train":
                images = subset(self.data.train, self.config.eval_images, self.config.seed)
            loader = evaluation_loader(
                images, self.config, self.input, self.group.rank, self.group.world_size
            )
            # Small data sets are decoded once.
            is_small = len(images) * math.prod(self.input["input_size"]) < _KEPT_PIXELS
            self.batches[split] = list(loader) if is_small else loader
        outputs = evaluation.run_model(model, self.batches[split], self.device, self.config.amp)
        return evaluation.Outputs.join(self.group.gather(outputs))

    def _finish(self) -> dict[str, Any]:
        config = self.config
        val = self.last_outputs or self._pass(self.model, "val")
        results: dict[str, Any] = {
            "objective": config.objective,
            "model": config.model,
            "data": config.data,
            "seed": config.seed,
            "classes": len(self.data.classes),
            "train_images": len(self.data.train),
            "val_images": len(self.data.val),
            "epochs": config.epochs,
            "steps": self.position.step,
            "seconds": round(self.position.seconds, 3),
            "seconds_per_epoch": round(self.position.seconds / config.epochs, 4),
            **val.classification(len(self.data.classes)),
        }
        part = None
        if config.eval_embeddings != "never":
            part = val.take(config.eval_images, config.seed)
            results |= evaluation.neighbours(self._pass(self.model, "train"), part)
            results |= evaluation.quality(part)
        if self.group.is_main:
            self._write_results(results, part)
        return results

    def _write_results(self, results: dict[str, Any], val: evaluation.Outputs | None) -> None:
        metadata = {
            "model": self.config.model,
            "classes": json.dumps(self.data.classes),
            "input": json.dumps(self.input),
        }
        checkpoint.write_weights(
            self.folder / "model.safetensors", self.model.backbone.state_dict(), metadata | {"format": "pt"}
        )
        if val is not None:
            tensors = {"embeddings": val.embeddings, "labels": val.labels}
            checkpoint.write_weights(self.folder / "embeddings.safetensors", tensors)
        shown = val if self.with_map else None
        report.write_run_report(self.folder, self.config, results, self.rows, self.data.classes, shown)
        # Last: a run with results.json is finished.
        checkpoint.write_text(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        if self.config.progress:
            shown = {k: v for k, v in results.items() if k in ("top1", "top5", "knn", "centroid")}
            figures = "  ".join(f"{k} {100 * v:.2f} %" for k, v in shown.items())
            print(f"{figures}\nreport: {self.folder / 'report.html'}")

    # Checkpoints

    def _save(self) -> None:
        sums = self.group.gather(self.mean.sums)
        if not self.group.is_main:
            return
        training = {
            "position": dataclasses.asdict(self.position),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.module.state_dict() if self.averaged is not None else None,
            "sums": sums,
            "rows": self.rows,
            "world_size": self.group.world_size,
        }
        checkpoint.save_checkpoint(
            self.folder, self.position.step, self.model.state_dict(), training, self.config.keep_checkpoints
        )

    def _restore(self, folder: Path) -> list[dict[str, Any]]:
        weights, training = checkpoint.load_checkpoint(folder)
        if training["world_size"] != self.group.world_size:
            raise TrainingError(
                f"{folder}: written by {training['world_size']} process(es); resume with as many, not "
                f"{self.group.world_size}: the batches would differ"
            )
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise TrainingError(
                f"{folder}: not a checkpoint of this model: {str(error).splitlines()[1].strip()}"
            ) from error
        self.position = Position(**training["position"])
        self.mean = Mean(training["sums"][self.group.rank])
        if training["averaged"] is not None:
            self.averaged = ModelEmaV3(self.model, decay=self.config.ema, use_warmup=True)
            self.averaged.module.load_state_dict(training["averaged"])
        self.optimizer_state = {"optimizer": training["optimizer"], "scaler": training["scaler"]}
        if self.group.is_main and self.config.progress:
            print(f"resuming from {folder}")
        return training["rows"]


def _prepare_folder(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Makes the run's directory. Returns the results of a run that has already finished and is resumed."""
    saved, finished = folder / "config.yaml", folder / "results.json"
    # A start that failed has left nothing to keep.
    if saved.exists() and (checkpoint.checkpoints(folder) or finished.exists()):
        if config.resume:
            _check_same_run(saved, config)
            if finished.exists():
                return json.loads(finished.read_text())
        elif config.overwrite:
            for name in ("checkpoints", "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in ("metrics.csv", "model.safetensors", "embeddings.safetensors"):
                (folder / name).unlink(missing_ok=True)
            saved.unlink()
            finished.unlink(missing_ok=True)
        else:
            raise TrainingError(
                f"--output {folder} already holds a run: --resume goes on with it, --overwrite deletes it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return None


def _check_same_run(saved: Path, config: TrainConfig) -> None:
    before, now = TrainConfig.from_dict(read_yaml(saved), str(saved)).to_dict(), config.to_dict()
    changed = [name for name in now if name not in _FREE_TO_CHANGE and now[name] != before[name]]
    if changed:
        details = "; ".join(f"{flag(name)} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise TrainingError(f"--resume: {saved} has other options: {details}")


def _seed(*key: int) -> None:
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_embeddings(folder: Path) -> dict[str, Tensor]:
    """``embeddings`` [N, D] and ``labels`` [N] of a finished run's validation images."""
    return load_file(folder / "embeddings.safetensors")
