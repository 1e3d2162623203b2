"""The contrastive loss of the batch of all ranks, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clce_ext.arguments import (
    ContrastiveLossInputs,
    Derivatives,
    LossFromStatisticsInputs,
    LossFromStatisticsOutputs,
    LossOptions,
    StatisticsBackwardOutputs,
    StatisticsInputs,
    Temperature,
)
from clce_ext.distributed.merge import MergedStatistics
from clce_ext.distributed.ranks import Ranks, refuse
from clce_ext.distributed.transports import TRANSPORTS, Shard
from clce_ext.labels import own_class_labels
from clce_ext.ops import check_arguments, only_first_derivative
from clce_ext.portable.loss import temperature_gradient

_ops = torch.ops.clce_ext


class _Anchors(NamedTuple):
    """One rank's anchors, to be compared with any keys; keys None: with one another."""

    z: Tensor
    labels: Tensor
    temperature: Temperature
    dim: int
    options: LossOptions

    def _with(self, keys: Shard | None, key_offset: int | None) -> StatisticsInputs:
        return StatisticsInputs(
            z=self.z,
            key_z=None if keys is None else keys.z,
            labels=self.labels,
            key_labels=None if keys is None else keys.labels,
            temperature_tensor=self.temperature.temperature_tensor,
            temperature=self.temperature.temperature,
            dim=self.dim,
            key_offset=key_offset,
            beta=self.options.beta,
            normalized=self.options.normalize,
            ignore_index=self.options.ignore_index,
        )

    def statistics(self, keys: Shard | None, key_offset: int | None = None) -> Tensor:
        """[9, M]"""
        return _ops.statistics(*self._with(keys, key_offset))

    def loss(self, statistics: Tensor) -> LossFromStatisticsOutputs:
        """The sum of the terms (or each of them, reduction "none"), their number, the derivatives [5, M]."""
        reduction = "none" if self.options.reduction == "none" else "sum"
        options = self.options._replace(reduction=reduction)
        inputs = LossFromStatisticsInputs.of(statistics, self.temperature, options)
        return LossFromStatisticsOutputs(*_ops.loss_from_statistics(*inputs))

    def backward(
        self,
        derivatives: Tensor,
        statistics: Tensor,
        keys: Shard | None,
        key_offset: int | None = None,
        *,
        need_anchors: bool,
        need_keys: bool,
    ) -> StatisticsBackwardOutputs:
        """dz [M, padded D], dkeys [N, padded D] in the accumulation dtype; unneeded ones have no rows."""
        inputs = self._with(keys, key_offset)
        grads = _ops.statistics_backward(derivatives, statistics, *inputs, need_anchors, need_keys)
        return StatisticsBackwardOutputs(*grads)


class _Constants(NamedTuple):
    """Tensors that no gradient flows to."""

    labels: Tensor
    key_labels: Tensor | None
    queue: Tensor | None
    queue_labels: Tensor | None
    debias: Tensor | None


@dataclass(frozen=True)
class _Setting:
    """What is no tensor, and the same in forward and backward."""

    ranks: Ranks
    transport: str
    sizes: list[int]  # how many keys each rank contributes
    key_offset: int | None
    dim: int
    options: LossOptions

    def start_transport(self, own: Shard, gathered: Shard | None):
        transport = TRANSPORTS[self.transport](self.ranks, self.sizes, self.options.ignore_index)
        transport.start(own, gathered)
        return transport

    def reduced(self, total: Tensor, num_terms: Tensor) -> Tensor:
        """Of a sum over all ranks' terms. Linear in it, so it serves the loss and its upstream gradient."""
        return total / num_terms.clamp_min(1) if self.options.reduction == "mean" else total


class _Saved(NamedTuple):
    """What the forward saves for the backward."""

    here: Tensor  # saved, it leads back to the autograd node (see only_first_derivative)
    z: Tensor
    norms: Tensor
    key_z: Tensor | None
    key_norms: Tensor | None
    temperature_tensor: Tensor | None
    labels: Tensor
    key_labels: Tensor | None
    queue_z: Tensor | None
    queue_labels: Tensor | None
    statistics: Tensor
    derivatives: Tensor
    num_terms: Tensor
    gathered_z: Tensor | None
    gathered_labels: Tensor | None


class _LossOfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, keys, temperature_tensor, constants: _Constants, setting: _Setting):
        options, labels = setting.options, constants.labels
        z, norms = _ops.prepare(embeddings, options.normalize)
        key_z = key_norms = queue_z = own = None
        if keys is not None:
            key_z, key_norms = _ops.prepare(keys, options.normalize)
            own = Shard(key_z, constants.key_labels)
        transport = setting.start_transport(own or Shard(z, labels), None)

        temperature = Temperature(temperature_tensor, options.temperature)
        if constants.debias is not None:
            options = options._replace(debias=constants.debias)
        anchors = _Anchors(z, labels, temperature, setting.dim, options)
        merged = MergedStatistics(anchors.statistics(own, setting.key_offset))
        if constants.queue is not None:
            queue_z, _ = _ops.prepare(constants.queue, options.normalize)
            merged.add(anchors.statistics(Shard(queue_z, constants.queue_labels)))
        for shard in transport.shards():
            merged.add(anchors.statistics(shard))
            del shard
        statistics = merged.result()
        loss, num_terms, derivatives = anchors.loss(statistics)
        if options.reduction != "none":
            total, num_terms = setting.ranks.sum(torch.stack([loss, num_terms]), "the loss").unbind()
            loss = setting.reduced(total, num_terms).to(loss.dtype)

        here = loss.new_empty(0)
        saved = _Saved(
            here=here,
            z=z,
            norms=norms,
            key_z=key_z,
            key_norms=key_norms,
            temperature_tensor=temperature_tensor,
            labels=labels,
            key_labels=constants.key_labels,
            queue_z=queue_z,
            queue_labels=constants.queue_labels,
            statistics=statistics,
            derivatives=derivatives,
            num_terms=num_terms,
            gathered_z=transport.gathered and transport.gathered.z,
            gathered_labels=transport.gathered and transport.gathered.labels,
        )
        ctx.save_for_backward(*saved)
        ctx.setting = setting
        return loss, here

    @staticmethod
    def backward(ctx, grad_loss, _):
        saved = _Saved(*ctx.saved_tensors)
        with torch.no_grad():
            grads = _gradients(saved, ctx.setting, grad_loss, *ctx.needs_input_grad[:3])
        return (*only_first_derivative(saved.here, grad_loss, grads), None, None)


def _gradients(
    saved: _Saved,
    setting: _Setting,
    grad_loss: Tensor,
    need_embeddings: bool,
    need_keys: bool,
    need_temperature: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of embeddings, keys and temperature."""
    options, statistics, key_offset = setting.options, saved.statistics, setting.key_offset
    self_contrast = saved.key_z is None

    upstream = grad_loss
    if options.reduction != "none":
        # All ranks have returned this loss: its gradient is the sum of what each of them was given.
        upstream = setting.reduced(setting.ranks.sum(grad_loss, "the loss's gradient"), saved.num_terms)
    derivatives = saved.derivatives * upstream.to(saved.derivatives.dtype)

    own = None if self_contrast else Shard(saved.key_z, saved.key_labels)
    gathered = None if saved.gathered_z is None else Shard(saved.gathered_z, saved.gathered_labels)
    transport = setting.start_transport(own or Shard(saved.z, saved.labels), gathered)
    temperature = Temperature(saved.temperature_tensor, options.temperature)
    anchors = _Anchors(saved.z, saved.labels, temperature, setting.dim, options)
    needs = {
        "need_anchors": need_embeddings or need_temperature,
        # In self-contrast the embeddings are the keys that the other ranks give back a gradient for.
        "need_keys": need_embeddings if self_contrast else need_keys,
    }
    dz, dkeys = anchors.backward(derivatives, statistics, own, key_offset, **needs)
    # In self-contrast dz holds both sides; the temperature takes the anchors' side alone.
    keys_side = _dot(saved.z, dz) / 2 if need_temperature and self_contrast else 0
    if saved.queue_z is not None and needs["need_anchors"]:
        queue = Shard(saved.queue_z, saved.queue_labels)
        dz += anchors.backward(derivatives, statistics, queue, need_anchors=True, need_keys=False).dz
    for shard in transport.shards():
        part = anchors.backward(derivatives, statistics, shard, **needs)
        dz += part.dz
        if needs["need_keys"]:
            transport.give_back(part.dkeys)
        del shard, part  # before the next ones are made

    dx = dkeys_x = dtemperature = None
    if need_temperature:
        t = saved.temperature_tensor.detach()
        by_scale = Derivatives(*derivatives).scale.sum(dtype=torch.float64)
        dots = _dot(saved.z, dz) - keys_side
        dtemperature = temperature_gradient(dots, by_scale, False, t.double().reshape(()))
        dtemperature = dtemperature.to(t.dtype).reshape(t.shape)
    returned = transport.own_gradient(setting.sizes[setting.ranks.rank])
    if returned is not None:
        (dz if self_contrast else dkeys).add_(returned)
    if need_embeddings:
        dx = _ops.prepare_backward(dz, saved.z, saved.norms, setting.dim, options.normalize)
    if need_keys:
        dkeys_x = _ops.prepare_backward(dkeys, saved.key_z, saved.key_norms, setting.dim, options.normalize)
    return dx, dkeys_x, dtemperature


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.to(b.dtype), b).sum(dtype=torch.float64)


def name_of_call(transport: str) -> str:
    """The public call, as messages name it."""
    return f"hard_negative_contrastive_loss(distributed={transport!r})"


@torch.compiler.disable
def loss_of_all_ranks(
    inputs: ContrastiveLossInputs,
    queue: tuple[Tensor, Tensor] | None,
    transport: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """What :func:`clce_ext.hard_negative_contrastive_loss` does with ``distributed=transport``.

    Args:
        inputs: this rank's.
        queue: [Q, D] and [Q]: keys of this rank's anchors alone, constants.
    """
    call = name_of_call(transport)
    if transport not in TRANSPORTS:
        refuse(ValueError(f"distributed must be None, 'gather' or 'ring', got {transport!r}"), call, group)
    ranks = Ranks(group, call)
    problem = None
    try:
        check_arguments(inputs)
    except Exception as error:  # every rank must hear of it
        problem = error
    embeddings, keys, temperature = inputs.embeddings, inputs.keys, inputs.temperature_tensor
    options = inputs.options()
    same = {
        "dtype": str(embeddings.dtype),
        "the embeddings' dim": embeddings.shape[1],
        "labels being given": inputs.labels is not None,
        "keys being given": keys is not None,
        "a queue being given": queue is not None,
        "debias being a tensor": inputs.debias_tensor is not None,
        **options._asdict(),
    }
    for name, tensor in (("embeddings", embeddings), ("keys", keys), ("temperature", temperature)):
        needed = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        same[f"{name} requiring grad"] = needed
    same["temperature being a tensor"] = temperature is not None
    rows = len(embeddings if keys is None else keys)
    sizes = ranks.agree(same, rows, embeddings.device, temperature, problem)

    labels, key_labels, views = inputs.labels, inputs.key_labels, inputs.views
    if labels is None:
        images = embeddings.shape[0] // views
        labels = key_labels = own_class_labels(images, options.ignore_index, embeddings.device, ranks.rank)
    labels = labels.long().repeat_interleave(views) if views > 1 else labels.long()
    key_labels = None if keys is None else key_labels.long()
    constants = _Constants(labels, key_labels, *(queue or (None, None)), inputs.debias_tensor)
    setting = _Setting(ranks, transport, sizes, inputs.key_offset, embeddings.shape[1], options)
    loss, _ = _LossOfAllRanks.apply(embeddings, keys, temperature, constants, setting)
    return loss
