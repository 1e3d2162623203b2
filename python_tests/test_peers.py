"""Independent implementations: pytorch-metric-learning's SupConLoss and NTXentLoss, torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch

import clce_ext

losses = pytest.importorskip("pytorch_metric_learning.losses")


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05])
def test_supcon(temperature):
    x, labels = torch.randn(60, 24, dtype=torch.float64), torch.randint(8, (60,))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = clce_ext.SupConLoss(temperature)(ours, labels)
    b = losses.SupConLoss(temperature)(theirs, labels)
    torch.testing.assert_close(a, b)
    a.backward(), b.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05])
def test_ntxent(temperature):
    """Two views of every image; theirs takes the views one below the other."""
    views = torch.randn(30, 2, 24, dtype=torch.float64)
    labels = torch.arange(30).repeat(2)
    ours, theirs = views.clone().requires_grad_(), views.clone().requires_grad_()
    a = clce_ext.NTXentLoss(temperature)(ours)
    b = losses.NTXentLoss(temperature)(theirs.transpose(0, 1).reshape(60, 24), labels)
    torch.testing.assert_close(a, b)
    a.backward(), b.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
