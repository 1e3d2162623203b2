"""A model's outputs for the images of a split, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import metrics
from .config import TrainConfig
from .data import Data, Images, evaluation_loader
from .errors import TrainingError
from .models import FineTuner
from .objectives import UNTOUCHED
from .processes import Processes
from .progress import progress, waiting

_KEPT_PIXELS = 64 << 20  # of decoded images, per split


class Outputs(NamedTuple):
    """Of N images, in the order of the data set; CPU. What the classifier said is kept, not its logits, which
    of many classes would be far larger than all else."""

    top: Tensor  # [N, min(5, classes)] int64, the classes of the largest logits, largest first
    confidence: Tensor  # [N, min(5, classes)] float32, their probabilities
    losses: Tensor  # [N] float32, cross-entropy; 0 where the label is no class of the model
    embeddings: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64
    rows: Tensor  # [N] int64, positions among the images that the model was run over

    @staticmethod
    def join(shards: list[Outputs]) -> Outputs:
        """Of shards that took images in turn (rank, rank + W, ...), in the order of all images; of fewer
        images than shards, some are empty."""
        shards = [shard for shard in shards if len(shard.rows)]
        joined = Outputs(*map(torch.cat, zip(*shards, strict=True)))
        return joined.at(joined.rows.argsort())

    def at(self, rows: Tensor | slice) -> Outputs:
        return Outputs(*(tensor[rows] for tensor in self))

    def embedded(self) -> metrics.Embedded:
        return self.embeddings.numpy(), self.labels.numpy()

    def correct(self) -> Tensor:
        """Of which images the classifier finds the class: bool [N]."""
        return self.top[:, 0] == self.labels

    def classification(self, num_classes: int, split: str = "val") -> dict[str, float]:
        """{split}_loss (cross-entropy), top1 and, with more than five classes, top5 as fractions."""
        found = {"top1": self.correct()}
        if num_classes > 5:
            found["top5"] = (self.top == self.labels[:, None]).any(dim=1)
        return {f"{split}_loss": float(self.losses.double().mean()), **accuracies(found)}

    def by_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Per class that has images: name, their number, accuracy, the other class that is said most often,
        and how often."""
        rows = []
        for label in self.labels.unique().tolist():
            said = torch.bincount(self.top[self.labels == label, 0], minlength=len(classes))
            row = {"class": classes[label], "images": int(said.sum())}
            row["accuracy"], said[label] = int(said[label]) / row["images"], 0
            times = int(said.max())
            rows.append(row | {"taken_for": classes[said.argmax()] if times else None, "times": times})
        return rows


def accuracies(correct: dict[str, Tensor]) -> dict[str, float]:
    """The shares of images whose class was found."""
    return {name: float(of.double().mean()) for name, of in correct.items()}


class Judge:
    """Runs models over images without augmentation. All processes take part, and all get the outputs."""

    def __init__(self, config: TrainConfig, input_config: dict[str, Any], group: Processes) -> None:
        self.config, self.input, self.group = config, input_config, group
        self._batches: dict[Images, Iterable] = {}
        self._is_shown = config.progress and group.is_main

    def share(self, model: FineTuner, images: Images) -> Outputs:
        """The outputs for this process's share of the images."""
        batches = progress(f"judging {len(images)} images", self._loaded(images), self._is_shown)
        outputs = run_model(model, batches, self.group.device, self.config.amp)
        if self.config.eval_embeddings == "never":
            outputs = outputs._replace(embeddings=outputs.embeddings[:, :0])
        return outputs._replace(rows=outputs.rows * self.group.world_size + self.group.rank)

    def outputs(self, model: FineTuner, images: Images) -> Outputs:
        """For all images.

        Raises:
            TrainingError: some are not finite; in every process.
        """
        outputs = Outputs.join(self.group.gather(self.share(model, images)))
        if odd := int((~outputs.losses.isfinite()).sum()):
            raise TrainingError(
                f"the model's outputs for {odd} of {len(outputs.rows)} images are not finite: its weights "
                "have diverged. Train with a lower --lr, --clip-grad 1 or longer --warmup-epochs, or without "
                "--amp float16"
            )
        return outputs

    def part(self, outputs: Outputs) -> Outputs:
        """Of as many images as embeddings are judged on."""
        return outputs.at(self._drawn(len(outputs.rows)))

    def frozen(self, model: FineTuner, train: Images, test: Outputs, probe: bool = True) -> dict[str, Tensor]:
        """Of which test images, at most --eval-images, the class is found by what can be fitted to frozen
        embeddings: knn and centroid of all training images, of which every process compares with its share,
        and probe of at most --eval-images; bool [N]."""
        test, share, gather = self.part(test), self.share(model, train), self.group.gather
        share = share if len(share.rows) else test.at(slice(0))  # none, in tensors of the right shapes
        found = {
            "knn": metrics.knn_correct(share.embedded(), test.embedded(), gather),
            "centroid": metrics.centroid_correct(share.embedded(), test.embedded(), gather),
        }
        if probe:
            is_drawn = torch.isin(share.rows, self._drawn(len(train)))
            fitted = Outputs.join(gather(share.at(is_drawn)))
            with waiting(f"fitting a probe to {len(fitted.rows)} embeddings", self._is_shown):
                found["probe"] = metrics.probe_correct(fitted.embedded(), test.embedded())
        return {name: torch.from_numpy(of) for name, of in found.items()}

    def figures(
        self,
        model: FineTuner,
        data: Data,
        split: str,
        before: dict[str, Tensor] | None,
        outputs: Outputs | None = None,
    ) -> tuple[dict[str, Any], Outputs, dict[str, Tensor]]:
        """What results.json and correct.safetensors hold of ``split``, and the ``outputs`` for it, which may
        be known already.

        That is accuracies and the geometry of the embeddings, ``before`` (what `frozen` found of the given
        backbone) as figures of their own; and which images were judged, with, by figure, whether each one's
        class was found. The latter is empty where only a part of the images was judged: every seed draws
        another part, so they do not pair.
        """
        images, found = data.split(split), {}
        outputs = outputs or self.outputs(model, images)
        figures = {"split": split, "images": len(images), **outputs.classification(len(data.classes), split)}
        if self.config.eval_embeddings != "never":
            found = self.frozen(model, data.train, outputs)
            figures |= accuracies(found) | metrics.quality(*self.part(outputs).embedded())
        correct = {"top1": outputs.correct(), **found}
        if before is not None:
            figures[UNTOUCHED] = accuracies(before)
            correct |= {f"{UNTOUCHED}.{name}": of for name, of in before.items()}
        if any(len(of) != len(images) for of in correct.values()):
            return figures, outputs, {}
        return figures, outputs, {"images": torch.from_numpy(images.indices.astype(np.int64)), **correct}

    def _drawn(self, count: int) -> Tensor:
        """At most --eval-images of ``count`` positions, in order."""
        if count <= self.config.eval_images:
            return torch.arange(count)
        generator = np.random.default_rng([self.config.seed, 0x7A6E])
        return torch.from_numpy(np.sort(generator.choice(count, self.config.eval_images, replace=False)))

    def _loaded(self, images: Images) -> Iterable:
        """This process's share of the images; small splits are decoded once and kept."""
        if images not in self._batches:
            group = self.group
            loader = evaluation_loader(images, self.config, self.input, group.rank, group.world_size)
            is_small = len(images) * math.prod(self.input["input_size"]) < _KEPT_PIXELS
            if is_small:
                loader = list(progress(f"reading {len(images)} images", loader, self._is_shown))
            self._batches[images] = loader
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
        # Other data may have more classes; of an image that cannot be read none is known.
        known = labels.where((labels >= 0) & (labels < logits.shape[1]), -100)
        losses = F.cross_entropy(logits, known.to(device), reduction="none")
        parts.append([x.cpu() for x in (top, confidence, losses, embeddings.float(), labels)])
    model.train(was_training)
    # A process without images has outputs of no shape, which join leaves out.
    joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)] or [torch.empty(0, 0)] * 5
    return Outputs(*joined, rows=torch.arange(len(joined[-1])))
