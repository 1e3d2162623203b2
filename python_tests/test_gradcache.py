"""GradCache: the whole batch's gradients, with the memory of a micro-batch."""

from __future__ import annotations

import gc
import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import clce_ext
from clce_ext import CLCELoss, GradCache, SCHaNeLoss

CLASSES, BATCH, WIDTH = 4, 22, 16  # 22 is no multiple of the micro-batches below


class Net(nn.Module):
    """Dropout and drop-path, as in a vision transformer; gives (logits, embeddings)."""

    def __init__(self, drop: float = 0.3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(drop))
        self.branch = nn.Linear(64, 64)
        self.drop_path = drop
        self.out = nn.Linear(64, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.body(x)
        if self.training and self.drop_path:
            keep = torch.empty(len(x), 1, device=x.device).bernoulli_(1 - self.drop_path)
            x = x + self.branch(x) * keep
        else:
            x = x + self.branch(x)
        z = self.out(x)
        return self.head(z), z


def batch(device="cpu"):
    return torch.randn(BATCH, 12, device=device), torch.randint(CLASSES, (BATCH,), device=device)


def gradients(*modules: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for m in modules for p in m.parameters()]


def assert_same(ours, wanted, tolerance=1e-5):
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


def whole_batch(model, criterion, x, y, size, **kwargs):
    """The same micro-batches, hence the same dropout masks, in one graph."""
    parts = [model(chunk) for chunk in x.split(size)]
    outputs = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    loss = criterion(*outputs, y, **kwargs)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("size", [1, 5, 22, 64])
def test_equals_the_whole_batch_with_dropout_on(device, size):
    model, criterion = Net().to(device), CLCELoss()
    x, y = batch(device)
    torch.manual_seed(1)
    wanted_loss = whole_batch(model, criterion, x, y, size)
    wanted, after = gradients(model), torch.rand(1)
    model.zero_grad()
    torch.manual_seed(1)
    loss = GradCache(model, criterion, micro_batch_size=size)(x, y)
    assert torch.allclose(loss, wanted_loss, rtol=1e-6)
    assert_same(gradients(model), wanted)
    # The random numbers go on as if the model had run once.
    assert torch.equal(torch.rand(1), after)


def test_contrast_sees_the_whole_batch():
    """Accumulated micro-batch losses are something else: the test above cannot pass by accumulation."""
    model, criterion = Net(drop=0.0), CLCELoss()
    x, y = batch()
    GradCache(model, criterion, 5)(x, y)
    cached = gradients(model)
    model.zero_grad()
    for xs, ys in zip(x.split(5), y.split(5), strict=True):
        (criterion(*model(xs), ys) * len(xs) / BATCH).backward()
    accumulated = gradients(model)
    assert max(((a - b).norm() / b.norm()).item() for a, b in zip(accumulated, cached, strict=True)) > 0.05


def test_gradients_are_added_to_those_there():
    model, criterion = Net(drop=0.0), CLCELoss()
    x, y = batch()
    step = GradCache(model, criterion, 5)
    step(x, y)
    once = gradients(model)
    step(x, y)
    assert_same(gradients(model), [2 * g for g in once])


def test_the_criterions_own_parameters_learn():
    model, criterion = Net(), CLCELoss(learnable_temperature=True)
    x, y = batch()
    torch.manual_seed(1)
    whole_batch(model, criterion, x, y, 5)
    wanted = gradients(model, criterion)
    model.zero_grad(), criterion.zero_grad()
    torch.manual_seed(1)
    GradCache(model, criterion, 5)(x, y)
    assert criterion.temperature.grad.abs() > 0
    assert_same(gradients(model, criterion), wanted)


def test_soft_targets_reach_the_criterion():
    model, criterion = Net(), CLCELoss()
    x, y = batch()
    targets = torch.rand(BATCH, CLASSES).softmax(1)
    torch.manual_seed(1)
    whole_batch(model, criterion, x, y, 5, targets=targets)
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    GradCache(model, criterion, 5)(x, y, targets=targets)
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "dict"])
def test_single_output_and_structured_inputs(inputs):
    body = nn.Linear(12, WIDTH)

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            if inputs == "tuple":
                x = x[0] + x[1]
            if inputs == "dict":
                x = x["a"] + x["b"]
            return self.body(x)

    x, y = batch()
    given = {"tensor": x, "tuple": (x - 1, torch.ones_like(x)), "dict": {"a": x - 1, "b": torch.ones_like(x)}}
    SCHaNeLoss()(body(x), y).backward()
    wanted = gradients(body)
    body.zero_grad()
    GradCache(Single(), SCHaNeLoss(), 5)(given[inputs], y)
    assert_same(gradients(body), wanted)


def test_two_views_are_split_by_image():
    body = nn.Linear(12, WIDTH)
    x, y = torch.randn(BATCH, 2, 12), torch.randint(CLASSES, (BATCH,))
    SCHaNeLoss()(body(x), y).backward()
    wanted = gradients(body)
    body.zero_grad()
    GradCache(body, SCHaNeLoss(), 5)(x, y)
    assert_same(gradients(body), wanted)


def test_autocast_reaches_both_passes_and_every_weight():
    model, criterion = Net(), CLCELoss()
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        parts = [model(chunk) for chunk in x.split(5)]
        loss = criterion(*(torch.cat(t) for t in zip(*parts, strict=True)), y)
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    seen = []
    model.body.register_forward_hook(lambda m, i, o: seen.append((o.dtype, torch.is_grad_enabled())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        ours = GradCache(model, criterion, 5)(x, y)
        assert torch.is_autocast_enabled("cpu")
    assert len(seen) == 10 and {grad for _, grad in seen} == {False, True}
    assert len({dtype for dtype, _ in seen}) == 1
    assert torch.allclose(ours, loss.detach(), rtol=1e-5)
    # bfloat16 sums in another order; weights cut off by autocast's cache would have no gradient at all.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert_same(gradients(model), wanted, tolerance=3e-2)


def test_frozen_backbone():
    model, criterion = Net(), CLCELoss(weight=0.0)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    x, y = batch()
    GradCache(model, criterion, 5)(x, y)
    assert model.head.weight.grad.abs().max() > 0 and model.out.weight.grad is None


def test_peak_memory_follows_the_micro_batch():
    """Bytes that the graph keeps alive at any one time."""
    live = peak = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor = tensor
            is_weight = tensor.untyped_storage().data_ptr() in weights  # saved as a transposed view
            self.bytes = 0 if is_weight else tensor.numel() * tensor.element_size()
            live += self.bytes
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            live -= self.bytes

    def measure(run) -> int:
        nonlocal live, peak
        gc.collect()
        live = peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            run()
        return peak

    # Wide inside and narrow at the end, as backbones are.
    model = nn.Sequential(
        nn.Linear(12, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 8)
    )
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x, y = torch.randn(512, 12), torch.randint(CLASSES, (512,))
    whole = measure(lambda: SCHaNeLoss()(model(x), y).backward())
    small = measure(lambda: GradCache(model, SCHaNeLoss(), 16)(x, y))
    smaller = measure(lambda: GradCache(model, SCHaNeLoss(), 8)(x, y))
    assert small < whole / 12
    assert smaller < 0.75 * small


@pytest.mark.slow
def test_compiled_model():
    model, criterion = Net(), CLCELoss()
    x, y = batch()
    compiled = torch.compile(model)
    torch.manual_seed(1)
    whole_batch(compiled, criterion, x, y, 11)
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    GradCache(compiled, criterion, 11)(x, y)
    assert_same(gradients(model), wanted)


def test_bad_arguments():
    x, y = batch()
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="micro_batch_size"):
            GradCache(Net(), CLCELoss(), size)
    with pytest.raises(ValueError, match="lengths"):
        GradCache(Net(), CLCELoss())((x, x[:3]), y)
    with pytest.raises(TypeError, match="inputs must be"):
        GradCache(Net(), CLCELoss())("images", y)
    with pytest.raises(ValueError, match="scalar"):
        GradCache(Net(), lambda logits, z, labels: z.sum(1), 5)(x, y)
    with pytest.raises(TypeError, match="tuple of tensors"):
        GradCache(nn.Sequential(Net(), Wrong()), CLCELoss(), 5)(x, y)


class Wrong(nn.Module):
    def forward(self, outputs):
        return (*outputs, "name")


def _process(rank: int, world_size: int, port: int, weights: dict, x, y, size: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    model = Net(drop=0.0)
    model.load_state_dict(weights)
    ddp = nn.parallel.DistributedDataParallel(model)
    reductions = []
    ddp.register_comm_hook(
        reductions,
        lambda state, bucket: (
            state.append(1),
            torch.distributed.all_reduce(bucket.buffer().div_(world_size), async_op=True)
            .get_future()
            .then(lambda f: f.value()[0]),
        )[1],
    )
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    GradCache(ddp, CLCELoss(), size)(x[rows], y[rows])
    torch.save((gradients(model), len(reductions)), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """Two processes average the gradients of their batches, reduced once."""
    model, criterion = Net(drop=0.0), CLCELoss()
    x, y = batch()
    for rows in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        (criterion(*model(x[rows]), y[rows]) / 2).backward()
    port = 29500 + os.getpid() % 2000
    mp.spawn(_process, (2, port, model.state_dict(), x, y, 4, str(tmp_path)), nprocs=2)
    for rank in range(2):
        ours, reductions = torch.load(tmp_path / f"{rank}.pt")
        assert_same(ours, gradients(model))
        assert reductions == 1


def test_is_public():
    assert "GradCache" in clce_ext.__all__


def test_outputs_for_a_queue():
    """Without dropout they are the model's, and the queue that takes them changes the next loss."""
    model, criterion = Net(drop=0.0), CLCELoss()
    images, labels = torch.randn(BATCH, 12), torch.arange(BATCH) % CLASSES
    queue = clce_ext.EmbeddingQueue(40, WIDTH)
    step = GradCache(model, criterion, micro_batch_size=5, return_outputs=True)
    losses = []
    for _ in range(2):
        wanted = criterion(*model(images), labels, queue=queue)
        loss, (logits, embeddings) = step(images, labels, queue=queue)
        assert torch.allclose(loss, wanted, rtol=1e-5)
        assert torch.allclose(embeddings, model(images)[1], atol=1e-6)
        assert logits.shape == (BATCH, CLASSES) and not embeddings.requires_grad
        queue.enqueue(embeddings, labels)
        losses.append(loss.item())
    assert losses[0] != losses[1]
    single = nn.Linear(12, WIDTH)
    _, embeddings = GradCache(single, SCHaNeLoss(), 5, return_outputs=True)(images, labels)
    assert torch.allclose(embeddings, single(images), atol=1e-6)  # micro-batches may round otherwise
