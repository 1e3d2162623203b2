"""examples/finetune.py, the file to copy: it trains, evaluates, saves and predicts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "finetune.py"


def run(*arguments: object) -> str:
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    done = subprocess.run(command, cwd=EXAMPLE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_trains_and_predicts(tmp_path):
    folder = tmp_path / "images"
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, brightness in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(brightness - 30, brightness + 30, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"  # of other classes than the data's
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), weights)
    saved = tmp_path / "not there yet" / "saved.pt"
    options = {"model": "test_resnet", "weights": weights, "output": saved, "epochs": 4, "batch-size": 8}
    options |= {"micro-batch-size": 3, "lr": 1e-3, "workers": 0}
    printed = run(
        "train", folder, *(text for name, value in options.items() for text in (f"--{name}", value))
    )
    lines = re.findall(r"epoch (\d+): loss ([\d.]+)  top-1 ([\d.]+)%  neighbours ([\d.]+)%", printed)
    assert [int(line[0]) for line in lines] == [1, 2, 3, 4]
    assert float(lines[-1][1]) < float(lines[0][1])
    assert lines[-1][2:] == ("100.00", "100.00")  # top-1 and neighbours

    before, after = torch.load(weights), torch.load(saved, weights_only=True)[2]
    assert torch.equal(before["bn1.running_mean"], after["backbone.bn1.running_mean"])  # BatchNorm rests
    assert not torch.equal(before["bn1.weight"], after["backbone.bn1.weight"])

    photos = [folder / "val" / name / "3.png" for name in ("light", "dark")]
    found = [line.split() for line in run("predict", saved, *photos).splitlines()]
    assert [line[:2] for line in found] == [[str(photos[0]), "light"], [str(photos[1]), "dark"]]
    assert all(50 < float(line[2].rstrip("%")) <= 100 for line in found)


def test_the_example_stays_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 150
