"""What the tests of clce_ext.train share: quick runs on digits, folders of real images."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clce_ext.train.config import TrainConfig

# Two steps per epoch on 40 images: a run takes a second.
QUICK = {
    "shots": 4,
    "batch_size": 20,
    "images_per_class": 2,
    "epochs": 2,
    "lr": 1e-3,
    "drop_path": 0.1,
    "eval_embeddings": "never",
    "tensorboard": False,
    "progress": False,
    "device": "cpu",
}


def quick_config(output: Path, **options: Any) -> TrainConfig:
    return TrainConfig.from_dict(QUICK | {"output": str(output)} | options)


def command_line(options: dict[str, Any]) -> list[str]:
    """The options as arguments of clce-train."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if "second" not in k}


def write_digit_images(root: Path, train: int, val: int, classes: int = 10, size: int = 64) -> Path:
    """scikit-learn's digits as PNG files: root/train/CLASS/*.png and root/val/CLASS/*.png."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(classes):
        members = np.flatnonzero(digits.target == label)
        for split, part in (("train", members[:train]), ("val", members[train : train + val])):
            folder = root / split / f"digit_{label}"
            folder.mkdir(parents=True)
            for i in part:
                pixels = (digits.images[i] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).resize((size, size)).save(folder / f"{i:04d}.png")
    return root
