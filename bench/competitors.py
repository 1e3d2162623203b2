"""Who is measured: each competitor makes the loss of a case, or says why it cannot."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import clce_ext
from bench.cases import DTYPES, Case, Inputs
from clce_ext.arguments import ContrastiveLossInputs, ContrastiveLossOutputs, LossOptions
from clce_ext.ops import PortableFunction
from python_tests import reference

Loss = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Competitor:
    """A way to compute the loss.

    Attributes:
        name: on the command line and in results.
        build: makes the loss function of a case.
        refuses: the reason why a case is not for it, or None.
        copies: float32 matrices of B x B that forward and backward hold at once, about; what decides
            whether a case fits in memory.
        capturable: whether a CUDA graph of it is tried.
        tf32: multiplies float32 as TF32, whatever torch is told.
        truth: makes what it is compared with in float64; not the benchmark's loss where it computes another.
        title, color, marker: in tables and plots.
    """

    name: str
    build: Callable[[Case], Loss]
    refuses: Callable[[Case], str | None] = lambda case: None
    copies: float = 0.0
    capturable: bool = False
    tf32: bool = False
    truth: Callable[[Case], Loss] | None = None  # the benchmark's loss
    title: str = ""
    color: str = "#666666"
    marker: str = "o"

    def bytes_needed(self, case: Case) -> int:
        width = 8 if case.dtype == "float64" else 4
        rows_and_gradients = 8 * case.batch * case.dim * width
        return int(self.copies * case.matrix_elements * width) + rows_and_gradients

    def reason_to_skip(self, case: Case, available: int) -> str | None:
        """None, or why this competitor does not run this case."""
        reason = self.refuses(case)
        if reason is not None:
            return reason
        needed = self.bytes_needed(case)
        if needed > available:
            return f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        return None


def _ours(case: Case) -> Loss:
    def loss(inputs: Inputs) -> torch.Tensor:
        return clce_ext.hard_negative_contrastive_loss(
            inputs.x, inputs.labels, keys=inputs.keys, **case.options
        )

    return loss


def _ours_refuses(case: Case) -> str | None:
    if case.device.startswith("cuda") and clce_ext.build_info()["cuda"] is None:
        return "clce_ext was built without CUDA kernels"
    return None


def _portable(case: Case) -> Loss:
    options = LossOptions(**case.options)._asdict()

    def loss(inputs: Inputs) -> torch.Tensor:
        given = ContrastiveLossInputs(
            embeddings=inputs.x, labels=inputs.labels, keys=inputs.keys, key_labels=None,
            temperature_tensor=None, views=1, key_offset=None, debias_tensor=None, **options,
        )  # fmt: skip
        return ContrastiveLossOutputs(*PortableFunction.apply(*given)).loss

    return loss


def _eager(case: Case) -> Loss:
    def loss(inputs: Inputs) -> torch.Tensor:
        return reference.hard_negative_contrastive_loss(
            inputs.x, inputs.labels, keys=inputs.keys, **case.options
        )

    return loss


def _compiled(case: Case) -> Loss:
    torch._dynamo.reset()  # each case is its own program: no recompilation limit, no dynamic shapes
    function = torch.compile(reference.hard_negative_contrastive_loss, dynamic=False, fullgraph=True)

    def loss(inputs: Inputs) -> torch.Tensor:
        return function(inputs.x, inputs.labels, keys=inputs.keys, **case.options)

    return loss


def slab_rows(case: Case) -> int:
    """Rows of a slab of logits: 16 MiB of float32 on a CPU, 256 MiB on a GPU, at least 16 rows."""
    elements = 2**22 if case.device == "cpu" else 2**26
    return min(case.batch, max(16, elements // case.batch))


def _chunked(case: Case) -> Loss:
    rows = slab_rows(case)

    def slab(z, keys, first: int, inputs: Inputs):
        last = min(first + rows, case.batch)
        if inputs.keys is None:
            labels = inputs.labels
            where = {"key_offset": first}
        else:
            labels = torch.arange(case.batch, device=z.device)
            where = {}
        return reference.hard_negative_contrastive_loss(
            z[first:last], labels[first:last], keys=keys, key_labels=labels, normalize=False,
            reduction="sum", **where, **case.options,
        )  # fmt: skip

    def loss(inputs: Inputs) -> torch.Tensor:
        z = F.normalize(inputs.x, dim=1)
        keys = z if inputs.keys is None else F.normalize(inputs.keys, dim=1)
        total = 0
        for first in range(0, case.batch, rows):
            total = total + checkpoint(slab, z, keys, first, inputs, use_reentrant=False)
        return total / case.batch  # every anchor of the benchmark has a positive

    return loss


def _metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    function = SupConLoss(temperature=case.temperature)
    wide = torch.float64 if case.dtype == "float64" else torch.float32  # as under autocast

    def loss(inputs: Inputs) -> torch.Tensor:
        return function(inputs.x.to(wide), inputs.labels)

    return loss


def _metric_learning_refuses(case: Case) -> str | None:
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        return "pytorch-metric-learning is not installed"
    if case.problem != "self" or case.beta != 0 or case.summation != "out":
        return 'SupConLoss is the case problem="self", beta=0, summation="out"'
    return None


def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    # It cuts rows into heads of at most 256 numbers, a power of two.
    head = next(size for size in (256, 128, 64, 32, 16) if case.dim % size == 0)

    def loss(inputs: Inputs) -> torch.Tensor:
        q, k = F.normalize(inputs.x, dim=1), F.normalize(inputs.keys, dim=1)
        return cal_flash_loss(q, k, scale=1 / case.temperature, head_dim=head).mean()

    return loss


def _missing_on_cuda(case: Case, package: str) -> str | None:
    """Why a package of Triton kernels for CLIP does not run this case, as far as all of them are alike."""
    if not case.device.startswith("cuda"):
        return f"{package} runs on CUDA only"
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"{package} is not installed"
    if case.problem != "clip" or case.beta != 0:
        return f'{package} is the case problem="clip", beta=0'
    return None


def _inf_cl_refuses(case: Case) -> str | None:
    reason = _missing_on_cuda(case, "inf-cl")
    if reason is None and case.dim % 16:
        return "inf-cl takes D that is a multiple of 16"
    return reason


def _memeff(case: Case) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # "stable" is another gradient than the loss's own.
    function = MemoryEfficientCLIPLoss(temperature=case.temperature, stable=False)
    return lambda inputs: function(inputs.x, inputs.keys)


def _memeff_refuses(case: Case) -> str | None:
    reason = _missing_on_cuda(case, "memeff")
    return "memeff accumulates in float32" if reason is None and case.dtype == "float64" else reason


def both_halves(case: Case) -> Loss:
    """CLIP's whole loss: the mean of rows against keys and of keys against rows."""
    half = _chunked(case)

    def loss(inputs: Inputs) -> torch.Tensor:
        return (half(inputs) + half(Inputs(inputs.keys, inputs.x, None))) / 2

    return loss


_SIGLIP_BIAS = -10.0  # where SigLIP's training begins


def _siglip(case: Case) -> Loss:
    from siglip_kernel import fused_siglip_loss

    log_scale = torch.tensor(-math.log(case.temperature), device=case.device)
    bias = torch.tensor(_SIGLIP_BIAS, device=case.device)

    def loss(inputs: Inputs) -> torch.Tensor:
        return fused_siglip_loss(F.normalize(inputs.x), F.normalize(inputs.keys), log_scale, bias)

    return loss


def _siglip_refuses(case: Case) -> str | None:
    reason = _missing_on_cuda(case, "siglip-kernel")
    return "siglip-kernel accumulates in float32" if reason is None and case.dtype == "float64" else reason


def sigmoid(case: Case) -> Loss:
    """SigLIP's loss: each pair by itself, no softmax over the keys."""

    def loss(inputs: Inputs) -> torch.Tensor:
        logits = F.normalize(inputs.x) @ F.normalize(inputs.keys).T / case.temperature + _SIGLIP_BIAS
        return (F.softplus(logits).sum() - logits.diagonal().sum()) / case.batch

    return loss


COMPETITORS = {
    c.name: c
    for c in (
        Competitor("ours", _ours, _ours_refuses, capturable=True, title="clce_ext", color="#0072b2"),
        Competitor("portable", _portable, title="portable (panels in torch)", color="#882255", marker="*"),
        Competitor("eager", _eager, copies=14, title="eager PyTorch", color="#d55e00", marker="s"),
        Competitor(
            "compile",
            _compiled,
            copies=6,
            capturable=True,
            title="torch.compile",
            color="#009e73",
            marker="^",
        ),
        Competitor("chunked", _chunked, title="chunked + checkpoint", color="#cc79a7", marker="D"),
        Competitor(
            "metric-learning",
            _metric_learning,
            _metric_learning_refuses,
            copies=14,
            title="pytorch-metric-learning",
            color="#e69f00",
            marker="v",
        ),
        Competitor(
            "inf-cl",
            _inf_cl,
            _inf_cl_refuses,
            tf32=True,
            title="Inf-CL (Triton)",
            color="#56b4e9",
            marker="P",
        ),
        Competitor(
            "memeff",
            _memeff,
            _memeff_refuses,
            tf32=True,
            truth=both_halves,
            title="memeff (Triton, both halves)",
            color="#999933",
            marker="X",
        ),
        Competitor(
            "siglip-kernel",
            _siglip,
            _siglip_refuses,
            tf32=True,
            truth=sigmoid,
            title="siglip-kernel (another loss)",
            color="#332288",
            marker="h",
        ),
    )
}


@dataclass(frozen=True)
class Yardstick:
    """``torch.mm(x, x.T)``; where B x B does not fit, one slab of its rows, counted as often as needed."""

    rows: int
    factor: float
    note: str

    @classmethod
    def of(cls, case: Case, available: int) -> Yardstick:
        row_bytes = case.batch * DTYPES[case.dtype].itemsize
        rows = case.batch
        while rows > 1 and rows * row_bytes > available // 2:
            rows = (rows + 1) // 2
        if rows == case.batch:
            return cls(rows, 1.0, "")
        return cls(rows, case.batch / rows, f"{rows} rows measured, times {case.batch / rows:g}")

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        keys = inputs.x if inputs.keys is None else inputs.keys
        return torch.mm(inputs.x[: self.rows], keys.T)
