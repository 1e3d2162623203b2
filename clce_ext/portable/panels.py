"""Anchors against keys, panel by panel of their logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clce_ext.portable.rows import acc_dtype

# Largest (1 + beta) / temperature at which sums of plain exponentials of logits are safe in float32.
BOUNDED_LOGIT = 43.5


def panel_size(device_type: str, count: int) -> int:
    """Rows and columns of a panel: on a CPU a panel fits a core's cache, elsewhere launches shall be few.

    Of few rows smaller panels leave more of the square below the diagonal out.
    """
    if device_type != "cpu":
        return 2048
    return 512 if count > 2048 else 256


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
    positive: Tensor | None  # which pairs have one label; None: none of them
    selves: tuple[Tensor, Tensor] | None  # where an anchor meets itself

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
        self.scale, self.beta = 1 / temperature, beta
        self.bounded = normalized and (1 + beta) / temperature <= BOUNDED_LOGIT
        self.symmetric = key_z is None
        self.anchors = Side(z, labels, views, ignore_index)
        self.keys = self.anchors if key_z is None else Side(key_z, key_labels, 1, ignore_index)
        self.itself = self._places_of_selves(key_offset)
        self.size = panel_size(z.device.type, max(self.anchors.count, self.keys.count))
        area = min(self.size, self.anchors.count) * min(self.size, self.keys.count)
        self._scratch = self.anchors.rows.new_empty((4, area))

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
        labels, key_labels = self.anchors.labels, self.keys.labels
        begin = torch.searchsorted(key_labels, labels)
        end = torch.searchsorted(key_labels, labels, right=True)
        positives, keys = end - begin, self.keys.count
        if self.itself is not None:
            is_key = self.itself >= 0
            positives = positives - (is_key & (begin <= self.itself) & (self.itself < end)).long()
            keys = keys - is_key.long()
        return positives, keys - positives

    def panels(self) -> Iterator[Panel]:
        rows, columns = self._blocks(self.anchors.count), self._blocks(self.keys.count)
        # Intervals of labels, and of places of selves, tell which panels need not look for such pairs.
        labels = _intervals(self.anchors.labels, rows)
        selves = [(0, -1)] * len(rows) if self.itself is None else _intervals(self.itself, rows)
        key_labels = _intervals(self.keys.labels, columns)
        for block, (first, last), (lowest, highest) in zip(rows, labels, selves, strict=True):
            for other, (key_first, key_last) in zip(columns, key_labels, strict=True):
                if self.symmetric and other.start < block.start:
                    continue
                mirrored = self.symmetric and other.start > block.start
                positive = at = None
                if first <= key_last and key_first <= last:
                    positive = self.anchors.labels[block, None] == self.keys.labels[None, other]
                if lowest < other.stop and highest >= other.start:
                    place = self.itself[block] - other.start
                    row = torch.nonzero((place >= 0) & (place < other.stop - other.start))[:, 0]
                    at = (row, place[row])
                yield Panel(block, other, mirrored, positive, at)

    def _blocks(self, count: int) -> list[slice]:
        return [slice(i, min(i + self.size, count)) for i in range(0, count, self.size)]

    def scratch(self, which: int, panel: Panel) -> Tensor:
        shape = (panel.rows.stop - panel.rows.start, panel.columns.stop - panel.columns.start)
        return self._scratch[which, : shape[0] * shape[1]].view(shape)

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
