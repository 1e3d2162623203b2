"""clce-predict: the classes of new images by a trained model, as a table and as a page of thumbnails."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image
from torch import Tensor

from . import models, plots
from .checkpoint import read_metadata, read_weights
from .config import TrainConfig, add_options, command_parser
from .data import Images, Source, evaluation_loader
from .data.sources import image_files
from .errors import TrainingError, UnreadableImageError, run_command
from .judge import run_model
from .processes import choose_device
from .report import write_page
from .results import write_rows

_ON_SHEET = 500  # thumbnails at most; the table has all images
_SAID = 3  # classes of each image
_LOADING = ("workers", "max_image_pixels", "device")
_UNREADABLE = -1  # label of an image that cannot be decoded


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("clce-predict", lambda: print(f"predictions: {predict(_parse(arguments))}"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    example = "example:\n  clce-predict --checkpoint runs/birds photos/ one-more.jpg --output predictions"
    parser = command_parser(__doc__, example, "--checkpoint PATH IMAGE [IMAGE ...]")
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, and folders of them")
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run's directory, or its model.safetensors alone",
    )
    add(
        "--output", default="predictions", metavar="DIR", help="folder for the results (default: predictions)"
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images per forward pass (default: 64)")
    add_options(parser, only=_LOADING)
    return parser.parse_args(arguments)


class _Readable(Images):
    """A blank image, labelled as unreadable, stands for each that cannot be decoded."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        try:
            return super().__getitem__(item)
        except UnreadableImageError:
            return self.transform(Image.new("RGB", (64, 64))), _UNREADABLE


def predict(options: argparse.Namespace) -> Path:
    """Writes predictions.csv and contact-sheet.html; returns the former's path. Images that cannot be decoded
    are named on stderr and have no class in the table.

    Raises:
        TrainingError: none of the images can be decoded.
    """
    model, classes, input_config = load_saved(options.checkpoint)
    paths = _paths(options.images)
    config = TrainConfig.from_dict({k: v for k, v in vars(options).items() if k in ("batch_size", *_LOADING)})
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)  # before minutes are spent on what cannot be written
    unknown = np.zeros(len(paths), dtype=np.int64)  # labels
    source = Source(paths, unknown, max_pixels=config.max_image_pixels)
    images = _Readable(source, np.arange(len(paths)), unknown)
    device = choose_device(config.device)
    outputs = run_model(model.to(device), evaluation_loader(images, config, input_config), device)
    rows = []
    for path, top, shares in zip(paths, outputs.top, outputs.confidence.tolist(), strict=True):
        row: dict[str, Any] = {"image": path}
        for place, (label, share) in enumerate(zip(top[:_SAID], shares, strict=False), 1):
            row |= {f"class_{place}": classes[label], f"probability_{place}": round(share, 5)}
        rows.append(row)
    for i in (outputs.labels == _UNREADABLE).nonzero().flatten().tolist():
        rows[i] = {"image": paths[i]}
        try:
            images.decode(i)
        except UnreadableImageError as error:
            if not (outputs.labels != _UNREADABLE).any():
                raise
            print(f"clce-predict: warning: {error}", file=sys.stderr)
    write_rows(folder / "predictions.csv", rows)
    photos, shown = [], [i for i, row in enumerate(rows) if "class_1" in row]
    for i in shown[:_ON_SHEET]:
        text = f"{rows[i]['class_1']}, {100 * rows[i]['probability_1']:.0f} % – {Path(paths[i]).name}"
        photos.append(([plots.photograph(images.decode(i))], text))
    title = f"{len(shown)} images, {len(classes)} classes"
    lead = f"By {options.checkpoint}." + f" The first {_ON_SHEET} are shown." * (len(shown) > _ON_SHEET)
    write_page(folder / "contact-sheet.html", title=title, lead=lead, predictions=photos)
    return folder / "predictions.csv"


def load_saved(path: str | Path) -> tuple[models.FineTuner, list[str], dict[str, Any]]:
    """(model, names of its classes, size and scale of its images) of a run, from its model.safetensors alone.

    Raises:
        TrainingError: no such file, a damaged one, or one that clce-train did not write.
    """
    state, about = read_weights(path), read_metadata(path)
    if missing := {"model", "classes", "input", "arguments"} - set(about):
        raise TrainingError(
            f"--checkpoint {path}: does not say its {', '.join(sorted(missing))}, as the model.safetensors "
            "of clce-train does"
        )
    classes, seen = json.loads(about["classes"]), json.loads(about["input"])
    scale = {name: seen[name] for name in ("mean", "std")}
    backbone = timm.create_model(
        about["model"], pretrained_cfg_overlay=scale, **json.loads(about["arguments"])
    )
    if about.get("global_pool"):
        backbone.reset_classifier(len(classes), about["global_pool"])
    backbone.load_state_dict(state)
    return models.FineTuner(backbone).eval(), classes, seen


def _paths(given: Sequence[str]) -> list[str]:
    """The files, and the images in the folders."""
    found: list[str] = []
    for path in map(Path, given):
        if not (path.is_dir() or path.is_file()):
            raise TrainingError(f"{path}: no such file or folder")
        inside = [file for file, _ in image_files(path)[0]] if path.is_dir() else [str(path)]
        if not inside:
            raise TrainingError(f"{path}: no images in this folder")
        found += inside
    return found


if __name__ == "__main__":
    sys.exit(main())
