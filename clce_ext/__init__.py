"""Contrastive fine-tuning with hard negatives: tiled C++/CUDA losses for PyTorch."""

import torch  # noqa: F401  (loads the libraries that _C links to)

try:
    from clce_ext import _C
except ImportError as error:
    raise ImportError(
        "clce_ext's compiled part is missing or was built for another torch; build it with "
        "`python setup.py build_ext --inplace` or `pip install --no-build-isolation .`"
    ) from error

from clce_ext.build import build_info
from clce_ext.functional import clce_loss, hard_negative_contrastive_loss
from clce_ext.gradcache import GradCache
from clce_ext.losses import (
    CLCELoss,
    HardNegativeContrastiveLoss,
    HCLLoss,
    LaCViTLoss,
    NTXentLoss,
    SCHaNeLoss,
    SupConLoss,
)
from clce_ext.ops import HardNegativeContrastiveFunction
from clce_ext.queue import EmbeddingQueue

__version__ = _C.build()["version"]

__all__ = [
    "CLCELoss",
    "EmbeddingQueue",
    "GradCache",
    "HCLLoss",
    "HardNegativeContrastiveFunction",
    "HardNegativeContrastiveLoss",
    "LaCViTLoss",
    "NTXentLoss",
    "SCHaNeLoss",
    "SupConLoss",
    "build_info",
    "clce_loss",
    "hard_negative_contrastive_loss",
]
