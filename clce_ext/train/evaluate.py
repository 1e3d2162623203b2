"""clce-eval: judge a run's model: accuracy, neighbours, few-shot episodes, geometry of its embeddings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import models
from .checkpoint import read_classes, write_text
from .config import TrainConfig, add_options, command_parser, flag, read_yaml
from .data import load_classes, load_data
from .errors import TrainingError, listing, run_command
from .judge import Judge, Outputs
from .metrics import episode_classes, few_shot_episodes, quality
from .objectives import UNTOUCHED
from .processes import Processes, choose_device

_LOADING = ("data", "data_dir", "image_column", "label_column", "workers", "device")
# Options that name parts of one data set.
_NAMED = ("train_split", "val_split", "test_split", "image_column", "label_column")
_EPILOG = """\
Few-shot episodes use classes that the run was not trained on: those of its --hold-out-classes, those named
with --classes, or every class of another data set given with --data. If that data set has the very classes
that the run was trained on, its classifier is judged instead.

examples:
  clce-eval --checkpoint runs/digits
  clce-eval --checkpoint runs/birds --data NOVEL_CLASSES_DIR --ways 5 --shots 1 5 --output novel.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("clce-eval", lambda: _command(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, _EPILOG, "--checkpoint DIR")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="directory of a finished run")
    text = "split to judge on (default: val, or test where there is no val)"
    add("--split", choices=("val", "test"), help=text)
    add("--classes", nargs="+", default=[], metavar="NAME", help="classes of the few-shot episodes")
    add("--ways", type=int, default=5, metavar="N", help="classes per episode (default: 5)")
    add(
        "--shots",
        type=int,
        nargs="+",
        default=[1, 5],
        metavar="K",
        help="labelled images per class (default: 1 5)",
    )
    add("--queries", type=int, default=15, metavar="N", help="images per class to classify (default: 15)")
    add("--episodes", type=int, default=600, metavar="N", help="number of episodes (default: 600)")
    add("--seed", type=int, default=0, metavar="N", help="of the episodes (default: 0)")
    add("--output", metavar="FILE", help="write the figures as JSON")
    own = parser.add_argument_group("in place of the run's own")
    own.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass")
    add_options(own, only=_LOADING, with_defaults=False)
    return parser


def _command(options: argparse.Namespace) -> None:
    for name in ("ways", "shots", "queries", "episodes", "seed", "batch_size"):
        value, least = getattr(options, name), 0 if name == "seed" else 1
        if value is not None and np.min(value) < least:
            raise TrainingError(f"{flag(name)} must be >= {least}, got {np.min(value)}")
    if options.output:  # before minutes are spent on what cannot be written
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    figures = evaluate(options)
    shown = {name: value for name, value in figures.items() if name not in (UNTOUCHED, "by_class")}
    shown |= {f"{UNTOUCHED}_{name}": value for name, value in figures.get(UNTOUCHED, {}).items()}
    for name, value in shown.items():
        print(f"{name:<28}{value if isinstance(value, (str, int)) else format(value, '.4f')}")
    if "by_class" in figures:
        print("accuracy by class, the lowest first")
    for row in sorted(figures.get("by_class", []), key=lambda row: row["accuracy"])[:10]:
        taken = f", {row['times']} taken for {row['taken_for']}" if row["times"] else ""
        print(f"  {row['class']}: {100 * row['accuracy']:.1f} % of {row['images']}{taken}")
    if options.output:
        write_text(Path(options.output), json.dumps(figures, indent=2) + "\n")


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The figures by name, accuracies as fractions; where the classifier is judged, ``by_class`` has those of
    each class (Outputs.by_class)."""
    given = {name: value for name, value in vars(options).items() if name in _LOADING}
    if options.batch_size is not None:
        given["micro_batch_size"] = options.batch_size
    run = FinishedRun(Path(options.checkpoint), **given)
    if "data" not in given:
        figures, outputs, _ = run.figures(options.split)
        if classes := options.classes or run.config.hold_out_classes:
            figures |= _episodes(run, classes, options)
    else:
        images, names = load_classes(run.config, split=options.split or "watched")
        if set(names) != set(run.classes) or options.classes:
            return _episodes(run, options.classes, options)
        images.labels = np.array([run.classes.index(name) for name in names])[images.labels]
        outputs = run.judge.outputs(run.model, images)
        figures = {"data": run.config.data, "images": len(images)}
        figures |= outputs.classification(len(names), "data") | quality(*run.judge.part(outputs).embedded())
    return figures | {"by_class": outputs.by_class(run.classes)}


def _episodes(run: FinishedRun, classes: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Few-shot figures, called novel where the run was trained on none of the classes.

    Novel classes give all their images, whatever split they lie in, unless a split is asked for.
    """
    is_novel = set(classes).isdisjoint(run.classes)
    images, names = load_classes(run.config, classes, options.split or (None if is_novel else "watched"))
    kind = "novel" if set(names).isdisjoint(run.classes) else "episode"
    x, labels = run.judge.outputs(run.model, images).embedded()
    figures: dict[str, Any] = {f"{kind}_classes": len(names), f"{kind}_images": len(labels)}
    figures |= {f"{kind}_{name}": value for name, value in quality(x, labels).items()}
    ways, queries = options.ways, options.queries
    # The same classes whatever the number of shots, so that more shots are compared with fewer.
    large, small = episode_classes(labels, ways, max(options.shots), queries, names)
    if small:
        figures["too_small_for_episodes"] = listing(small)
    for shots in options.shots:
        heads = few_shot_episodes((x, labels), large, ways, shots, queries, options.episodes, options.seed)
        for head, interval in heads.items():
            name = f"{ways}way_{shots}shot_{head}"
            figures |= {name: interval.mean, f"{name}_ci95": interval.half_width}
    return figures


class FinishedRun:
    """The model of a run, to judge it again: on another split, or on another data set."""

    def __init__(self, folder: Path, device: str | None = None, **options: Any) -> None:
        """``options``, those of how images are loaded, in place of the run's."""
        parts = {"config.yaml": "not the directory of a run", "model.safetensors": "the run has not finished"}
        for name, lack in parts.items():
            if not (folder / name).is_file():
                raise TrainingError(f"--checkpoint {folder}: {lack} (no {name} in it)")
        saved = folder / "config.yaml"
        self.trained = TrainConfig.from_dict(read_yaml(saved), str(saved))
        if "data" in options:  # which may name its splits and columns otherwise
            options = dict.fromkeys(_NAMED) | options
        options |= {"pretrained": False, "checkpoint": str(folder), "eval_embeddings": "final"}
        self.config = dataclasses.replace(self.trained, best_metric=None, patience=None, **options)
        self.classes = read_classes(folder)
        group = Processes(choose_device(device))
        self.model = self._model(self.config).to(group.device)
        self.judge = Judge(self.config, self.model.input, group)

    def figures(self, split: str | None = None) -> tuple[dict[str, Any], Outputs, dict[str, torch.Tensor]]:
        """Judge.figures on a split of the run's own data, by default the one that training watched."""
        data = load_data(self.config)
        if data.classes != self.classes:
            differ = sorted(set(data.classes) ^ set(self.classes)) or ["their order"]
            raise TrainingError(
                f"{self.config.data} has {len(data.classes)} classes, the model was trained on "
                f"{len(self.classes)}; what differs: {listing(differ, 8)}"
            )
        split, before = split or data.watched, None
        if (backbone := self._untouched_backbone()) is not None:
            of_split = self.judge.outputs(backbone, data.split(split))
            before = self.judge.frozen(backbone, data.train, of_split)
        return self.judge.figures(self.model, data, split, before)

    def _untouched_backbone(self) -> models.FineTuner | None:
        """What the run started from, where it started from weights that can still be read."""
        if not self.trained.has_weights:
            return None
        weights = {"pretrained": self.trained.pretrained, "checkpoint": self.trained.checkpoint}
        try:
            return self._model(dataclasses.replace(self.config, **weights)).to(self.judge.group.device)
        except TrainingError as error:
            print(f"warning: the untouched backbone is not judged: {error}", file=sys.stderr)
            return None

    def _model(self, config: TrainConfig) -> models.FineTuner:
        return models.create_model(config, len(self.classes), False, self.classes)


if __name__ == "__main__":
    sys.exit(main())
