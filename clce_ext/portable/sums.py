"""Panels to statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from clce_ext.arguments import Statistics
from clce_ext.portable import kept
from clce_ext.portable.panels import Contrast, Panel
from clce_ext.portable.rows import wide_dtype


def statistics(c: Contrast, keep: bool = False) -> Tensor:
    """[9, M] in the accumulation dtype: what :class:`clce_ext.arguments.Statistics` names.

    ``keep``: of a small problem with the logits behind it, for the backward.
    """
    rows, out = c.anchors.rows, None
    if keep and c.bounded and c.is_small:
        out, c.kept = kept.with_room(rows, c.anchors.total, c.num_logits())
    n_pos, n_neg = c.counts()
    wide = torch.zeros((6, c.anchors.count), dtype=wide_dtype(rows.device.type), device=rows.device)
    wide[0], wide[1] = n_pos, n_neg
    add_up = _bounded if c.bounded else _unbounded
    add_up(c, wide[2], *wide[3:])
    if c.beta == 0:
        wide[4] = wide[1].log()  # of as many numbers e^0
    numbers = wide.to(rows.dtype)
    high = numbers[3:]
    # What rounding took from the logarithms, where they are not infinite.
    low = torch.where(high.isfinite(), wide[3:] - high, 0).to(rows.dtype)
    found = c.anchors.put_back(torch.cat([numbers, low]), 1)
    out = found if out is None else out.copy_(found)
    if c.anchors.count < c.anchors.total:  # the ignored: logarithms of nothing
        s = Statistics(*out)
        out[3:6].masked_fill_((s.n_pos == 0) & (s.n_neg == 0), -torch.inf)
    return out


def _add(total: Tensor, panel: Panel, values: Tensor, columns: slice | None = None) -> None:
    """Sums of a panel, or of those columns of it, to anchors' totals."""
    total[panel.rows].add_(values.sum(1))
    mirrored, at = _mirrored(panel, values, columns)
    if mirrored is not None:
        total[at].add_(mirrored.sum(0))


def _mirrored(
    panel: Panel, values: Tensor, columns: slice | None = None
) -> tuple[Tensor, slice] | tuple[None, None]:
    """What of the values belongs to pairs below the diagonal too, and whose they are; or None."""
    first = 0 if columns is None else columns.start
    start = max(panel.mirror - first, 0)
    if start >= values.shape[1]:
        return None, None
    place = panel.columns.start + first
    return values[:, start:], slice(place + start, place + values.shape[1])


def _bounded(c: Contrast, sum_pos: Tensor, lse_pos: Tensor, lse_w: Tensor, lse_wn: Tensor) -> None:
    """Sums of plain exponentials, then their logarithms."""
    for panel in c.panels():
        s, near = c.logits(panel), panel.near
        if near is not None:
            panel.set_selves(s, 0)
            of_near = torch.mul(s[:, near], panel.positive, out=c.scratch(3, panel, near))
            _add(sum_pos, panel, of_near, near)
        w = torch.mul(s, c.beta, out=c.scratch(1, panel)).exp_() if c.beta not in (0, 1) else None
        e = torch.exp(s, out=c.scratch(0, panel))
        panel.set_selves(e, 0)
        if near is not None:
            _add(lse_pos, panel, torch.mul(e[:, near], panel.positive, out=of_near), near)
            e[:, near].sub_(of_near)  # which leaves exactly 0
        if c.beta == 1:
            _add(lse_w, panel, e)
            e.mul_(e)
        elif w is not None:
            panel.set_selves(w, 0)
            if near is not None:
                w[:, near].masked_fill_(panel.positive != 0, 0)
            _add(lse_w, panel, w)
            e.mul_(w)
        _add(lse_wn, panel, e)
    for sums in (lse_pos, lse_w, lse_wn):
        sums.log_()


def _unbounded(c: Contrast, sum_pos: Tensor, lse_pos: Tensor, lse_w: Tensor, lse_wn: Tensor) -> None:
    """Logarithms of sums from the first, each with a maximum of its own."""
    factors = [(lse_wn, c.one_plus_beta)] + ([(lse_w, c.beta)] if c.beta != 0 else [])
    for logs in (lse_pos, lse_w, lse_wn):
        logs.fill_(-torch.inf)

    def add(logs: Tensor, panel: Panel, x: Tensor, columns: slice | None = None) -> None:
        logs[panel.rows] = torch.logaddexp(logs[panel.rows], x.logsumexp(1))
        mirrored, at = _mirrored(panel, x, columns)
        if mirrored is not None:
            logs[at] = torch.logaddexp(logs[at], mirrored.logsumexp(0))

    for panel in c.panels():
        s, near = c.logits(panel).to(sum_pos.dtype), panel.near
        if near is not None:
            positive = panel.positive != 0
            panel.set_selves(s, 0)
            _add(sum_pos, panel, torch.where(positive, s[:, near], 0), near)
        panel.set_selves(s, -torch.inf)
        if near is not None:
            add(lse_pos, panel, torch.where(positive, s[:, near], -torch.inf), near)
            s[:, near].masked_fill_(positive, -torch.inf)
        for logs, factor in factors:
            add(logs, panel, s * factor)
