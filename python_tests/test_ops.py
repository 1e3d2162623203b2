"""The ops as torch sees them: opcheck, gradcheck, compile, export, autocast, no double backward."""

from __future__ import annotations

import pytest
import torch

import clce_ext
from clce_ext import HardNegativeContrastiveFunction, compiled
from clce_ext.arguments import (
    DEFAULTS,
    ContrastiveLossInputs,
    ContrastiveLossOutputs,
    LossFromStatisticsInputs,
    Temperature,
)

OPS = torch.ops.clce_ext


def arguments(x, labels, keys=None, key_labels=None, temperature=0.5, views=1, key_offset=None, **changed):
    """The arguments of the op, in its order."""
    tensor, number = Temperature.of(temperature)
    options = DEFAULTS._asdict() | {"temperature": number, "debias_tensor": None} | changed
    return tuple(
        ContrastiveLossInputs(
            x, labels, keys, key_labels, tensor, views=views, key_offset=key_offset, **options
        )
    )


def samples(device, requires_grad):
    x = torch.randn(12, 9, device=device, requires_grad=requires_grad)
    labels = torch.arange(12, device=device) % 3
    keys = torch.randn(20, 9, device=device, requires_grad=requires_grad)
    key_labels = torch.arange(20, device=device) % 3
    t = torch.tensor(0.3, device=device, requires_grad=requires_grad)
    yield arguments(x, labels)
    yield arguments(x, labels, keys, key_labels, t, reduction="none")
    yield arguments(x, labels, keys, key_labels, key_offset=4, normalize=False, summation="in")
    yield arguments(x, None, views=3, debias=0.1, reduction="sum")
    yield arguments(x, None, views=3, debias_tensor=torch.rand(12, device=device) / 2, debias=0.0)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    for args in samples(device, requires_grad):
        torch.library.opcheck(OPS.contrastive_loss.default, args)


def test_opcheck_parts(device):
    x, labels = torch.randn(12, 9, device=device), torch.arange(12, device=device) % 3
    torch.library.opcheck(OPS.prepare.default, (x, True))
    z, norms = OPS.prepare(x, True)
    tail = (None, 0.5, 9, None, 1.0, True, -100)
    torch.library.opcheck(OPS.statistics.default, (z, None, labels, None, *tail))
    torch.library.opcheck(OPS.statistics.default, (z, z.clone(), labels, labels, *tail))
    statistics = OPS.statistics(z, None, labels, None, *tail)
    form = LossFromStatisticsInputs.of(statistics, Temperature.of(0.5), DEFAULTS)
    torch.library.opcheck(OPS.loss_from_statistics.default, tuple(form))
    _, _, derivatives = OPS.loss_from_statistics(*form)
    torch.library.opcheck(
        OPS.statistics_backward.default, (derivatives, statistics, z, None, labels, None, *tail, True, False)
    )
    torch.library.opcheck(OPS.prepare_backward.default, (torch.randn_like(z), z, norms, 9, True))


def test_parts_make_the_whole(device):
    """The ops for keys that arrive in pieces give what the whole op gives."""
    x, labels = torch.randn(50, 9, device=device), torch.arange(50, device=device) % 3
    leaf = x.clone().requires_grad_()
    loss = clce_ext.hard_negative_contrastive_loss(leaf, labels)
    loss.backward()
    z, norms = OPS.prepare(x, True)
    tail = (None, 0.5, 9, None, 1.0, True, -100)
    statistics = OPS.statistics(z, None, labels, None, *tail)
    mean, terms, derivatives = OPS.loss_from_statistics(
        *LossFromStatisticsInputs.of(statistics, Temperature.of(0.5), DEFAULTS)
    )
    dz, _ = OPS.statistics_backward(
        derivatives / terms, statistics, z, None, labels, None, *tail, True, False
    )
    torch.testing.assert_close(mean, loss)
    torch.testing.assert_close(OPS.prepare_backward(dz, z, norms, 9, True), leaf.grad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.5, "summation": "in"},
        {"denominator": "negatives", "normalize": False},
        {"debias": 0.05, "reduction": "none"},
        {"beta": 0.0},
        {"beta": 2.0, "reduction": "sum"},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 0.03])
@pytest.mark.parametrize("with_keys", [False, True])
def test_gradcheck(with_keys, temperature, options, device):
    x = torch.randn(9, 5, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.arange(9, device=device) % 3
    t = torch.tensor(temperature, dtype=torch.float64, device=device, requires_grad=True)
    if with_keys:
        keys = torch.randn(11, 5, dtype=torch.float64, device=device, requires_grad=True)
        key_labels = torch.arange(11, device=device) % 3
        call = lambda x, k, t: clce_ext.hard_negative_contrastive_loss(  # noqa: E731
            x, labels, keys=k, key_labels=key_labels, temperature=t, **options
        )
        assert torch.autograd.gradcheck(call, (x, keys, t), eps=1e-7, atol=1e-5, rtol=1e-4)
    else:
        call = lambda x, t: clce_ext.hard_negative_contrastive_loss(x, labels, temperature=t, **options)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, t), eps=1e-7, atol=1e-5, rtol=1e-4)


def test_function_shares_the_formula(device):
    x, labels = torch.randn(20, 6, device=device), torch.arange(20, device=device) % 4
    grads = []
    for call in (OPS.contrastive_loss, HardNegativeContrastiveFunction.apply):
        leaf = x.clone().requires_grad_()
        outputs = ContrastiveLossOutputs(*call(*arguments(leaf, labels)))
        loss, *rest = outputs
        assert loss.requires_grad
        assert not any(output.requires_grad for output in rest if output is not outputs.z)  # see ops.py
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("how", ["op", "function"])
def test_double_backward_says_no(how, device):
    x = torch.randn(6, 4, device=device, requires_grad=True)
    call = OPS.contrastive_loss if how == "op" else HardNegativeContrastiveFunction.apply
    loss = call(*arguments(x, torch.arange(6, device=device) % 2))[0]
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_second_derivative_is_never_silently_zero(device):
    """However it is asked for: by the inputs alone, beside first derivatives, through keys or temperature."""
    labels = torch.arange(6, device=device) % 2
    loss = lambda x, **options: clce_ext.hard_negative_contrastive_loss(x, labels, **options)  # noqa: E731
    x = torch.randn(6, 4, device=device, requires_grad=True)
    t = torch.tensor(0.5, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.functional.hessian(loss, x)
    value = loss(x)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(value + grad.square().sum(), x)
    (grad,) = torch.autograd.grad(loss(x, temperature=t), t, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad, x)
    keys = torch.randn(6, 4, device=device, requires_grad=True)
    value = loss(x.detach(), keys=keys, key_labels=labels)
    (grad,) = torch.autograd.grad(value, keys, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), keys)


def test_second_derivative_by_what_weighs_the_loss(device):
    x = torch.randn(6, 4, device=device, requires_grad=True)
    weight = torch.tensor(2.0, device=device, requires_grad=True)
    loss = clce_ext.hard_negative_contrastive_loss(x, torch.arange(6, device=device) % 2)
    (grad,) = torch.autograd.grad(loss * weight, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), weight)


def test_only_the_loss_is_differentiable(device):
    x = torch.randn(6, 4, device=device, requires_grad=True)
    outputs = HardNegativeContrastiveFunction.apply(*arguments(x, torch.arange(6, device=device) % 2))
    with pytest.raises(RuntimeError, match="only the loss is"):
        ContrastiveLossOutputs(*outputs).z.sum().backward()


def test_checkpoint(device):
    from torch.utils.checkpoint import checkpoint

    labels = torch.arange(12, device=device) % 3
    grads = []
    for wrapped in (False, True):
        leaf = torch.linspace(-1, 1, 48, device=device).view(12, 4).sin().requires_grad_()
        loss = lambda x: clce_ext.hard_negative_contrastive_loss(x * 3, labels)  # noqa: E731
        (checkpoint(loss, leaf, use_reentrant=False) if wrapped else loss(leaf)).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_functional_gradient(device):
    x, labels = torch.randn(12, 4, device=device), torch.arange(12, device=device) % 3
    leaf = x.clone().requires_grad_()
    clce_ext.hard_negative_contrastive_loss(leaf, labels).backward()
    assert torch.equal(torch.func.grad(clce_ext.hard_negative_contrastive_loss)(x, labels), leaf.grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic, device):
    torch._dynamo.reset()
    criterion = clce_ext.CLCELoss()
    layer = torch.nn.Linear(16, 8).to(device)

    def step(x, head, labels):
        z = layer(x)
        return criterion(head(z), z, labels)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    head = torch.nn.Linear(8, 3).to(device)
    for rows in (10, 17, 24):
        x, labels = torch.randn(rows, 16, device=device), torch.arange(rows, device=device) % 3
        want = torch.autograd.grad(step(x, head, labels), layer.weight)[0]
        got = torch.autograd.grad(compiled(x, head, labels), layer.weight)[0]
        torch.testing.assert_close(got, want)


def test_compile_with_keys_and_learnable_temperature(device):
    torch._dynamo.reset()
    loss = torch.compile(clce_ext.hard_negative_contrastive_loss, fullgraph=True)
    leaves = [torch.randn(n, 8, device=device, requires_grad=True) for n in (12, 30)]
    t = torch.tensor(0.2, device=device, requires_grad=True)
    labels, key_labels = torch.arange(12, device=device) % 3, torch.arange(30, device=device) % 3
    debias = torch.linspace(0, 0.3, 12, device=device)
    options = {"keys": leaves[1], "key_labels": key_labels, "temperature": t, "debias": debias}
    want = torch.autograd.grad(
        clce_ext.hard_negative_contrastive_loss(leaves[0], labels, **options), [*leaves, t]
    )
    got = torch.autograd.grad(loss(leaves[0], labels, **options), [*leaves, t])
    torch.testing.assert_close(got, want)


def test_export(device):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 8)
            self.criterion = clce_ext.SupConLoss()

        def forward(self, x, labels):
            return self.criterion(self.layer(x), labels)

    model = Model().to(device)
    rows = torch.export.Dim("rows", min=2)
    example = (torch.randn(10, 16, device=device), torch.arange(10, device=device) % 3)
    program = torch.export.export(model, example, dynamic_shapes=({0: rows}, {0: rows}))
    other = (torch.randn(23, 16, device=device), torch.arange(23, device=device) % 4)
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_autocast_keeps_statistics_in_float32(device):
    layer = torch.nn.Linear(16, 8).to(device)
    x, labels = torch.randn(30, 16, device=device), torch.arange(30, device=device) % 3
    with torch.autocast(device, dtype=torch.bfloat16):
        z = layer(x)
        assert z.dtype == torch.bfloat16
        half = clce_ext.hard_negative_contrastive_loss(z, labels)
        full = clce_ext.hard_negative_contrastive_loss(z.float(), labels)
    assert half.dtype == full.dtype == torch.float32
    # Inside autocast nothing of the loss is cast down: float32 embeddings give what they give outside.
    assert torch.equal(full, clce_ext.hard_negative_contrastive_loss(z.float(), labels))
    half.backward()
    assert layer.weight.grad.isfinite().all()


def test_parts_refuse_what_kernels_cannot_read(device):
    x, labels = torch.randn(10, 8, device=device), torch.arange(10, device=device) % 3
    z, norms = OPS.prepare(x, True)
    options = (labels, None, None, 0.5, 8, None, 1.0, True, -100)
    statistics = OPS.statistics(z, None, *options)
    form = LossFromStatisticsInputs.of(statistics, Temperature.of(0.5), DEFAULTS._replace(summation="in"))
    _, _, derivatives = OPS.loss_from_statistics(*form)
    shifted = torch.empty(81, device=device)[1:].view(10, 8)
    for call, message in (
        (lambda: OPS.statistics(shifted, None, *options), "z must lie at a multiple of 16 bytes"),
        (lambda: OPS.statistics(z[::2], None, *options), "z must be contiguous rows"),
        (lambda: OPS.prepare_backward(z.double(), z, norms, 8, True), "dz must be Float where z is Float"),
        (lambda: OPS.prepare_backward(z, z, norms[1:], 8, True), r"norms must have shape \[10\]"),
        (
            lambda: OPS.statistics_backward(derivatives[:, 1:], statistics, z, None, *options, True, False),
            r"derivatives must have shape \[5, 10\], got \[5, 9\]",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers where no 16 bytes begin."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_arguments_at_any_address(dtype, device):
    """The bits of every op are those that it gives to aligned arguments."""
    x, keys = torch.randn(10, 16, device=device).to(dtype), torch.randn(14, 16, device=device).to(dtype)
    labels, key_labels = torch.arange(10, device=device) % 3, torch.arange(14, device=device) % 3
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    t, debias = torch.tensor(0.4, device=device, dtype=acc), torch.rand(10, device=device, dtype=acc) / 2
    upstream = torch.rand(10, device=device, dtype=acc)

    def whole(x, keys, labels, key_labels, t, debias, upstream):
        inputs = [tensor.requires_grad_() for tensor in (x, keys, t)]
        options = {"debias_tensor": debias, "debias": 0.0, "reduction": "none"}
        loss = OPS.contrastive_loss(*arguments(x, labels, keys, key_labels, t, **options))[0]
        return loss, *torch.autograd.grad(loss, inputs, upstream)

    z, norms = OPS.prepare(x, True)
    options = (labels, None, None, 0.4, 16, None, 1.0, True, -100)
    statistics = OPS.statistics(z, None, *options)
    form = DEFAULTS._replace(summation="in")
    derivatives = OPS.loss_from_statistics(
        *LossFromStatisticsInputs.of(statistics, Temperature.of(0.4), form)
    )[2]
    dz = torch.randn(10, 16, device=device, dtype=acc)
    for op, given in (
        (whole, (x, keys, labels, key_labels, t, debias, upstream)),
        (lambda dz, norms: [OPS.prepare_backward(dz, z, norms, 16, True)], (dz, norms)),
        (
            lambda d, s: OPS.statistics_backward(d, s, z, None, *options, True, False)[:1],
            (derivatives, statistics),
        ),
        (
            lambda s: OPS.loss_from_statistics(*LossFromStatisticsInputs.of(s, Temperature.of(0.4), form)),
            (statistics,),
        ),
    ):
        given = [tensor.detach() for tensor in given]
        moved = [shifted(tensor) for tensor in given]
        assert all(tensor.data_ptr() % 16 != 0 for tensor in moved)
        for found, expected in zip(op(*moved), op(*[g.clone() for g in given]), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.skipif(compiled.C is None, reason="no kernels")
def test_kernels_are_given_aligned_gradients():
    """A copy is made of what they would read 16 bytes at a time, and of nothing else."""
    z, norms = OPS.prepare(torch.randn(10, 16), True)
    dz = torch.randn(10, 16)
    for given, copies in ((dz, 0), (shifted(dz), 1)):
        with torch.profiler.profile() as profile:
            OPS.prepare_backward(given, z, norms, 16, True)
        assert sum(event.name == "aten::clone" for event in profile.events()) == copies


def test_rows_of_another_library_at_an_odd_address(engine):
    memory = torch.frombuffer(bytearray(4 * (80 + 8)), dtype=torch.uint8)
    begin = next(i for i in range(0, 32, 4) if (memory.data_ptr() + i) % 16 == 4)
    rows = torch.from_numpy(memory.numpy()[begin : begin + 320].view("float32")).view(10, 8)
    assert rows.storage_offset() == 0 and rows.data_ptr() % 16 == 4
    labels = torch.arange(10)
    with pytest.raises(ValueError, match="z must lie at a multiple of 16 bytes"):
        OPS.statistics(rows, None, labels, None, None, 0.5, 8, None, 1.0, True, -100)


def test_inference_mode_and_meta(device):
    x, labels = torch.randn(10, 4, device=device), torch.arange(10, device=device) % 3
    with torch.inference_mode():
        assert torch.equal(
            clce_ext.hard_negative_contrastive_loss(x, labels),
            clce_ext.hard_negative_contrastive_loss(x.clone(), labels.clone()),
        )
    meta = clce_ext.hard_negative_contrastive_loss(x.to("meta"), labels.to("meta"), reduction="none")
    assert meta.device.type == "meta" and meta.shape == (10,)
