"""Gradient caching: the gradients of one large batch in the memory of a small one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GradCache"]


class GradCache:
    """Computes ``criterion(*model(inputs), labels)`` and its gradients micro-batch by micro-batch.

    A contrastive loss needs the embeddings of the whole batch at once; gradient accumulation only ever
    contrasts inside each micro-batch. Gradient caching (Gao et al., arXiv 2101.06983) is exact:

    1. every micro-batch goes through the model without a graph; only the outputs stay;
    2. the loss of all outputs together is differentiated by the outputs;
    3. every micro-batch goes through the model again, with a graph, and is sent its part of (2).

    The second pass repeats the first one's random numbers (CPU and CUDA), so dropout and drop-path drop the
    same elements, and runs under the autocast settings of the caller. Peak memory follows
    ``micro_batch_size``; the price is one more forward pass.

    Args:
        model: called with one micro-batch of the inputs; returns a tensor or a tuple of tensors whose first
            dimension is the micro-batch. May be wrapped in ``DistributedDataParallel`` (gradients are
            reduced once, with the last micro-batch) or ``torch.compile``.
        criterion: called as ``criterion(*outputs, labels, **kwargs)`` with the outputs of the whole batch;
            returns a scalar. Its own parameters (a learnable temperature) receive gradients too.
        micro_batch_size: images per forward pass.
        scaler: ``torch.amp.GradScaler`` where float16 needs loss scaling; ``.grad`` is then scaled too.
        return_outputs: return the model's outputs too, such as the embeddings that an EmbeddingQueue takes.

    BatchNorm in training mode computes its statistics within each micro-batch (as with any accumulation), so
    they differ from the whole batch's, and its running averages are updated twice per step. In evaluation
    mode it normalises by its running averages, and gradient caching is exact, as it is with LayerNorm.

    Raises:
        TypeError: no module for the model, or a class for the criterion; the model's outputs are not tensors,
            or the criterion's value is not one.
        ValueError: ``micro_batch_size`` < 1, inputs of different lengths, or a loss that is not a scalar.

    Example::

        step = GradCache(model, criterion, micro_batch_size=64)
        optimizer.zero_grad()
        loss = step(images, labels)      # fills .grad, returns the detached loss
        optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        micro_batch_size: int = 64,
        scaler: torch.amp.GradScaler | None = None,
        return_outputs: bool = False,
    ) -> None:
        if (
            isinstance(micro_batch_size, bool)
            or not isinstance(micro_batch_size, int)
            or micro_batch_size < 1
        ):
            raise ValueError(f"micro_batch_size must be an integer >= 1, got {micro_batch_size!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {model!r}")
        if isinstance(criterion, type) or not callable(criterion):
            raise TypeError(f"criterion must be a loss to call, such as CLCELoss(), got {criterion!r}")
        self.model = model
        self.criterion = criterion
        self.micro_batch_size = micro_batch_size
        self.scaler = scaler
        self.return_outputs = return_outputs

    def __call__(self, inputs: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Adds the whole batch's gradients to ``.grad`` and returns its loss.

        Args:
            inputs: tensor, or tuple / list / dict of tensors, with the batch in the first dimension. They may
                lie on the CPU: a micro-batch is moved to the model's device when its turn comes.
            labels: passed on to the criterion unless None.
            **kwargs: passed on to the criterion (e.g. ``targets=`` for mixup, ``queue=``).

        Returns:
            The detached scalar loss; with ``return_outputs`` also the model's outputs for the whole batch, as
            a detached tensor or tuple of them.
        """
        # Its parameters say where the model is: wrappers such as DDP and torch.compile hide its attributes.
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        micro_batches = list(_split(inputs, self.micro_batch_size))
        autocast = _AutocastState(device.type)

        outputs, random_states, single = self._forward_without_graph(micro_batches, device, autocast)
        loss, gradients = self._loss_and_output_gradients(outputs, labels, kwargs)
        # The caller's random numbers go on as if the model had run once.
        after_criterion = _RandomState(device)
        self._backward(micro_batches, random_states, gradients, single, device, autocast)
        after_criterion.restore()
        if self.return_outputs:
            return loss, outputs[0] if single else tuple(outputs)
        return loss

    def _forward_without_graph(self, micro_batches, device, autocast):
        rows, random_states, single = [], [], False
        for micro_batch in micro_batches:
            random_states.append(_RandomState(device))
            with torch.no_grad(), self._no_sync(), autocast.fresh():
                output = self.model(_to(micro_batch, device))
            single = isinstance(output, Tensor)
            rows.append((output,) if single else tuple(output))
            _check_outputs(rows[-1], rows[0])
        return [torch.cat(parts) for parts in zip(*rows, strict=True)], random_states, single

    def _loss_and_output_gradients(self, outputs, labels, kwargs):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in outputs]
        with torch.enable_grad():
            loss = self.criterion(*leaves, *(() if labels is None else (labels,)), **kwargs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"criterion must return a tensor, got {type(loss).__name__}")
        if loss.dim() != 0:
            raise ValueError(f"criterion must return a scalar, got shape {tuple(loss.shape)}")
        if loss.requires_grad:
            # Autocast is for forward passes only. This also fills .grad of the criterion's own parameters.
            with torch.autocast(loss.device.type, enabled=False):
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach(), [x.grad for x in leaves]

    def _backward(self, micro_batches, random_states, gradients, single, device, autocast):
        if all(g is None for g in gradients):
            return
        begin = 0
        for i, (micro_batch, random_state) in enumerate(zip(micro_batches, random_states, strict=True)):
            end = begin + _length(micro_batch)
            is_last = i == len(micro_batches) - 1
            with nullcontext() if is_last else self._no_sync():
                random_state.restore()
                with torch.enable_grad(), autocast.fresh():
                    output = self.model(_to(micro_batch, device))
                pairs = [
                    (x, g[begin:end])
                    for x, g in zip((output,) if single else output, gradients, strict=True)
                    if g is not None and x.requires_grad
                ]
                if pairs:
                    torch.autograd.backward(*zip(*pairs, strict=True))
            begin = end

    def _no_sync(self) -> AbstractContextManager:
        return self.model.no_sync() if hasattr(self.model, "no_sync") else nullcontext()


class _RandomState:
    """The generators that a forward pass on ``device`` draws from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(self.device) if self.device else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device:
            torch.cuda.set_rng_state(self.cuda, self.device)


class _AutocastState:
    """The caller's autocast settings, entered afresh for every forward pass.

    Autocast caches the low-precision copies of the weights until its outermost block ends. Copies made under
    no_grad carry no graph, so a second forward pass that found them would leave the weights without
    gradients.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type)

    def fresh(self) -> AbstractContextManager:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


def _check_outputs(output: tuple, first: tuple) -> None:
    for x in output:
        if not isinstance(x, Tensor):
            raise TypeError(f"model must return a tensor or a tuple of tensors, got {type(x).__name__} in it")
        if x.dim() == 0:
            raise ValueError("model must return tensors whose first dimension is the batch, got a scalar")
    if len(output) != len(first):
        raise ValueError(
            f"model returned {len(first)} tensors for one micro-batch, {len(output)} for another"
        )


def _leaves(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    if not isinstance(inputs, (tuple, list)) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"inputs must be a tensor or a tuple, list or dict of tensors, got {type(inputs).__name__}"
        )
    return list(inputs)


def _map(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: function(x) for name, x in inputs.items()}
    return type(inputs)(function(x) for x in inputs)


def _length(inputs: Any) -> int:
    return _leaves(inputs)[0].shape[0]


def _split(inputs: Any, size: int) -> Iterator[Any]:
    lengths = {x.shape[0] for x in _leaves(inputs)}
    if len(lengths) != 1:
        raise ValueError(f"inputs must share their first dimension, got lengths {sorted(lengths)}")
    if lengths == {0}:
        raise ValueError("inputs must hold at least one image, got none")
    for begin in range(0, lengths.pop(), size):
        yield _map(lambda x: x[begin : begin + size], inputs)  # noqa: B023 (used before begin moves on)


def _to(inputs: Any, device: torch.device) -> Any:
    return _map(lambda x: x.to(device, non_blocking=True), inputs)
