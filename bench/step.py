"""``python -m bench.step``: a whole training step, images per second and peak memory.

A backbone from timm with random weights and a linear classifier, bfloat16 autocast and AdamW on random
images; the batch goes through in micro-batches. ``ce`` accumulates their cross-entropies. The others contrast
the whole batch by gradient caching, which is a second forward pass: ``clce`` with this package's loss,
``clce-eager`` with the same loss in plain PyTorch.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clce_ext
from bench import machine
from python_tests import reference

CLASSES = 100
WEIGHT, TEMPERATURE = 0.9, 0.5  # CLCE's mixing weight and temperature
Step = Callable[[Tensor, Tensor], object]


class Classifier(nn.Module):
    """Logits [B, CLASSES] and embeddings [B, D]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, CLASSES)
        self.image_shape = self.backbone.default_cfg["input_size"]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.backbone(images)
        return self.head(embeddings), embeddings


def eager_clce(logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    contrast = reference.hard_negative_contrastive_loss(
        embeddings, labels, temperature=TEMPERATURE, beta=1.0, summation="in"
    )
    return (1 - WEIGHT) * F.cross_entropy(logits.float(), labels) + WEIGHT * contrast


def make_step(objective: str, model: Classifier, micro_batch: int) -> Step:
    """Adds the gradients of a batch to the model's."""
    if objective == "clce":
        return clce_ext.GradCache(model, clce_ext.CLCELoss(WEIGHT, temperature=TEMPERATURE), micro_batch)
    if objective == "clce-eager":
        return clce_ext.GradCache(model, eager_clce, micro_batch)

    def accumulate(images: Tensor, labels: Tensor) -> None:
        for part, of_part in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
            logits, _ = model(part)
            (F.cross_entropy(logits.float(), of_part) * (len(part) / len(images))).backward()

    return accumulate


def measure(objective: str, args: argparse.Namespace, batch: int) -> dict:
    """Seconds of a step (median), images per second, and peak bytes of device memory (CUDA)."""
    torch.manual_seed(0)
    device, cuda = args.device, args.device.startswith("cuda")
    model = Classifier(args.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step = make_step(objective, model, args.micro_batch)
    images = torch.randn(batch, *model.image_shape, device=device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    seconds = []
    for _ in range(1 + args.steps):  # the first warms up
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            step(images, labels)
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"seconds": median, "images_per_second": batch / median, "peak_bytes": peak}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="beit_base_patch16_224")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--objectives", nargs="+", default=["ce", "clce", "clce-eager"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/out/step.csv"))
    args = parser.parse_args(argv)
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for batch in args.batches:
        for objective in args.objectives:
            row = {
                "model": args.model,
                "batch": batch,
                "micro_batch": args.micro_batch,
                "objective": objective,
            }
            row |= measure(objective, args, batch)
            memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**30:.1f} GiB"
            print(f"{batch:6} {objective:12} {row['images_per_second']:8.0f} images/s{memory}", flush=True)
            rows.append(machine.metadata(args.device) | row)
            with args.out.open("w", newline="") as file:  # after each: what was measured survives
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
