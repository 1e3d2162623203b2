"""Derivatives and panels to the gradients of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from clce_ext.arguments import Derivatives, Statistics
from clce_ext.portable.panels import Contrast, Panel
from clce_ext.portable.rows import wide_dtype


def gradients(
    c: Contrast, statistics: Tensor, derivatives: Tensor, need_anchors: bool, need_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of anchors and of keys, ordered as the contrast's are, in the accumulation dtype.

    In self-contrast the anchors' holds both sides'.
    """
    rows, key_rows = c.anchors.rows, c.keys.rows
    need_keys = need_keys and not c.symmetric
    # Each row's first product is put in its place, further ones are added; without pairs there is none.
    new = torch.empty_like if c.anchors.count and c.keys.count else torch.zeros_like
    danchors = new(rows) if need_anchors else None
    dkeys = new(key_rows) if need_keys else None
    if danchors is None and dkeys is None:
        return None, None

    def add(to: Tensor, at: slice, g: Tensor, other: Tensor, first: bool) -> None:
        to[at].addmm_(g, other, beta=0 if first else 1, alpha=c.scale)

    of_logits = (_Bounded if c.bounded else _Unbounded)(c, statistics, derivatives)
    for panel in c.panels():
        g = of_logits(panel)
        panel.set_selves(g, 0)
        first = panel.rows.start == 0
        if danchors is not None:
            add(danchors, panel.rows, g, key_rows[panel.columns], panel.columns.start == 0)
            if panel.mirror < g.shape[1]:
                add(danchors, panel.mirrored, g[:, panel.mirror :].T, rows[panel.rows], first)
        if dkeys is not None:
            add(dkeys, panel.columns, g.T, rows[panel.rows], first)
    return danchors, dkeys


class _Coefficients:
    """Of each anchor: its derivatives by the exponents of its sums, and the logarithms of those."""

    def __init__(self, c: Contrast, statistics: Tensor, derivatives: Tensor):
        self.c = c
        wide = wide_dtype(statistics.device.type)
        s = Statistics(*c.anchors.ordered(statistics, 1).to(wide))
        d = Derivatives(*c.anchors.ordered(derivatives, 1).to(wide))
        self.by_sum = d.sum_pos
        self.by_logs = torch.stack([d.lse_pos, d.lse_w * c.beta, d.lse_wn * c.one_plus_beta])
        logs = [s.lse_pos + s.lse_pos_low, s.lse_w + s.lse_w_low, s.lse_wn + s.lse_wn_low]
        # A derivative of 0 may belong to an empty set, whose logarithm is -inf: e^(s - inf) is 0.
        self.logs = torch.where(self.by_logs == 0, torch.inf, torch.stack(logs))


class _Bounded(_Coefficients):
    """e^(s - lse) = e^s e^-lse: both factors lie well inside the exponent's range.

    A pair's gradient is linear in numbers of its anchor. In self-contrast those of its key are added.
    """

    def __init__(self, c: Contrast, statistics: Tensor, derivatives: Tensor):
        super().__init__(c, statistics, derivatives)
        acc = c.anchors.rows.dtype
        self.pos, self.w, self.wn = (self.by_logs * torch.exp(-self.logs)).to(acc)
        self.by_sum = self.by_sum.to(acc)

    def _of_pairs(self, of_anchor: Tensor, panel: Panel, which: int, columns: slice | None = None) -> Tensor:
        """[P, Q] in scratch, or [P, 1]."""
        rows = of_anchor[panel.rows, None]
        if not self.c.symmetric:
            return rows
        keys = of_anchor[panel.columns]
        if columns is not None:
            keys = keys[columns]
        return torch.add(rows, keys, out=self.c.scratch(which, panel, columns))

    def __call__(self, panel: Panel) -> Tensor:
        c, near = self.c, panel.near
        s, g = c.logits(panel), c.scratch(1, panel)
        w = torch.mul(s, c.beta, out=c.scratch(3, panel)).exp_() if c.beta not in (0, 1) else None
        e = torch.exp(s, out=c.scratch(0, panel))
        if near is not None:
            # Exponentials are 0 where they are another kind of pair's: their gradient might overflow.
            positive = torch.mul(e[:, near], panel.positive, out=c.scratch(5, panel, near))
            e[:, near].sub_(positive)  # which leaves exactly 0
            if w is not None:
                w[:, near].masked_fill_(panel.positive != 0, 0)
            positive.mul_(self._of_pairs(self.pos, panel, 1, near))
            positive.addcmul_(self._of_pairs(self.by_sum, panel, 1, near), panel.positive)
        wn = self._of_pairs(self.wn, panel, 1)
        # From here on scratch 4, where the positives were marked, is free.
        if c.symmetric and c.beta != 0:
            torch.addcmul(self._of_pairs(self.w, panel, 4), wn, e, out=g)
        else:  # as fast for a column of numbers as for a matrix
            torch.mul(e, wn, out=g)
            if c.beta != 0:
                g.add_(self._of_pairs(self.w, panel, 4))
        if c.beta != 0:
            g.mul_(e if w is None else w)
        if near is not None:
            g[:, near].add_(positive)
        return g


class _Unbounded(_Coefficients):
    """Exponents s - lse are at most 0: in the wide dtype, as s and lse may be large and close."""

    def __call__(self, panel: Panel) -> Tensor:
        logits = self.c.logits(panel)
        s = logits.to(self.logs.dtype)
        g = self._of_side(panel, s, lambda x: x[panel.rows, None], lambda x: x)
        if self.c.symmetric:
            near = panel.near or slice(None)
            g += self._of_side(panel, s, lambda x: x[panel.columns], lambda x: x[near])
        return g.to(logits.dtype)

    def _of_side(self, panel: Panel, s: Tensor, at, of_near) -> Tensor:
        """``at`` takes the numbers of the side's rows, ``of_near`` of these those near the panel's rows."""

        def term(which: int, factor: float) -> Tensor:
            return at(self.by_logs[which]) * torch.exp(s * factor - at(self.logs[which]))

        g = term(2, self.c.one_plus_beta)
        if self.c.beta != 0:
            g += term(1, self.c.beta)
        near = panel.near
        if near is not None:
            exponent = s[:, near] - of_near(at(self.logs[0]))
            of_positive = of_near(at(self.by_sum)) + of_near(at(self.by_logs[0])) * torch.exp(exponent)
            g[:, near] = torch.where(panel.positive != 0, of_positive, g[:, near])
        return g
