"""What a run would do, in words: clce-train --plan."""

from __future__ import annotations

import numpy as np
import timm

from . import models  # noqa: F401 (registers models)
from .config import TrainConfig
from .data import epoch_sampler, load_data
from .data.loaders import KEPT_BYTES, PREFETCH
from .stages import stages


def plan(config: TrainConfig, world_size: int = 1) -> str:
    """Lines of a run of ``world_size`` processes; nothing is trained, no weights are read.

    Raises:
        TrainingError: data or batches that the run itself would refuse.
    """
    data = load_data(config)
    samplers = [epoch_sampler(data.train.labels, config, rank, world_size) for rank in range(world_size)]
    sampler, shares = samplers[0], [sampler.share for sampler in samplers]
    counts = np.bincount(data.train.labels)
    micro = min(config.micro_batch_size or max(shares), max(shares))
    contrast = "alone" if world_size == 1 else config.distributed_loss or "gather"
    lines = [
        (
            "training images",
            f"{len(data.train):,}: {len(counts)} classes of {counts.min()} to {counts.max()}",
        ),
        ("batch", f"{config.batch_size:,} images{_balance(config)}"),
        (
            "processes",
            f"{world_size}, of {_range(shares)} images per step each, in micro-batches of {micro}; contrast "
            + {"alone": "within the batch", "none": "within a process"}.get(
                contrast, f"with all ({contrast})"
            ),
        ),
        ("steps per epoch", f"{sampler.steps:,}"),
    ]
    for stage in stages(config, world_size):
        warmup = round(stage.warmup_epochs * sampler.steps)
        text = (
            f"{stage.epochs} epochs, {stage.epochs * sampler.steps:,} steps, {stage.views} view(s); learning "
            f"rate {stage.lr:.3g}, of the classifier {stage.classifier_lr:.3g}, after {warmup:,} steps of "
            "warm-up"
        )
        lines.append((f"stage {stage.name}", text))
    lines.append(("host memory", _memory(config, sampler.item_size, max(shares), world_size)))
    return "\n".join(f"{name:<16} {text}" for name, text in lines)


def _balance(config: TrainConfig) -> str:
    k = config.images_per_class
    return f": {k} of each of {config.batch_size // k} classes" if k else ", shuffled"


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} or {max(numbers)}"


def _memory(config: TrainConfig, item: int, share: int, world_size: int) -> str:
    size = config.image_size or timm.get_pretrained_cfg(config.model).input_size[-1]
    image = 3 * size * size * config.resolved_views
    ahead = max(1, config.workers * PREFETCH) * item * image
    decoded = f"up to {KEPT_BYTES / 1e9:.2g} GB of decoded training images" + " in all" * (world_size > 1)
    return (
        f"each process {ahead / 1e9:.2g} GB that {config.workers} workers prepare ahead; {decoded}; on the "
        f"device {share * image / 1e9:.2g} GB, its share of a batch"
    )
