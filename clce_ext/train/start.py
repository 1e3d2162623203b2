"""What a run says when it starts: on which images, with which weights; and which code it is that runs."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import timm
import torch

import clce_ext

from .config import TrainConfig
from .data import Data, Images
from .errors import listing
from .models import FineTuner


def start_lines(config: TrainConfig, data: Data, model: FineTuner) -> list[str]:
    """A line each for data, splits, files that were passed over, model and weights."""
    lines = [
        f"data     {config.data}: {len(data.classes)} classes ({listing(data.classes, 5)})",
        f"train    {len(data.train)} images{_per_class(data.train, len(data.classes))}",
        f"{data.watched:<9}{len(data.val)} images, watched while training",
    ]
    if data.test is not None and data.test is not data.val:
        lines.append(f"test     {len(data.test)} images, left to judge what was chosen")
    splits = [images.source for images in (data.train, data.val, data.test) if images is not None]
    passed_over: dict[str, int] = {}
    for of_split in {id(source.passed_over): source.passed_over for source in splits}.values():
        for kind, count in of_split.items():
            passed_over[kind] = passed_over.get(kind, 0) + count
    if passed_over:
        kinds = [f"{count} {kind}" for kind, count in sorted(passed_over.items())]
        lines.append(f"no image {listing(kinds)}: these files were passed over")
    millions = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    lines.append(f"model    {config.model}, {millions:.3g} million parameters")
    lines.append(f"weights  {'; '.join(model.notes) if model.notes else 'none given: from scratch'}")
    return lines


def _per_class(images: Images, classes: int) -> str:
    counts = [int((images.labels == label).sum()) for label in range(classes)]
    few, many = min(counts), max(counts)
    return f", {few} of each class" if few == many else f", {few} to {many} of a class"


@functools.cache
def versions() -> dict[str, str]:
    """Of this package, with a digest of its Python code, of torch and of timm."""
    folder = Path(clce_ext.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    code = f"{clce_ext.__version__}+{digest.hexdigest()[:10]}"
    return {"code": code, "torch": torch.__version__, "timm": timm.__version__}
