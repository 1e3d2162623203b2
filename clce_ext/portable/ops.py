"""The ops of torch.ops.clce_ext_backend, made of the backend's parts as in ``csrc/binding/ops.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from clce_ext.arguments import (
    ContrastiveLossBackwardInputs,
    ContrastiveLossInputs,
    Derivatives,
    LossFromStatisticsInputs,
    StatisticsBackwardInputs,
    StatisticsInputs,
)
from clce_ext.portable import kept
from clce_ext.portable.gradient import gradients
from clce_ext.portable.loss import loss_of_anchors, reduce_loss, temperature_gradient
from clce_ext.portable.panels import Contrast
from clce_ext.portable.rows import prepare, prepare_backward
from clce_ext.portable.sums import statistics


def _number(inputs) -> float:
    """The temperature. On an accelerator this waits for it, as the walk over panels does anyhow."""
    tensor = inputs.temperature_tensor
    return inputs.temperature if tensor is None else tensor.item()


def _contrast_of_rows(inputs: StatisticsInputs | StatisticsBackwardInputs) -> Contrast:
    return Contrast(
        inputs.z, inputs.key_z, inputs.labels, inputs.key_labels, temperature=_number(inputs),
        beta=inputs.beta, normalized=inputs.normalized, ignore_index=inputs.ignore_index,
        key_offset=inputs.key_offset,
    )  # fmt: skip


def _loss(numbers: Tensor, inputs: ContrastiveLossInputs | LossFromStatisticsInputs) -> tuple[Tensor, ...]:
    """loss, num_terms, derivatives"""
    debias = inputs.debias if inputs.debias_tensor is None else inputs.debias_tensor.to(numbers.dtype)
    value, is_term, derivatives = loss_of_anchors(
        numbers, _number(inputs), inputs.beta, inputs.summation, inputs.denominator,
        debias, inputs.detach_weights,
    )  # fmt: skip
    return *reduce_loss(value, is_term, inputs.reduction), derivatives


def contrastive_loss(*args) -> tuple[Tensor, ...]:
    inputs = ContrastiveLossInputs(*args)
    z, norms = prepare(inputs.embeddings, inputs.normalize)
    key_z, key_norms = z.new_empty((0, z.shape[1])), norms.new_empty(0)
    if inputs.keys is not None:
        key_z, key_norms = prepare(inputs.keys, inputs.normalize)
    contrast = Contrast(
        z, None if inputs.keys is None else key_z, inputs.labels, inputs.key_labels, views=inputs.views,
        temperature=_number(inputs), beta=inputs.beta, normalized=inputs.normalize,
        ignore_index=inputs.ignore_index, key_offset=inputs.key_offset,
    )  # fmt: skip
    numbers = statistics(contrast, keep=True)
    loss, num_terms, derivatives = _loss(numbers, inputs)
    return loss, num_terms, numbers, derivatives, z, norms, key_z, key_norms


def contrastive_loss_backward(*args) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ContrastiveLossBackwardInputs(*args)
    z, key_z, acc = inputs.z, inputs.key_z, inputs.statistics.dtype
    contrast = Contrast(
        z, key_z, inputs.labels, inputs.key_labels, views=inputs.views, temperature=_number(inputs),
        beta=inputs.beta, normalized=inputs.normalize, ignore_index=inputs.ignore_index,
        key_offset=inputs.key_offset,
    )  # fmt: skip
    if contrast.bounded and contrast.is_small:
        contrast.kept = kept.found(inputs.statistics, contrast.num_logits())
        contrast.is_backward = True
    upstream = inputs.grad_loss.to(acc)
    if inputs.reduction == "mean":
        upstream = upstream / inputs.num_terms.clamp_min(1)
    derivatives = inputs.derivatives * upstream

    # The temperature's gradient is made of a row-wise dot of either side's gradient.
    keys_give_dots = inputs.need_keys and not inputs.need_embeddings
    need_anchors = inputs.need_embeddings or (inputs.need_temperature and not keys_give_dots)
    danchors, dkeys = gradients(contrast, inputs.statistics, derivatives, need_anchors, inputs.need_keys)

    dtemperature = inputs.statistics.new_empty(0)
    if inputs.need_temperature:
        rows, dz = (contrast.keys.rows, dkeys) if keys_give_dots else (contrast.anchors.rows, danchors)
        by_scale = Derivatives(*derivatives).scale.sum()
        t = inputs.temperature_tensor.detach().to(acc).reshape(())
        dots = torch.linalg.vecdot(rows, dz)
        dtemperature = temperature_gradient(dots, by_scale, contrast.symmetric, t)
        del rows, dz
    spare, key_spare = contrast.release()
    if inputs.need_embeddings:
        dx = prepare_backward(danchors, z, inputs.norms, inputs.dim, contrast.anchors.order, spare)
    else:
        dx = z.new_empty((0, inputs.dim))
    if dkeys is None:
        return dx, z.new_empty((0, inputs.dim)), dtemperature
    dk = prepare_backward(dkeys, key_z, inputs.key_norms, inputs.dim, contrast.keys.order, key_spare)
    return dx, dk, dtemperature


def prepare_op(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    return prepare(x, normalize)


def prepare_backward_op(dz: Tensor, z: Tensor, norms: Tensor, dim: int, normalize: bool) -> Tensor:
    return prepare_backward(dz.clone(), z, norms, dim)


def statistics_op(*args) -> Tensor:
    return statistics(_contrast_of_rows(StatisticsInputs(*args)))


def loss_from_statistics(*args) -> tuple[Tensor, Tensor, Tensor]:
    inputs = LossFromStatisticsInputs(*args)
    return _loss(inputs.statistics, inputs)


def statistics_backward(*args) -> tuple[Tensor, Tensor]:
    inputs = StatisticsBackwardInputs(*args)
    contrast = _contrast_of_rows(inputs)
    found = gradients(contrast, inputs.statistics, inputs.derivatives, inputs.need_anchors, inputs.need_keys)
    contrast.release()
    empty = inputs.statistics.new_empty((0, inputs.z.shape[1]))
    sides = (contrast.anchors, contrast.keys)
    return tuple(
        empty.clone() if dz is None else side.put_back(dz, 0) for dz, side in zip(found, sides, strict=True)
    )


OPS = {
    "contrastive_loss": contrastive_loss,
    "contrastive_loss_backward": contrastive_loss_backward,
    "prepare": prepare_op,
    "prepare_backward": prepare_backward_op,
    "statistics": statistics_op,
    "loss_from_statistics": loss_from_statistics,
    "statistics_backward": statistics_backward,
}
