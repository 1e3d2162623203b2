"""Bad arguments: the error names the argument, what came and what is accepted."""

from __future__ import annotations

import pytest
import torch

import clce_ext
from python_tests.conftest import DEVICES

X = torch.randn(6, 4)
LABELS = torch.arange(6) % 2
KEYS = torch.randn(9, 4)
KEY_LABELS = torch.arange(9) % 2


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "embeddings must be a tensor, got list", {"embeddings": [1.0]}),
        (TypeError, "embeddings must be float32.*got Long",
         {"embeddings": torch.ones(6, 4, dtype=torch.long)}),
        (ValueError, r"embeddings must have shape .* got \(4,\)", {"embeddings": torch.randn(4)}),
        (ValueError, r"embeddings must have shape .* got \(1, 2, 3, 4\)",
         {"embeddings": torch.randn(1, 2, 3, 4)}),
        (ValueError, "embeddings must have at least one column", {"embeddings": torch.randn(6, 0)}),
        (ValueError, "embeddings must have at least one view", {"embeddings": torch.randn(6, 0, 4)}),
        (ValueError, r"labels must have shape \[6\].*got \[5\]", {"labels": LABELS[:5]}),
        (ValueError, r"labels must have shape \[6\].*got \[6, 1\]", {"labels": LABELS[:, None]}),
        (TypeError, "labels must be integers.*got Float", {"labels": LABELS.float()}),
        (TypeError, "labels must be integers.*got Bool", {"labels": LABELS.bool()}),
        (TypeError, "labels must be a tensor or None, got list", {"labels": [0] * 6}),
        (ValueError, "labels are needed", {"labels": None}),
        (ValueError, "temperature must be finite and greater than 0, got 0", {"temperature": 0.0}),
        (ValueError, "temperature must be a number or a tensor of one element",
         {"temperature": torch.ones(2)}),
        (TypeError, "temperature must be a floating-point tensor", {"temperature": torch.tensor(1)}),
        (ValueError, "beta must be finite and at least 0, got -1", {"beta": -1.0}),
        (ValueError, "beta must be finite and at least 0, got inf", {"beta": float("inf")}),
        (ValueError, "beta must be at most 10000, got 20000", {"beta": 2e4}),
        (ValueError, "summation must be 'in' or 'out', got 'inside'", {"summation": "inside"}),
        (ValueError, "denominator must be 'all' or 'negatives', got 'none'", {"denominator": "none"}),
        (ValueError, r"debias must be in \[0, 1\), got 1", {"debias": 1.0}),
        (ValueError, r"debias must be a number or have shape \[6\], .* got \[5\]",
         {"debias": torch.full((5,), 0.1)}),
        (ValueError, r"debias must be in \[0, 1\), got -0.1 for anchor 2",
         {"debias": torch.tensor([0.1, 0.1, -0.1, 0.1, 0.1, 1.0])}),
        (ValueError, r"debias must be in \[0, 1\), got nan for anchor 0",
         {"debias": torch.full((6,), float("nan"))}),
        (TypeError, "debias must be a floating-point tensor, got Long", {"debias": torch.zeros(6).long()}),
        (ValueError, "debias must not require grad", {"debias": torch.zeros(6, requires_grad=True)}),
        (ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'", {"reduction": "max"}),
        (ValueError, "key_labels are given without keys", {"key_labels": KEY_LABELS}),
        (ValueError, "key_offset is given without keys", {"key_offset": 0}),
        (ValueError, "labels and key_labels must be given together", {"keys": KEYS}),
        (TypeError, "keys must have the embeddings' dtype Float, got Double",
         {"keys": KEYS.double(), "key_labels": KEY_LABELS}),
        (ValueError, "keys must have the embeddings' 4 columns",
         {"keys": torch.randn(9, 5), "key_labels": KEY_LABELS}),
        (ValueError, r"keys must have shape \[rows, dim\]",
         {"keys": torch.randn(9), "key_labels": KEY_LABELS}),
        (ValueError, r"key_labels must have shape \[9\]", {"keys": KEYS, "key_labels": KEY_LABELS[:3]}),
        (TypeError, "key_labels must be integers", {"keys": KEYS, "key_labels": KEY_LABELS.float()}),
        (ValueError, "keys must have one row per image", {"labels": None, "keys": KEYS}),
        (ValueError, "key_offset must place all 6 anchors inside the 9 keys, got 4",
         {"keys": KEYS, "key_labels": KEY_LABELS, "key_offset": 4}),
        (ValueError, "key_offset must place all", {"keys": KEYS, "key_labels": KEY_LABELS, "key_offset": -1}),
        (ValueError, "key_offset needs labels", {"labels": None, "keys": X, "key_offset": 0}),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, change, engine):
    arguments = {"embeddings": X, "labels": LABELS} | change
    embeddings = arguments.pop("embeddings")
    labels = arguments.pop("labels")
    with pytest.raises(error, match=message):
        clce_ext.hard_negative_contrastive_loss(embeddings, labels, **arguments)


def test_bad_clce_arguments():
    logits = torch.randn(6, 3)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"weight .* must be in \[0, 1\]"):
            clce_ext.CLCELoss(weight=weight)
        with pytest.raises(ValueError, match=r"weight .* must be in \[0, 1\]"):
            clce_ext.clce_loss(logits, X, LABELS, weight=weight)
    with pytest.raises(ValueError, match="logits must have shape"):
        clce_ext.clce_loss(torch.randn(6), X, LABELS)
    with pytest.raises(ValueError, match="targets must have the logits' shape"):
        clce_ext.clce_loss(logits, X, LABELS, targets=torch.rand(6, 4))
    with pytest.raises(ValueError, match="labels must have shape"):
        clce_ext.clce_loss(torch.randn(5, 3), X, LABELS)
    with pytest.raises(ValueError, match="labels must have shape"):
        clce_ext.clce_loss(torch.randn(5, 3), X, LABELS, targets=torch.rand(5, 3))
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        clce_ext.clce_loss(logits, X, [0] * 6)


@pytest.mark.parametrize("loss", ["HardNegativeContrastiveLoss", "SCHaNeLoss", "CLCELoss", "HCLLoss"])
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, r"unknown option temprature \(did you mean temperature\?\); accepted are .*beta",
         {"temprature": 0.1}),
        (ValueError, "temperature must be finite and greater than 0, got 0", {"temperature": 0}),
        (TypeError, "temperature must be a number, got '0.1'", {"temperature": "0.1"}),
        (ValueError, "temperature must be a number or a tensor of one element",
         {"temperature": torch.ones(2)}),
        (TypeError, "beta must be a number, got '1'", {"beta": "1"}),
        (TypeError, "temperature must be a number, got True", {"temperature": True}),
        (TypeError, r"beta must be a number, got a tensor of shape \[3\]", {"beta": torch.ones(3)}),
        (TypeError, "learnable_temperature must be True or False, got 'no'",
         {"learnable_temperature": "no"}),
        (ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'", {"reduction": "avg"}),
        (TypeError, "reduction must be a string, got None", {"reduction": None}),
        (ValueError, "summation must be 'in' or 'out', got 'inside'", {"summation": "inside"}),
        (ValueError, "denominator must be 'all' or 'negatives', got 'none'", {"denominator": "none"}),
        (TypeError, "normalize must be True or False, got 'no'", {"normalize": "no"}),
        (TypeError, "ignore_index must be an integer, got None", {"ignore_index": None}),
        (ValueError, "distributed must be None, 'gather' or 'ring', got 'all'", {"distributed": "all"}),
        (ValueError, "process_group is given without distributed", {"process_group": object()}),
    ],
)  # fmt: skip
def test_wrong_options_fail_in_the_constructor(loss, error, message, options):
    with pytest.raises(error, match=message):
        getattr(clce_ext, loss)(**options)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, r"beta of SupConLoss is 0, got beta=1; Hard.* accepts any",
         lambda: clce_ext.SupConLoss(beta=1)),
        (TypeError, "weight .* must be a number, got '0.5'", lambda: clce_ext.CLCELoss(weight="0.5")),
        (TypeError, "label_smoothing must be a number, got None",
         lambda: clce_ext.CLCELoss(label_smoothing=None)),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 2",
         lambda: clce_ext.CLCELoss(label_smoothing=2)),
        (TypeError, "class_weights must be a tensor or None, got list",
         lambda: clce_ext.CLCELoss(class_weights=[1, 2])),
        (TypeError, r"weight .* must be a number, got a tensor of shape \[5\]",
         lambda: clce_ext.CLCELoss(weight=torch.ones(5))),
        (TypeError, "size must be an integer, got '4'", lambda: clce_ext.EmbeddingQueue("4", 8)),
        (TypeError, "dim must be an integer, got 8.0", lambda: clce_ext.EmbeddingQueue(4, 8.0)),
        (TypeError, "ignore_index must be an integer, got None",
         lambda: clce_ext.EmbeddingQueue(4, 8, ignore_index=None)),
        (TypeError, "dtype must be floating-point, got torch.int64",
         lambda: clce_ext.EmbeddingQueue(4, 8, dtype=torch.int64)),
        (TypeError, "model must be a module, got 'resnet50'",
         lambda: clce_ext.GradCache("resnet50", clce_ext.SupConLoss())),
        (TypeError, r"criterion must be a loss to call, such as CLCELoss\(\), got <class",
         lambda: clce_ext.GradCache(torch.nn.Linear(4, 4), clce_ext.SupConLoss)),
        (TypeError, r"loss must be a module, such as SupConLoss\(\), got <class",
         lambda: clce_ext.MatryoshkaLoss(clce_ext.SupConLoss, [4])),
        (ValueError, "dims must be at least one number of columns, .* got 4",
         lambda: clce_ext.MatryoshkaLoss(clce_ext.SupConLoss(), 4)),
        (TypeError, "weights must be numbers, one for each of dims, or None, got 1",
         lambda: clce_ext.MatryoshkaLoss(clce_ext.SupConLoss(), [4], 1)),
    ],
)  # fmt: skip
def test_wrong_options_of_one_loss(error, message, make):
    with pytest.raises(error, match=message):
        make()


ONE_HOT = torch.nn.functional.one_hot(LABELS, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"labels must have shape \[6\].*got \[6, 3\]; one-hot .* labels.argmax",
         lambda: clce_ext.SupConLoss()(X, ONE_HOT)),
        (r"labels must have shape \[6\].*got \[6, 3\]; one-hot",
         lambda: clce_ext.CLCELoss()(torch.randn(6, 3), X, ONE_HOT)),
        (r"labels must have shape \[6\].*got \(6, 3\); one-hot",
         lambda: clce_ext.EmbeddingQueue(9, 4).enqueue(X, ONE_HOT)),
        (r"got \[6\]; \[2, 6, 4\] looks like \[views, images, ...\].*transpose\(0, 1\)",
         lambda: clce_ext.SupConLoss()(torch.randn(2, 6, 4), LABELS)),
        (r"got \[6\]; \[2, 6, 3\] looks like \[views, images",
         lambda: clce_ext.CLCELoss()(torch.randn(2, 6, 3), torch.randn(2, 6, 4), LABELS)),
        (r"\[12\], .*got \[6\]; two views .* torch.stack\(\[first, second\], dim=1\)",
         lambda: clce_ext.SupConLoss()(torch.randn(12, 4), LABELS)),
        ("labels must be class indices from 0 to 2, for logits of 3 classes, or ignore_index -100, got 3",
         lambda: clce_ext.CLCELoss()(torch.randn(6, 3), X, torch.tensor([0, 1, 2, 3, 0, 1]))),
        ("labels must be class indices from 0 to 2, .* got -1",
         lambda: clce_ext.CLCELoss()(torch.randn(6, 3), X, torch.tensor([0, 1, 2, -1, 0, 1]))),
    ],
)  # fmt: skip
def test_labels_of_a_wrong_shape_get_a_hint(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_matryoshka_arguments():
    loss = clce_ext.SupConLoss()
    for dims in ((), (0, 4), (-1,), (2.0,)):
        with pytest.raises(ValueError, match="dims must be at least one number of columns, each at least 1"):
            clce_ext.MatryoshkaLoss(loss, dims)
    with pytest.raises(ValueError, match="weights must be 2, one for each of dims, got 1"):
        clce_ext.MatryoshkaLoss(loss, (2, 4), (1.0,))
    for weights in ((1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="weights must be finite and at least 0"):
            clce_ext.MatryoshkaLoss(loss, (2, 4), weights)
    nested = clce_ext.MatryoshkaLoss(loss, (2, 8))
    with pytest.raises(ValueError, match=r"embeddings must have at least as many columns .* got \(6, 4\)"):
        nested(X, LABELS)
    with pytest.raises(ValueError, match="MatryoshkaLoss cuts no queue"):
        nested(X, LABELS, queue=clce_ext.EmbeddingQueue(4, 4))


@pytest.mark.skipif(clce_ext.build_info()["cuda"] is not None, reason="this build has CUDA kernels")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to put a tensor on")
def test_cuda_tensor_without_cuda_kernels(monkeypatch):
    monkeypatch.setenv("CLCE_PORTABLE", "0")
    with pytest.raises(NotImplementedError, match="build_info"):
        clce_ext.hard_negative_contrastive_loss(X.cuda(), LABELS.cuda())


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a second device")
def test_mixed_devices():
    with pytest.raises(ValueError, match="labels must be on the embeddings' device cuda:0, got cpu"):
        clce_ext.hard_negative_contrastive_loss(X.cuda(), LABELS)
    with pytest.raises(ValueError, match="temperature must be on the embeddings' device cuda:0, got cpu"):
        clce_ext.hard_negative_contrastive_loss(X.cuda(), LABELS.cuda(), temperature=torch.tensor(0.5))


def test_build_info():
    info = clce_ext.build_info()
    assert {"version", "torch", "cpu_capability", "cuda", "cuda_archs", "features", "backends"} <= set(info)
    cuda = "kernels" if info["cuda"] else "portable"
    assert info["backends"] == {"cpu": "kernels", "cuda": cuda} | dict.fromkeys(
        ("mps", "xpu", "others"), "portable"
    )
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512")
    assert (info["cuda"] is None) == (not info["cuda_archs"])


def test_every_loss_is_exported():
    assert set(clce_ext.losses.__all__) <= set(clce_ext.__all__)
    assert all(getattr(clce_ext, name) is getattr(clce_ext.losses, name) for name in clce_ext.losses.__all__)
