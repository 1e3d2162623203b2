"""The backend in plain torch operations, for devices that this installation has no kernels for.

It offers what a compiled backend offers (``csrc/backend.h``): prepare, statistics, loss, backward. Like the
CPU kernels it orders rows by label, so that nearly all panels of logits hold negatives only, and computes
self-contrast's panels on and above the diagonal once for both sides. A panel is the largest thing it ever
holds: memory is O(B D) and a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
BOUNDED_LOGIT = 43.5  # largest (1 + beta) |s| whose plain exponentials can be summed in float32
_ROW_PADDING = 8
# Rows and columns of a panel: a few of them should fit a core's cache; an accelerator wants fewer launches.
_CPU_PANEL, _ACCELERATOR_PANEL = 512, 2048


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, statistics and gradients of embeddings of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache
def _wide_dtype(device_type: str) -> torch.dtype:
    """The widest type of sums over panels: some devices (mps) have no float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


# ---- rows before and after ----


def prepare(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """x [M, D] -> rows [M, padded D], of length 1 where ``normalize``; and their lengths [M] before."""
    rows, dim = x.shape
    z = x.new_empty((rows, math.ceil(dim / _ROW_PADDING) * _ROW_PADDING))
    z[:, dim:] = 0
    acc = acc_dtype(x.dtype)
    if not normalize:
        z[:, :dim] = x
        return z, x.new_empty(0, dtype=acc)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=acc)
    z[:, :dim] = x / norms.clamp_min(NORM_EPS)[:, None]
    return z, norms


def prepare_backward(dz: Tensor, z: Tensor, norms: Tensor, dim: int, normalize: bool) -> Tensor:
    """The gradient [M, D] of :func:`prepare`'s input, given that of its rows."""
    grad = dz[:, :dim]
    if not normalize:
        return grad.to(z.dtype)
    rows = z[:, :dim].to(grad.dtype)
    tiny = norms < NORM_EPS
    # The part along the row is lost to normalisation; a row shorter than eps was only divided by eps.
    along = torch.where(tiny, 0, torch.linalg.vecdot(rows, grad))[:, None]
    grad = torch.addcmul(grad, rows, along, value=-1).div_(norms.clamp_min(NORM_EPS)[:, None])
    # Divided by eps: a half cannot hold it, and a zero vector must not make the step infinite.
    largest = torch.finfo(torch.float16 if z.dtype == torch.float16 else grad.dtype).max
    bound = torch.where(tiny, largest, torch.inf).to(grad.dtype)[:, None]
    return grad.clamp_(-bound, bound).to(z.dtype)


# ---- panels ----


class _Side:
    """Anchors or keys in the order of their labels, without those that are ignored."""

    def __init__(self, z: Tensor, labels: Tensor | None, views: int, ignore_index: int):
        if labels is None:
            labels = torch.arange(z.shape[0], device=z.device) // views
            self.order = torch.arange(z.shape[0], device=z.device)
        else:
            labels = labels.long().repeat_interleave(views)
            order = torch.argsort(labels, stable=True)
            self.order = order[labels[order] != ignore_index]
        self.labels = labels[self.order]
        self.rows = z[self.order].to(acc_dtype(z.dtype))
        self.count = self.rows.shape[0]


@dataclass
class _Panel:
    rows: slice
    columns: slice
    mirrored: bool  # stands for the panel below the diagonal too
    positive: Tensor | None  # None: all pairs are negatives
    negative: Tensor | None


class _Contrast:
    """Anchors against keys, panel by panel."""

    def __init__(
        self, z: Tensor, key_z: Tensor | None, labels: Tensor | None, key_labels: Tensor | None, views: int,
        key_offset: int | None, scale: float, ignore_index: int,
    ):  # fmt: skip
        self.scale, self.symmetric = scale, key_z is None
        self.num_anchors = z.shape[0]
        self.num_keys = z.shape[0] if key_z is None else key_z.shape[0]
        self.anchors = _Side(z, labels, views, ignore_index)
        self.keys = self.anchors if key_z is None else _Side(key_z, key_labels, 1, ignore_index)
        self.size = _CPU_PANEL if z.device.type == "cpu" else _ACCELERATOR_PANEL
        # Of each anchor: where its positives begin and end among the ordered keys, and where it is itself.
        self.begin = torch.searchsorted(self.keys.labels, self.anchors.labels)
        self.end = torch.searchsorted(self.keys.labels, self.anchors.labels, right=True)
        if self.symmetric:
            self.itself = torch.arange(self.anchors.count, device=z.device)
        elif key_offset is None:
            self.itself = torch.full_like(self.begin, -1)
        else:
            place = self.begin.new_full((self.num_keys,), -1)
            place[self.keys.order] = torch.arange(self.keys.count, device=z.device)
            self.itself = place[self.anchors.order + key_offset]

    def counts(self) -> tuple[Tensor, Tensor]:
        """Numbers of positives and of negatives."""
        is_key = self.itself >= 0
        among_positives = is_key & (self.begin <= self.itself) & (self.itself < self.end)
        positives = self.end - self.begin - among_positives.long()
        return positives, self.keys.count - is_key.long() - positives

    def panels(self) -> Iterator[_Panel]:
        def blocks(count: int) -> list[slice]:
            return [slice(i, min(i + self.size, count)) for i in range(0, count, self.size)]

        rows = blocks(self.anchors.count)
        columns = torch.arange(self.keys.count, device=self.begin.device)
        for block, first, last, low, high in zip(rows, *self._reach(rows), strict=True):
            for other in blocks(self.keys.count):
                if self.symmetric and other.start < block.start:
                    continue
                mirrored = self.symmetric and other.start > block.start
                holds_positives = first < other.stop and last > other.start
                if not holds_positives and not (low < other.stop and high >= other.start):
                    yield _Panel(block, other, mirrored, None, None)
                    continue
                column = columns[other][None, :]
                same = (column >= self.begin[block, None]) & (column < self.end[block, None])
                counted = column != self.itself[block, None]
                yield _Panel(block, other, mirrored, same & counted, ~same & counted)

    def _reach(self, blocks: list[slice]) -> list[list[int]]:
        """Of each block of anchors: where its positives begin and end, its first and last self among keys."""
        numbers = [
            torch.stack([self.begin[b][0], self.end[b][-1], self.itself[b].amin(), self.itself[b].amax()])
            for b in blocks
        ]
        return torch.stack(numbers, 1).tolist() if blocks else [[]] * 4

    def logits(self, panel: _Panel) -> Tensor:
        """Both passes make them by this call, which gives the same bits."""
        a, b = self.anchors.rows[panel.rows], self.keys.rows[panel.columns]
        return torch.addmm(a.new_empty(()), a, b.T, beta=0, alpha=self.scale)


def _add(total: Tensor, panel: _Panel, values: Tensor) -> None:
    total[panel.rows] += values.sum(1)
    if panel.mirrored:
        total[panel.columns] += values.sum(0)


def _powers(s: Tensor, beta: float) -> tuple[Tensor | None, Tensor]:
    """e^(beta s), or None where it is 1, and e^((1 + beta) s); one exponential where one is enough."""
    if beta == 0:
        return None, s.exp()
    if beta == 1:
        e = s.exp()
        return e, e * e
    return (s * beta).exp(), (s * (1 + beta)).exp()


# ---- statistics ----


def statistics(contrast: _Contrast, beta: float, bounded: bool) -> Tensor:
    """[9, M] (csrc/family/statistics.h names the rows) in the accumulation dtype."""
    c = contrast
    rows = c.anchors.rows
    wide = torch.zeros((6, c.anchors.count), dtype=_wide_dtype(rows.device.type), device=rows.device)
    wide[0], wide[1] = c.counts()
    wide[3:] = (_bounded_logs if bounded else _unbounded_logs)(c, beta, wide[1], wide[2])
    out = wide.new_zeros((9, c.num_anchors))
    out[3:6] = -torch.inf  # of ignored anchors
    out[:6, c.anchors.order] = wide
    high = out[:6].to(rows.dtype)
    low = torch.where(high[3:].isfinite(), out[3:6] - high[3:], 0).to(rows.dtype)
    return torch.cat([high, low])


def _bounded_logs(c: _Contrast, beta: float, num_negatives: Tensor, sum_positives: Tensor) -> Tensor:
    exp_pos, exp_w, exp_wn = sums = num_negatives.new_zeros((3, c.anchors.count))
    for panel in c.panels():
        s = c.logits(panel)
        if panel.positive is not None:
            _add(sum_positives, panel, torch.where(panel.positive, s, 0))
            _add(exp_pos, panel, torch.where(panel.positive, s.exp(), 0))
            s = torch.where(panel.negative, s, -torch.inf)
        w, wn = _powers(s, beta)
        if w is not None:
            _add(exp_w, panel, w)
        _add(exp_wn, panel, wn)
    if beta == 0:
        exp_w.copy_(num_negatives)
    return sums.log()


def _unbounded_logs(c: _Contrast, beta: float, num_negatives: Tensor, sum_positives: Tensor) -> Tensor:
    logs = num_negatives.new_full((3, c.anchors.count), -torch.inf)
    for panel in c.panels():
        s = c.logits(panel).to(logs.dtype)
        negatives = s
        if panel.positive is not None:
            _add(sum_positives, panel, torch.where(panel.positive, s, 0))
            negatives = torch.where(panel.negative, s, -torch.inf)
        for log, factor in zip(logs, (None, beta, 1 + beta), strict=True):
            if factor is None:
                if panel.positive is None:
                    continue
                x = torch.where(panel.positive, s, -torch.inf)
            elif factor == 0:
                continue
            else:
                x = negatives * factor
            log[panel.rows] = torch.logaddexp(log[panel.rows], x.logsumexp(1))
            if panel.mirrored:
                log[panel.columns] = torch.logaddexp(log[panel.columns], x.logsumexp(0))
    if beta == 0:
        logs[1] = num_negatives.log()
    return logs


# ---- the loss, of the statistics alone ----


def loss_from_statistics(
    statistics: Tensor, temperature: float, beta: float, summation: str, denominator: str, debias: float,
    detach_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each anchor's loss [M], whether it has a term [M], and its derivatives [5, M]: csrc/family/loss.h."""
    n_pos, n_neg, sum_pos, lse_pos, lse_w, lse_wn, pos_low, w_low, wn_low = statistics
    has_negatives = n_neg > 0
    is_term = (n_pos > 0) & (has_negatives | (denominator == "all"))
    zero = torch.zeros_like(n_pos)

    # log H, and its derivatives by the weighted mean of negatives, by lse_pos and by 1 / temperature.
    log_n_neg = n_neg.log()
    log_h = torch.where(has_negatives, log_n_neg + ((lse_wn - lse_w) + (wn_low - w_low)), -torch.inf)
    by_weighted, by_pos, by_scale = torch.ones_like(zero), zero, zero
    if debias > 0:
        floor = log_n_neg - 1 / temperature
        # The share of H that the false negatives are expected to make up.
        share = torch.exp((debias * n_neg / n_pos).log() + lse_pos - log_h)
        debiased = log_h + torch.log1p(-share) - math.log(1 - debias)
        on_floor = (share >= 1) | (debiased <= floor)
        log_h = torch.where(has_negatives, torch.where(on_floor, floor, debiased), -torch.inf)
        by_weighted = torch.where(on_floor, 0, 1 / (1 - share))
        by_pos = torch.where(on_floor, 0, -share / (1 - share))
        by_scale = torch.where(on_floor, -1.0, zero)

    gap = (log_h - lse_pos) - pos_low  # log H - lse_pos: -inf without negatives
    if denominator == "negatives":
        log_d_over_pos, by_log_h = gap, torch.ones_like(gap)
    else:
        small = torch.exp(-gap.abs())
        log_d_over_pos = torch.log1p(small) + gap.clamp_min(0)
        by_log_h = torch.where(gap > 0, 1 / (1 + small), small / (1 + small))
    if summation == "in":
        value = log_d_over_pos + n_pos.log()
        d_sum, d_pos = zero, -by_log_h
    else:
        value = log_d_over_pos + ((lse_pos - sum_pos / n_pos) + pos_low)
        d_sum, d_pos = -1 / n_pos, 1 - by_log_h
    by_negatives = by_log_h * by_weighted
    d_pos = torch.where(has_negatives, d_pos + by_log_h * by_pos, d_pos)
    d_wn = by_negatives / (1 + beta) if detach_weights else by_negatives
    d_w = zero if detach_weights else -by_negatives
    of_negatives = [torch.where(has_negatives, d, 0) for d in (d_w, d_wn, by_log_h * by_scale)]
    derivatives = torch.stack([d_sum, d_pos, *of_negatives])
    return torch.where(is_term, value, 0), is_term, torch.where(is_term, derivatives, 0)


# ---- backward ----


def statistics_backward(
    contrast: _Contrast, statistics: Tensor, derivatives: Tensor, beta: float, bounded: bool, stride: int,
    need_anchors: bool, need_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz [M, stride] and dkeys [N, stride] in the accumulation dtype; unneeded ones have no rows."""
    c = contrast
    need_keys = need_keys and not c.symmetric
    rows = c.anchors.rows
    danchors = rows.new_zeros((c.anchors.count if need_anchors else 0, stride))
    dkeys = rows.new_zeros((c.keys.count if need_keys else 0, stride))
    gradient = (_Bounded if bounded else _Unbounded)(c, statistics, derivatives, beta)
    for panel in c.panels() if need_anchors or need_keys else ():
        g = gradient.of(panel)
        if need_anchors:
            danchors[panel.rows].addmm_(g, c.keys.rows[panel.columns], alpha=c.scale)
            if panel.mirrored:
                danchors[panel.columns].addmm_(g.T, rows[panel.rows], alpha=c.scale)
        if need_keys:
            dkeys[panel.columns].addmm_(g.T, rows[panel.rows], alpha=c.scale)
    return (
        _put_back(danchors, c.anchors.order, c.num_anchors if need_anchors else 0),
        _put_back(dkeys, c.keys.order, c.num_keys if need_keys else 0),
    )


def _put_back(ordered: Tensor, order: Tensor, count: int) -> Tensor:
    if count == 0:
        return ordered.new_empty((0, ordered.shape[1]))
    return ordered.new_zeros((count, ordered.shape[1])).index_copy_(0, order, ordered)


class _Gradient:
    """dL/ds of a panel; in self-contrast with what the other side's statistics give."""

    def __init__(self, c: _Contrast, statistics: Tensor, derivatives: Tensor, beta: float):
        self.c, self.beta = c, beta
        wide = _wide_dtype(statistics.device.type)
        s, d = statistics[:, c.anchors.order].to(wide), derivatives[:, c.anchors.order].to(wide)
        self.by_sum = d[0]
        self.by_logs = torch.stack([d[1], d[2] * beta, d[3] * (1 + beta)])
        # A derivative of 0 belongs to an empty set, whose logarithm is -inf: e^(s - inf) is 0.
        self.logs = torch.where(self.by_logs == 0, torch.inf, s[3:6] + s[6:9])

    def both(self, of_anchor: Tensor, panel: _Panel) -> Tensor:
        """A number of each pair's anchor and, in self-contrast, of its key: [P, Q] or [P, 1]."""
        rows = of_anchor[panel.rows, None]
        return rows + of_anchor[None, panel.columns] if self.c.symmetric else rows


class _Bounded(_Gradient):
    """e^(s - lse) = e^s e^-lse: both factors lie well inside the exponent's range."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        acc = self.c.anchors.rows.dtype
        self.pos, self.w, self.wn = (self.by_logs * torch.exp(-self.logs)).to(acc)
        self.by_sum = self.by_sum.to(acc)

    def of(self, panel: _Panel) -> Tensor:
        s = self.c.logits(panel)
        wn = self.both(self.wn, panel)
        if self.beta == 1:  # e (e wn + w)
            e = s.exp()
            g = torch.addcmul(self.both(self.w, panel), wn, e).mul_(e)
        else:
            w, e = _powers(s, self.beta)
            g = e.mul_(wn)
            if w is not None:
                g.addcmul_(self.both(self.w, panel), w)
        if panel.positive is None:
            return g
        positive = torch.addcmul(self.both(self.by_sum, panel), self.both(self.pos, panel), s.exp())
        return torch.where(panel.positive, positive, torch.where(panel.negative, g, 0))


class _Unbounded(_Gradient):
    """Every exponent s - lse is at most 0; computed in the wide type, where s and lse are large and close."""

    def of(self, panel: _Panel) -> Tensor:
        logits = self.c.logits(panel)
        s = logits.to(self.logs.dtype)
        g = self._of_side(panel, s, lambda x: x[panel.rows, None])
        if self.c.symmetric:
            g += self._of_side(panel, s, lambda x: x[None, panel.columns])
        return g.to(logits.dtype)

    def _of_side(self, panel: _Panel, s: Tensor, at) -> Tensor:
        def term(which: int, factor: float) -> Tensor:
            return at(self.by_logs[which]) * torch.exp(s * factor - at(self.logs[which]))

        g = term(2, 1 + self.beta)
        if self.beta != 0:
            g += term(1, self.beta)
        if panel.positive is None:
            return g
        return torch.where(panel.positive, at(self.by_sum) + term(0, 1.0), torch.where(panel.negative, g, 0))
