"""The backend in plain torch operations: where it serves, what it says, and that kernels agree with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import clce_ext
from clce_ext import arguments, backends, checks, compiled
from clce_ext.portable import kept, panels, rows

needs_kernels = pytest.mark.skipif(compiled.C is None, reason="nothing is compiled here")
ROOT = Path(clce_ext.__file__).parent.parent
TESTS = Path(__file__).parent.parent  # the same, unless clce_ext is installed

# In a process that imports clce_ext as if nothing had been compiled.
NOTHING_COMPILED = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **options: "libclce_ext" not in self.name and exists(self, **options)
"""
STEP = """
import warnings, torch
warnings.simplefilter("always")
import clce_ext
x = torch.linspace(-2, 2, 240).sin().view(30, 8).requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    for _ in range(2):
        x.grad = None
        loss = clce_ext.hard_negative_contrastive_loss(x, torch.arange(30) % 4)
        loss.backward()
print(len(caught), *[w.message for w in caught], sep="|")
print(loss.item(), x.grad.abs().sum().item(), sep="|")
"""


def run(script: str, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(path), str(TESTS)]}\n{script}"],
        capture_output=True, text=True, cwd=path, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def same_numbers(line: str) -> bool:
    x = torch.linspace(-2, 2, 240).sin().view(30, 8).requires_grad_()
    loss = clce_ext.hard_negative_contrastive_loss(x, torch.arange(30) % 4)
    loss.backward()
    there = torch.tensor([float(number) for number in line.split("|")])
    return torch.allclose(there, torch.stack([loss.detach(), x.grad.abs().sum()]), rtol=1e-5)


@needs_kernels
def test_constants_are_those_of_the_compiled_part():
    facts = compiled.C.facts
    assert list(arguments.Statistics._fields) == facts["statistics"]
    assert list(arguments.Derivatives._fields) == facts["derivatives"]
    assert facts["row_padding"] == arguments.ROW_PADDING
    assert facts["norm_eps"] == rows.NORM_EPS
    assert facts["bounded_logit"] == panels.BOUNDED_LOGIT
    assert facts["largest_beta"] == checks.LARGEST_BETA


@needs_kernels
def test_kernels_win_and_the_engine_can_be_chosen():
    x, labels = torch.randn(40, 8), torch.arange(40) % 3
    loss = lambda: clce_ext.hard_negative_contrastive_loss(x, labels)  # noqa: E731
    ours = loss()
    with backends.engine("fused"):
        assert torch.equal(loss(), ours)
    seen = []
    original = panels.Contrast.panels
    with backends.engine("portable"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels.Contrast, "panels", lambda self: seen.append(1) or original(self))
        torch.testing.assert_close(loss(), ours)
        assert seen and clce_ext.build_info()["backends"]["cpu"] == "portable"
        seen.clear()
        with backends.engine(None):
            assert torch.equal(loss(), ours) and not seen
    assert clce_ext.build_info()["backends"]["cpu"] == "kernels"


def test_engine_that_is_not_there_is_an_error_at_the_first_call():
    x, labels = torch.randn(40, 8), torch.arange(40) % 3
    with backends.engine("turbo"), pytest.raises(ValueError, match=r"CLCE_ENGINE must be one of .*'turbo'"):
        clce_ext.hard_negative_contrastive_loss(x, labels)
    script = (
        "import clce_ext, torch; print(1); clce_ext.SupConLoss()(torch.ones(4, 2), torch.zeros(4).long())"
    )
    for nothing_compiled, engine, message in (
        ("", "turbo", "CLCE_ENGINE must be one of"),
        (NOTHING_COMPILED, "fused", "CLCE_ENGINE must be one of 'portable' here, got 'fused'"),
    ):
        refused = run(nothing_compiled + script, CLCE_ENGINE=engine)
        assert refused.stdout == "1\n" and f"ValueError: {message}" in refused.stderr
    assert run(script, CLCE_ENGINE="portable").returncode == 0


def test_without_a_compiled_part():
    done = run(NOTHING_COMPILED + STEP)
    assert done.returncode == 0, done.stderr
    warned, numbers = done.stdout.splitlines()
    assert warned.startswith("1|clce_ext computes on cpu in plain torch operations")  # once
    assert "build_ext --inplace" in warned and "build_info()" in warned
    assert same_numbers(numbers)


def test_without_a_compiled_part_and_without_leave():
    refused = run(NOTHING_COMPILED + STEP, CLCE_PORTABLE="0")
    assert "NotImplementedError: embeddings are on cpu but" in refused.stderr
    assert "build_info()" in refused.stderr


def test_broken_compiled_part(tmp_path):
    """As one that a torch is too old for: its reason is told at the import, and all works."""
    shutil.copytree(
        ROOT / "clce_ext",
        tmp_path / "clce_ext",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "train"),
    )
    (tmp_path / "clce_ext" / compiled.PATH.name).write_bytes(b"not a library")
    done = run(STEP, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"compiled part does not load with torch {torch.__version__}" in done.stderr
    assert same_numbers(done.stdout.splitlines()[1])


def test_device_without_kernels():
    """torch's private-use device: nothing of it touches the CPU on the way."""
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no private-use devices in Python")
    script = """
import torch, clce_ext
from python_tests.elsewhere import here, there
torch.manual_seed(0)
x, keys, labels = torch.randn(40, 6), torch.randn(50, 6), torch.arange(40) % 4
key_labels = torch.arange(50) % 5
for dtype in (torch.float32, torch.bfloat16):
    for options in ({}, {"temperature": 0.01}, {"temperature": torch.tensor(0.3)}, {"keys": keys}):
        results = []
        for place in (lambda x: x, there):
            leaf = place(x.to(dtype, copy=True)).requires_grad_()
            given, leaves = dict(options), [leaf]
            if "keys" in given:
                given |= {"keys": place(keys.to(dtype)), "key_labels": place(key_labels), "key_offset": 3}
            if isinstance(options.get("temperature"), torch.Tensor):
                given["temperature"] = place(options["temperature"].clone()).requires_grad_()
                leaves.append(given["temperature"])
            loss = clce_ext.hard_negative_contrastive_loss(leaf, place(labels), **given)
            assert loss.device == leaf.device
            loss.backward()
            back = here if place is there else lambda x: x
            results.append([back(loss.detach()), *[back(leaf.grad) for leaf in leaves]])
        for theirs, ours in zip(*results, strict=True):
            allowed = 1e-4 if dtype == torch.float32 else 2e-2
            assert (ours - theirs).norm() <= allowed * theirs.norm()
try:
    clce_ext.hard_negative_contrastive_loss(there(x), labels)
except ValueError as error:
    print(error)
"""
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "labels must be on the embeddings' device elsewhere:0, got cpu\n"
    assert "clce_ext computes on elsewhere:0 in plain torch operations" in done.stderr


# After a warm-up no more address space than half of one B x B of float32 may be taken.
LARGE = """
import resource, sys, torch, clce_ext
from clce_ext import backends
torch.manual_seed(0)
rows = 20000
x, labels = torch.randn(rows, 32), torch.randint(100, (rows,))
def step(x, labels):
    leaf = x.clone().requires_grad_()
    loss = clce_ext.hard_negative_contrastive_loss(leaf, labels)
    loss.backward()
    return loss.detach(), leaf.grad
def both(x, labels):
    kernels = step(x, labels)
    with backends.engine("portable"):
        return kernels, step(x, labels)
both(x[:1500], labels[:1500])
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + rows * rows * 2, resource.RLIM_INFINITY))
for theirs, ours in zip(*both(x, labels), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_kernels_agree_where_no_matrix_of_all_pairs_fits():
    done = run(LARGE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (256, 256), (96, 1000)])
def test_several_panels(shape, sort, monkeypatch):
    """Panels that rows do not fill, beside and across classes, with selves in any of them."""
    monkeypatch.setattr(panels, "panel_shape", lambda *_: shape)
    monkeypatch.setattr(panels, "ROWS_OF_A_COLUMN", 0 if sort else 1000)
    x, keys = torch.randn(500, 20, dtype=torch.float64), torch.randn(700, 20, dtype=torch.float64)
    labels, key_labels = torch.randint(7, (500,)), torch.randint(7, (700,))
    labels[torch.rand(500) < 0.1] = -100
    for options in (
        {},
        {"temperature": 0.01, "beta": 0.5},
        {"beta": 0.5, "summation": "in"},
        {"keys": keys, "key_labels": key_labels},
        {"keys": keys, "key_labels": key_labels, "key_offset": 150, "beta": 0.0},
        {"keys": keys, "key_labels": key_labels, "key_offset": 150, "temperature": 0.02},
    ):
        results = []
        for engine in (None, "portable"):
            leaf = x.clone().requires_grad_()
            with backends.engine(engine):
                loss = clce_ext.hard_negative_contrastive_loss(leaf, labels, **options)
                loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_scratch_that_a_thread_keeps():
    """Made in inference mode, then written to outside of it; and no other thread's."""
    x, labels = torch.randn(300, 8), torch.randint(40, (300,))

    def step(_):
        with torch.inference_mode():
            clce_ext.hard_negative_contrastive_loss(x, labels)
        leaf = x.clone().requires_grad_()
        clce_ext.hard_negative_contrastive_loss(leaf, labels).backward()
        return leaf.grad

    expected = step(0)  # by kernels
    with backends.engine("portable"), ThreadPoolExecutor(3) as threads:
        for grad in threads.map(step, range(9)):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


def test_what_is_found_lies_in_no_scratch(monkeypatch):
    """Losses and gradients outlive the next call, one inside a backward pass and an interrupted one."""
    x, labels = torch.randn(600, 8), torch.randint(40, (600,))

    def step(*inside):
        leaf = x.clone().requires_grad_()
        loss = clce_ext.hard_negative_contrastive_loss(leaf, labels, reduction="none")
        for call in inside:
            loss.register_hook(lambda _, call=call: call())
        loss.sum().backward()
        return loss.detach(), leaf.grad

    def other():
        with torch.enable_grad():
            y = torch.randn(500, 8, requires_grad=True)
            clce_ext.hard_negative_contrastive_loss(y, labels[:500]).backward()

    with backends.engine("portable"):
        found = step()
        kept = [tensor.clone() for tensor in found]
        assert all(torch.equal(a, b) for a, b in zip(step(other), kept, strict=True))
        logits, calls = panels.Contrast.logits, []

        def interrupted(contrast, panel):
            calls.append(panel)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return logits(contrast, panel)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(panels.Contrast, "logits", interrupted)
            step()
        for memory in panels._kept.scratch[torch.float32].values():
            memory.fill_(torch.nan)
        assert all(torch.equal(a, b) for a, b in zip(step(), kept, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.parametrize("count", [5, 700, 1000])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_kept_logits_give_the_bits_of_new_ones(count, beta, monkeypatch):
    """Behind statistics that were copied there are none, and a second backward finds them as they were."""
    x, labels = torch.randn(count, 24, requires_grad=True), torch.randint(40, (count,))
    found, of = [], kept.found
    monkeypatch.setattr(kept, "found", lambda *args: found.append(of(*args)) or found[-1])

    def step(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = clce_ext.hard_negative_contrastive_loss(x, labels, beta=beta)
        return [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]

    with backends.engine("portable"):
        kept_ones, new_ones = step(lambda tensor: tensor), step(torch.clone)
    assert [logits is None for logits in found] == [False, False, True, True]
    assert all(torch.equal(grad, kept_ones[0]) for grad in [*kept_ones, *new_ones])


@pytest.mark.parametrize(("anchors", "keys"), [(1000, None), (64, 3000)])
def test_kept_logits_are_found_by_another_number_of_threads(anchors, keys):
    x, labels, more = torch.randn(anchors, 24, requires_grad=True), torch.arange(anchors) % 40, {}
    if keys is not None:
        more = {"keys": torch.randn(keys, 24), "key_labels": torch.arange(keys) % 50}
    threads, grads = torch.get_num_threads(), []
    try:
        with backends.engine("portable"):
            for forward, backward in ((1, 1), (1, 8), (8, 1)):
                torch.set_num_threads(forward)
                loss = clce_ext.hard_negative_contrastive_loss(x, labels, **more)
                torch.set_num_threads(backward)
                grads += torch.autograd.grad(loss, x)
    finally:
        torch.set_num_threads(threads)
    # The number of threads decides how products add up; logits of other pairs would be wrong altogether.
    for grad in grads[1:]:
        assert (grad - grads[0]).norm() < 1e-5 * grads[0].norm()


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_one_kind_of_pair_does_not_overflow_into_the_other(beta, engine):
    """Bounded logits at both ends of their range, and an upstream gradient as mixed precision scales it."""
    x = torch.tensor([[1.0, 0.0]]) * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None] + 1e-3 * torch.randn(4, 2)
    for labels in (torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])):
        leaf = x.clone().requires_grad_()
        options = {"temperature": (1 + beta) / 43, "beta": beta, "reduction": "sum"}
        (clce_ext.hard_negative_contrastive_loss(leaf, labels, **options) * 65536).backward()
        assert leaf.grad.isfinite().all()
