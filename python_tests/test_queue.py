"""The memory bank: what it holds, and that losses see exactly that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clce_ext
from clce_ext import EmbeddingQueue, hard_negative_contrastive_loss
from python_tests import ranks, reference
from python_tests.ranks import World


def batch(n, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize(
    "sizes", [(3,), (3, 3), (4, 4, 4), (7,), (2, 9, 1), (0, 5, 0), (7, 7), (15, 3)], ids=str
)
def test_holds_the_last_entries(sizes):
    queue, z, y = EmbeddingQueue(7, 4), torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    for i, n in enumerate(sizes):
        new_z, new_y = batch(n, seed=i)
        queue.enqueue(new_z, new_y)
        z, y = torch.cat([z, new_z]), torch.cat([y, new_y])
    z, y = z[-7:], y[-7:]
    assert len(queue) == len(z)
    assert queue.embeddings.shape == (7, 4) and queue.labels.shape == (7,)
    filled = queue.labels != -100
    order = torch.argsort(queue.embeddings[filled][:, 0])
    expected = torch.argsort(z[:, 0])
    assert torch.equal(queue.embeddings[filled][order], z[expected])
    assert torch.equal(queue.labels[filled][order], y[expected])
    assert not queue.embeddings[~filled].any()


def test_oldest_go_first():
    queue = EmbeddingQueue(3, 1)
    for value in range(5):
        queue.enqueue(torch.full((1, 1), float(value)), torch.tensor([value]))
    assert queue.labels.tolist() == [3, 4, 2]
    assert queue.embeddings[:, 0].tolist() == [3, 4, 2]


@pytest.mark.parametrize("filled", [0, 2, 6, 9])
@pytest.mark.parametrize("module", [clce_ext.SCHaNeLoss, clce_ext.SupConLoss])
def test_loss_sees_batch_and_filled_entries(filled, module):
    z, y = batch(5, seed=1)
    z = z.double().requires_grad_()
    past_z, past_y = batch(filled, seed=2)
    queue = EmbeddingQueue(6, 4, dtype=torch.float64)
    queue.enqueue(past_z, past_y)
    criterion = module()
    loss = criterion(z, y, queue=queue)
    (grad,) = torch.autograd.grad(loss, z)
    keys = torch.cat([z, past_z.double()[-6:]])
    labels = torch.cat([y, past_y[-6:]])
    options = {k: criterion.options[k] for k in ("beta", "summation")}
    expected = reference.hard_negative_contrastive_loss(
        z, y, keys=keys, key_labels=labels, key_offset=0, temperature=criterion.temperature, **options
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, z)[0], rtol=1e-9, atol=1e-10)


def test_queue_alone_as_keys():
    z, y = batch(5, seed=1)
    past_z, past_y = batch(4, seed=2)
    queue = EmbeddingQueue(10, 4)
    queue.enqueue(past_z, past_y)
    loss = hard_negative_contrastive_loss(z, y, keys=queue.embeddings, key_labels=queue.labels)
    expected = hard_negative_contrastive_loss(z, y, keys=past_z, key_labels=past_y)
    torch.testing.assert_close(loss, expected)


def test_unlabelled_entries_are_negatives_for_all():
    """MoCo: two views, no labels, a queue of negatives."""
    z = torch.randn(5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    past, _ = batch(6, seed=2)
    queue = EmbeddingQueue(8, 4, dtype=torch.float64)
    queue.enqueue(past)
    expected = reference.hard_negative_contrastive_loss(
        z,
        torch.arange(5),
        keys=torch.cat([z.flatten(0, 1), past.double()]),
        key_labels=torch.cat([torch.arange(5).repeat_interleave(2), torch.arange(6) + 100]),
        key_offset=0,
    )
    torch.testing.assert_close(
        hard_negative_contrastive_loss(z, queue=queue), expected, rtol=1e-10, atol=1e-10
    )
    labelled = EmbeddingQueue(8, 4, dtype=torch.float64)
    labelled.enqueue(
        past, torch.zeros(6, dtype=torch.int64)
    )  # labels that mean nothing where the loss has none
    torch.testing.assert_close(
        hard_negative_contrastive_loss(z, queue=labelled), expected, rtol=1e-10, atol=1e-10
    )


def test_queue_beside_keys():
    z, y = batch(5, seed=1)
    keys, key_labels = batch(3, seed=3)
    past_z, past_y = batch(4, seed=2)
    queue = EmbeddingQueue(4, 4)
    queue.enqueue(past_z, past_y)
    loss = hard_negative_contrastive_loss(z, y, keys=keys, key_labels=key_labels, queue=queue)
    expected = hard_negative_contrastive_loss(
        z, y, keys=torch.cat([keys, past_z]), key_labels=torch.cat([key_labels, past_y])
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("alone", [False, True])
def test_enqueue_between_loss_and_backward(alone):
    z, y = batch(5, seed=1)
    queue = EmbeddingQueue(6, 4)
    queue.enqueue(*batch(6, seed=2))
    first, second = (z.clone().requires_grad_() for _ in range(2))

    def loss(z):
        if alone:
            return hard_negative_contrastive_loss(z, y, keys=queue.embeddings, key_labels=queue.labels)
        return hard_negative_contrastive_loss(z, y, queue=queue)

    loss(first).backward()
    delayed = loss(second)
    queue.enqueue(second, y)
    delayed.backward()
    assert torch.equal(first.grad, second.grad)
    assert not queue.embeddings.requires_grad


def test_views_dtype_and_state_dict():
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    queue = EmbeddingQueue(10, 4, dtype=torch.bfloat16)
    queue.enqueue(z, torch.tensor([3, 1, 2], dtype=torch.uint8))
    assert queue.labels.tolist()[:6] == [3, 3, 1, 1, 2, 2]
    assert torch.equal(queue.embeddings[:6], z.detach().flatten(0, 1).bfloat16())
    copy = EmbeddingQueue(10, 4, dtype=torch.bfloat16)
    copy.load_state_dict(queue.state_dict())
    assert len(copy) == 6
    for q in (queue, copy):
        q.enqueue(z[:1], torch.tensor([7]))
    for name, buffer in queue.state_dict().items():
        assert torch.equal(buffer, copy.state_dict()[name]), name
    assert queue.double().embeddings.dtype == torch.float64


def test_evicted_labels_are_gone():
    z, _ = batch(4, seed=1)
    queue = EmbeddingQueue(4, 4)
    queue.enqueue(z, torch.full((4,), 3))
    queue.enqueue(z, torch.full((4,), 2))
    assert 3 not in queue.labels
    anchors = torch.full((4,), 3)
    loss = hard_negative_contrastive_loss(z, anchors, keys=queue.embeddings, key_labels=queue.labels)
    assert loss == 0  # no positives left


def test_compiled_step_without_graph_breaks():
    torch._dynamo.reset()
    queue, eager = EmbeddingQueue(6, 4), EmbeddingQueue(6, 4)

    def step(queue, z, y):
        loss = hard_negative_contrastive_loss(z, y, queue=queue)
        queue.enqueue(z, y)
        return loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for i in range(4):
        z, y = batch(4, seed=i)
        torch.testing.assert_close(compiled(queue, z, y), step(eager, z, y))
        assert torch.equal(queue.embeddings, eager.embeddings) and torch.equal(queue.labels, eager.labels)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda q, z, y: EmbeddingQueue(0, 4), ValueError, "size and dim must be at least 1, got size=0"),
        (lambda q, z, y: q.enqueue(z[:, :3], y), ValueError, r"embeddings must have shape \[B, 4\]"),
        (lambda q, z, y: q.enqueue(z, y[1:]), ValueError, r"labels must have shape \[5\], got \(4,\)"),
        (lambda q, z, y: q.enqueue(z, y.float()), TypeError, "labels must be integers"),
        (
            lambda q, z, y: hard_negative_contrastive_loss(z, y, queue=q, ignore_index=-1),
            ValueError,
            "queue must have the loss's ignore_index -1",
        ),
        (
            lambda q, z, y: hard_negative_contrastive_loss(z[:, :3], y, queue=q),
            ValueError,
            "queue must have the embeddings' 3 columns",
        ),
        (
            lambda q, z, y: hard_negative_contrastive_loss(z, y, queue=z),
            TypeError,
            "queue must be a clce_ext",
        ),
        (lambda q, z, y: hard_negative_contrastive_loss(z, queue=q), ValueError, "labels are needed"),
        (
            lambda q, z, y: hard_negative_contrastive_loss(z, y, keys=z, queue=q),
            ValueError,
            "labels and key_labels must be given together",
        ),
    ],
)
def test_errors(call, error, says):
    with pytest.raises(error, match=says):
        call(EmbeddingQueue(6, 4), *batch(5))


# ---- across ranks ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(2, tmp_path_factory.mktemp("ranks") / "store")
    yield world
    world.close()


def enqueue_gathered(batches):
    queue = EmbeddingQueue(7, 4)
    for z, y in batches:
        queue.enqueue(z, y, gather=True)
    return queue.state_dict()


def test_gathered_queues_are_equal(world):
    sizes = [(2, 3), (0, 1), (4, 4)]
    batches = [[batch(n, seed=10 * i + r) for r, n in enumerate(pair)] for i, pair in enumerate(sizes)]
    results = world.run(enqueue_gathered, {r: ([pair[r] for pair in batches],) for r in range(2)})
    one = EmbeddingQueue(7, 4)
    for (z0, y0), (z1, y1) in batches:
        one.enqueue(torch.cat([z0, z1]), torch.cat([y0, y1]))
    for state in results.values():
        for name, buffer in one.state_dict().items():
            assert torch.equal(state[name], buffer), name


def enqueue_another_dim(dim):
    EmbeddingQueue(7, dim).enqueue(torch.zeros(2, dim), torch.zeros(2, dtype=torch.int64), gather=True)


def test_queues_that_differ_are_refused(world):
    answers = world.run(enqueue_another_dim, {0: (4,), 1: (5,)}, check=False)
    assert all(a.kind == "ValueError" and "tensor 0 must be the same" in a.text for a in answers.values())


def enqueue_floats(is_float):
    labels = torch.zeros(2, dtype=torch.float32 if is_float else torch.int64)
    EmbeddingQueue(7, 4).enqueue(torch.zeros(2, 4), labels, gather=True)


def test_what_one_rank_refuses_to_enqueue(world):
    answers = world.run(enqueue_floats, {0: (False,), 1: (True,)}, check=False)
    assert all("labels must be integers" in a.text for a in answers.values())
    assert [a.kind for a in answers.values()] == ["ValueError", "TypeError"]


@pytest.mark.parametrize("filled", [0, 3])
def test_loaded_into_a_queue_of_another_ignore_index(filled):
    """What is not there, or was to be ignored, stays so."""
    before, after = EmbeddingQueue(6, 4), EmbeddingQueue(6, 4, ignore_index=-1)
    z, y = batch(filled)
    y[:1] = -100
    before.enqueue(z, y)
    after.load_state_dict(before.state_dict())
    anchors, labels = batch(5, seed=3)
    losses = [
        hard_negative_contrastive_loss(anchors, labels, queue=queue, ignore_index=queue.ignore_index)
        for queue in (before, after)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "key_labels are given without keys", {"key_labels": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "key_offset is given without keys", {"key_offset": 0}),
        (TypeError, "key_labels must be integers", {"keys": torch.zeros(3, 4), "key_labels": torch.rand(3)}),
        (TypeError, "keys must have the embeddings' dtype",
         {"keys": torch.zeros(3, 4).half(), "key_labels": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, r"labels must have shape \[5\].*got \[4\]",
         {"labels": torch.zeros(4, dtype=torch.int64)}),
    ],
)  # fmt: skip
def test_arguments_beside_a_queue(error, message, options):
    z, y = batch(5)
    with pytest.raises(error, match=message):
        hard_negative_contrastive_loss(z, options.pop("labels", y), queue=EmbeddingQueue(6, 4), **options)


class WithQueue(nn.Module):
    """A model whose queue is one of its own buffers, as DDP broadcasts them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(4) + 0.1)
        self.queue = EmbeddingQueue(6, 4, dtype=torch.float64)

    def forward(self, x, y, transport=None, gather=False):
        z = self.layer(x)
        loss = hard_negative_contrastive_loss(z, y, queue=self.queue, distributed=transport)
        self.queue.enqueue(z, y, gather=gather)
        return loss


def train(batches, transport):
    model = nn.parallel.DistributedDataParallel(WithQueue())
    losses = []
    for x, y in batches:
        model.zero_grad()
        loss = model(x.double(), y, transport, True)
        loss.backward()
        losses.append(loss.item())
    return losses, model.module.layer.weight.grad, model.module.queue.state_dict()


@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_steps_under_ddp_are_one_process(world, transport):
    batches = [[batch(n, seed=10 * i + n) for n in (3, 2)] for i in range(4)]
    model, losses = WithQueue(), []
    for pair in batches:
        model.zero_grad()
        loss = model(torch.cat([x for x, _ in pair]).double(), torch.cat([y for _, y in pair]))
        loss.backward()
        losses.append(loss.item())
    results = world.run(train, {r: ([pair[r] for pair in batches], transport) for r in range(2)})
    for got, grad, state in results.values():
        assert got == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(grad, model.layer.weight.grad, rtol=1e-9, atol=1e-9)
        for name, buffer in model.queue.state_dict().items():
            torch.testing.assert_close(state[name], buffer, rtol=1e-12, atol=1e-12)


def shared_bank(z, y, past, transport):
    queue = EmbeddingQueue(4, 4, dtype=torch.float64)
    queue.enqueue(*past)
    return hard_negative_contrastive_loss(
        z, y, keys=queue.embeddings, key_labels=queue.labels, distributed=transport
    ).item()


@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_shares_of_one_bank(world, transport):
    """Queues filled without gather, given as keys: their union is the bank."""
    parts = [batch(3, seed=r) for r in range(2)]
    past = [batch(3 + r, seed=7 + r) for r in range(2)]
    got = world.run(
        shared_bank, {r: (parts[r][0].double(), parts[r][1], past[r], transport) for r in range(2)}
    )
    expected = hard_negative_contrastive_loss(
        torch.cat([z for z, _ in parts]).double(),
        torch.cat([y for _, y in parts]),
        keys=torch.cat([z for z, _ in past]).double(),
        key_labels=torch.cat([y for _, y in past]),
    )
    assert list(got.values()) == pytest.approx([expected.item()] * 2, rel=1e-9)


def outside_the_group():
    queue = EmbeddingQueue(4, 4)
    queue.enqueue(*batch(2), gather=True, process_group=ranks.group_of((0,)))


def test_enqueue_needs_the_group(world):
    world.run(ranks.make_group, {r: ((0,),) for r in range(2)})
    answers = world.run(outside_the_group, {0: (), 1: ()}, check=False)
    assert answers[0] is None
    assert answers[1].kind == "ValueError" and "must contain this process" in answers[1].text
