"""The losses as modules: one class per published system, each a choice of options of the same function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clce_ext.functional import clce_loss, hard_negative_contrastive_loss
from clce_ext.queue import EmbeddingQueue

__all__ = [
    "CLCELoss",
    "HCLLoss",
    "HardNegativeContrastiveLoss",
    "LaCViTLoss",
    "NTXentLoss",
    "SCHaNeLoss",
    "SupConLoss",
]


class _ContrastiveOptions(nn.Module):
    """Options of the contrastive loss; the temperature may be a parameter."""

    def __init__(self, temperature: float | Tensor = 0.5, learnable_temperature: bool = False, **options):
        super().__init__()
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

    @property
    def options(self) -> dict:
        return {name: self._buffers.get(name, value) for name, value in self._options.items()}

    def extra_repr(self) -> str:
        given = {name: value for name, value in self.options.items() if value is not None}
        shown = {"temperature": self.temperature, **given}
        return ", ".join(f"{name}={_brief(value)}" for name, value in shown.items())


def _brief(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_meta or value.numel() > 1:
        return f"<{', '.join(map(str, value.shape))}>"
    return repr(value.item())


class HardNegativeContrastiveLoss(_ContrastiveOptions):
    """:func:`clce_ext.hard_negative_contrastive_loss` with its options held.

    Args:
        temperature: tau > 0, a float, or a tensor of one element (a Parameter is trained).
        beta: hardness, >= 0.
        summation: "in" or "out".
        denominator: "all" or "negatives".
        debias: HCL's tau+, in [0, 1).
        detach_weights, normalize, ignore_index, reduction, distributed, process_group: see the function.
        learnable_temperature: hold the temperature as a Parameter.

    ``forward(embeddings, labels=None, keys=None, key_labels=None, key_offset=None, queue=None)`` returns
    the loss.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        beta: float = 1.0,
        summation: str = "out",
        denominator: str = "all",
        debias: float = 0.0,
        detach_weights: bool = False,
        normalize: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
        learnable_temperature: bool = False,
        distributed: str | None = None,
        process_group=None,
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
    ) -> Tensor:
        return hard_negative_contrastive_loss(
            embeddings,
            labels,
            keys=keys,
            key_labels=key_labels,
            key_offset=key_offset,
            queue=queue,
            temperature=self.temperature,
            **self.options,
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
        super().__init__(temperature, 0.0, summation, **options)


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
        super().__init__(temperature, 0.0, **options)


class CLCELoss(_ContrastiveOptions):
    """CLCE (2402.14551): ``(1 - weight) * CE(logits, labels) + weight * contrastive(embeddings, labels)``.

    Args:
        weight: the paper's lambda, in [0, 1].
        temperature, beta, summation: of the contrastive half (tau = 0.5, beta = 1, "in").
        label_smoothing: of the cross-entropy half.
        options: further options of :func:`clce_ext.clce_loss`, such as ``distributed``.

    ``forward(logits, embeddings, labels, targets=None, **keys)``: see :func:`clce_ext.clce_loss`.
    """

    def __init__(
        self,
        weight: float = 0.9,
        temperature: float | Tensor = 0.5,
        beta: float = 1.0,
        summation: str = "in",
        label_smoothing: float = 0.0,
        learnable_temperature: bool = False,
        **options,
    ):
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight (the paper's lambda) must be in [0, 1], got {weight}")
        super().__init__(
            temperature,
            learnable_temperature,
            weight=weight,
            beta=beta,
            summation=summation,
            label_smoothing=label_smoothing,
            **options,
        )

    def forward(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, targets: Tensor | None = None, **keys
    ) -> Tensor:
        return clce_loss(
            logits, embeddings, labels, targets=targets, temperature=self.temperature, **self.options, **keys
        )
