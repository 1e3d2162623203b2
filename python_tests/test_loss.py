"""Accuracy: random shapes that no tile divides, strides, dtypes and options against float64."""

from __future__ import annotations

import functools
import random

import pytest
import torch

import clce_ext
from clce_ext.arguments import DEFAULTS, LossFromStatisticsInputs, Temperature
from python_tests import reference
from python_tests.conftest import DEVICES
from python_tests.oracle import Case, check, run

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 7, 33, 97, 130, 257]
DIMS = [1, 3, 16, 59, 111, 252, 300]


def random_case(rng: random.Random) -> Case:
    rows, dim, classes = rng.choice(ROWS), rng.choice(DIMS), rng.choice([1, 2, 5, 50])
    views = rng.choice([None, None, 2, 3])
    shape = (rows, dim) if views is None else (rows, views, dim)
    anchors = rows * (views or 1)
    labels = torch.randint(classes, (rows,), dtype=rng.choice([torch.int64, torch.int32, torch.uint8]))
    if labels.dtype != torch.uint8 and rng.random() < 0.3:
        labels[torch.rand(rows) < 0.3] = -100
    options = {
        "beta": rng.choice([0.0, 1.0, 1.0, 0.5, 2.0]),
        "summation": rng.choice(["in", "out"]),
        "denominator": rng.choice(["all", "all", "negatives"]),
        "detach_weights": rng.random() < 0.3,
        "reduction": rng.choice(["mean", "sum", "none"]),
        "normalize": rng.random() < 0.8,
    }
    temperature = rng.choice([0.5, 0.5, 0.1, 0.07, 0.02])
    keys = key_labels = None
    kind = rng.choice(["self", "self", "keys", "offset"])
    if kind == "keys":
        keys = torch.randn(rng.choice([0, 1, 50, 301, 600]), dim, dtype=torch.float64)
    elif kind == "offset":
        options["key_offset"] = rng.choice([0, 5])
        keys = torch.randn(anchors + options["key_offset"] + 3, dim, dtype=torch.float64)
    if keys is not None:
        key_labels = torch.randint(classes, (len(keys),))
    elif views is not None and rng.random() < 0.4:
        labels = None
    embeddings = torch.randn(shape, dtype=torch.float64)
    if not options["normalize"]:  # logits of a size that losses can have
        embeddings, temperature = embeddings / dim**0.5, 0.5
    grad = torch.randn(anchors, dtype=torch.float64) if options["reduction"] == "none" else None
    return Case(embeddings, labels, keys, key_labels, temperature, options, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(50))
def test_random_options(seed, dtype, device):
    torch.manual_seed(seed)
    check(random_case(random.Random(seed)), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 2.0])
def test_several_blocks(beta, temperature, dtype, device):
    """More rows than one block of the kernels, on both paths."""
    case = Case(torch.randn(777, 40, dtype=torch.float64), torch.randint(37, (777,)), temperature=temperature)
    case.options = {"beta": beta}
    check(case, dtype, device)


@pytest.mark.skipif("cuda" not in DEVICES, reason="TF32 is a GPU's")
@pytest.mark.parametrize("dim", [40, 300])
@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_tf32(temperature, dim, monkeypatch):
    """Taken where torch allows it; ten bits of each embedding are left."""
    x, labels = torch.randn(200, dim, device="cuda"), torch.arange(200, device="cuda") % 7
    grads = []
    for precision, dtype in (("ieee", torch.float64), ("ieee", torch.float32), ("tf32", torch.float32)):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        leaf = x.to(dtype, copy=True).requires_grad_()
        clce_ext.hard_negative_contrastive_loss(leaf, labels, temperature=temperature).backward()
        grads.append(leaf.grad.double())
    errors = [(grad - grads[0]).norm() / grads[0].norm() for grad in grads[1:]]
    assert errors[0] < 1e-5 / temperature and errors[0] < errors[1] < 2e-3 / temperature


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.03, 0.02, 0.013, 0.01])
def test_both_passes_round_a_logit_alike(temperature, device):
    """One anchor and its positive: the gradient is 1 - e^(s - lse) with lse = s, on the general path."""
    label = torch.zeros(1, dtype=torch.long, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        z, key_z = (
            torch.ops.clce_ext.prepare(torch.randn(1, 24, device=device).to(dtype), True)[0] for _ in range(2)
        )
        given = (z, key_z, label, label, None, temperature, 24, None, 1.0, False, -100)
        statistics = torch.ops.clce_ext.statistics(*given)
        form = LossFromStatisticsInputs.of(statistics, Temperature.of(temperature), DEFAULTS)
        _, _, derivatives = torch.ops.clce_ext.loss_from_statistics(*form)
        gradients = torch.ops.clce_ext.statistics_backward(derivatives, statistics, *given, True, True)
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("normalize", [True, False])
def test_debias(normalize, device):
    """HCL, on both sides of its floor, in float64 (the difference of two sums is ill-conditioned)."""
    for seed in range(10):
        torch.manual_seed(seed)
        embeddings = torch.randn(40, 2, 24, dtype=torch.float64) / (1 if normalize else 5)
        options = {"debias": 0.1 + 0.08 * seed, "beta": 1.0, "normalize": normalize}
        check(Case(embeddings, None, temperature=0.5, options=options), torch.float64, device)


@pytest.mark.parametrize("views", [1, 2])
def test_debias_of_each_image(views, device):
    """Zeros among them, and on both sides of the floor."""
    for seed in range(5):
        torch.manual_seed(seed)
        labels = torch.arange(40) % 9
        options = {"debias": torch.rand(40, dtype=torch.float64).mul(0.9).clamp_min(0.3) - 0.3}
        options |= {"beta": 1.0 - seed / 4, "summation": ["in", "out"][seed % 2], "detach_weights": seed == 3}
        assert (options["debias"] == 0).any() and (options["debias"] > 0.5).any()
        embeddings = torch.randn(40, views, 24, dtype=torch.float64)
        options["debias"] = options["debias"].to(device)
        truth = run(
            reference.hard_negative_contrastive_loss,
            Case(embeddings, labels, options=options | {"debias": options["debias"].cpu()}),
            torch.float64,
            "cpu",
        )
        found = run(
            clce_ext.hard_negative_contrastive_loss, Case(embeddings, labels, options=options),
            torch.float64, device,
        )  # fmt: skip
        for name, value in found.items():
            torch.testing.assert_close(value, truth[name], rtol=1e-8, atol=1e-11)


def test_debias_as_a_tensor(device):
    x, labels = torch.randn(12, 8, device=device), torch.arange(12, device=device) % 3
    loss = functools.partial(clce_ext.hard_negative_contrastive_loss, x, labels, reduction="none")
    alike = loss(debias=0.2)
    of_one = torch.full((12,), 0.2, device=device)
    # float32's 0.2 is not float64's
    for debias in (of_one, of_one.double(), of_one[0]):
        torch.testing.assert_close(loss(debias=debias), alike, rtol=1e-6, atol=0)
    assert torch.equal(loss(debias=torch.zeros(12, device=device)), loss())
    each = torch.linspace(0, 0.6, 12, device=device)
    one_by_one = torch.stack([loss(debias=d.item())[i] for i, d in enumerate(each)])
    torch.testing.assert_close(loss(debias=each), one_by_one, rtol=1e-6, atol=0)
    # A view's own; a module's, and for one call.
    pairs = x.reshape(6, 2, 8)
    direct = clce_ext.hard_negative_contrastive_loss(pairs, labels[:6], debias=each)
    assert torch.equal(clce_ext.HardNegativeContrastiveLoss(debias=each)(pairs, labels[:6]), direct)
    assert torch.equal(clce_ext.HardNegativeContrastiveLoss()(pairs, labels[:6], debias=each), direct)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "reversed rows"])
def test_strides(layout, device):
    base = torch.randn(64, 48, device=device)
    x = {
        "transposed": torch.randn(48, 64, device=device).T,
        "expanded": base[:1].expand(64, 48),
        "sliced": torch.randn(64, 100, device=device)[:, 1:97:2],
        "reversed rows": base.flip(0)[::2].repeat(2, 1),
    }[layout]
    labels = torch.arange(64, device=device) % 7
    assert torch.equal(
        clce_ext.hard_negative_contrastive_loss(x, labels),
        clce_ext.hard_negative_contrastive_loss(x.contiguous(), labels),
    )


def test_gradients_only_where_asked(device):
    labels, key_labels = torch.arange(30, device=device) % 4, torch.arange(50, device=device) % 4
    inputs = {
        "embeddings": torch.randn(30, 17, dtype=torch.float64, device=device),
        "keys": torch.randn(50, 17, dtype=torch.float64, device=device),
        "temperature": torch.tensor(0.3, dtype=torch.float64, device=device),
    }
    whole = None
    for wanted in (
        ["embeddings", "keys", "temperature"],
        ["embeddings"],
        ["keys"],
        ["temperature"],
        ["keys", "temperature"],
    ):
        leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in inputs.items()}
        loss = clce_ext.hard_negative_contrastive_loss(
            leaves["embeddings"],
            labels,
            keys=leaves["keys"],
            key_labels=key_labels,
            temperature=leaves["temperature"],
        )
        loss.backward()
        whole = whole or {k: v.grad for k, v in leaves.items()}
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-12, atol=1e-14)
            else:
                assert leaf.grad is None


def test_paired_rows_are_one_half_of_clip(device):
    images, texts = torch.randn(2, 20, 12, device=device)
    loss = clce_ext.NTXentLoss(temperature=0.2)(images, keys=texts)
    logits = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T / 0.2
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, torch.arange(20, device=device))
    )


def test_soft_targets_and_smoothing(device):
    logits, embeddings = torch.randn(12, 5, device=device), torch.randn(12, 8, device=device)
    labels = torch.randint(5, (12,), device=device)
    soft = torch.randn(12, 5, device=device).softmax(1)
    criterion = clce_ext.CLCELoss(weight=0.3, label_smoothing=0.1)
    contrastive = reference.hard_negative_contrastive_loss(embeddings, labels, summation="in")
    for target, given in ((labels, {}), (soft, {"targets": soft})):
        cross_entropy = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
        torch.testing.assert_close(
            criterion(logits, embeddings, labels, **given), 0.7 * cross_entropy + 0.3 * contrastive
        )


def test_class_weights_and_ignored_images_in_cross_entropy(device):
    logits, embeddings = torch.randn(12, 5, device=device), torch.randn(12, 8, device=device)
    labels = torch.randint(5, (12,), device=device)
    labels[3] = -100
    weights = torch.rand(5, device=device)
    ours = clce_ext.clce_loss(logits, embeddings, labels, weight=0.0, class_weights=weights)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, weights))
    nobody = torch.full_like(labels, -100)
    assert clce_ext.clce_loss(logits, embeddings, nobody, weight=0.5) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["labels", "targets", "class_weights"])
def test_the_cross_entropy_of_many_images_in_low_precision(dtype, kind):
    """A bfloat16 cannot count to 257, and a float16 holds no sum of 6,000 cross-entropies."""
    for images in (257, 6_000):
        logits = (10 * torch.randn(images, 10)).to(dtype).requires_grad_()
        embeddings = torch.randn(images, 4)
        labels = torch.randint(10, (images,))
        targets = torch.rand(images, 10).softmax(dim=1).to(dtype) if kind == "targets" else None
        weights = torch.rand(10).to(dtype) if kind == "class_weights" else None
        options = {"targets": targets, "class_weights": weights}
        found = clce_ext.clce_loss(logits, embeddings, labels, weight=0.0, **options)
        wanted = torch.nn.functional.cross_entropy(
            logits.double(),
            labels if targets is None else targets.double(),
            None if weights is None else weights.double(),
        )
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(found, logits)
        assert gradient.dtype == dtype


def test_presets_are_what_they_say(device):
    views, labels = torch.randn(20, 2, 16, device=device), torch.randint(4, (20,), device=device)
    ref = reference.hard_negative_contrastive_loss
    for criterion, options in (
        (clce_ext.SupConLoss(), {"temperature": 0.07, "beta": 0.0, "summation": "out"}),
        (clce_ext.LaCViTLoss(), {"temperature": 0.1, "beta": 0.0, "summation": "out"}),
        (clce_ext.SCHaNeLoss(), {"temperature": 0.5, "beta": 1.0, "summation": "in"}),
        (clce_ext.HardNegativeContrastiveLoss(), {}),
    ):
        torch.testing.assert_close(criterion(views, labels), ref(views, labels, **options))
    torch.testing.assert_close(clce_ext.HCLLoss()(views), ref(views, beta=1.0, debias=0.1))
    torch.testing.assert_close(clce_ext.NTXentLoss()(views), ref(views, beta=0.0))


def test_tensors_among_the_options_move_with_the_module(device):
    weights = torch.rand(3)
    criterion = clce_ext.CLCELoss(temperature=torch.tensor(0.3), class_weights=weights).to(device).double()
    assert "class_weights=<3>" in repr(criterion) and "temperature=0.3" in repr(criterion)
    assert not criterion.state_dict() and not list(criterion.parameters())
    logits = torch.randn(12, 3, dtype=torch.float64, device=device)
    embeddings = torch.randn(12, 8, dtype=torch.float64, device=device)
    labels = torch.randint(3, (12,), device=device)
    direct = clce_ext.clce_loss(
        logits, embeddings, labels, temperature=criterion.temperature, class_weights=weights.to(logits)
    )
    assert torch.equal(criterion(logits, embeddings, labels), direct)
    learnable = clce_ext.SupConLoss(learnable_temperature=True)
    assert "temperature=0.07" in repr(learnable) and "temperature=<" in repr(learnable.to("meta"))


def test_matryoshka(device):
    """The weighted sum over prefixes, each normalised by itself; slices with any stride, keys, views."""
    dims, weights = (3, 8, 20), (1.0, 0.5, 2.0)
    leaves = [torch.randn(*shape, 20, device=device, requires_grad=True) for shape in ((9, 2), (14,))]
    labels, key_labels = torch.arange(9, device=device) % 3, torch.arange(14, device=device) % 3
    loss = clce_ext.SupConLoss(temperature=0.3)
    nested = clce_ext.MatryoshkaLoss(loss, dims, weights)

    def one_by_one(x, labels, keys, key_labels):
        cut = [
            loss(x[..., :d].clone(), labels, keys=keys[:, :d].clone(), key_labels=key_labels) for d in dims
        ]
        return sum(weight * term for weight, term in zip(weights, cut, strict=True))

    given = (leaves[0], labels), {"keys": leaves[1], "key_labels": key_labels}
    results = []
    for function in (nested, lambda x, labels, **keys: one_by_one(x, labels, *keys.values())):
        value = function(*given[0], **given[1])
        results.append([value, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert torch.equal(nested(embeddings=leaves[0], labels=labels, **given[1]), results[0][0])
    assert results[0][0] != loss(*given[0], **given[1])
    assert torch.equal(clce_ext.MatryoshkaLoss(loss, [20])(*given[0]), loss(*given[0]))


def test_matryoshka_of_clce_and_compiled(device):
    """CLCE's embeddings are its second argument; both halves count once for each prefix."""
    torch._dynamo.reset()
    x, logits = torch.randn(12, 16, device=device), torch.randn(12, 3, device=device)
    labels = torch.arange(12, device=device) % 3
    clce = clce_ext.CLCELoss(learnable_temperature=True).to(device)
    nested = clce_ext.MatryoshkaLoss(clce, (4, 16))
    both = clce(logits, x[:, :4], labels) + clce(logits, x, labels)
    torch.testing.assert_close(nested(logits, x, labels), both)
    assert [name for name, _ in nested.named_parameters()] == ["loss.temperature"]
    compiled = torch.compile(nested, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, x, labels), both)
    assert "dims=(4, 16)" in repr(nested)


def test_debias_close_to_one(device):
    x = torch.randn(40, 2, 24, dtype=torch.float64, device=device)
    options = {"beta": 1.0, "debias": 1 - 1e-6}
    truth = reference.hard_negative_contrastive_loss(x, **options)
    ours = clce_ext.hard_negative_contrastive_loss(x.float(), **options)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)


def test_learnable_temperature_is_a_parameter(device):
    criterion = clce_ext.CLCELoss(temperature=0.4, learnable_temperature=True).to(device)
    labels = torch.randint(3, (12,), device=device)
    criterion(torch.randn(12, 3, device=device), torch.randn(12, 8, device=device), labels).backward()
    assert [name for name, _ in criterion.named_parameters()] == ["temperature"]
    assert criterion.temperature.grad.abs() > 0


def test_same_bits_every_run(device):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1500, 100, device=device).to(dtype)
        keys = torch.randn(700, 100, device=device).to(dtype)
        labels = torch.randint(9, (1500,), device=device)
        for options in ({}, {"temperature": 0.01}, {"keys": keys, "key_labels": labels[:700]}):
            runs = []
            for _ in range(4):
                leaf = x.clone().requires_grad_()
                loss = clce_ext.hard_negative_contrastive_loss(leaf, labels, **options)
                loss.backward()
                runs.append((loss.detach(), leaf.grad))
            for loss, grad in runs[1:]:
                assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])


# Small batches of wide rows are those whose products a BLAS is tempted to share among threads.
@pytest.mark.parametrize(
    "shape", [(6, 805), (10, 490), (25, 780), (64, 1024), (300, 805), (700, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.skipif("cpu" not in clce_ext.build_info()["features"], reason="torch promises less")
def test_any_number_of_threads_gives_the_same_bits(shape, dtype):
    x, labels = torch.randn(shape, dtype=dtype), torch.randint(4, shape[:1])
    keys = torch.randn(40, shape[1], dtype=dtype, requires_grad=True)
    before = torch.get_num_threads()
    try:
        for options in ({}, {"keys": keys, "key_labels": torch.arange(40) % 4}, {"normalize": False}):
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                leaf = x.clone().requires_grad_()
                loss = clce_ext.hard_negative_contrastive_loss(leaf, labels, beta=0.5, **options)
                wanted = [leaf, *(v for v in options.values() if v is keys)]
                runs.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
            for run in runs[1:]:
                assert all(map(torch.equal, run, runs[0]))
    finally:
        torch.set_num_threads(before)
