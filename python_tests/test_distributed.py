"""Contrast across ranks: what any number of gloo processes compute is what one process computes."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import clce_ext
from bench import scaling_model
from clce_ext import EmbeddingQueue, clce_loss, hard_negative_contrastive_loss
from clce_ext.distributed.ranks import announcing_device
from python_tests import ranks
from python_tests.ranks import World

WORLD = 4
# Process groups by size; the one of two ranks is neither contiguous nor in the world's order of pairs.
GROUPS = {1: (2,), 2: (1, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3)}
TRANSPORTS = ("gather", "ring")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(WORLD, tmp_path_factory.mktemp("ranks") / "store")
    for members in GROUPS.values():
        if len(members) < WORLD:
            world.run(ranks.make_group, {rank: (members,) for rank in range(WORLD)})
    yield world
    world.close()


# ---- data, and the same loss in one process and across ranks ----


def make_batch(sizes, dim=7, views=1, classes=5, labelled=True, dtype=torch.float64, seed=0, ignored=True):
    """One dict of arguments per rank."""
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for size in sizes:
        z = torch.randn(size, views, dim, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (size,), generator=generator)
        if ignored:
            labels[::6] = -100
        share = {"embeddings": (z if views > 1 else z[:, 0]).to(dtype)}
        if labelled:
            share["labels"] = labels
        shares.append(share)
    return shares


def make_queue(filled=5, size=9, dim=7, dtype=torch.float64, seed=3, labelled=True):
    generator = torch.Generator().manual_seed(seed)
    queue = EmbeddingQueue(size, dim, dtype=dtype)
    labels = torch.randint(5, (filled,), generator=generator) if labelled else None
    queue.enqueue(torch.randn(filled, dim, generator=generator, dtype=torch.float64), labels)
    return queue


def leaf(x):
    return x.detach().clone().requires_grad_()


def evaluate(tensors: dict, options: dict, factor=1.0, function=hard_negative_contrastive_loss):
    """Loss and the gradients of all that is floating point, temperature included."""
    constants = {k: v for k, v in tensors.items() if not v.is_floating_point() or k == "debias"}
    tensors = {k: leaf(v) for k, v in tensors.items() if k not in constants}
    options = dict(options)
    if isinstance(options.get("temperature"), torch.Tensor):
        tensors["temperature"] = leaf(options.pop("temperature"))
    loss = function(**tensors, **constants, **options)
    (loss * factor).sum().backward()
    return loss.detach(), {k: v.grad for k, v in tensors.items()}


def on_rank(tensors, options, transport, members, factor=1.0, function=hard_negative_contrastive_loss):
    options = {**options, "distributed": transport, "process_group": ranks.group_of(members)}
    return evaluate(tensors, options, factor, function)


def across(world, transport, shares, options, factors=None, function=hard_negative_contrastive_loss):
    members = GROUPS[len(shares)]
    factors = factors or [1.0] * len(shares)
    args = {
        m: (s, options, transport, members, f, function)
        for m, s, f in zip(members, shares, factors, strict=True)
    }
    return list(world.run(on_rank, args).values())


def end_to_end(shares):
    """The ranks' arguments as those of one process; key_offset is left to the caller."""
    return {name: torch.cat([share[name] for share in shares]) for name in shares[0]}


def assert_same(results, whole, factor, reduction="mean", rtol=1e-9, atol=1e-9):
    """Every rank's loss is the whole batch's, and gradients are ``factor`` times its."""
    loss, grads = whole
    losses = [r[0] for r in results]
    if reduction == "none":
        torch.testing.assert_close(torch.cat(losses), loss, rtol=rtol, atol=atol)
    else:
        for one in losses:
            torch.testing.assert_close(one, loss, rtol=rtol, atol=atol)
            assert torch.equal(one, losses[0])
    for name, grad in grads.items():
        given = [r[1][name] for r in results]
        together = torch.stack(given).sum(0) if name == "temperature" else torch.cat(given)
        torch.testing.assert_close(
            together, factor * grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


SIZES = {1: [(11,), (1,)], 2: [(6, 6), (9, 2)], 3: [(4, 4, 4), (5, 0, 8)], 4: [(5, 5, 5, 5), (1, 7, 0, 6)]}
SHARDS = [sizes for several in SIZES.values() for sizes in several]


@pytest.mark.parametrize("queue", [False, True], ids=["", "queue"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("sizes", SHARDS, ids=str)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_loss_and_gradients_are_one_process(world, transport, sizes, beta, queue):
    options = {"beta": beta, "temperature": torch.tensor(0.3, dtype=torch.float64)}
    if queue:
        options["queue"] = make_queue()
    shares = make_batch(sizes, seed=len(sizes))
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options), whole, len(sizes))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "options",
    [
        {"summation": "in"},
        {"denominator": "negatives"},
        {"debias": 0.1, "temperature": torch.tensor(0.5, dtype=torch.float64)},
        {"debias": 0.9, "temperature": torch.tensor(0.5, dtype=torch.float64)},  # on its floor
        {"detach_weights": True},
        {"normalize": False, "temperature": torch.tensor([2.0], dtype=torch.float64)},
        {"temperature": 0.01, "beta": 2.0},
        {"reduction": "sum"},
        {"ignore_index": 3},
    ],
    ids=str,
)
def test_every_option(world, transport, options):
    shares = make_batch((5, 2, 4))
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options), whole, 3, options.get("reduction", "mean"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_debias_of_each_image(world, transport):
    options = {"temperature": torch.tensor(0.4, dtype=torch.float64)}
    shares = make_batch((5, 0, 4), views=2)
    for share in shares:
        images = len(share["embeddings"])
        share["debias"] = torch.linspace(0, 0.7, images, dtype=torch.float64)
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options), whole, 3)
    constant = evaluate(end_to_end(make_batch((5, 0, 4), views=2)), options)
    assert not torch.allclose(whole[0], constant[0])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_reduction_gives_own_terms(world, transport):
    shares, options = (
        make_batch((5, 2, 4)),
        {"reduction": "none", "temperature": torch.tensor(0.4, dtype=torch.float64)},
    )
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options), whole, 1, "none")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("queue", [None, True, False], ids=["", "labelled queue", "unlabelled queue"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_views(world, transport, labelled, queue, ignore_index):
    options = {"temperature": torch.tensor(0.3, dtype=torch.float64), "ignore_index": ignore_index}
    if queue is not None:
        options["queue"] = make_queue(labelled=queue)
        options["queue"].classes.masked_fill_(options["queue"].classes == -100, ignore_index)
        options["queue"].ignore_index = ignore_index
    shares = make_batch((3, 0, 4), views=3, labelled=labelled)
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options), whole, 3)


def with_keys(shares, counts, seed=5):
    for i, (share, count) in enumerate(zip(shares, counts, strict=True)):
        more = make_batch((count,), seed=seed + i)[0]
        share["keys"] = more["embeddings"]
        if "labels" in share:
            share["key_labels"] = more["labels"]
    return shares


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("queue", [False, True], ids=["", "queue"])
def test_keys_of_all_ranks(world, transport, queue):
    options = {"temperature": torch.tensor(0.3, dtype=torch.float64)}
    if queue:
        options["queue"] = make_queue()
    shares = with_keys(make_batch((3, 0, 4)), (5, 2, 0))
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options), whole, 3)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_paired_keys(world, transport):
    """CLIP's half: image i's positive is key i, among the keys of all ranks."""
    options = {"temperature": torch.tensor(0.3, dtype=torch.float64), "beta": 0.0}
    shares = with_keys(make_batch((3, 2, 4), labelled=False), (3, 2, 4))
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options), whole, 3)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_anchors_among_the_keys(world, transport):
    """key_offset counts in the rank's own keys."""
    z = make_batch((4, 4), seed=9)
    shares = [
        {
            "embeddings": s["embeddings"],
            "labels": s["labels"],
            "keys": torch.cat([s["embeddings"].flip(0)[:2], s["embeddings"]]),
            "key_labels": torch.cat([s["labels"].flip(0)[:2], s["labels"]]),
        }
        for s in z
    ]
    results = across(world, transport, shares, {"key_offset": 2})
    # One process knows one offset alone: the anchors of rank r begin at 6 r + 2, so term by term.
    keys, key_labels = (
        leaf(torch.cat([s["keys"] for s in shares])),
        torch.cat([s["key_labels"] for s in shares]),
    )
    anchors = [leaf(s["embeddings"]) for s in shares]
    terms = torch.cat(
        [
            hard_negative_contrastive_loss(
                anchors[r],
                shares[r]["labels"],
                keys=keys,
                key_labels=key_labels,
                key_offset=6 * r + 2,
                reduction="none",
            )
            for r in range(2)
        ]
    )
    loss = terms.sum() / (terms != 0).sum()
    loss.backward()
    grads = {"embeddings": torch.cat([a.grad for a in anchors]), "keys": keys.grad}
    assert_same(results, (loss.detach(), grads), 2)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradient_is_that_of_the_sum_of_what_ranks_return(world, transport):
    shares, options = make_batch((5, 2, 4)), {"temperature": torch.tensor(0.4, dtype=torch.float64)}
    factors = [0.5, -1.0, 3.0]
    whole = evaluate(end_to_end(shares), options)
    assert_same(across(world, transport, shares, options, factors), whole, sum(factors))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", ["no positives", "all ignored", "no images"])
def test_nothing_to_compare(world, transport, case):
    shares = make_batch((3, 2), seed=1)
    for i, share in enumerate(shares):
        share["labels"] = (
            torch.arange(len(share["labels"])) + 10 * i if case == "no positives" else share["labels"]
        )
        if case == "all ignored":
            share["labels"][:] = -100
        if case == "no images":
            share["labels"], share["embeddings"] = share["labels"][:0], share["embeddings"][:0]
    for loss, grads in across(world, transport, shares, {}):
        assert loss == 0
        assert not grads["embeddings"].any()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nan_comes_out(world, transport):
    shares = make_batch((3, 2), ignored=False, classes=2)
    shares[1]["embeddings"][0] = torch.nan
    for loss, _ in across(world, transport, shares, {}):
        assert loss.isnan()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("temperature", [0.5, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_one_process(world, transport, temperature, dtype):
    """Error against float64, of the ranks at most twice that of one process in the same dtype."""
    options = {"temperature": temperature}
    shares = make_batch((40, 33, 50), dim=59, dtype=dtype, ignored=False)
    exact_loss, exact_grads = evaluate(
        {k: v.double() if v.is_floating_point() else v for k, v in end_to_end(shares).items()}, options
    )
    loss, grads = evaluate(end_to_end(shares), options)
    results = across(world, transport, shares, options)
    assert results[0][0].dtype == torch.float32 and results[0][1]["embeddings"].dtype == dtype
    eps = torch.finfo(torch.float32).eps

    def error(x, exact):
        return (x.double() - exact).norm() / exact.norm()

    assert error(results[0][0], exact_loss) <= 2 * error(loss, exact_loss) + 4 * eps
    got = torch.cat([r[1]["embeddings"] for r in results]) / 3
    assert (
        error(got, exact_grads["embeddings"])
        <= 2 * error(grads["embeddings"], exact_grads["embeddings"]) + 4 * eps
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_same_bits_every_time(world, transport):
    shares = make_batch((20, 3, 11, 15), dtype=torch.float32, dim=33)
    first, second = (across(world, transport, shares, {"beta": 2.0}) for _ in range(2))
    for (loss, grads), (again, grads_again) in zip(first, second, strict=True):
        assert torch.equal(loss, again)
        assert torch.equal(grads["embeddings"], grads_again["embeddings"])


# ---- CLCE, DDP, FSDP, GradCache ----


def clce_share(sizes, soft, views):
    shares = make_batch(sizes, views=views, seed=4)
    generator = torch.Generator().manual_seed(8)
    for share in shares:
        shape = (*share["embeddings"].shape[:-1], 5)
        share["logits"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return shares


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("views", [1, 2])
def test_clce(world, transport, weighted, views):
    options = {"weight": 0.7, "label_smoothing": 0.1}
    if weighted:
        options["class_weights"] = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.25], dtype=torch.float64)
    shares = clce_share((5, 0, 7), False, views)
    whole = evaluate(end_to_end(shares), options, function=clce_loss)
    assert_same(across(world, transport, shares, options, function=clce_loss), whole, 3)


def test_clce_soft_targets(world):
    shares = clce_share((5, 2), True, 1)
    for share in shares:
        share["targets"] = torch.rand(len(share["logits"]), 5, dtype=torch.float64).softmax(1)
    whole = evaluate(end_to_end(shares), {}, function=clce_loss)
    assert_same(across(world, "gather", shares, {}, function=clce_loss), whole, 2)


class Encoder(nn.Module):
    """Two layers with a class head, seeded."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(6, 16, dtype=dtype)
        self.second = nn.Linear(16, 8, dtype=dtype)
        self.head = nn.Linear(8, 5, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)

    def forward(self, x):
        z = self.second(torch.tanh(self.first(x)))
        return self.head(z), z


def encoder_gradients(module: nn.Module) -> dict:
    full = {
        n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for n, p in module.named_parameters()
    }
    return {n.removeprefix("module."): g for n, g in full.items()}


class Training(nn.Module):
    """A model and a criterion with a temperature to learn, wrapped together."""

    def __init__(self, transport=None):
        super().__init__()
        self.encoder = Encoder()
        self.criterion = clce_ext.CLCELoss(weight=0.6, learnable_temperature=True, distributed=transport)

    def forward(self, x, y):
        return self.criterion(*self.encoder(x), y)


def train_ddp(x, y, transport):
    model = nn.parallel.DistributedDataParallel(Training(transport))
    loss = model(x, y)
    loss.backward()
    return loss.detach(), encoder_gradients(model)


def train_fsdp(x, y, transport):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    encoder = Encoder()
    fully_shard(encoder.first, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    loss = clce_ext.CLCELoss(weight=0.6, distributed=transport)(*encoder(x), y)
    loss.backward()
    return loss.detach(), {f"encoder.{n}": g for n, g in encoder_gradients(encoder).items()}


def cached_step(x, y, transport):
    model = nn.parallel.DistributedDataParallel(Encoder())
    step = clce_ext.GradCache(model, clce_ext.CLCELoss(weight=0.6, distributed=transport), micro_batch_size=2)
    loss = step(x, y)
    return loss, {f"encoder.{n}": g for n, g in encoder_gradients(model).items()}


def images(sizes):
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64),
            torch.randint(5, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("train", [train_ddp, train_fsdp, cached_step])
def test_averaged_model_gradients_are_one_process(world, transport, train):
    parts = images((5, 9, 2, 7))
    one = Training()
    loss = one(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    loss.backward()
    expected = encoder_gradients(one)
    for got_loss, grads in world.run(train, {r: (*parts[r], transport) for r in range(WORLD)}).values():
        torch.testing.assert_close(got_loss, loss.detach(), rtol=1e-9, atol=1e-9)
        assert len(grads) >= 6
        for name, grad in grads.items():
            # The temperature is a float32 parameter.
            rtol = 1e-5 if name == "criterion.temperature" else 1e-9
            torch.testing.assert_close(
                grad, expected[name], rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def compiled_step(x, y, transport):
    model, criterion = Encoder(torch.float32), clce_ext.CLCELoss(distributed=transport)

    def step(x, y):
        return criterion(*model(x), y)

    results = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        model.zero_grad()
        loss = run(x, y)
        loss.backward()
        results.append((loss.detach(), model.first.weight.grad.clone()))
    return results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_inside_a_compiled_step(world, transport):
    parts = images((5, 9))
    members = (0, 1, 2, 3)
    args = {r: (parts[r % 2][0].float(), parts[r % 2][1], transport) for r in members}
    for plain, compiled in world.run(compiled_step, args).values():
        torch.testing.assert_close(plain, compiled)


def autocast_step(x, y, transport):
    model, queue = Encoder(torch.float32), EmbeddingQueue(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits, z = model(x)
        loss = clce_ext.CLCELoss(distributed=transport)(logits, z, y, queue=queue)
    loss.backward()
    return z.dtype, loss.dtype, loss.item(), model.first.weight.grad.isfinite().all().item()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_under_autocast(world, transport):
    parts = images((5, 9, 2, 7))
    model = Encoder(torch.float32)
    exact = clce_loss(*model(torch.cat([x for x, _ in parts]).float()), torch.cat([y for _, y in parts]))
    args = {r: (parts[r][0].float(), parts[r][1], transport) for r in range(WORLD)}
    for z_dtype, loss_dtype, loss, finite in world.run(autocast_step, args).values():
        assert z_dtype == torch.bfloat16 and loss_dtype == torch.float32 and finite
        assert abs(loss - exact.item()) < 0.02 * exact.item()


def second_derivative(share, transport):
    z = leaf(share["embeddings"])
    loss = hard_negative_contrastive_loss(z, share["labels"], distributed=transport)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    grad.sum().backward()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_second_derivative_is_refused(world, transport):
    shares = make_batch((3, 2, 4, 5))
    answers = world.run(second_derivative, {r: (shares[r], transport) for r in range(WORLD)}, check=False)
    assert all(a.kind == "RuntimeError" and "no second derivative" in a.text for a in answers.values())


def no_gradients(share, transport):
    with torch.no_grad():
        loss = hard_negative_contrastive_loss(
            leaf(share["embeddings"]), share["labels"], distributed=transport
        )
    return loss.requires_grad


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_gradients(world, transport):
    shares = make_batch((3, 2, 4, 5))
    assert not any(world.run(no_gradients, {r: (shares[r], transport) for r in range(WORLD)}).values())


# ---- memory ----


def peak_bytes(function) -> int:
    """Most bytes that the CPU allocator held at once for ``function``, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def peak_on_rank(share, transport, members):
    z, y = leaf(share["embeddings"]), share["labels"]

    def step():
        options = {"distributed": transport, "process_group": ranks.group_of(members)}
        hard_negative_contrastive_loss(z, y, **options).backward()
        z.grad = None

    step()
    return peak_bytes(step)


def test_peak_memory(world):
    """In units of the local embeddings' bytes: flat with W for the ring, growing with W for gather."""
    rows, dim = 768, 128
    peaks = {}
    for transport, size in itertools.product(TRANSPORTS, (2, 3, 4)):
        shares = make_batch((rows,) * size, dim=dim, dtype=torch.float32)
        args = {m: (s, transport, GROUPS[size]) for m, s in zip(GROUPS[size], shares, strict=True)}
        peaks[transport, size] = max(world.run(peak_on_rank, args).values()) / (rows * dim * 4)
    # z, keys here and coming, dz and its new part, the keys' gradient here, coming and leaving: 8; and the
    # CPU kernels sort anchors, keys and both gradients by label, 4, and have a tile's scratch, below 1. Four
    # ranks have all at once; one shard more anywhere would be another 1.
    assert max(peaks["ring", size] for size in (2, 3, 4)) < 13
    # For every rank more: its keys, their gradient, the new part of it, and the CPU kernels' two.
    for size in (2, 3):
        assert 3 < peaks["gather", size + 1] - peaks["gather", size] < 5.5


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bytes_sent_are_the_scaling_models(world, transport):
    rows, dim = 12, 20
    model = scaling_model.Step(WORLD, rows, dim, element_bytes=4).bytes_sent(transport)
    answers = world.run(scaling_model.count_on_rank, {r: (transport, rows, dim) for r in range(WORLD)})
    for counted in answers.values():
        assert sum(counted.values()) == sum(model.values())
    # padded rows of 24 columns, at home and abroad
    assert model["gradients"] == 3 * rows * 24 * 4 and model["keys"] % (3 * rows * (24 * 4 + 8)) == 0


# ---- what must not pass in silence ----


def changed(share, what):
    share = dict(share)
    z = share["embeddings"]
    options = {}
    if what == "dim":
        share["embeddings"] = z[:, :4]
    elif what == "rank":
        share["embeddings"] = z[0]
    elif what == "dtype":
        share["embeddings"] = z.float()
    elif what == "labels":
        share["labels"] = share["labels"][1:]
    elif what == "float labels":
        share["labels"] = share["labels"].double()
    elif what == "temperature tensor":
        options["temperature"] = torch.tensor(0.1)
    else:
        options = what
    return share, options


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            "dim",
            "embeddings' dim must be the same on all ranks of the process group: rank 0 has 7, rank 1 has 4",
        ),
        ("dtype", "dtype must be the same on all ranks"),
        (
            {"beta": 2.0},
            "beta must be the same on all ranks of the process group: rank 0 has 1.0, rank 1 has 2.0",
        ),
        ({"temperature": 0.1}, "temperature must be the same"),
        ("temperature tensor", "temperature must be the same"),
        ({"distributed": None}, "the same call"),
        ({"reduction": "sum"}, "reduction must be the same"),
        ("rank", "embeddings must have shape"),
        ({"queue": "none"}, "queue must be a clce_ext.EmbeddingQueue or None, got str"),
        ("labels", r"labels must have shape"),
        ("float labels", "labels must be integers"),
        ({"beta": -1.0}, "beta must be finite and at least 0"),
    ],
    ids=str,
)
def test_ranks_that_differ_hear_of_it(world, transport, what, says):
    shares = make_batch((3, 4, 2))
    members = GROUPS[3]
    args = {m: (s, {}, transport, members) for m, s in zip(members, shares, strict=True)}
    share, options = changed(shares[1], what)
    if what == {"distributed": None}:
        args[members[1]] = (share, {}, {"gather": "ring", "ring": "gather"}[transport], members)
    else:
        args[members[1]] = (share, options, transport, members)
    answers = world.run(on_rank, args, check=False)
    for answer in answers.values():
        assert isinstance(answer, ranks.Failed), answer
        assert answer.kind in ("ValueError", "TypeError")
        assert says in answer.text
    # and the group still works
    whole = evaluate(end_to_end(shares), {})
    assert_same(across(world, transport, shares, {}), whole, 3)


def clce_of(share, transport, classes):
    logits = torch.zeros(len(share["embeddings"]), classes)
    return clce_loss(logits, share["embeddings"], share["labels"], distributed=transport).item()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_clce_refused_by_one_rank(world, transport):
    """Its cross-entropy comes first; the others do not wait for it."""
    shares = make_batch((3, 4, 2, 5))
    shares[1]["labels"] = shares[1]["labels"].clone().fill_(7)
    answers = world.run(clce_of, {r: (shares[r], transport, 6) for r in range(WORLD)}, check=False)
    for answer in answers.values():
        assert answer.kind == "ValueError", answer.text
        assert "labels must be class indices from 0 to 5" in answer.text


def temperatures(share, transport, value):
    temperature = leaf(torch.tensor(value))
    return hard_negative_contrastive_loss(
        share["embeddings"], share["labels"], temperature=temperature, distributed=transport
    ).item()


def apart(share, transport, value):
    """As on a GPU whose group announces on the host: the bits of a temperature travel by themselves."""
    with mock.patch("clce_ext.distributed.ranks.is_beside", lambda *_: False):
        return temperatures(share, transport, value)


@pytest.mark.parametrize("call", [temperatures, apart])
def test_temperatures_that_differ(world, call):
    shares = make_batch((3, 4, 2, 5))
    answers = world.run(call, {r: (shares[r], "ring", 0.1) for r in range(WORLD)})
    assert len(set(answers.values())) == 1
    answers = world.run(call, {r: (shares[r], "ring", 0.1 + (r == 2)) for r in range(WORLD)}, check=False)
    assert all("temperature must be the same" in a.text for a in answers.values())


def number_or_tensor(share, transport):
    """1 is also what stands in the place of the number where the temperature is a tensor."""
    temperature = 1.0 if dist.get_rank() else torch.tensor(1.0)
    with mock.patch("clce_ext.distributed.ranks.is_beside", lambda *_: False):
        return hard_negative_contrastive_loss(
            share["embeddings"], share["labels"], temperature=temperature, distributed=transport
        ).item()


def test_a_temperature_that_is_a_tensor_on_one_rank_alone(world):
    shares = make_batch((3, 4, 2, 5))
    answers = world.run(number_or_tensor, {r: (shares[r], "ring") for r in range(WORLD)}, check=False)
    assert all("temperature being a tensor must be the same" in a.text for a in answers.values())


def where_announcements_lie(backend):
    group = dist.new_group(backend=backend)
    return [str(announcing_device(g, torch.device("cuda"))) for g in (None, group)]


def test_announcements_lie_on_the_host_where_the_group_can_exchange_it(world):
    """So that no rank waits for its GPU before the loss."""
    answers = world.run(where_announcements_lie, {r: ("cpu:gloo",) for r in range(WORLD)})
    assert all(answer == ["cpu", "cpu"] for answer in answers.values())
    with mock.patch("torch.distributed.get_backend_config", lambda group: "cuda:nccl"):
        assert announcing_device(None, torch.device("cuda")).type == "cuda"


def test_arguments_of_one_process():
    z, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="init_process_group"):
        hard_negative_contrastive_loss(z, y, distributed="gather")
    with pytest.raises(ValueError, match="'gather' or 'ring', got 'mesh'"):
        hard_negative_contrastive_loss(z, y, distributed="mesh")
    with pytest.raises(ValueError, match="process_group is given without"):
        hard_negative_contrastive_loss(z, y, process_group=object())


def outside(share, transport):
    group = ranks.group_of(GROUPS[2])
    return hard_negative_contrastive_loss(
        share["embeddings"], share["labels"], distributed=transport, process_group=group
    )


def test_a_process_outside_the_group(world):
    (answer,) = world.run(outside, {0: (make_batch((3,))[0], "ring")}, check=False).values()
    assert answer.kind == "ValueError" and "must contain this process (rank 0)" in answer.text


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_never_comes(world, transport):
    members = {"gather": (0, 2), "ring": (0, 3)}[transport]
    world.run(ranks.make_group, {rank: (members, 2.0) for rank in range(WORLD)})
    (answer,) = world.run(
        on_rank, {0: (make_batch((3,))[0], {}, transport, members)}, check=False, patience=30
    ).values()
    assert answer.kind == "RuntimeError"
    assert (
        "could not exchange what they are about to do" in answer.text
        and "never made this call" in answer.text
    )


def dies(share, transport, when, me):
    rank = dist.get_rank()
    if when == "before the loss" and rank == me:
        ranks.die()
    loss = hard_negative_contrastive_loss(leaf(share["embeddings"]), share["labels"], distributed=transport)
    if when == "before the backward" and rank == me:
        ranks.die()
    loss.backward()


@pytest.mark.parametrize(
    ("transport", "when"),
    list(zip(TRANSPORTS, ("before the loss", "before the backward"), strict=True)),
    ids=str,
)
def test_a_rank_that_dies(tmp_path, transport, when):
    world = World(3, tmp_path / "store", timeout=10)
    shares = make_batch((3, 4, 2))
    answers = world.run(
        dies, {r: (shares[r], transport, when, 1) for r in range(3)}, check=False, patience=60
    )
    assert answers.pop(1).kind == "died"
    for answer in answers.values():
        assert answer.kind == "RuntimeError" and "one of them has died" in answer.text
    world.close()
