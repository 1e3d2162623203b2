"""The benchmark of a whole training step, on a tiny backbone. No time is asserted."""

from __future__ import annotations

import csv

import torch

import clce_ext
from bench import step


def test_every_objective_has_its_row(tmp_path):
    out = tmp_path / "step.csv"
    options = "--device cpu:0 --model test_vit --batches 8 --micro-batch 4 --steps 1 --out"
    assert step.main([*options.split(), str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["objective"] for row in rows] == ["ce", "clce", "clce-eager"]
    assert all(float(row["images_per_second"]) > 0 and row["commit"] for row in rows)


def test_micro_batches_give_the_gradients_of_the_batch():
    """And the two ways to compute CLCE agree."""
    torch.manual_seed(0)
    model = step.Classifier("test_vit").eval()
    images, labels = torch.randn(6, *model.image_shape), torch.arange(6) % 2
    gradients = {}
    for objective in ("ce", "clce", "clce-eager"):
        for micro_batch in (6, 4):
            model.zero_grad()
            step.make_step(objective, model, micro_batch)(images, labels)
            gradients[objective, micro_batch] = model.head.weight.grad.clone()
        torch.testing.assert_close(gradients[objective, 4], gradients[objective, 6], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients["clce", 6], gradients["clce-eager", 6], rtol=1e-4, atol=1e-6)
    logits, embeddings = torch.randn(8, step.CLASSES), torch.randn(8, 16)
    labels = torch.arange(8) % 3
    ours = clce_ext.CLCELoss(step.WEIGHT, temperature=step.TEMPERATURE)(logits, embeddings, labels)
    torch.testing.assert_close(step.eager_clce(logits, embeddings, labels), ours)
