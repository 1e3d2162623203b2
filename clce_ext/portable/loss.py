"""Statistics to losses: ``csrc/family/loss.h`` says what is computed, and here all anchors are at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clce_ext.arguments import Derivatives, Statistics
from clce_ext.portable.rows import wide_dtype


def loss_of_anchors(
    statistics: Tensor, temperature: float, beta: float, summation: str, denominator: str,
    debias: float | Tensor, detach_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each anchor's loss [M], whether it has a term [M], and its derivatives [5, M]."""
    acc, wide = statistics.dtype, wide_dtype(statistics.device.type)
    s = Statistics(*statistics.to(wide))
    lse_pos, sum_pos = s.lse_pos, s.sum_pos
    has_negatives = s.n_neg > 0
    is_term = (s.n_pos > 0) & (has_negatives | (denominator == "all"))
    zero = torch.zeros_like(s.n_pos)

    # log H; its derivatives by the logarithm of the negatives' weighted mean, by lse_pos, by 1 / temperature.
    log_n_neg = s.n_neg.log()
    log_h = log_n_neg + ((s.lse_wn - s.lse_w) + (s.lse_wn_low - s.lse_w_low))
    h_by_weighted, h_by_pos, h_by_scale = torch.ones_like(zero), zero, zero
    per_anchor = isinstance(debias, Tensor)
    if per_anchor or debias > 0:
        debias = debias.to(wide) if per_anchor else debias
        log_true = torch.log1p(-debias) if per_anchor else math.log1p(-debias)
        floor = log_n_neg - 1 / temperature
        # The share of H that the false negatives are expected to make up.
        share = torch.exp((debias * s.n_neg / s.n_pos).log() + lse_pos - log_h)
        debiased = log_h + torch.log1p(-share) - log_true
        on_floor = (share >= 1) | (debiased <= floor)  # NaN is not
        if per_anchor:
            on_floor &= debias > 0
        log_h = torch.where(on_floor, floor, debiased)
        h_by_weighted = torch.where(on_floor, 0, 1 / (1 - share))
        h_by_pos = torch.where(on_floor, 0, -share / (1 - share))
        h_by_scale = torch.where(on_floor, -1.0, zero)
    log_h = torch.where(has_negatives, log_h, -torch.inf)

    # log D - lse_pos as a softplus: no cancellation between two large logarithms.
    gap = (log_h - lse_pos) - s.lse_pos_low
    if denominator == "negatives":
        log_d_over_pos, d_by_h = gap, torch.ones_like(gap)
    else:
        small = torch.exp(-gap.abs())
        log_d_over_pos = torch.log1p(small) + gap.clamp_min(0)
        d_by_h = torch.where(gap > 0, 1, small) / (1 + small)
    if summation == "in":
        value = log_d_over_pos + s.n_pos.log()
        by_sum, by_pos = zero, -d_by_h
    else:
        value = log_d_over_pos + ((lse_pos - sum_pos / s.n_pos) + s.lse_pos_low)
        by_sum, by_pos = -1 / s.n_pos, 1 - d_by_h
    by_weighted = d_by_h * h_by_weighted
    derivatives = Derivatives(
        sum_pos=by_sum,
        lse_pos=torch.where(has_negatives, by_pos + d_by_h * h_by_pos, by_pos),
        lse_w=zero if detach_weights else torch.where(has_negatives, -by_weighted, 0),
        lse_wn=torch.where(has_negatives, by_weighted / (1 + beta if detach_weights else 1), 0),
        scale=torch.where(has_negatives, d_by_h * h_by_scale, 0),
    )
    value = torch.where(is_term, value, 0)
    return value.to(acc), is_term, torch.where(is_term, torch.stack(derivatives), 0).to(acc)


def reduce_loss(value: Tensor, is_term: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss, [] or [M], and the number of its terms []."""
    num_terms = is_term.sum().to(value.dtype)
    if reduction != "none":
        total = value.sum(dtype=wide_dtype(value.device.type))
        value = (total / num_terms.clamp_min(1) if reduction == "mean" else total).to(value.dtype)
    return value, num_terms


def temperature_gradient(dots: Tensor, by_scale: Tensor, symmetric: bool, temperature: Tensor) -> Tensor:
    """By the temperature t. Through the logits: d(1/t) = t sum_i z_i . dz_i, and d(1/t) is -dt / t^2.

    Args:
        dots: [M], z_i . dz_i of the rows of one side, or [], their sum.
        by_scale: [], what the loss takes from 1 / t directly.
        symmetric: dz holds both sides' gradient, as in self-contrast.
        temperature: [].
    """
    by_logits = dots.sum(dtype=wide_dtype(dots.device.type)).to(by_scale.dtype)
    if symmetric:
        by_logits = by_logits / 2
    return torch.addcdiv(by_logits, by_scale, temperature) / -temperature
