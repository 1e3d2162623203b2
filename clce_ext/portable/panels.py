"""Anchors against keys, panel by panel of their logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clce_ext.portable.kept import MOST_KEPT
from clce_ext.portable.rows import acc_dtype

# Largest (1 + beta) / temperature at which sums of plain exponentials of logits are safe in float32.
BOUNDED_LOGIT = 43.5
# Up to this many rows for each of their columns, the rows are left in the order that they come in.
ROWS_OF_A_COLUMN = 2
# Columns between the rows of some panels: rows a power of two apart would share few places of a cache.
_GAP = 16

_kept = threading.local()


def _scratch_for(rows: Tensor) -> dict[int, Tensor]:
    """Scratch by its number. On a CPU each thread keeps its own from call to call: to get memory from the
    system anew takes a tenth of a small batch's time.
    """
    if not rows.is_cpu:
        return {}
    if not hasattr(_kept, "scratch"):
        _kept.scratch = {}
    return _kept.scratch.setdefault(rows.dtype, {})


def panel_shape(device_type: str, is_small: bool) -> tuple[int, int]:
    """Rows and columns of a panel: on a CPU its parts fit the cores' caches, elsewhere launches shall be few.

    Fewer rows would leave more below the diagonal out, but are more calls. Columns are never fewer than rows.
    Where logits are kept, both passes must cut them alike, whatever the number of threads is meanwhile.
    """
    if device_type != "cpu":
        return 2048, 2048
    return 384, 384 * (2 if is_small else min(max(torch.get_num_threads(), 2), 8))


class Side:
    """Anchors or keys without those that are ignored, in the order of their labels if that is asked for."""

    def __init__(self, z: Tensor, labels: Tensor | None, views: int, ignore_index: int, sort: bool):
        self.total = z.shape[0]
        self.order = None  # as they were
        if labels is None:
            self.labels = torch.arange(self.total, device=z.device) // views
        else:
            self.labels = labels.long()
            if views > 1:
                self.labels = self.labels.repeat_interleave(views)
            kept = self.labels != ignore_index
            if sort and not _ascending(self.labels):
                order = torch.argsort(self.labels, stable=True)
                self.order = order[kept[order]]
            elif not kept.all():
                self.order = torch.nonzero(kept)[:, 0]
            if self.order is not None:
                self.labels = self.labels[self.order]
        self.ascending = _ascending(self.labels)
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
    first: int  # of its logits among those of all panels
    # The columns of the panel from here on stand for pairs below the diagonal too.
    mirror: int
    # The columns of the panel where some row has positives, or None; and of these pairs, 1 where labels
    # agree, else 0. Numbers, as on a CPU a product takes a fifth of the time of a choice.
    near: slice | None = None
    positive: Tensor | None = None
    # Where an anchor meets itself: on the diagonal, or at these rows and columns.
    on_diagonal: bool = False
    selves: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def mirrored(self) -> slice:
        """Of the keys, those that are anchors of pairs below the diagonal."""
        return slice(self.columns.start + self.mirror, self.columns.stop)

    def set_selves(self, values: Tensor, value: float) -> None:
        if self.on_diagonal:
            values.diagonal().fill_(value)
        elif self.selves is not None:
            values[self.selves] = value


class Contrast:
    """The rows of anchors against those of keys, or against themselves.

    What walks over panels uses the scratch of the contrast: one panel at a time.
    """

    # The logits of all panels, where the forward keeps them and the backward finds them (kept.py).
    kept: Tensor | None = None
    is_backward = False

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
        # To gather a few wide rows takes longer than to compare the labels of all their pairs.
        count = max(z.shape[0], 0 if key_z is None else key_z.shape[0])
        sort = count > ROWS_OF_A_COLUMN * z.shape[1]
        self.anchors = Side(z, labels, views, ignore_index, sort)
        self.keys = self.anchors if key_z is None else Side(key_z, key_labels, 1, ignore_index, sort)
        self.itself = self._places_of_selves(key_offset)
        labels, key_labels = self.anchors.labels, self.keys.labels
        if not self.keys.ascending:
            key_labels = key_labels.sort().values
        # Of each anchor: where its positives begin and end among the keys, once these are ordered by label.
        self.begin = torch.searchsorted(key_labels, labels)
        self.end = torch.searchsorted(key_labels, labels, right=True)
        # Labels as numbers that are alike where labels are; -1 is that of no key.
        acc = self.anchors.rows.dtype
        self.classes = self.begin.masked_fill(self.begin == self.end, -1).to(acc)
        self.key_classes = (
            self.classes if self.symmetric else torch.searchsorted(key_labels, self.keys.labels).to(acc)
        )
        self.is_small = 0 < self.anchors.count * self.keys.count <= MOST_KEPT
        self.panel_rows, self.panel_columns = panel_shape(z.device.type, self.is_small)
        columns = min(self.panel_columns, self.keys.count) + _GAP
        self._area = min(self.panel_rows, self.anchors.count) * columns
        self._scratch = _scratch_for(self.anchors.rows)

    def _places_of_selves(self, key_offset: int | None) -> Tensor | None:
        """Of every anchor its place among the keys, or -1; None where no anchor is a key of others."""
        if key_offset is None or self.keys.count == 0:
            return None
        places = torch.arange(self.keys.count, device=self.keys.rows.device)
        if self.keys.order is not None:
            places = places.new_full((self.keys.total,), -1).index_copy_(0, self.keys.order, places)
        return self.anchors.ordered(places[key_offset : key_offset + self.anchors.total], 0)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Numbers of positives and of negatives of each anchor."""
        positives, keys = self.end - self.begin, self.keys.count
        if self.symmetric:
            return positives - 1, keys - positives
        if self.itself is not None:
            is_key = self.itself >= 0
            alike = self.keys.labels[self.itself.clamp_min(0)] == self.anchors.labels
            positives = positives - (is_key & alike).long()
            keys = keys - is_key.long()
        return positives, keys - positives

    def panels(self) -> Iterator[Panel]:
        rows = _blocks(0, self.anchors.count, self.panel_rows)
        if not rows:
            return
        first = 0
        # Where the positives of a block's rows begin and end, and their places among the keys.
        near = [(0, self.keys.count)] * len(rows)
        if self.anchors.ascending and self.keys.ascending:
            ends = [torch.stack([self.begin[block.start], self.end[block.stop - 1]]) for block in rows]
            near = torch.stack(ends).tolist()
        selves = None
        if self.itself is not None:
            selves = torch.stack([torch.stack(self.itself[block].aminmax()) for block in rows]).tolist()
        for i, block in enumerate(rows):
            start = block.start if self.symmetric else 0
            for columns in _blocks(start, self.keys.count, self.panel_columns):
                width = columns.stop - columns.start
                panel = Panel(block, columns, first, width)
                first += panel.shape[0] * _stride(width)
                if self.symmetric:
                    panel.on_diagonal = columns.start == block.start
                    panel.mirror = max(0, min(block.stop - columns.start, width))
                elif selves is not None and selves[i][0] < columns.stop and selves[i][1] >= columns.start:
                    panel.selves = self._selves(panel)
                begin, end = (min(max(place - columns.start, 0), width) for place in near[i])
                if begin < end:
                    panel.near = slice(begin, end)
                    panel.positive = self._positive(panel)
                yield panel

    def _positive(self, panel: Panel) -> Tensor:
        of_keys = self.key_classes[panel.columns][panel.near]
        return torch.eq(self.classes[panel.rows, None], of_keys, out=self.scratch(4, panel, panel.near))

    def _selves(self, panel: Panel) -> tuple[Tensor, Tensor]:
        place = self.itself[panel.rows] - panel.columns.start
        row = torch.nonzero((place >= 0) & (place < panel.shape[1]))[:, 0]
        return row, place[row]

    def scratch(self, which: int, panel: Panel, columns: slice | None = None) -> Tensor:
        """[rows, columns] of the panel, or those columns of it."""
        height, width = panel.shape
        if columns is not None:
            width = columns.stop - columns.start
        memory = self._scratch.get(which)
        if memory is None or memory.numel() < self._area:
            with torch.inference_mode(False):  # which other calls could not write to
                memory = self._scratch[which] = self.anchors.rows.new_empty(self._area)
        return memory.as_strided((height, width), (_stride(width), 1))

    def release(self) -> tuple[Tensor | None, Tensor | None]:
        """Gives scratch and rows back, as what follows the walks over panels needs memory too.

        Returned are the anchors' and the keys' rows, unless they are those that the caller gave.
        """
        self._scratch = {}
        spare = tuple(None if side.order is None else side.rows for side in (self.anchors, self.keys))
        self.anchors.rows = self.keys.rows = None
        return spare

    def num_logits(self) -> int:
        """Of all panels, with the gaps between their rows."""
        total = 0
        for block in _blocks(0, self.anchors.count, self.panel_rows):
            columns = self.keys.count - (block.start if self.symmetric else 0)
            whole, rest = divmod(columns, self.panel_columns)
            stride = whole * _stride(self.panel_columns) + _stride(rest)
            total += (block.stop - block.start) * stride
        return total

    def logits(self, panel: Panel) -> Tensor:
        """In scratch 0, or kept, and then to be left as they are.

        Both passes make them by this call, which gives the same bits.
        """
        if self.kept is None:
            out = self.scratch(0, panel)
        else:
            stride = (_stride(panel.shape[1]), 1)
            out = self.kept.as_strided(panel.shape, stride, self.kept.storage_offset() + panel.first)
            if self.is_backward:
                return out
        a, b = self.anchors.rows[panel.rows], self.keys.rows[panel.columns]
        torch.addmm(out, a, b.T, beta=0, alpha=self.scale, out=out)
        if panel.on_diagonal and not self.bounded:
            # The gradient takes a pair's logit for both of its anchors. Some libraries' products of a matrix
            # with itself are not symmetric to the last bit, which shows where logits are large.
            square = out[:, : out.shape[0]]
            square.copy_(square.triu() + square.triu(1).T)
        return out


def _stride(columns: int) -> int:
    """Between rows of so many columns. Without a gap they are gone over faster, as if they were one row."""
    return columns + _GAP if columns % 1024 == 0 else columns


def _ascending(labels: Tensor) -> bool:
    return bool((labels[1:] >= labels[:-1]).all())


def _blocks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
