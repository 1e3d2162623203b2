"""What only a chip can decide; without one all of it is skipped.

The executor rounds the sums of mma and the exponential in ways of its own, and runs blocks one after another.
So these tests ask the chip: has a logit the same bits wherever it is computed, does a captured step give the
same bits a thousand times and beside other work, do as many blocks run at once as planned.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clce_ext
from clce_ext.arguments import ContrastiveLossOutputs, Statistics, padded

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and clce_ext.build_info()["cuda"]), reason="no GPU with kernels"
)
DEVICE = "cuda"
OPS = torch.ops.clce_ext
FORMATS = ("bfloat16", "float16", "float32", "tf32", "float64")
# Whole steps of columns, and rows that end within a step, in all shapes of the backward pass.
DIMS = (100, 128, 300, 512, 1000)


@pytest.fixture(params=FORMATS)
def dtype(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    yield torch.float32 if request.param == "tf32" else getattr(torch, request.param)
    torch.backends.cuda.matmul.allow_tf32 = before


def logits(z, keys, dim, temperature=0.5):
    """s_ii [M] of rows against keys, through the kernels: key i is row i's only positive."""
    labels = torch.arange(len(z), device=z.device)
    statistics = OPS.statistics(z, keys, labels, labels, None, temperature, dim, None, 1.0, True, -100)
    return Statistics(*statistics).sum_pos


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("count", [130, 2100])  # with the small and with the large tile
def test_a_logit_has_the_same_bits_everywhere(count, dim, dtype):
    """With its sides swapped, at another place of another tile, and in self-contrast. In tiles: for so many
    rows the plan would take a library's products, which are summed in an order of their own."""
    z, k = (OPS.prepare(torch.randn(count, dim, device=DEVICE).to(dtype), True)[0] for _ in range(2))
    assert z.shape[1] == padded(dim)
    with clce_ext.backends.engine("fused"):
        found = logits(z, k, dim)
        assert torch.unique(found).numel() > count / 2
        assert torch.equal(found, logits(k, z, dim))
        assert torch.equal(found.roll(37), logits(z.roll(37, 0), k.roll(37, 0), dim))
        both, labels = torch.cat([z, k]), torch.arange(count, device=DEVICE).repeat(2)
        statistics = OPS.statistics(both, None, labels, None, None, 0.5, dim, None, 1.0, True, -100)
        assert torch.equal(Statistics(*statistics).sum_pos, found.repeat(2))


LAUNCHES = {
    (256, None): (["phases_kernel"], ["backward_kernel", "prepare_backward_kernel"]),
    (256, "keys"): (["phases_kernel"], ["backward_kernel", "prepare_backward_kernel"]),
    (2100, None): (
        ["prepare_kernel", "forward_kernel", "merge_loss_kernel"],
        ["backward_kernel", "prepare_backward_kernel"],
    ),
    (700, "panels"): (
        ["prepare_kernel", "panel_sums_kernel", "merge_loss_kernel"],
        ["gradient_factors_kernel", "panel_gradients_kernel", "prepare_backward_kernel"],
    ),
}


@pytest.mark.parametrize(("count", "how"), LAUNCHES, ids=str)
def test_launches_are_those_of_the_plan(count, how):
    """Of small batches one, as blocks can meet here; and panels, for which torch's cuBLAS has to be found."""
    x = torch.randn(count, 128, device=DEVICE).bfloat16().requires_grad_()
    labels = torch.arange(count, device=DEVICE) % 9
    keys = (
        {"keys": x.detach().flip(0).requires_grad_(), "key_labels": labels.flip(0)} if how == "keys" else {}
    )
    leaves = [x, keys["keys"]] if keys else [x]

    def contrast():
        return clce_ext.hard_negative_contrastive_loss(x, labels, **keys)

    with clce_ext.backends.engine("panels" if how == "panels" else None):
        loss = contrast()
        for _ in range(2):  # the first starts the profiler
            found = (
                launches_of(contrast),
                launches_of(lambda: torch.autograd.grad(loss, leaves, retain_graph=True)),
            )
    if not any(found):
        pytest.skip("torch's profiler sees no kernels here")
    assert found == LAUNCHES[count, how]


def launches_of(call) -> list[str]:
    """This project's kernels in the order in which the device ran them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    names = (re.search(r"clce::cuda::(\w+_kernel)\b", event.name) for event in events)
    return [match[1] for match in names if match]


@pytest.mark.parametrize("engine", [None, "panels"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("count", [300, 2100])
def test_both_passes_know_the_same_logit(count, dim, engine, dtype):
    """The gradient of two rows that have nobody but each other is 1 - e^(s - s): 0 if all bits agree."""
    x = torch.randn(count, dim, device=DEVICE).to(dtype).requires_grad_()
    pairs = [(0, count - 1), *(torch.randperm(count)[:2].tolist() for _ in range(5))]
    with clce_ext.backends.engine(engine):
        for pair in pairs:
            labels = torch.full((count,), -100, device=DEVICE)
            labels[list(pair)] = 1
            # So low a temperature that the logits have no bound: the bounded ones divide by a sum.
            loss = clce_ext.hard_negative_contrastive_loss(x, labels, temperature=0.01)
            (gradient,) = torch.autograd.grad(loss, x)
            assert loss == 0 and not gradient.any(), pair


@pytest.mark.parametrize("temperature", [0.5, 0.01, "on the device"])
@pytest.mark.parametrize("dim", [100, 256, 768])
@pytest.mark.parametrize("count, keys", [(1, None), (64, None), (300, None), (1024, None), (200, 700)])
def test_one_launch_gives_the_bits_of_three(count, keys, dim, temperature, dtype):
    """A small batch is prepared, summed and merged in one launch; a batch that is prepared already is not."""
    on_device = temperature == "on the device"
    t = (
        torch.full((), 0.5, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
        if on_device
        else None
    )
    number = 1.0 if on_device else temperature
    x, k = (None if n is None else torch.randn(n, dim, device=DEVICE).to(dtype) for n in (count, keys))
    labels, key_labels = (
        None if n is None else torch.randint(0, 9, (n,), device=DEVICE) for n in (count, keys)
    )
    options = (1.0, "out", "all", None, 0.0, False, True, -100, "mean")
    found = ContrastiveLossOutputs(
        *OPS.contrastive_loss(x, labels, k, key_labels, t, number, 1, None, *options)
    )
    z, norms = OPS.prepare(x, True)
    key_z = None if k is None else OPS.prepare(k, True)[0]
    statistics = OPS.statistics(z, key_z, labels, key_labels, t, number, dim, None, 1.0, True, -100)
    for one, three in ((found.z, z), (found.norms, norms), (found.statistics, statistics)):
        assert torch.equal(one, three)


# ---- a captured step ----


def step(x, labels, temperature=0.5):
    loss = clce_ext.hard_negative_contrastive_loss(x, labels, temperature=temperature)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def captured(*given):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*given)
    return graph, results


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["current stream", "side stream"])
@pytest.mark.parametrize("count", [129, 256, 500, 1024])
def test_a_captured_step_replayed_a_thousand_times(count, where, half):
    """The bits of plain calls, whatever embeddings lie in its input, beside other work on the device."""
    labels = torch.randint(0, count // 8, (count,), device=DEVICE)
    inputs = [torch.randn(count, 128, device=DEVICE).to(half) for _ in range(10)]
    expected = [step(x.requires_grad_(), labels) for x in inputs]
    x = inputs[0].detach().clone().requires_grad_()
    graph, results = captured(x, labels)
    busy = torch.randn(2048, 2048, device=DEVICE)
    wrong = torch.zeros((), dtype=torch.long, device=DEVICE)
    stream = torch.cuda.Stream() if where == "side stream" else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    for turn in range(1000):
        if turn % 10 == 0 and where == "side stream":
            busy @ busy  # on the current stream
        with torch.cuda.stream(stream), torch.no_grad():
            x.copy_(inputs[turn % 10])
            graph.replay()
            for result, value in zip(results, expected[turn % 10], strict=True):
                wrong += (result != value).sum()
    torch.cuda.synchronize()
    assert wrong == 0


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("engine", ["fused", "panels"])
@pytest.mark.parametrize("count", [500, 2100])
def test_a_captured_step_of_every_engine(count, engine, on_device, dtype):
    """Of many launches, a library's among them; a temperature on the device is read in each replay."""
    labels = torch.randint(0, count // 8, (count,), device=DEVICE)
    temperatures = (0.5, 0.01) if on_device else (0.5,)
    t = torch.full((), 0.5, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    inputs = [torch.randn(count, 300, device=DEVICE).to(dtype).requires_grad_() for _ in temperatures]
    with clce_ext.backends.engine(engine):
        expected = [
            step(x, labels, torch.full_like(t, number) if on_device else number)
            for x, number in zip(inputs, temperatures, strict=True)
        ]
        x = inputs[0].detach().clone().requires_grad_()
        graph, results = captured(x, labels, t if on_device else 0.5)
    for _ in range(3):
        for source, number, wanted in zip(inputs, temperatures, expected, strict=True):
            with torch.no_grad():
                x.copy_(source)
            t.fill_(number)
            graph.replay()
            assert all(map(torch.equal, results, wanted))


@pytest.mark.parametrize("engine", ["fused", "panels"])
@pytest.mark.parametrize("count", [129, 1024, 2100])
def test_plain_calls_on_a_side_stream(count, engine):
    x = torch.randn(count, 96, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, count // 8, (count,), device=DEVICE)
    busy = torch.randn(2048, 2048, device=DEVICE)
    wrong = torch.zeros((), dtype=torch.long, device=DEVICE)
    side = torch.cuda.Stream()
    with clce_ext.backends.engine(engine):
        expected = step(x, labels)
        side.wait_stream(torch.cuda.current_stream())
        for _ in range(100):
            busy @ busy
            with torch.cuda.stream(side):
                for result, value in zip(step(x, labels), expected, strict=True):
                    wrong += (result != value).sum()
    torch.cuda.synchronize()
    assert wrong == 0


# ---- blocks that run at once ----

LIMITS = [f"launch__occupancy_limit_{what}" for what in ("registers", "shared_mem", "warps", "blocks")]
SHARED, CONFIGURED = "launch__shared_mem_per_block", "launch__shared_mem_config_size"
# 34 rows of large tiles; both shapes of the backward pass that keep their rows.
PROFILED = """if True:
    import torch, clce_ext
    for dim in (128, 256):
        x = torch.randn(4264, dim, device="cuda").to(torch.bfloat16).requires_grad_()
        labels = torch.randint(0, 500, (4264,), device="cuda")
        clce_ext.hard_negative_contrastive_loss(x, labels).backward()
    torch.cuda.synchronize()
"""


def profiled_launches() -> list[dict[str, str]]:
    """What Nsight Compute says of each launch of the two passes."""
    beside = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin/ncu")
    ncu = str(beside) if beside.exists() else shutil.which("ncu")
    if ncu is None:
        pytest.skip("no ncu (Nsight Compute)")
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--kernel-name", "regex:forward_kernel|backward_kernel"]
    command += ["--metrics", ",".join([*LIMITS, SHARED, CONFIGURED]), sys.executable, "-c", PROFILED]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return launches_in(done.stdout)


def launches_in(output: str) -> list[dict[str, str]]:
    rows = csv.DictReader(line for line in output.splitlines() if line.startswith('"'))
    return [row for row in rows if row["ID"]]  # one row has the units


def number(printed: str) -> float:
    """ncu separates thousands as the locale has it."""
    return float(printed.replace(",", ""))


def planned_blocks(kernel: str) -> int | None:
    """By the shape in the kernel's name (csrc/cuda/sm80/shapes.cuh); None of other kernels."""
    name = re.sub(r"\(\w+\)|clce::|cuda::|sm80::", "", kernel)
    if match := re.search(r"\bForwardShape<([\d, ]+)>", name):
        return int(match[1].split(",")[5])
    if match := re.search(
        r"\b(?:Resident|Streaming)Shape<Fragment<[^>]*>, Fragment<[^>]*>, ([\d, ]+)>", name
    ):
        return int(match[1].split(",")[-1])
    return None


def test_as_many_blocks_run_at_once_as_planned():
    room = torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor
    seen = set()
    for launch in profiled_launches():
        planned = planned_blocks(launch["Kernel Name"])
        if planned is None:
            continue
        shared, configured, *limits = (number(launch[name]) for name in (SHARED, CONFIGURED, *LIMITS))
        fits = min(planned, int(room // shared))
        assert min(limits) >= fits, launch
        assert configured >= fits * shared, launch
        seen.add((launch["Kernel Name"].partition("<")[0].split("::")[-1], planned))
    assert len(seen) >= 2 and {planned for _, planned in seen} == {1, 2}
