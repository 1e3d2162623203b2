"""The losses in plain PyTorch, with the whole B x B matrix: short enough to be believed.

Tests compare against it in float64; the same code in the tested dtype says how large an error is usual;
benchmarks take it as the eager (and compiled) competitor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast(embeddings, labels=None, keys=None, key_labels=None, key_offset=None, ignore_index=-100):
    """Anchors [M, D], keys [N, D] and the boolean masks [M, N] of positives and negatives."""
    views = 1
    if embeddings.dim() == 3:
        views = embeddings.shape[1]
        embeddings = embeddings.flatten(0, 1)
    rows = torch.arange(len(embeddings), device=embeddings.device)
    anchor_labels = rows // views if labels is None else labels.long().repeat_interleave(views)
    if keys is None:
        keys, key_labels, key_offset = embeddings, None if labels is None else anchor_labels, 0
    columns = torch.arange(len(keys), device=keys.device)
    if key_labels is None:
        key_labels = columns // (views if keys is embeddings else 1)
    same = anchor_labels[:, None] == key_labels.long()[None, :]
    counted = torch.ones_like(same)
    if labels is not None:
        counted = (anchor_labels != ignore_index)[:, None] & (key_labels != ignore_index)[None, :]
    if key_offset is not None:
        counted = counted & (columns[None, :] != rows[:, None] + key_offset)
    return embeddings, keys, same & counted, ~same & counted


def hard_negative_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_offset: int | None = None,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    summation: str = "out",
    denominator: str = "all",
    debias: float | Tensor = 0.0,
    detach_weights: bool = False,
    normalize: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    z, k, pos, neg = contrast(embeddings, labels, keys, key_labels, key_offset, ignore_index)
    if normalize:
        itself = k is z
        z = F.normalize(z, dim=1)
        k = z if itself else F.normalize(k, dim=1)
    s = z @ k.T / temperature
    if s.dtype in (torch.float16, torch.bfloat16):
        s = s.float()  # as autocast does for a loss

    n_pos, n_neg = pos.sum(1).to(s.dtype), neg.sum(1).to(s.dtype)
    terms = (n_pos > 0) & ((n_neg > 0) | (denominator == "all"))
    empty = torch.tensor(-torch.inf, dtype=s.dtype, device=s.device)

    def lse(mask, x):
        # Rows of an empty set get a constant, so that no gradient passes through -inf - -inf.
        some = mask.any(1)
        x = torch.where(mask, x, empty)
        x = torch.where(some[:, None], x, torch.zeros_like(x))
        return torch.where(some, x.logsumexp(1), empty)

    lse_pos = lse(pos, s)
    log_w = (
        beta * s + n_neg.clamp_min(1).log()[:, None] - torch.where(n_neg > 0, lse(neg, beta * s), 0)[:, None]
    )
    log_h = lse(neg, s + (log_w.detach() if detach_weights else log_w))
    debias_of_images = isinstance(debias, Tensor)
    if debias_of_images:
        debias = debias.to(s).repeat_interleave(len(s) // max(1, len(debias)))
    if debias_of_images or debias > 0:
        mean_pos = lse_pos.exp() / n_pos.clamp_min(1)
        h = (log_h.exp() - debias * n_neg * mean_pos) / (1 - debias)
        floor = n_neg * torch.exp(-1 / torch.as_tensor(temperature, dtype=s.dtype, device=s.device))
        h = (
            torch.where(debias > 0, torch.maximum(h, floor), h)
            if debias_of_images
            else torch.maximum(h, floor)
        )
        log_h = torch.where(n_neg > 0, torch.where(n_neg > 0, h, 1).log(), empty)
    with_terms = torch.where(terms, lse_pos, 0)
    if denominator == "all":
        # logaddexp whose gradient is finite where H = 0
        log_d = torch.where(
            n_neg > 0, torch.logaddexp(with_terms, torch.where(n_neg > 0, log_h, 0)), with_terms
        )
    else:
        log_d = torch.where(terms, log_h, 0)
    if summation == "out":
        losses = log_d - torch.where(pos, s, 0).sum(1) / n_pos.clamp_min(1)
    else:
        losses = log_d - with_terms + n_pos.clamp_min(1).log()
    losses = torch.where(terms, losses, torch.zeros_like(losses))
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / terms.sum().clamp_min(1)
