"""The objectives: one record each, from which options, stages, model, plots and reports take what they need.

To add one, add its record here, a row to the table in docs/training.md, and a test.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

import clce_ext


@dataclass(frozen=True)
class Objective:
    """What ``--objective NAME`` minimises.

    ``outputs`` names what the model gives in the first stage (models.FineTuner), and so what is minimised:

    ==============  ==================================================================
    ``"logits"``    cross-entropy
    ``"joint"``     ``loss(logits, embeddings, labels)``
    ``"contrast"``  ``loss(embeddings, labels)``; a second stage trains the classifier
    ==============  ==================================================================
    """

    name: str
    summary: str  # a line for --help
    color: str  # in plots
    outputs: str
    loss: type[nn.Module] | None = None
    options: tuple[str, ...] = ()  # the options of a run that the loss takes
    views: int = 1  # augmented views per image
    projection: bool = False  # contrast happens behind a projection head, which is then dropped

    @property
    def two_stage(self) -> bool:
        """Contrast leaves the classifier untrained, so a second stage trains it by cross-entropy."""
        return self.outputs == "contrast"

    @property
    def temperature(self) -> float | None:
        """The default of the loss, where it has one."""
        return None if self.loss is None else inspect.signature(self.loss).parameters["temperature"].default


# Options of one objective's loss, which mean nothing, or another thing, to the others.
LOSS_OPTIONS = ("weight", "temperature", "beta", "queue_size")
UNTOUCHED = "untouched"  # the name of the given backbone's row, before the first step

_TWO_VIEWS = {"outputs": "contrast", "options": ("temperature", "queue_size"), "views": 2, "projection": True}

OBJECTIVES = {
    record.name: record
    for record in (
        Objective("ce", "cross-entropy", color="#5b6770", outputs="logits"),
        Objective(
            "supcon",
            "supervised contrast of two views behind a projection head, then the classifier",
            color="#0b8a8f",
            loss=clce_ext.SupConLoss,
            **_TWO_VIEWS,
        ),
        Objective(
            "lacvit",
            "as supcon, with LaCViT's temperature",
            color="#d98200",
            loss=clce_ext.LaCViTLoss,
            **_TWO_VIEWS,
        ),
        Objective(
            "schane",
            "contrast with hard negatives, then the classifier",
            color="#7b3fa0",
            outputs="contrast",
            loss=clce_ext.SCHaNeLoss,
            options=("temperature", "beta", "queue_size"),
        ),
        Objective(
            "clce",
            "cross-entropy and contrast with hard negatives together",
            color="#d0253f",
            outputs="joint",
            loss=clce_ext.CLCELoss,
            options=("weight", "temperature", "beta", "label_smoothing", "queue_size"),
        ),
    )
}
