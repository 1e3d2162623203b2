"""The losses as modules: one class per published system, whose defaults are that system's options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clce_ext.arguments import CLCE_DEFAULTS, DEFAULTS
from clce_ext.functional import (
    check_clce_options,
    check_options,
    clce_loss,
    hard_negative_contrastive_loss,
    number,
)
from clce_ext.queue import EmbeddingQueue

__all__ = [
    "CLCELoss",
    "HCLLoss",
    "HardNegativeContrastiveLoss",
    "LaCViTLoss",
    "MatryoshkaLoss",
    "NTXentLoss",
    "SCHaNeLoss",
    "SupConLoss",
]


class _Criterion(nn.Module):
    """A loss's options; the temperature may be a parameter."""

    def __init__(self, temperature: float | Tensor, learnable_temperature: bool, **options):
        super().__init__()
        self._check(temperature=temperature, **options)
        if not isinstance(learnable_temperature, bool):
            raise TypeError(f"learnable_temperature must be True or False, got {learnable_temperature!r}")
        if learnable_temperature:
            self.temperature = nn.Parameter(
                torch.as_tensor(temperature, dtype=torch.float32).detach().clone()
            )
        elif isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            self.temperature = temperature
        # Tensors, such as class weights, move with the module.
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
        self._options = options

    def _check(self, **options) -> None:
        check_options(options)

    def _with_beta_zero(self, options: dict) -> dict:
        if "beta" in options:
            raise TypeError(
                f"beta of {type(self).__name__} is 0, got beta={options['beta']!r}; "
                "HardNegativeContrastiveLoss accepts any beta >= 0"
            )
        return {"beta": 0.0, **options}

    @property
    def options(self) -> dict:
        """The keyword arguments of the function that computes the loss."""
        held = {name: self._buffers.get(name, value) for name, value in self._options.items()}
        return {"temperature": self.temperature, **held}

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={_brief(value)}" for n, value in self.options.items() if value is not None)


def _brief(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_meta or value.numel() > 1:
        return f"<{', '.join(map(str, value.shape))}>"
    return repr(value.item())


class HardNegativeContrastiveLoss(_Criterion):
    """:func:`clce_ext.hard_negative_contrastive_loss` with its options held.

    Args:
        temperature: tau > 0, a float, or a tensor of one element (a Parameter is trained).
        beta: hardness, >= 0.
        summation: "in" or "out".
        denominator: "all" or "negatives".
        debias: HCL's tau+, in [0, 1): a number, or a tensor with one for each image of a batch.
        detach_weights, normalize, ignore_index, reduction, distributed, process_group: see the function.
        learnable_temperature: hold the temperature as a Parameter.

    ``forward(embeddings, labels=None, keys=None, key_labels=None, key_offset=None, queue=None,
    debias=None)`` returns the loss; ``debias`` stands for the module's in this call.
    """

    def __init__(
        self,
        temperature: float | Tensor = DEFAULTS.temperature,
        beta: float = DEFAULTS.beta,
        summation: str = DEFAULTS.summation,
        denominator: str = DEFAULTS.denominator,
        debias: float | Tensor = DEFAULTS.debias,
        detach_weights: bool = DEFAULTS.detach_weights,
        normalize: bool = DEFAULTS.normalize,
        ignore_index: int = DEFAULTS.ignore_index,
        reduction: str = DEFAULTS.reduction,
        learnable_temperature: bool = False,
        distributed: str | None = None,
        process_group=None,
        **unknown,
    ):
        super().__init__(
            temperature,
            learnable_temperature,
            beta=beta,
            summation=summation,
            denominator=denominator,
            debias=debias,
            detach_weights=detach_weights,
            normalize=normalize,
            ignore_index=ignore_index,
            reduction=reduction,
            distributed=distributed,
            process_group=process_group,
            **unknown,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        key_offset: int | None = None,
        queue: EmbeddingQueue | None = None,
        debias: float | Tensor | None = None,
    ) -> Tensor:
        options = self.options if debias is None else self.options | {"debias": debias}
        return hard_negative_contrastive_loss(
            embeddings,
            labels,
            keys=keys,
            key_labels=key_labels,
            key_offset=key_offset,
            queue=queue,
            **options,
        )


class SCHaNeLoss(HardNegativeContrastiveLoss):
    """SCHaNe (arXiv 2308.14893): beta = 1 and the mean over positives inside the logarithm.

    ``"in"`` is the reading of an independent public implementation of CLCE, which shares this loss.
    """

    def __init__(
        self, temperature: float | Tensor = 0.5, beta: float = 1.0, summation: str = "in", **options
    ):
        super().__init__(temperature, beta, summation, **options)


class SupConLoss(HardNegativeContrastiveLoss):
    """Supervised contrastive loss, L_out (arXiv 2004.11362): beta = 0; no base-temperature factor."""

    def __init__(self, temperature: float | Tensor = 0.07, summation: str = "out", **options):
        super().__init__(temperature, summation=summation, **self._with_beta_zero(options))


class LaCViTLoss(SupConLoss):
    """LaCViT's first stage (arXiv 2303.18013): SupCon's L_out on [B, 2, D], two augmented views per image."""

    def __init__(self, temperature: float | Tensor = 0.1, **options):
        super().__init__(temperature, **options)


class HCLLoss(HardNegativeContrastiveLoss):
    """HCL (Robinson et al., 2010.04592): hard negatives, debiased by tau+; [B, 2, D] without labels."""

    def __init__(self, temperature: float | Tensor = 0.5, beta: float = 1.0, debias: float = 0.1, **options):
        super().__init__(temperature, beta, debias=debias, **options)


class NTXentLoss(HardNegativeContrastiveLoss):
    """NT-Xent (SimCLR, 2002.05709) on [B, V, D]; with ``keys`` of the batch's size, one half of CLIP."""

    def __init__(self, temperature: float | Tensor = 0.5, **options):
        super().__init__(temperature, **self._with_beta_zero(options))


class CLCELoss(_Criterion):
    """CLCE (2402.14551): ``(1 - weight) * CE(logits, labels) + weight * contrastive(embeddings, labels)``.

    Args:
        weight: the mixing weight lambda, in [0, 1].
        temperature, beta, summation: of the contrastive half.
        label_smoothing: of the cross-entropy half.
        options: further options of :func:`clce_ext.clce_loss`, such as ``distributed``.

    ``forward(logits, embeddings, labels, targets=None, **keys)``: see :func:`clce_ext.clce_loss`.
    """

    def __init__(
        self,
        weight: float = CLCE_DEFAULTS.weight,
        temperature: float | Tensor = CLCE_DEFAULTS.temperature,
        beta: float = CLCE_DEFAULTS.beta,
        summation: str = CLCE_DEFAULTS.summation,
        label_smoothing: float = CLCE_DEFAULTS.label_smoothing,
        learnable_temperature: bool = False,
        **options,
    ):
        super().__init__(
            temperature,
            learnable_temperature,
            weight=weight,
            beta=beta,
            summation=summation,
            label_smoothing=label_smoothing,
            **options,
        )

    def _check(self, **options) -> None:
        check_clce_options(options)

    def forward(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, targets: Tensor | None = None, **keys
    ) -> Tensor:
        return clce_loss(logits, embeddings, labels, targets=targets, **self.options, **keys)


class MatryoshkaLoss(nn.Module):
    r"""Any loss on prefixes of the embeddings (Matryoshka representations, arXiv 2205.13147)::

        sum_m weights[m] * loss(embeddings[..., :dims[m]], ...)

    A model trained by it has embeddings that may be cut to any of the ``dims``. Prefixes are slices, not
    copies; each is normalised by itself, if the loss normalises.

    Args:
        loss: a module such as :class:`SupConLoss` or :class:`CLCELoss`. What its ``forward`` calls
            ``embeddings`` (where there is no such argument, the first) and ``keys`` is cut, all else is
            passed on. So both halves of :class:`CLCELoss` count once for each prefix.
        dims: the prefixes' numbers of columns, each at least 1; usually with the full D among them.
        weights: of each prefix, finite and at least 0; None: 1 each, as in the paper.

    ``forward`` takes what the loss takes and returns what it returns, summed over prefixes.

    Raises:
        ValueError: dims or weights as above; at a call, embeddings (or keys) with fewer columns than a
            prefix, or a queue: its entries are not cut.
    """

    def __init__(self, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, such as SupConLoss(), got {loss!r}")
        dims = tuple(dims) if isinstance(dims, Sequence) else dims
        if not isinstance(dims, tuple) or not dims or not all(isinstance(d, int) and d >= 1 for d in dims):
            raise ValueError(f"dims must be at least one number of columns, each at least 1, got {dims}")
        if weights is not None and not isinstance(weights, Sequence):
            raise TypeError(f"weights must be numbers, one for each of dims, or None, got {weights!r}")
        weights = [1.0] * len(dims) if weights is None else weights
        weights = tuple(number("each of weights", weight) for weight in weights)
        if len(weights) != len(dims):
            raise ValueError(f"weights must be {len(dims)}, one for each of dims, got {len(weights)}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"weights must be finite and at least 0, got {weights}")
        self.loss, self.dims, self.weights = loss, dims, weights
        names = list(inspect.signature(loss.forward).parameters)
        self._place = names.index("embeddings") if "embeddings" in names else 0

    def forward(self, *args, **options) -> Tensor:
        if options.get("queue") is not None:
            raise ValueError(
                "MatryoshkaLoss cuts no queue: give keys=queue.embeddings, key_labels=queue.labels instead"
            )
        total = None
        for dim, weight in zip(self.dims, self.weights, strict=True):
            cut_args = list(args)
            if self._place < len(args):
                cut_args[self._place] = self._prefix(args[self._place], dim, "embeddings")
            cut = {
                name: self._prefix(value, dim, name) if name in ("embeddings", "keys") else value
                for name, value in options.items()
            }
            term = weight * self.loss(*cut_args, **cut)
            total = term if total is None else total + term
        return total

    def _prefix(self, rows: Tensor | None, dim: int, name: str) -> Tensor | None:
        if rows is None:
            return None
        if rows.shape[-1] < dim:
            got = tuple(rows.shape)
            raise ValueError(
                f"{name} must have at least as many columns as dims {self.dims} ask for, got {got}"
            )
        return rows[..., :dim]

    def extra_repr(self) -> str:
        return f"dims={self.dims}, weights={self.weights}"
