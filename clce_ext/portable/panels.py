"""Anchors against keys, panel by panel of their logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clce_ext.portable.rows import acc_dtype

# Largest (1 + beta) / temperature at which sums of plain exponentials of logits are safe in float32.
BOUNDED_LOGIT = 43.5


def panel_size(device_type: str, count: int, dim: int) -> int:
    """Rows and columns of a panel: on a CPU a panel fits a core's cache, elsewhere launches shall be few.

    Of few rows a third: small panels leave more below the diagonal out, but are more calls. Of wide rows
    more: their time goes to products, which like large panels.
    """
    if device_type != "cpu":
        return 2048
    return min(512 if dim < 512 else 704, max(256, math.ceil(count / 48) * 16))


class Side:
    """Anchors or keys in the order of their labels, without those that are ignored."""

    def __init__(self, z: Tensor, labels: Tensor | None, views: int, ignore_index: int):
        self.total = z.shape[0]
        self.order = None  # as they were
        if labels is None:
            self.labels = torch.arange(self.total, device=z.device) // views
        else:
            self.labels = labels.long()
            if views > 1:
                self.labels = self.labels.repeat_interleave(views)
            ordered, order = torch.sort(self.labels, stable=True)
            kept = ordered != ignore_index
            if not (kept & (self.labels == ordered)).all():
                self.order = order[kept]
                self.labels = ordered[kept]
        self.rows = self.ordered(z, 0).to(acc_dtype(z.dtype))
        self.count = self.rows.shape[0]

    def ordered(self, x: Tensor, dim: int) -> Tensor:
        """``x`` has something of every anchor (or key) along ``dim``."""
        return x if self.order is None else x.index_select(dim, self.order)

    def put_back(self, x: Tensor, dim: int, ignored: float = 0) -> Tensor:
        """The inverse of ``ordered``, with a value for what was left out."""
        if self.order is None:
            return x
        shape = [*x.shape[:dim], self.total, *x.shape[dim + 1 :]]
        out = x.new_empty(shape) if self.count == self.total else x.new_full(shape, ignored)
        return out.index_copy_(dim, self.order, x)


@dataclass
class Panel:
    rows: slice
    columns: slice
    mirrored: bool  # stands for the panel below the diagonal too
    # 1 where labels differ, 0 where they agree; None: they differ everywhere. Numbers, as on a CPU a product
    # takes a fifth of the time that a choice by a mask takes.
    negative: Tensor | None
    selves: tuple[Tensor, Tensor] | None  # where an anchor meets itself

    @property
    def positive(self) -> Tensor:
        return self.negative == 0

    def set_selves(self, values: Tensor, value: float) -> None:
        if self.selves is not None:
            values[self.selves] = value


class Contrast:
    """The rows of anchors against those of keys, or against themselves.

    What walks over panels uses the scratch of the contrast: one panel at a time.
    """

    def __init__(
        self, z: Tensor, key_z: Tensor | None, labels: Tensor | None, key_labels: Tensor | None, *,
        temperature: float, beta: float, normalized: bool, ignore_index: int, key_offset: int | None,
        views: int = 1,
    ):  # fmt: skip
        self.scale = 1 / temperature
        # Rounded once each, so that their products with logits fit in the two parts of a logarithm.
        self.beta = torch.tensor(beta, dtype=acc_dtype(z.dtype)).item()
        self.one_plus_beta = torch.tensor(1 + self.beta, dtype=acc_dtype(z.dtype)).item()
        self.bounded = normalized and (1 + beta) / temperature <= BOUNDED_LOGIT
        self.symmetric = key_z is None
        self.anchors = Side(z, labels, views, ignore_index)
        self.keys = self.anchors if key_z is None else Side(key_z, key_labels, 1, ignore_index)
        self.itself = self._places_of_selves(key_offset)
        labels, key_labels = self.anchors.labels, self.keys.labels
        # Of each anchor: where its positives begin and end among the keys.
        self.begin = torch.searchsorted(key_labels, labels)
        self.end = torch.searchsorted(key_labels, labels, right=True)
        # Labels as numbers that are alike where labels are; odd ones are those of no key.
        acc = self.anchors.rows.dtype
        self.classes = (2 * self.begin + (self.begin == self.end)).to(acc)
        self.key_classes = (
            self.classes if self.symmetric else (2 * torch.searchsorted(key_labels, key_labels)).to(acc)
        )
        self.size = panel_size(z.device.type, max(self.anchors.count, self.keys.count), z.shape[1])
        self._area = min(self.size, self.anchors.count) * min(self.size, self.keys.count)
        self._scratch: dict[int, Tensor] = {}

    def _places_of_selves(self, key_offset: int | None) -> Tensor | None:
        """Of every anchor its place among the keys, or -1; None where no anchor is a key."""
        places = torch.arange(self.keys.count, device=self.keys.rows.device)
        if self.symmetric:
            return places
        if key_offset is None:
            return None
        if self.keys.order is not None:
            places = places.new_full((self.keys.total,), -1).index_copy_(0, self.keys.order, places)
        return self.anchors.ordered(places[key_offset : key_offset + self.anchors.total], 0)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Numbers of positives and of negatives of each anchor."""
        positives, keys = self.end - self.begin, self.keys.count
        if self.itself is not None:
            is_key = self.itself >= 0
            positives = positives - (is_key & (self.begin <= self.itself) & (self.itself < self.end)).long()
            keys = keys - is_key.long()
        return positives, keys - positives

    def panels(self) -> Iterator[Panel]:
        rows, columns = self._blocks(self.anchors.count), self._blocks(self.keys.count)
        # Intervals of classes, and of places of selves, tell which panels need not look for such pairs.
        classes = _intervals(self.classes, rows)
        selves = [(0, -1)] * len(rows) if self.itself is None else _intervals(self.itself, rows)
        key_classes = _intervals(self.key_classes, columns)
        for block, (first, last), (lowest, highest) in zip(rows, classes, selves, strict=True):
            for other, (key_first, key_last) in zip(columns, key_classes, strict=True):
                if self.symmetric and other.start < block.start:
                    continue
                mirrored = self.symmetric and other.start > block.start
                panel = Panel(block, other, mirrored, None, None)
                if first <= key_last and key_first <= last:
                    panel.negative = self._differ(panel)
                if lowest < other.stop and highest >= other.start:
                    panel.selves = self._selves(panel)
                yield panel

    def _differ(self, panel: Panel) -> Tensor:
        of_rows, of_columns = self.classes[panel.rows, None], self.key_classes[None, panel.columns]
        return torch.sub(of_rows, of_columns, out=self.scratch(4, panel)).abs_().clamp_max_(1)

    def _selves(self, panel: Panel) -> tuple[Tensor, Tensor]:
        place = self.itself[panel.rows] - panel.columns.start
        if self.symmetric:
            return place, place
        row = torch.nonzero((place >= 0) & (place < panel.columns.stop - panel.columns.start))[:, 0]
        return row, place[row]

    def _blocks(self, count: int) -> list[slice]:
        return [slice(i, min(i + self.size, count)) for i in range(0, count, self.size)]

    def scratch(self, which: int, panel: Panel) -> Tensor:
        shape = (panel.rows.stop - panel.rows.start, panel.columns.stop - panel.columns.start)
        if which not in self._scratch:
            self._scratch[which] = self.anchors.rows.new_empty(self._area)
        return self._scratch[which][: shape[0] * shape[1]].view(shape)

    def release(self) -> None:
        """Gives the scratch back: what follows a walk over panels needs memory too."""
        self._scratch.clear()

    def logits(self, panel: Panel) -> Tensor:
        """In scratch 0. Both passes make them by this call, which gives the same bits."""
        out = self.scratch(0, panel)
        a, b = self.anchors.rows[panel.rows], self.keys.rows[panel.columns]
        return torch.addmm(out, a, b.T, beta=0, alpha=self.scale, out=out)


def _intervals(numbers: Tensor, blocks: list[slice]) -> list[list[int]]:
    """The least and the largest of the numbers of each block."""
    if not blocks:
        return []
    return torch.stack([torch.stack(torch.aminmax(numbers[block])) for block in blocks]).cpu().tolist()
