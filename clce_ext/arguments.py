"""Names: the options of the losses with their defaults, and what the ops take and return.

The record of an op is a tuple in the order of its schema (``clce_ext/ops.py``): ``op(*record)`` calls it, and
``Record(*op(...))`` names what it returned. Tests compare the records with the schemas, and the names and
constants here with those of the compiled part.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

from torch import Tensor

# ---- what the ops' tensors hold ----

# Rows of embeddings are padded with zeros to a multiple of this many columns.
ROW_PADDING = 8


def padded(dim: int) -> int:
    return (dim + ROW_PADDING - 1) // ROW_PADDING * ROW_PADDING


class Statistics(NamedTuple):
    """The rows of a statistics tensor [9, M]: ``Statistics(*tensor)``. docs/losses.md has the formulas."""

    n_pos: Tensor
    n_neg: Tensor
    sum_pos: Tensor
    lse_pos: Tensor
    lse_w: Tensor
    lse_wn: Tensor
    lse_pos_low: Tensor
    lse_w_low: Tensor
    lse_wn_low: Tensor


class Derivatives(NamedTuple):
    """The rows of a derivatives tensor [5, M]: of a loss by statistics and by 1 / temperature."""

    sum_pos: Tensor
    lse_pos: Tensor
    lse_w: Tensor
    lse_wn: Tensor
    scale: Tensor


# ---- options and their defaults ----


class LossOptions(NamedTuple):
    """The options of the contrastive loss, with the defaults of all functions and modules."""

    temperature: float | Tensor = 0.5
    beta: float = 1.0
    summation: str = "out"
    denominator: str = "all"
    debias: float | Tensor = 0.0
    detach_weights: bool = False
    normalize: bool = True
    ignore_index: int = -100
    reduction: str = "mean"


class CLCEOptions(NamedTuple):
    """The options that CLCE adds, or for which it has defaults of its own."""

    weight: float = 0.9
    temperature: float | Tensor = 0.5
    beta: float = 1.0
    summation: str = "in"
    label_smoothing: float = 0.0


DEFAULTS = LossOptions()
CLCE_DEFAULTS = CLCEOptions()


class Temperature(NamedTuple):
    """A temperature as the ops take it: a tensor of one element or, where there is none, a number."""

    temperature_tensor: Tensor | None
    temperature: float

    @classmethod
    def of(cls, value: float | Tensor) -> Temperature:
        return cls(value, 1.0) if isinstance(value, Tensor) else cls(None, float(value))


class Debias(NamedTuple):
    """tau+ as the ops take it: a tensor with one for each anchor or, where there is none, a number."""

    debias_tensor: Tensor | None
    debias: float

    @classmethod
    def of(cls, value: float | Tensor) -> Debias:
        return cls(value, 0.0) if isinstance(value, Tensor) else cls(None, float(value))


# ---- clce_ext::contrastive_loss ----


class ContrastiveLossInputs(NamedTuple):
    embeddings: Tensor
    labels: Tensor | None
    keys: Tensor | None
    key_labels: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    views: int
    key_offset: int | None
    beta: float
    summation: str
    denominator: str
    debias_tensor: Tensor | None
    debias: float
    detach_weights: bool
    normalize: bool
    ignore_index: int
    reduction: str

    def options(self) -> LossOptions:
        """The options, with the numbers that count where there is no tensor."""
        return LossOptions(*(getattr(self, name) for name in LossOptions._fields))


class ContrastiveLossOutputs(NamedTuple):
    loss: Tensor
    num_terms: Tensor
    statistics: Tensor
    derivatives: Tensor
    z: Tensor
    norms: Tensor
    key_z: Tensor
    key_norms: Tensor


# ---- clce_ext::contrastive_loss_backward: the upstream gradient, what the forward saves, options, needs ----


class SavedTensors(NamedTuple):
    """What the forward saves for the backward."""

    num_terms: Tensor
    statistics: Tensor
    derivatives: Tensor
    z: Tensor
    norms: Tensor
    key_z: Tensor | None
    key_norms: Tensor | None
    labels: Tensor | None
    key_labels: Tensor | None
    temperature_tensor: Tensor | None


class BackwardOptions(NamedTuple):
    temperature: float
    dim: int
    views: int
    key_offset: int | None
    beta: float
    normalize: bool
    ignore_index: int
    reduction: str


ContrastiveLossBackwardInputs = namedtuple(
    "ContrastiveLossBackwardInputs",
    [
        "grad_loss",
        *SavedTensors._fields,
        *BackwardOptions._fields,
        "need_embeddings",
        "need_keys",
        "need_temperature",
    ],
)


# ---- the parts of it, for losses whose keys arrive in pieces ----


class StatisticsInputs(NamedTuple):
    z: Tensor
    key_z: Tensor | None
    labels: Tensor | None
    key_labels: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    dim: int
    key_offset: int | None
    beta: float
    normalized: bool
    ignore_index: int


class LossFromStatisticsInputs(NamedTuple):
    statistics: Tensor
    temperature_tensor: Tensor | None
    temperature: float
    beta: float
    summation: str
    denominator: str
    debias_tensor: Tensor | None
    debias: float
    detach_weights: bool
    reduction: str

    @classmethod
    def of(
        cls, statistics: Tensor, temperature: Temperature, options: LossOptions
    ) -> LossFromStatisticsInputs:
        given = options._asdict() | temperature._asdict() | Debias.of(options.debias)._asdict()
        return cls(statistics, **{name: given[name] for name in cls._fields[1:]})


class LossFromStatisticsOutputs(NamedTuple):
    loss: Tensor
    num_terms: Tensor
    derivatives: Tensor


StatisticsBackwardInputs = namedtuple(
    "StatisticsBackwardInputs",
    ["derivatives", "statistics", *StatisticsInputs._fields, "need_anchors", "need_keys"],
)


class StatisticsBackwardOutputs(NamedTuple):
    dz: Tensor
    dkeys: Tensor
