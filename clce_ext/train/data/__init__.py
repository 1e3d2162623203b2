"""Images and labels, from a data set's name to batches.

    sources    data sets by name: digits, folders, torchvision, Hugging Face
    splits     what a run trains on and is judged by; held-out classes, few-shot subsets; a digest
    images     images with labels, and their augmentation
    sampler    which images form a batch
    loaders    batches of transformed images

Nothing here depends on how many workers load the images or where a run was interrupted: the order of an epoch
is a function of (seed, epoch), and the augmentation of an image of (seed, epoch, image, view).
"""

from .images import Images, Source
from .loaders import evaluation_loader, in_memory, training_loader
from .sampler import EpochSampler
from .splits import Data, data_digest, load_classes, load_data

__all__ = [
    "Data", "EpochSampler", "Images", "Source", "data_digest", "evaluation_loader", "in_memory",
    "load_classes", "load_data", "training_loader",
]  # fmt: skip
