"""Images on their way to the model: transformed, as uint8, in items of a few; the model normalises them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Compose

from ..config import TrainConfig
from ..errors import in_one_line
from .images import Images
from .sampler import ITEM, EpochSampler

PREFETCH = 2  # items that each of them prepares ahead
KEPT_BYTES = 256 << 20  # of a run's decoded training images, at most


def in_memory(images: Images, world_size: int = 1) -> Images:
    """The images, decoded here and now if that is little: the processes of a loader share them."""
    few = images.indices[np.linspace(0, len(images) - 1, min(8, len(images))).astype(int)]
    sizes = [3 * image.width * image.height for image in map(images.decode, few.tolist())]
    if np.mean(sizes) * len(images) * world_size > KEPT_BYTES:
        return images
    return dataclasses.replace(images, decoded={i: images.decode(i) for i in images.indices.tolist()})


def training_loader(
    images: Images, config: TrainConfig, input_config: dict[str, Any], views: int, rank: int, world_size: int
) -> tuple[DataLoader, EpochSampler]:
    """Items (views [n, V, C, H, W] uint8, labels [n]), n <= ITEM, of this process's share of the batches."""
    hflip, jitter = (0.0, 0.0) if config.data_is_glyphs else (0.5, 0.4)
    with in_one_line("--auto-augment and other augmentation: timm refuses: "):
        transform = create_transform(
            is_training=True,
            no_aug=not config.augment,
            scale=tuple(config.scale) or ((0.8, 1.0) if config.data_is_glyphs else None),
            hflip=hflip if config.hflip is None else config.hflip,
            color_jitter=(jitter if config.color_jitter is None else config.color_jitter) or None,
            auto_augment=config.auto_augment,
            normalize=False,
            **input_config,
        )
    if config.augment and config.random_erasing:
        transform = Compose([transform, _Erase(config.random_erasing, input_config)])
    images.views, images.transform = views, transform
    sampler = EpochSampler(images.labels, config, rank, world_size)
    return _loader(images, config, batch_sampler=sampler), sampler


def evaluation_loader(
    images: Images, config: TrainConfig, input_config: dict[str, Any], rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Batches (images [B, C, H, W] uint8, labels [B]) without augmentation; every process gets its share
    once."""
    shard = images.take(slice(rank, None, world_size))
    shard.transform = create_transform(is_training=False, normalize=False, **input_config)
    few = min(max(config.batch_size, ITEM), 2 * ITEM)
    return _loader(shard, config, batch_size=config.micro_batch_size or few)


class _Erase:
    """timm's random erasing, which fills with normal noise and so wants normalised pixels, on uint8."""

    def __init__(self, probability: float, input_config: dict[str, Any]) -> None:
        self.erase = RandomErasing(probability, mode="pixel", device="cpu")
        self.mean, self.std = (255 * torch.tensor(input_config[k]).view(-1, 1, 1) for k in ("mean", "std"))

    def __call__(self, image: Tensor) -> Tensor:
        erased = self.erase((image - self.mean) / self.std)
        return (erased * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


def _loader(dataset: Images, config: TrainConfig, **batching: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=config.workers,
        prefetch_factor=PREFETCH if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # leaves the generator that dropout draws from alone
        persistent_workers=config.workers > 0 and "batch_sampler" in batching,
        **batching,
    )
