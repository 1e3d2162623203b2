"""The ops of ``torch.ops.clce_ext``: what they return (fake kernels) and their one autograd formula.

The C++ side (``csrc/binding/ops.cpp``) declares the schemas, checks arguments and runs the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clce_ext import _C  # noqa: F401  (importing it registers the ops)

_ops = torch.ops.clce_ext

NUM_STATISTICS = 9
NUM_DERIVATIVES = 5
_ROW_PADDING = 8


def _padded(dim: int) -> int:
    return (dim + _ROW_PADDING - 1) // _ROW_PADDING * _ROW_PADDING


def _acc_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# ---- fake kernels: shapes, dtypes and devices of what the ops return ----


def _fake_prepared(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    z = x.new_empty((x.shape[0], _padded(x.shape[1])))
    norms = x.new_empty((x.shape[0] if normalize else 0,), dtype=_acc_dtype(x))
    return z, norms


def _fake_loss(rows: int, reduction: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = _acc_dtype(like)
    loss = like.new_empty((rows,) if reduction == "none" else (), dtype=acc)
    return loss, like.new_empty((), dtype=acc), like.new_empty((NUM_DERIVATIVES, rows), dtype=acc)


@torch.library.register_fake("clce_ext::contrastive_loss")
def _(
    embeddings, labels, keys, key_labels, temperature_tensor, temperature, views, key_offset, beta,
    summation, denominator, debias, detach_weights, normalize, ignore_index, reduction,
):  # fmt: skip
    z, norms = _fake_prepared(embeddings, normalize)
    if keys is None:
        key_z, key_norms = z.new_empty((0, z.shape[1])), norms.new_empty((0,))
    else:
        key_z, key_norms = _fake_prepared(keys, normalize)
    rows = embeddings.shape[0]
    loss, num_terms, derivatives = _fake_loss(rows, reduction, embeddings)
    statistics = derivatives.new_empty((NUM_STATISTICS, rows))
    return loss, num_terms, statistics, derivatives, z, norms, key_z, key_norms


@torch.library.register_fake("clce_ext::contrastive_loss_backward")
def _(
    grad_loss, num_terms, statistics, derivatives, z, norms, key_z, key_norms, labels, key_labels,
    temperature_tensor, temperature, dim, views, key_offset, beta, normalize, ignore_index, reduction,
    need_embeddings, need_keys, need_temperature,
):  # fmt: skip
    dx = z.new_empty((z.shape[0] if need_embeddings else 0, dim))
    dkeys = z.new_empty((key_z.shape[0] if need_keys and key_z is not None else 0, dim))
    return dx, dkeys, statistics.new_empty(() if need_temperature else (0,))


@torch.library.register_fake("clce_ext::prepare")
def _(x, normalize):
    return _fake_prepared(x, normalize)


@torch.library.register_fake("clce_ext::prepare_backward")
def _(dz, z, norms, dim, normalize):
    return z.new_empty((z.shape[0], dim))


@torch.library.register_fake("clce_ext::statistics")
def _(
    z,
    key_z,
    labels,
    key_labels,
    temperature_tensor,
    temperature,
    dim,
    key_offset,
    beta,
    normalized,
    ignore_index,
):
    return z.new_empty((NUM_STATISTICS, z.shape[0]), dtype=_acc_dtype(z))


@torch.library.register_fake("clce_ext::loss_from_statistics")
def _(
    statistics,
    temperature_tensor,
    temperature,
    beta,
    summation,
    denominator,
    debias,
    detach_weights,
    reduction,
):
    return _fake_loss(statistics.shape[1], reduction, statistics)


@torch.library.register_fake("clce_ext::statistics_backward")
def _(
    derivatives, statistics, z, key_z, labels, key_labels, temperature_tensor, temperature, dim, key_offset,
    beta, normalized, ignore_index, need_anchors, need_keys,
):  # fmt: skip
    acc = _acc_dtype(z)
    dz = z.new_empty((z.shape[0] if need_anchors else 0, z.shape[1]), dtype=acc)
    with_keys = need_keys and key_z is not None
    return dz, z.new_empty((key_z.shape[0] if with_keys else 0, z.shape[1]), dtype=acc)


# ---- the one autograd formula ----

_INPUTS = 16  # of contrastive_loss
_EMBEDDINGS, _KEYS, _TEMPERATURE = 0, 2, 4
_LOSS, _Z = 0, 4  # of its outputs


def _setup_context(ctx, inputs, output):
    (
        embeddings, labels, keys, key_labels, temperature_tensor, temperature, views, key_offset, beta,
        _, _, _, _, normalize, ignore_index, reduction,
    ) = inputs  # fmt: skip
    _, num_terms, statistics, derivatives, z, norms, key_z, key_norms = output
    if keys is None:
        key_z = key_norms = None
    ctx.save_for_backward(
        num_terms, statistics, derivatives, z, norms, key_z, key_norms, labels, key_labels, temperature_tensor
    )
    ctx.options = (
        temperature, embeddings.shape[1], views, key_offset, beta, normalize, ignore_index, reduction,
    )  # fmt: skip
    # Not z: what the backward saves of an output leads back to this node, which only_first_derivative needs.
    ctx.mark_non_differentiable(*(t for i, t in enumerate(output) if i not in (_LOSS, _Z)))
    ctx.set_materialize_grads(False)


class _OnlyFirstDerivative(torch.autograd.Function):
    """Passes gradients on; differentiating them raises instead of silently giving none."""

    @staticmethod
    def forward(inputs, grad_output, *grads):
        return tuple(grad.clone() for grad in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "clce_ext: the contrastive loss has no second derivative (double backward, create_graph=True); "
            "only first derivatives are offered"
        )


def only_first_derivative(
    inputs: Tensor, grad_output: Tensor, grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``grads`` of a backward; where a graph of it is asked for (create_graph), one that raises when used.

    The gradients depend on ``grad_output`` and on the forward's inputs, to which the graph of ``inputs``
    leads: without a way from the gradients to these, their derivative would be taken for 0.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return _OnlyFirstDerivative.apply(inputs, grad_output, *grads)


def _backward(ctx, grad_loss, *_):
    grads: list[Tensor | None] = [None] * _INPUTS
    needs = [ctx.needs_input_grad[i] for i in (_EMBEDDINGS, _KEYS, _TEMPERATURE)]
    if grad_loss is None or not any(needs):
        return tuple(grads)
    saved = ctx.saved_tensors  # once: hooks may unpack it only once
    with torch.no_grad():
        outputs = _ops.contrastive_loss_backward(grad_loss, *saved, *ctx.options, *needs)
    z, temperature_tensor = saved[3], saved[-1]
    dx, dkeys, dtemperature = only_first_derivative(z, grad_loss, outputs)
    if needs[0]:
        grads[_EMBEDDINGS] = dx
    if needs[1]:
        grads[_KEYS] = dkeys
    if needs[2]:
        grads[_TEMPERATURE] = dtemperature.to(temperature_tensor.dtype).reshape(temperature_tensor.shape)
    return tuple(grads)


torch.library.register_autograd("clce_ext::contrastive_loss", _backward, setup_context=_setup_context)


class HardNegativeContrastiveFunction(torch.autograd.Function):
    """``torch.ops.clce_ext.contrastive_loss`` as a :class:`torch.autograd.Function`.

    ``apply`` takes the op's sixteen arguments in order and returns its eight outputs, of which only the
    first, the loss, is differentiable (by embeddings, keys and temperature). It shares the op's autograd
    formula; :func:`clce_ext.hard_negative_contrastive_loss` is the function for every day.
    """

    @staticmethod
    def forward(*args):
        return _ops.contrastive_loss(*args)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, grad_loss, *others):
        if any(grad is not None for grad in others):
            raise RuntimeError("clce_ext: of what contrastive_loss returns only the loss is differentiable")
        return _backward(ctx, grad_loss)
