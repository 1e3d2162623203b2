"""Batches of transformed images, for training and for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader

from ..config import TrainConfig
from ..errors import timm_makes
from .images import Images
from .sampler import EpochSampler


def training_loader(
    images: Images, config: TrainConfig, input_config: dict[str, Any], views: int, rank: int, world_size: int
) -> tuple[DataLoader, EpochSampler]:
    """Batches (views [B, V, C, H, W], labels [B]) of the augmented training images."""
    glyphs = config.data_is_glyphs
    images.views = views
    images.transform = timm_makes("--auto-augment and other augmentation", create_transform)(
        input_size=input_config["input_size"],
        is_training=True,
        no_aug=not config.augment,
        scale=tuple(config.scale) or ((0.8, 1.0) if glyphs else None),
        hflip=_first(config.hflip, 0.0 if glyphs else 0.5),
        color_jitter=_first(config.color_jitter, 0.0 if glyphs else 0.4) or None,
        auto_augment=config.auto_augment,
        re_prob=config.random_erasing,
        re_mode="pixel",
        interpolation=input_config["interpolation"],
        mean=input_config["mean"],
        std=input_config["std"],
    )
    sampler = EpochSampler(
        images.labels, config.batch_size, config.images_per_class, config.seed, rank, world_size
    )
    return _loader(images, config, batch_sampler=sampler), sampler


def evaluation_loader(
    images: Images, config: TrainConfig, input_config: dict[str, Any], rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Batches (images [B, C, H, W], labels [B]) without augmentation; every process gets its share once."""
    shard = images.take(slice(rank, None, world_size))
    shard.transform = create_transform(
        input_size=input_config["input_size"],
        is_training=False,
        interpolation=input_config["interpolation"],
        mean=input_config["mean"],
        std=input_config["std"],
        crop_pct=input_config["crop_pct"],
    )
    return _loader(shard, config, batch_size=config.micro_batch_size or max(config.batch_size, 64))


def _loader(dataset: Images, config: TrainConfig, **batching: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # leaves the generator that dropout draws from alone
        persistent_workers=config.workers > 0 and "batch_sampler" in batching,
        **batching,
    )


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
