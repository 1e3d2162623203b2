"""docs/your-loop.md: its blocks run one after another, and do what they are there for."""

from __future__ import annotations

import re
from pathlib import Path

import timm
import torch
from PIL import Image

from clce_ext.train.loop import train
from clce_ext.train.predict import load_saved, main
from python_tests.training import quick_config

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "your-loop.md"


def test_the_guide(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    train(quick_config(tmp_path, model="resnet10t", image_size=32, epochs=1))
    Image.new("RGB", (40, 50)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    loader = [(torch.randn(10, 3, 32, 32), torch.arange(10) % 5) for _ in range(2)]
    names: dict = {"loader": loader, "__name__": "guide"}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) == 8
    for block in blocks[:-2]:
        before = {k: v.clone() for k, v in names["model"].state_dict().items()} if "model" in names else {}
        exec(compile(block, str(GUIDE), "exec"), names)
        if "for images" in block:
            moved = {k for k, v in names["model"].named_parameters() if not torch.equal(v, before[k])}
            assert "backbone.conv1.0.weight" in moved and torch.isfinite(names["loss"])
        if "EmbeddingQueue" in block:
            assert len(names["queue"]) == 20 and names["queue"].labels[:20].tolist() == [*range(5)] * 4
    assert names["criterion"].temperature.item() != 0.5
    # What a loop of one's own has saved is predicted from as a run's file is, here and by clce-predict.
    exec(compile(blocks[-2], str(GUIDE), "exec"), names)
    fresh: dict = {}
    exec(blocks[-1].replace("model.safetensors", "mine.safetensors"), fresh)
    with torch.inference_mode():
        logits = names["model"].eval()(fresh["transform"](fresh["image"])[None])[0]
    torch.testing.assert_close(fresh["probabilities"], logits.softmax(dim=1)[0])
    assert main(["--checkpoint", "mine.safetensors", "image.png", "--output", "predicted"]) == 0
    assert fresh["classes"][logits.argmax()] in (tmp_path / "predicted" / "predictions.csv").read_text()
    capsys.readouterr()
    exec(compile(blocks[-1], str(GUIDE), "exec"), names)
    said = capsys.readouterr().out.split()
    assert said[0] in names["classes"] and len(names["classes"]) == 10 and 0.1 <= float(said[1]) <= 1
    assert len(blocks[-1].split("from timm.data import create_transform")[1].strip().splitlines()) <= 12


def test_prediction_with_another_pooling(tmp_path, monkeypatch):
    train(quick_config(tmp_path, epochs=1, global_pool="token"))
    Image.new("RGB", (40, 50), (200, 90, 10)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {"timm": timm, "torch": torch}
    exec(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)[-1], names)
    ours, _, _ = load_saved(tmp_path)
    with torch.inference_mode():
        wanted = ours.backbone(names["transform"](names["image"])[None]).softmax(dim=1)[0]
    torch.testing.assert_close(names["probabilities"], wanted)
    assert names["model"].global_pool == "token"
