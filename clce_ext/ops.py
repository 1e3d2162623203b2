"""The ops of ``torch.ops.clce_ext``: schemas, what they return (fake kernels), the one autograd formula.

Each checks its arguments (:mod:`clce_ext.checks`) and calls the op of the same name in
``torch.ops.clce_ext_backend``, which computes: ``csrc/binding/ops.cpp`` (kernels) or
``clce_ext/portable/ops.py``. :mod:`clce_ext.backends` says which one serves a device.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from clce_ext import backends, checks
from clce_ext.arguments import (
    BackwardOptions,
    ContrastiveLossBackwardInputs,
    ContrastiveLossInputs,
    ContrastiveLossOutputs,
    Derivatives,
    LossFromStatisticsInputs,
    SavedTensors,
    Statistics,
    StatisticsBackwardInputs,
    StatisticsInputs,
    padded,
)
from clce_ext.portable.ops import OPS as PORTABLE_OPS
from clce_ext.portable.rows import acc_dtype

_backend_ops = torch.ops.clce_ext_backend

NUM_STATISTICS = len(Statistics._fields)
NUM_DERIVATIVES = len(Derivatives._fields)


# ---- schemas: the arguments are the records of clce_ext.arguments ----

_SCHEMAS = """
contrastive_loss(Tensor embeddings, Tensor? labels, Tensor? keys, Tensor? key_labels,
    Tensor? temperature_tensor, float temperature, int views, int? key_offset, float beta,
    str summation, str denominator, Tensor? debias_tensor, float debias, bool detach_weights,
    bool normalize, int ignore_index, str reduction)
    -> (Tensor loss, Tensor num_terms, Tensor statistics, Tensor derivatives, Tensor z, Tensor norms,
       Tensor key_z, Tensor key_norms)
contrastive_loss_backward(Tensor grad_loss, Tensor num_terms, Tensor statistics, Tensor derivatives,
    Tensor z, Tensor norms, Tensor? key_z, Tensor? key_norms, Tensor? labels, Tensor? key_labels,
    Tensor? temperature_tensor, float temperature, SymInt dim, int views, int? key_offset, float beta,
    bool normalize, int ignore_index, str reduction, bool need_embeddings, bool need_keys,
    bool need_temperature)
    -> (Tensor embeddings, Tensor keys, Tensor temperature)
prepare(Tensor x, bool normalize) -> (Tensor z, Tensor norms)
prepare_backward(Tensor dz, Tensor z, Tensor norms, SymInt dim, bool normalize) -> Tensor
statistics(Tensor z, Tensor? key_z, Tensor? labels, Tensor? key_labels, Tensor? temperature_tensor,
    float temperature, SymInt dim, int? key_offset, float beta, bool normalized, int ignore_index)
    -> Tensor
loss_from_statistics(Tensor statistics, Tensor? temperature_tensor, float temperature, float beta,
    str summation, str denominator, Tensor? debias_tensor, float debias, bool detach_weights,
    str reduction)
    -> (Tensor loss, Tensor num_terms, Tensor derivatives)
statistics_backward(Tensor derivatives, Tensor statistics, Tensor z, Tensor? key_z, Tensor? labels,
    Tensor? key_labels, Tensor? temperature_tensor, float temperature, SymInt dim, int? key_offset,
    float beta, bool normalized, int ignore_index, bool need_anchors, bool need_keys)
    -> (Tensor dz, Tensor dkeys)
"""
_CHECKS: dict[str, Callable] = {
    "contrastive_loss": checks.contrastive_loss,
    "prepare": checks.prepare,
    "prepare_backward": checks.prepare_backward,
    "statistics": checks.statistics,
    "loss_from_statistics": checks.loss_from_statistics,
    "statistics_backward": checks.statistics_backward,
}


def _checked(name: str) -> Callable:
    compute, check = getattr(_backend_ops, name).default, _CHECKS.get(name)

    def call(*args):
        if check is not None:
            check(*args)
        backends.follow_switches(args[0])
        return compute(*args)

    return call


# The compiled part registered its kernels by name when it was loaded.
_libraries = [torch.library.Library(name, "DEF") for name in ("clce_ext", "clce_ext_backend")]
for _schema in re.sub(r"\n +", " ", _SCHEMAS).strip().splitlines():
    _libraries[0].define(_schema)
    _libraries[1].define(_schema)
    _name = _schema.partition("(")[0]
    _libraries[0].impl(_name, _checked(_name), "CompositeExplicitAutograd")
backends.register()

# ---- fake kernels: shapes, dtypes and devices of what the ops return ----


def _fake(name: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        for library in _libraries:
            torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
        return function

    return register


def _fake_prepared(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    z = x.new_empty((x.shape[0], padded(x.shape[1])))
    norms = x.new_empty((x.shape[0] if normalize else 0,), dtype=acc_dtype(x.dtype))
    return z, norms


def _fake_loss(anchors: int, reduction: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(like.dtype)
    loss = like.new_empty((anchors,) if reduction == "none" else (), dtype=acc)
    return loss, like.new_empty((), dtype=acc), like.new_empty((NUM_DERIVATIVES, anchors), dtype=acc)


@_fake("contrastive_loss")
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


@_fake("contrastive_loss_backward")
def _(*args):
    inputs = ContrastiveLossBackwardInputs(*args)
    z, key_z, dim = inputs.z, inputs.key_z, inputs.dim
    dx = z.new_empty((z.shape[0] if inputs.need_embeddings else 0, dim))
    dkeys = z.new_empty((key_z.shape[0] if inputs.need_keys and key_z is not None else 0, dim))
    return dx, dkeys, inputs.statistics.new_empty(() if inputs.need_temperature else (0,))


@_fake("prepare")
def _(x, normalize):
    return _fake_prepared(x, normalize)


@_fake("prepare_backward")
def _(dz, z, norms, dim, normalize):
    return z.new_empty((z.shape[0], dim))


@_fake("statistics")
def _(*args):
    z = StatisticsInputs(*args).z
    return z.new_empty((NUM_STATISTICS, z.shape[0]), dtype=acc_dtype(z.dtype))


@_fake("loss_from_statistics")
def _(*args):
    inputs = LossFromStatisticsInputs(*args)
    return _fake_loss(inputs.statistics.shape[1], inputs.reduction, inputs.statistics)


@_fake("statistics_backward")
def _(*args):
    inputs = StatisticsBackwardInputs(*args)
    z, key_z, acc = inputs.z, inputs.key_z, acc_dtype(inputs.z.dtype)
    dz = z.new_empty((z.shape[0] if inputs.need_anchors else 0, z.shape[1]), dtype=acc)
    with_keys = inputs.need_keys and key_z is not None
    return dz, z.new_empty((key_z.shape[0] if with_keys else 0, z.shape[1]), dtype=acc)


def check_arguments(inputs: ContrastiveLossInputs) -> None:
    """Refuses what ``contrastive_loss(*inputs)`` refuses, and does nothing else."""
    checks.contrastive_loss(*inputs)
    backends.check_device(inputs.embeddings.device)


# ---- the one autograd formula ----

# An overload called by its name costs the host less than the search for one.
_contrastive_loss = _backend_ops.contrastive_loss.default
_contrastive_loss_backward = _backend_ops.contrastive_loss_backward.default

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


def _backward(ctx, grad_loss, *_, compute=_contrastive_loss_backward):
    grads: list[Tensor | None] = [None] * len(ContrastiveLossInputs._fields)
    needs = [ctx.needs_input_grad[place] for place in (_EMBEDDINGS, _KEYS, _TEMPERATURE)]
    if grad_loss is None or not any(needs):
        return tuple(grads)
    need_embeddings, need_keys, need_temperature = needs
    saved = SavedTensors(*ctx.saved_tensors)  # once: hooks may unpack it only once
    # Autograd is off already unless a graph of the gradients is built; switching it off costs the host time.
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        of_inputs = compute(grad_loss, *saved, *ctx.options, *needs)
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


def _forward(*args):
    if torch.compiler.is_compiling():
        return torch.ops.clce_ext.contrastive_loss(*args)
    checks.contrastive_loss(*args)
    backends.follow_switches(args[0])
    return _contrastive_loss(*args)


# torch asks for it at each call, and finds it out anew unless it is there: a tenth of a small batch's time.
_forward.__signature__ = inspect.signature(_forward)


class HardNegativeContrastiveFunction(torch.autograd.Function):
    """``torch.ops.clce_ext.contrastive_loss`` as a :class:`torch.autograd.Function`.

    ``apply`` takes the op's arguments in order (:class:`clce_ext.arguments.ContrastiveLossInputs`) and
    returns its outputs (``ContrastiveLossOutputs``), of which only the loss is differentiable: by embeddings,
    keys and temperature. It shares the op's autograd formula. Most programs call
    :func:`clce_ext.hard_negative_contrastive_loss` instead.
    """

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, *grads):
        grads = ContrastiveLossOutputs(*grads)
        if grads.z is not None:  # the only other output that is not marked as non-differentiable
            raise RuntimeError("clce_ext: of what contrastive_loss returns only the loss is differentiable")
        return _backward(ctx, grads.loss)


class PortableFunction(torch.autograd.Function):
    """:class:`HardNegativeContrastiveFunction` in plain torch operations on every device: a yardstick."""

    @staticmethod
    def forward(*args):
        return PORTABLE_OPS["contrastive_loss"](*args)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return _backward(ctx, grad_loss, compute=PORTABLE_OPS["contrastive_loss_backward"])
