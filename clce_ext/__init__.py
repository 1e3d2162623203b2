"""Contrastive fine-tuning with hard negatives: tiled C++/CUDA losses for PyTorch."""

from clce_ext.build import build_info, version
from clce_ext.functional import clce_loss, hard_negative_contrastive_loss
from clce_ext.gradcache import GradCache
from clce_ext.losses import (
    CLCELoss,
    HardNegativeContrastiveLoss,
    HCLLoss,
    LaCViTLoss,
    MatryoshkaLoss,
    NTXentLoss,
    SCHaNeLoss,
    SupConLoss,
)
from clce_ext.ops import HardNegativeContrastiveFunction
from clce_ext.queue import EmbeddingQueue

__version__ = version()

__all__ = [
    "CLCELoss",
    "EmbeddingQueue",
    "GradCache",
    "HCLLoss",
    "HardNegativeContrastiveFunction",
    "HardNegativeContrastiveLoss",
    "LaCViTLoss",
    "MatryoshkaLoss",
    "NTXentLoss",
    "SCHaNeLoss",
    "SupConLoss",
    "build_info",
    "clce_loss",
    "hard_negative_contrastive_loss",
]
