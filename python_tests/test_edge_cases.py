"""What the loss gives where a formula has nothing to say: docs/losses.md, "Edge cases", row by row."""

from __future__ import annotations

import pytest
import torch

import clce_ext
from python_tests.oracle import Case, check

BETAS = [0.0, 1.0, 0.5]
PATHS = [0.5, 0.01]  # temperatures of the bounded and of the general path


def loss_and_grad(x, labels, **options):
    x = x.detach().clone().requires_grad_()
    loss = clce_ext.hard_negative_contrastive_loss(x, labels, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("temperature", PATHS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("summation", ["in", "out"])
def test_anchor_without_positives(beta, summation, temperature, device):
    x = torch.randn(7, 12, device=device)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3], device=device)  # 2 and 3 stand alone
    options = {"beta": beta, "summation": summation, "temperature": temperature}
    each, _ = loss_and_grad(x, labels, reduction="none", **options)
    assert (each[5:] == 0).all() and (each[:5] != 0).all()
    mean, _ = loss_and_grad(x, labels, **options)
    torch.testing.assert_close(mean, each.sum() / 5)
    # As anchors they have no gradient: weigh the others by 0.
    leaf = x.clone().requires_grad_()
    clce_ext.hard_negative_contrastive_loss(leaf, labels, reduction="none", **options)[5:].sum().backward()
    assert (leaf.grad == 0).all()
    del options["temperature"]
    check(
        Case(x.double().cpu(), labels.cpu(), temperature=temperature, options=options), torch.float64, device
    )


@pytest.mark.parametrize("temperature", PATHS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_anchor_has_a_positive(reduction, temperature, device):
    x = torch.randn(6, 5, device=device, requires_grad=True)
    t = torch.tensor(temperature, device=device, requires_grad=True)
    loss = clce_ext.hard_negative_contrastive_loss(
        x, torch.arange(6, device=device), temperature=t, reduction=reduction
    )
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    assert (x.grad == 0).all() and t.grad == 0


@pytest.mark.parametrize("temperature", PATHS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("debias", [0.0, 0.1])
def test_anchor_without_negatives(debias, beta, temperature, device):
    x = torch.randn(5, 9, dtype=torch.float64, device=device)
    labels = torch.zeros(5, dtype=torch.long, device=device)
    options = {"beta": beta, "debias": debias, "temperature": temperature, "reduction": "none"}
    inside, grad = loss_and_grad(x, labels, summation="in", **options)
    torch.testing.assert_close(inside, torch.full_like(inside, 4.0).log())
    assert (grad == 0).all()
    outside, grad = loss_and_grad(x, labels, summation="out", **options)
    z = torch.nn.functional.normalize(x)
    s = (z @ z.T / temperature)[~torch.eye(5, dtype=torch.bool, device=device)].view(5, 4)
    torch.testing.assert_close(outside, s.logsumexp(1) - s.mean(1))
    assert grad.isfinite().all() and grad.abs().sum() > 0
    decoupled, grad = loss_and_grad(x, labels, denominator="negatives", **options)
    assert (decoupled == 0).all() and (grad == 0).all()
    # "mean" does not count them: one pair has no negatives among keys that others do have.
    mean, _ = loss_and_grad(x, labels, denominator="negatives", **(options | {"reduction": "mean"}))
    assert mean == 0


@pytest.mark.parametrize("temperature", PATHS)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_images_are_neither_anchors_nor_keys(ignore_index, temperature, device):
    x, labels = torch.randn(40, 10, device=device), torch.randint(3, (40,), device=device)
    ignored = torch.rand(40, device=device) < 0.4
    some = torch.where(ignored, torch.full_like(labels, ignore_index), labels)
    options = {"temperature": temperature, "ignore_index": ignore_index, "reduction": "none"}
    each, grad = loss_and_grad(x, some, **options)
    kept, kept_grad = loss_and_grad(x[~ignored], labels[~ignored], **options)
    assert (each[ignored] == 0).all() and (grad[ignored] == 0).all()
    torch.testing.assert_close(each[~ignored], kept)
    largest = kept_grad.abs().max()  # some are small differences of large terms
    torch.testing.assert_close(grad[~ignored] / largest, kept_grad / largest)
    everybody, grad = loss_and_grad(
        x, torch.full_like(labels, ignore_index), **(options | {"reduction": "mean"})
    )
    assert everybody == 0 and (grad == 0).all()
    # Among keys too, and as a key of an anchor's own.
    each, _ = loss_and_grad(x, labels, keys=x, key_labels=some, key_offset=0, **options)
    other, _ = loss_and_grad(
        x[~ignored], labels[~ignored], keys=x[~ignored], key_labels=labels[~ignored], key_offset=0, **options
    )
    torch.testing.assert_close(each[~ignored], other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", PATHS)
@pytest.mark.parametrize("beta", BETAS)
def test_duplicates_and_zero_vectors(beta, temperature, dtype, device):
    x = torch.randn(12, 16, device=device)
    x[3] = x[2]  # a positive alike
    x[5] = x[0]  # a negative alike
    x[7] = 0
    x = x.to(dtype)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2], device=device)
    loss, grad = loss_and_grad(x, labels, beta=beta, temperature=temperature)
    assert loss.isfinite() and grad.isfinite().all()
    same, grad = loss_and_grad(torch.ones_like(x), labels, beta=beta, temperature=temperature)
    assert same.isfinite() and grad.isfinite().all()
    zeros, grad = loss_and_grad(torch.zeros_like(x), labels, beta=beta, temperature=temperature)
    assert zeros.isfinite() and grad.isfinite().all()


def test_zero_vector_is_normalised_as_torch_does(device):
    x = torch.randn(6, 8, device=device, dtype=torch.float64)
    x[1] = 0
    labels = torch.tensor([0, 0, 1, 1, 0, 1], device=device)
    check(Case(x.cpu(), labels.cpu()), torch.float64, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("positives", ["near", "opposite"])
def test_low_temperature_with_cosines_near_both_ends(positives, beta, dtype, device):
    """Positives near 1 and negatives near -1 (and the reverse): 200 / t apart, separate maxima needed."""
    centre = torch.randn(1, 32, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(20)[:, None]
    x = sign * centre + 0.02 * torch.randn(40, 32, dtype=torch.float64)
    labels = torch.arange(40) % 2
    if positives == "opposite":  # each class holds both ends
        labels = torch.arange(40) // 2 % 2
    check(Case(x, labels, temperature=0.01, options={"beta": beta}), dtype, device)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", PATHS)
@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.0}, {"beta": 0.5}, {"debias": 0.1}, {"normalize": False}], ids=str
)
def test_nan_and_inf_come_out_as_nan(options, temperature, value, device):
    x = torch.randn(300, 20, device=device)
    x[123, 4] = value
    labels = torch.arange(300, device=device) % 5
    loss, grad = loss_and_grad(x, labels, temperature=temperature, **options)
    assert loss.isnan() or (value == float("inf") and not loss.isfinite())
    assert not grad[123].isfinite().all()
    if value != value:  # every anchor has it for a positive or a negative
        each, _ = loss_and_grad(x, labels, temperature=temperature, reduction="none", **options)
        assert each.isnan().all()
    keys = torch.randn(50, 20, device=device)
    keys[7] = value
    loss, _ = loss_and_grad(
        torch.randn(30, 20, device=device),
        labels[:30],
        keys=keys,
        key_labels=labels[:50],
        temperature=temperature,
        **options,
    )
    assert not loss.isfinite()


@pytest.mark.parametrize("temperature", PATHS)
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (0, 4), (17, 1), (65, 7), (129, 33), (3, 1, 5)], ids=str)
def test_small_and_odd_shapes(shape, temperature, device):
    x = torch.randn(shape, dtype=torch.float64)
    labels = torch.arange(shape[0]) % 2
    check(Case(x, labels, temperature=temperature), torch.float64, device)
    check(Case(x, labels, temperature=temperature), torch.float32, device)


@pytest.mark.parametrize("anchors", [0, 1, 30])
def test_no_keys(anchors, device):
    x = torch.randn(anchors, 6, device=device, requires_grad=True)
    keys = torch.randn(0, 6, device=device, requires_grad=True)
    none = torch.empty(0, dtype=torch.long, device=device)
    loss = clce_ext.hard_negative_contrastive_loss(
        x, torch.zeros(anchors, dtype=torch.long, device=device), keys=keys, key_labels=none
    )
    loss.backward()
    assert loss == 0 and (x.grad == 0).all() and keys.grad.shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_types(dtype, device):
    x, labels = torch.randn(30, 8, device=device), torch.randint(5, (30,), device=device)
    assert torch.equal(
        clce_ext.hard_negative_contrastive_loss(x, labels.to(dtype)),
        clce_ext.hard_negative_contrastive_loss(x, labels),
    )


def test_labels_of_any_size(device):
    """Labels are compared as 64-bit numbers, not as indices."""
    x, labels = torch.randn(30, 8, device=device), torch.randint(5, (30,), device=device)
    far = torch.tensor([-(2**62), -1, 0, 2**31, 2**32], device=device)
    torch.testing.assert_close(
        clce_ext.hard_negative_contrastive_loss(x, far[labels]),
        clce_ext.hard_negative_contrastive_loss(x, labels),
    )


def test_half_precision_logits_do_not_overflow(device):
    x = 300 * torch.randn(20, 64, device=device)
    labels = torch.arange(20, device=device) % 3
    loss, grad = loss_and_grad(x.half(), labels, temperature=0.01)
    assert loss.dtype == torch.float32 and loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("learnable", [False, True])
def test_temperature_below_zero_or_zero(learnable, engine):
    x, labels = torch.randn(6, 4), torch.arange(6) % 2
    for value in (0.0, -0.5, float("nan"), float("inf")):
        temperature = torch.tensor(value) if learnable else value
        with pytest.raises(ValueError, match="temperature must be finite and greater than 0"):
            clce_ext.hard_negative_contrastive_loss(x, labels, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("beta", [0.1, 0.25, 0.3, 1.7, 1000.1])
def test_huge_logits_where_beta_is_no_float32(beta, temperature, device):
    """One rounding of beta and of 1 + beta in sums, logarithms and gradients: with logits of 1e9 any other
    shows."""
    torch.manual_seed(0)  # of these, each anchor's hardest negative leads by far, which float32 can tell
    # From the CPU: another device's generator gives other numbers.
    x, labels = torch.randn(40, 64).to(device), torch.arange(40, device=device) % 4

    def gradient(dtype):
        z = x.to(dtype).requires_grad_()
        loss = clce_ext.hard_negative_contrastive_loss(
            z, labels, beta=beta, temperature=temperature, normalize=False
        )
        loss.backward()
        assert loss.isfinite()
        return z.grad.double() * temperature

    truth = gradient(torch.float64)
    # A negative's gradient is a difference of terms times 1 + beta and beta.
    assert (gradient(torch.float32) - truth).norm() <= 1e-6 * (1 + beta) * truth.norm()
