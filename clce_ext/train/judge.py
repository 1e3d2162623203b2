"""A model's outputs for the images of a split, and what they are worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import metrics
from .config import TrainConfig
from .data import Images, evaluation_loader
from .models import FineTuner
from .processes import Processes

_KEPT_PIXELS = 64 << 20  # of decoded images, per split


@dataclass
class Outputs:
    """Of N images, in the order of the data set; CPU. What the classifier said is kept, not its logits, which
    of many classes would be far larger than all else."""

    top: Tensor  # [N, min(5, classes)] int64, the classes of the largest logits, largest first
    confidence: Tensor  # [N, min(5, classes)] float32, their probabilities
    losses: Tensor  # [N] float32, cross-entropy
    embeddings: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64
    rows: Tensor  # [N] int64, positions among the images that the model was run over

    @staticmethod
    def join(shards: list[Outputs]) -> Outputs:
        """Of shards that took images in turn (rank, rank + W, ...), in the order of all images; of fewer
        images than shards, some are empty."""
        shards = [shard for shard in shards if len(shard.rows)]
        if len(shards) == 1:
            return shards[0]
        joined = Outputs(*(torch.cat(parts) for parts in zip(*map(_fields, shards), strict=True)))
        return joined.at(joined.rows.argsort())

    def at(self, rows: Tensor) -> Outputs:
        return Outputs(*(tensor[rows] for tensor in _fields(self)))

    def take(self, most: int, seed: int) -> Outputs:
        """At most ``most`` of the images, drawn with ``seed``."""
        if len(self.labels) <= most:
            return self
        chosen = np.random.default_rng([seed, 0x7A6E]).choice(len(self.labels), most, replace=False)
        return self.at(torch.from_numpy(np.sort(chosen)))

    def correct(self) -> Tensor:
        """Of which images the classifier finds the class: bool [N]."""
        return self.top[:, 0] == self.labels

    def classification(self, num_classes: int, split: str = "val") -> dict[str, float]:
        """{split}_loss (cross-entropy), top1 and, with more than five classes, top5 as fractions."""
        values = {f"{split}_loss": float(self.losses.double().mean()), "top1": _share(self.correct())}
        if num_classes > 5:
            values["top5"] = _share((self.top == self.labels[:, None]).any(dim=1))
        return values

    def by_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Per class that has images: name, their number, accuracy, the other class that is said most often,
        and how often."""
        rows = []
        for label in self.labels.unique().tolist():
            said = torch.bincount(self.top[self.labels == label, 0], minlength=len(classes))
            images, right = int(said.sum()), int(said[label])
            said[label] = 0
            other, times = int(said.argmax()), int(said.max())
            rows.append(
                {
                    "class": classes[label],
                    "images": images,
                    "accuracy": right / images,
                    "taken_for": classes[other] if times else None,
                    "times": times,
                }
            )
        return rows


def _fields(outputs: Outputs) -> list[Tensor]:
    return [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]


def _share(of: Tensor) -> float:
    return float(of.double().mean())


class Judge:
    """Runs models over images without augmentation. All processes take part, and all get the outputs."""

    def __init__(self, config: TrainConfig, input_config: dict[str, Any], group: Processes) -> None:
        self.config, self.input, self.group = config, input_config, group
        self._batches: dict[Images, Iterable] = {}

    def outputs(self, model: FineTuner, images: Images) -> Outputs:
        outputs = run_model(model, self._loaded(images), self.group.device, self.config.amp)
        outputs.rows = outputs.rows * self.group.world_size + self.group.rank
        if self.config.eval_embeddings == "never":
            outputs.embeddings = outputs.embeddings[:, :0]
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
    parts = []
    for images, labels in loader:
        with autocast(device, amp):
            embeddings = model.embed(images.to(device, non_blocking=True))
            logits = model.classify(embeddings).float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        confidence = logits.softmax(dim=1).gather(1, top)
        losses = F.cross_entropy(logits, labels.to(device), reduction="none")
        parts.append([x.cpu() for x in (top, confidence, losses, embeddings.float(), labels)])
    model.train(was_training)
    # A process without images has outputs of no shape, which join leaves out.
    joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)] or [torch.empty(0, 0)] * 5
    return Outputs(*joined, rows=torch.arange(len(joined[-1])))


def neighbours(train: Outputs, test: Outputs) -> dict[str, Tensor]:
    """Of which test images classifiers that only compare embeddings find the class: knn, centroid; bool
    [N]."""
    x, y = train.embeddings.numpy(), train.labels.numpy()
    u, v = test.embeddings.numpy(), test.labels.numpy()
    correct = {"knn": metrics.knn_correct(x, y, u, v), "centroid": metrics.centroid_correct(x, y, u, v)}
    return {name: torch.from_numpy(of) for name, of in correct.items()}


def frozen(train: Outputs, test: Outputs, most: int, seed: int) -> dict[str, Tensor]:
    """Of which test images the class is found by what can be fitted to frozen embeddings: knn and centroid of
    all training images, probe of at most ``most``, drawn with ``seed``; bool [N]."""
    part = train.take(most, seed)
    x, y = part.embeddings.numpy(), part.labels.numpy()
    u, v = test.embeddings.numpy(), test.labels.numpy()
    return {**neighbours(train, test), "probe": torch.from_numpy(metrics.probe_correct(x, y, u, v))}


def accuracies(correct: dict[str, Tensor]) -> dict[str, float]:
    return {name: _share(of) for name, of in correct.items()}


def quality(outputs: Outputs) -> dict[str, float]:
    """Silhouette, alignment, uniformity, isotropy, Recall@K and MAP@R of the embeddings."""
    return metrics.embedding_quality(outputs.embeddings.numpy(), outputs.labels.numpy())
