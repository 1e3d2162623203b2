"""What a run says before it starts: on which images, with which weights, and with --plan what it would do;
and which code it is that runs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch

import clce_ext

from .config import TrainConfig
from .data import Data, EpochSampler, load_data
from .data.loaders import KEPT_BYTES, PREFETCH
from .errors import listing
from .models import FineTuner, create_model
from .stages import stages


def start_lines(config: TrainConfig, data: Data, model: FineTuner) -> list[str]:
    """A line each for data, splits, files that were passed over, model and weights."""
    counts = np.bincount(data.train.labels)
    lines = [
        f"data     {config.data}: {len(data.classes)} classes ({listing(data.classes, 5)})",
        f"train    {len(data.train)} images, {_of_each(counts)}",
        f"{data.watched:<9}{len(data.val)} images, watched while training",
    ]
    if data.test is not None and data.test is not data.val:
        lines.append(f"test     {len(data.test)} images, not looked at until --split test")
    sources = {id(split.source): split.source for split in (data.train, data.val, data.test) if split}
    if passed_over := sum((Counter(source.passed_over) for source in sources.values()), Counter()):
        kinds = [f"{count} {kind}" for kind, count in sorted(passed_over.items())]
        lines.append(f"no image {listing(kinds)}: these files were passed over")
    millions = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    lines.append(f"model    {config.model}, {millions:.3g} million parameters")
    lines.append(f"weights  {'; '.join(model.notes) if model.notes else 'none given: from scratch'}")
    return lines


def _of_each(counts: np.ndarray) -> str:
    """In words, the numbers of images of the classes."""
    low, high = counts.min(), counts.max()
    return f"{low if low == high else f'{low} to {high}'} of each class"


def plan(config: TrainConfig, world_size: int = 1) -> str:
    """What a run of ``world_size`` processes would do, in lines; no weights are read.

    Raises:
        TrainingError: data, batches or a model that the run itself would refuse.
    """
    data = load_data(config)
    labels = data.train.labels
    samplers = [EpochSampler(labels, config, rank, world_size) for rank in range(world_size)]
    steps, shares = samplers[0].steps, sorted({sampler.share for sampler in samplers})
    k, counts = config.images_per_class, np.bincount(labels)
    reach = "within the batch" if world_size == 1 else f"with all ({config.distributed_loss or 'gather'})"
    if world_size > 1 and config.distributed_loss == "none":
        reach = "within a process"
    without_weights = dataclasses.replace(config, pretrained=False, checkpoint=None)
    model = create_model(without_weights, len(data.classes), with_projection=False)
    image = math.prod(model.input["input_size"]) * config.resolved_views
    ahead = max(1, config.workers * PREFETCH) * samplers[0].item_size * image
    lines = {
        "training images": f"{len(labels):,}: {len(counts)} classes, {_of_each(counts)}",
        "batch": f"{config.batch_size:,} images"
        + (f": {k} of each of {config.batch_size // k} classes" if k else ", shuffled"),
        "processes": f"{world_size}, of {' or '.join(map(str, shares))} images per step each, in "
        f"micro-batches of {min(config.micro_batch_size or shares[-1], shares[-1])}; contrast {reach}",
        "steps per epoch": f"{steps:,}",
    }
    for stage in stages(config, world_size):
        lines[f"stage {stage.name}"] = (
            f"{stage.epochs} epochs, {stage.epochs * steps:,} steps, {stage.views} view(s); learning rate "
            f"{stage.lr:.3g}, of the classifier {stage.classifier_lr:.3g}, after "
            f"{round(stage.warmup_epochs * steps):,} steps of warm-up"
        )
    lines["host memory"] = (
        f"each process {ahead / 1e9:.2g} GB that {config.workers} workers prepare ahead; up to "
        f"{KEPT_BYTES / 1e9:.2g} GB of decoded training images{' in all' * (world_size > 1)}; on the device "
        f"{shares[-1] * image / 1e9:.2g} GB, its share of a batch"
    )
    return "\n".join(f"{name:<16} {text}" for name, text in lines.items())


@functools.cache
def versions() -> dict[str, str]:
    """Of this package, with a digest of its Python code, of torch and of timm."""
    folder = Path(clce_ext.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    code = f"{clce_ext.__version__}+{digest.hexdigest()[:10]}"
    # torch has a type of its own for it.
    return {"code": code, "torch": str(torch.__version__), "timm": timm.__version__}
