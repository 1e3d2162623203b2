"""A model's outputs for the images of a split, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from . import metrics
from .config import TrainConfig
from .data import Images, evaluation_loader
from .models import FineTuner
from .processes import Processes

_KEPT_PIXELS = 64 << 20  # of decoded images, per split


@dataclass
class Outputs:
    """Of N images, in the order of the data set: logits [N, C], embeddings [N, D], labels [N]; float32,
    CPU."""

    logits: Tensor
    embeddings: Tensor
    labels: Tensor

    @staticmethod
    def join(shards: list[Outputs]) -> Outputs:
        """Of shards that took images in turn (rank, rank + W, ...)."""
        if len(shards) == 1:
            return shards[0]
        order = torch.cat([torch.arange(len(s.labels)) * len(shards) + rank for rank, s in enumerate(shards)])
        order = order.argsort()
        return Outputs(
            *(torch.cat([getattr(s, f) for s in shards])[order] for f in ("logits", "embeddings", "labels"))
        )

    def take(self, most: int, seed: int) -> Outputs:
        """At most ``most`` of the images, drawn with ``seed``."""
        if len(self.labels) <= most:
            return self
        chosen = np.sort(np.random.default_rng([seed, 0x7A6E]).choice(len(self.labels), most, replace=False))
        rows = torch.from_numpy(chosen)
        return Outputs(self.logits[rows], self.embeddings[rows], self.labels[rows])

    def correct(self) -> Tensor:
        """Of which images the classifier finds the class: bool [N]."""
        return self.logits.argmax(dim=1) == self.labels

    def classification(self, num_classes: int, split: str = "val") -> dict[str, float]:
        """{split}_loss (cross-entropy), top1 and, with more than five classes, top5 as fractions."""
        values = {f"{split}_loss": float(F.cross_entropy(self.logits, self.labels))}
        for k in (1, 5):
            if k == 1 or num_classes > 5:
                accuracy = multiclass_accuracy(
                    self.logits, self.labels, num_classes, average="micro", top_k=k
                )
                values[f"top{k}"] = float(accuracy)
        return values


class Judge:
    """Runs models over images without augmentation. All processes take part, and all get the outputs."""

    def __init__(self, config: TrainConfig, input_config: dict[str, Any], group: Processes) -> None:
        self.config, self.input, self.group = config, input_config, group
        self._batches: dict[Images, Iterable] = {}

    def outputs(self, model: FineTuner, images: Images) -> Outputs:
        outputs = run_model(model, self._loaded(images), self.group.device, self.config.amp)
        return Outputs.join(self.group.gather(outputs))

    def _loaded(self, images: Images) -> Iterable:
        """This process's share of the images; small splits are decoded once and kept."""
        if images not in self._batches:
            loader = evaluation_loader(
                images, self.config, self.input, self.group.rank, self.group.world_size
            )
            is_small = len(images) * math.prod(self.input["input_size"]) < _KEPT_PIXELS
            self._batches[images] = list(loader) if is_small else loader
        return self._batches[images]


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    dtype = torch.float16 if amp == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "none")


@torch.inference_mode()
def run_model(model: FineTuner, loader: Iterable, device: torch.device, amp: str = "none") -> Outputs:
    """The outputs of ``model`` in evaluation mode, whatever stage it is in; its training mode is restored."""
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, labels in loader:
        with autocast(device, amp):
            embeddings = model.embed(images.to(device, non_blocking=True))
            logits = model.classify(embeddings)
        parts.append((logits.float().cpu(), embeddings.float().cpu(), labels))
    model.train(was_training)
    return Outputs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def neighbours(train: Outputs, test: Outputs) -> dict[str, Tensor]:
    """Of which test images classifiers that only compare embeddings find the class: knn, centroid; bool
    [N]."""
    x, y = train.embeddings.numpy(), train.labels.numpy()
    u, v = test.embeddings.numpy(), test.labels.numpy()
    correct = {"knn": metrics.knn_correct(x, y, u, v), "centroid": metrics.centroid_correct(x, y, u, v)}
    return {name: torch.from_numpy(of) for name, of in correct.items()}


def frozen(train: Outputs, test: Outputs) -> dict[str, Tensor]:
    """Of which test images the class is found by what can be fitted to frozen embeddings: knn, centroid,
    probe; bool [N]."""
    x, y = train.embeddings.numpy(), train.labels.numpy()
    u, v = test.embeddings.numpy(), test.labels.numpy()
    return {**neighbours(train, test), "probe": torch.from_numpy(metrics.probe_correct(x, y, u, v))}


def accuracies(correct: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(of.double().mean()) for name, of in correct.items()}


def quality(outputs: Outputs) -> dict[str, float]:
    """Silhouette, alignment, uniformity and isotropy of the embeddings."""
    return metrics.embedding_quality(outputs.embeddings.numpy(), outputs.labels.numpy())
