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
    danchors = torch.zeros_like(rows) if need_anchors else None
    dkeys = torch.zeros_like(key_rows) if need_keys and not c.symmetric else None
    if danchors is None and dkeys is None:
        return None, None
    of_logits = (_Bounded if c.bounded else _Unbounded)(c, statistics, derivatives)
    for panel in c.panels():
        g = of_logits(panel)
        panel.set_selves(g, 0)
        if danchors is not None:
            danchors[panel.rows].addmm_(g, key_rows[panel.columns], alpha=c.scale)
            if panel.mirrored:
                danchors[panel.columns].addmm_(g.T, rows[panel.rows], alpha=c.scale)
        if dkeys is not None:
            dkeys[panel.columns].addmm_(g.T, rows[panel.rows], alpha=c.scale)
    c.release()
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

    def _pairs(self, of_anchor: Tensor, panel: Panel, which: int) -> Tensor:
        """[P, Q] in scratch, or [P, 1]."""
        rows = of_anchor[panel.rows, None]
        if not self.c.symmetric:
            return rows
        return torch.add(rows, of_anchor[None, panel.columns], out=self.c.scratch(which, panel))

    def __call__(self, panel: Panel) -> Tensor:
        c, differ = self.c, panel.negative
        s, g = c.logits(panel), c.scratch(1, panel)
        w = torch.mul(s, c.beta, out=c.scratch(3, panel)).exp_() if c.beta not in (0, 1) else None
        e = s.exp_()
        positive = None
        if differ is not None:
            # Exponentials are 0 where they are another kind of pair's: their gradient might overflow.
            positive = torch.addcmul(e, e, differ, value=-1, out=c.scratch(5, panel))
            e.mul_(differ)
            if w is not None:
                w.mul_(differ)
            by_sum = self._pairs(self.by_sum, panel, 2)
            by_sum = torch.addcmul(by_sum, by_sum, differ, value=-1, out=c.scratch(2, panel))
            torch.addcmul(by_sum, self._pairs(self.pos, panel, 1), positive, out=positive)
        wn = self._pairs(self.wn, panel, 1)
        if c.beta == 0:
            torch.mul(wn, e, out=g)
        else:
            torch.addcmul(self._pairs(self.w, panel, 2), wn, e, out=g).mul_(e if w is None else w)
        return g if positive is None else g.add_(positive)


class _Unbounded(_Coefficients):
    """Exponents s - lse are at most 0: in the wide dtype, as s and lse may be large and close."""

    def __call__(self, panel: Panel) -> Tensor:
        logits = self.c.logits(panel)
        s = logits.to(self.logs.dtype)
        g = self._of_side(panel, s, lambda x: x[panel.rows, None])
        if self.c.symmetric:
            g += self._of_side(panel, s, lambda x: x[None, panel.columns])
        return g.to(logits.dtype)

    def _of_side(self, panel: Panel, s: Tensor, at) -> Tensor:
        def term(which: int, factor: float) -> Tensor:
            return at(self.by_logs[which]) * torch.exp(s * factor - at(self.logs[which]))

        g = term(2, self.c.one_plus_beta)
        if self.c.beta != 0:
            g += term(1, self.c.beta)
        if panel.negative is None:
            return g
        return torch.where(panel.positive, at(self.by_sum) + term(0, 1.0), g)
