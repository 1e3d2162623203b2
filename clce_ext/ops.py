"""The ops of ``torch.ops.clce_ext``: what they return (fake kernels) and their one autograd formula.

The C++ side (``csrc/binding/ops.cpp``) declares the schemas, checks arguments and runs the kernels.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from clce_ext import _C  # noqa: F401  (importing it registers the ops)
from clce_ext.arguments import (
    ROW_PADDING,
    BackwardOptions,
    CheckArgumentsInputs,
    ContrastiveLossBackwardInputs,
    ContrastiveLossInputs,
    ContrastiveLossOutputs,
    Derivatives,
    LossFromStatisticsInputs,
    SavedTensors,
    Statistics,
    StatisticsBackwardInputs,
    StatisticsInputs,
)

_ops = torch.ops.clce_ext

NUM_STATISTICS = len(Statistics._fields)
NUM_DERIVATIVES = len(Derivatives._fields)


def check_arguments(inputs: ContrastiveLossInputs) -> None:
    """Refuses what ``contrastive_loss(*inputs)`` refuses, and does nothing else."""
    _ops.check_arguments(*(getattr(inputs, name) for name in CheckArgumentsInputs._fields))


# ---- fake kernels: shapes, dtypes and devices of what the ops return ----


def _padded(dim: int) -> int:
    return (dim + ROW_PADDING - 1) // ROW_PADDING * ROW_PADDING


def _acc_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums over ``tensor`` are accumulated."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake_prepared(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    z = x.new_empty((x.shape[0], _padded(x.shape[1])))
    norms = x.new_empty((x.shape[0] if normalize else 0,), dtype=_acc_dtype(x))
    return z, norms


def _fake_loss(anchors: int, reduction: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = _acc_dtype(like)
    loss = like.new_empty((anchors,) if reduction == "none" else (), dtype=acc)
    return loss, like.new_empty((), dtype=acc), like.new_empty((NUM_DERIVATIVES, anchors), dtype=acc)


@torch.library.register_fake("clce_ext::contrastive_loss")
def _(*args):
    inputs = ContrastiveLossInputs(*args)
    z, norms = _fake_prepared(inputs.embeddings, inputs.normalize)
    if inputs.keys is None:
        key_z, key_norms = z.new_empty((0, z.shape[1])), norms.new_empty((0,))
    else:
        key_z, key_norms = _fake_prepared(inputs.keys, inputs.normalize)
    anchors = inputs.embeddings.shape[0]
    loss, num_terms, derivatives = _fake_loss(anchors, inputs.reduction, inputs.embeddings)
    statistics = derivatives.new_empty((NUM_STATISTICS, anchors))
    return loss, num_terms, statistics, derivatives, z, norms, key_z, key_norms


@torch.library.register_fake("clce_ext::contrastive_loss_backward")
def _(*args):
    inputs = ContrastiveLossBackwardInputs(*args)
    z, key_z, dim = inputs.z, inputs.key_z, inputs.dim
    dx = z.new_empty((z.shape[0] if inputs.need_embeddings else 0, dim))
    dkeys = z.new_empty((key_z.shape[0] if inputs.need_keys and key_z is not None else 0, dim))
    return dx, dkeys, inputs.statistics.new_empty(() if inputs.need_temperature else (0,))


@torch.library.register_fake("clce_ext::prepare")
def _(x, normalize):
    return _fake_prepared(x, normalize)


@torch.library.register_fake("clce_ext::prepare_backward")
def _(dz, z, norms, dim, normalize):
    return z.new_empty((z.shape[0], dim))


@torch.library.register_fake("clce_ext::statistics")
def _(*args):
    z = StatisticsInputs(*args).z
    return z.new_empty((NUM_STATISTICS, z.shape[0]), dtype=_acc_dtype(z))


@torch.library.register_fake("clce_ext::loss_from_statistics")
def _(*args):
    inputs = LossFromStatisticsInputs(*args)
    return _fake_loss(inputs.statistics.shape[1], inputs.reduction, inputs.statistics)


@torch.library.register_fake("clce_ext::statistics_backward")
def _(*args):
    inputs = StatisticsBackwardInputs(*args)
    z, key_z, acc = inputs.z, inputs.key_z, _acc_dtype(inputs.z)
    dz = z.new_empty((z.shape[0] if inputs.need_anchors else 0, z.shape[1]), dtype=acc)
    with_keys = inputs.need_keys and key_z is not None
    return dz, z.new_empty((key_z.shape[0] if with_keys else 0, z.shape[1]), dtype=acc)


# ---- the one autograd formula ----

# An overload called by its name costs the host less than the search for one.
_contrastive_loss = _ops.contrastive_loss.default
_contrastive_loss_backward = _ops.contrastive_loss_backward.default

# Where what has a gradient stands among the inputs.
_EMBEDDINGS, _KEYS, _TEMPERATURE = (
    ContrastiveLossInputs._fields.index(name) for name in ("embeddings", "keys", "temperature_tensor")
)


def _setup_context(ctx, inputs, output):
    inputs, output = ContrastiveLossInputs(*inputs), ContrastiveLossOutputs(*output)
    self_contrast = inputs.keys is None
    saved = SavedTensors(
        output.num_terms,
        output.statistics,
        output.derivatives,
        output.z,
        output.norms,
        None if self_contrast else output.key_z,
        None if self_contrast else output.key_norms,
        inputs.labels,
        inputs.key_labels,
        inputs.temperature_tensor,
    )
    ctx.save_for_backward(*saved)
    ctx.options = BackwardOptions(
        inputs.temperature,
        inputs.embeddings.shape[1],
        inputs.views,
        inputs.key_offset,
        inputs.beta,
        inputs.normalize,
        inputs.ignore_index,
        inputs.reduction,
    )
    # All but the loss and z: only_first_derivative needs a saved tensor whose graph leads back to this node,
    # and only a differentiable output has one.
    ctx.mark_non_differentiable(
        output.num_terms,
        output.statistics,
        output.derivatives,
        output.norms,
        output.key_z,
        output.key_norms,
    )
    ctx.set_materialize_grads(False)


class _OnlyFirstDerivative(torch.autograd.Function):
    """Passes gradients on; differentiating them raises instead of silently giving none."""

    @staticmethod
    def forward(inputs, grad_output, *grads):
        return tuple(None if grad is None else grad.clone() for grad in grads)

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
    inputs: Tensor, grad_output: Tensor, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """``grads`` of a backward; where a graph of them is built (create_graph), one that raises when used.

    The gradients depend on ``grad_output`` and on the forward's inputs, to which the graph of ``inputs``
    leads. If no path led from the gradients to these, autograd would take their derivative for 0.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return _OnlyFirstDerivative.apply(inputs, grad_output, *grads)


def _backward(ctx, grad_loss, *_):
    grads: list[Tensor | None] = [None] * len(ContrastiveLossInputs._fields)
    needs = [ctx.needs_input_grad[place] for place in (_EMBEDDINGS, _KEYS, _TEMPERATURE)]
    if grad_loss is None or not any(needs):
        return tuple(grads)
    need_embeddings, need_keys, need_temperature = needs
    saved = SavedTensors(*ctx.saved_tensors)  # once: hooks may unpack it only once
    # Autograd is off already unless a graph of the gradients is built; switching it off costs the host time.
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        of_inputs = _contrastive_loss_backward(grad_loss, *saved, *ctx.options, *needs)
    dx, dkeys, dtemperature = only_first_derivative(saved.z, grad_loss, of_inputs)
    if need_embeddings:
        grads[_EMBEDDINGS] = dx
    if need_keys:
        grads[_KEYS] = dkeys
    if need_temperature:
        temperature = saved.temperature_tensor
        grads[_TEMPERATURE] = dtemperature.to(temperature.dtype).reshape(temperature.shape)
    return tuple(grads)


torch.library.register_autograd("clce_ext::contrastive_loss", _backward, setup_context=_setup_context)


class HardNegativeContrastiveFunction(torch.autograd.Function):
    """``torch.ops.clce_ext.contrastive_loss`` as a :class:`torch.autograd.Function`.

    ``apply`` takes the op's arguments in order (:class:`clce_ext.arguments.ContrastiveLossInputs`) and
    returns its outputs (``ContrastiveLossOutputs``), of which only the loss is differentiable: by embeddings,
    keys and temperature. It shares the op's autograd formula. Most programs call
    :func:`clce_ext.hard_negative_contrastive_loss` instead.
    """

    @staticmethod
    def forward(*args):
        return _contrastive_loss(*args)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, *grads):
        grads = ContrastiveLossOutputs(*grads)
        if grads.z is not None:  # the only other output that is not marked as non-differentiable
            raise RuntimeError("clce_ext: of what contrastive_loss returns only the loss is differentiable")
        return _backward(ctx, grads.loss)
