"""Every option of a training run, written once: command line, recipe file and config.yaml all read this."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import TrainingError
from .objectives import OBJECTIVES, Objective


def _objectives(having: Callable[[Objective], object]) -> str:
    return ", ".join(o.name for o in OBJECTIVES.values() if having(o))


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"help": help, "choices": tuple(choices) if choices else None}
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class TrainConfig:
    """Options of ``clce-train``. A recipe file holds the same names (``batch_size`` or ``batch-size``)."""

    # Data
    data: str = option(
        "digits", "digits | DIR with train/ and val/ class folders | torchvision:NAME | hfds/NAME"
    )
    data_dir: str | None = option(None, "where torchvision and Hugging Face data sets are kept")
    download: bool = option(False, "let torchvision download the data set")
    train_split: str | None = option(None, "name of the training split (default: train)")
    val_split: str | None = option(None, "name of the validation split (default: val, test or validation)")
    shots: int | None = option(None, "train on K images per class, drawn with --seed")
    hold_out_classes: list[str] = option(  # noqa: RUF009
        [], "classes left out of training: the novel ones of few-shot episodes"
    )
    images_per_class: int | None = option(
        None, "class-balanced batches: K images of each of batch-size / K classes (default: plain shuffling)"
    )
    image_size: int | None = option(None, "side in pixels (default: the model's)")
    augment: bool = option(True, "augment training images; --no-augment only resizes them")
    scale: list[float] = option([], "range of the random crop's area (default: 0.08 1, digits 0.8 1)")  # noqa: RUF009
    hflip: float | None = option(None, "probability of a horizontal flip (default: 0.5, digits 0)")
    color_jitter: float | None = option(None, "strength of colour jitter (default: 0.4, digits 0)")
    auto_augment: str | None = option(None, "timm's policy, e.g. rand-m9-mstd0.5-inc1")
    random_erasing: float = option(0.0, "probability of erasing a rectangle")
    workers: int = option(0, "processes that load images")

    # Model
    model: str = option("beit_tiny_digits", "a timm model: beit_*, beitv2_*, beit3_*, or any other")
    pretrained: bool = option(False, "start from timm's weights (needs the network or timm's cache)")
    checkpoint: str | None = option(None, "start from these weights: .safetensors, .pth or a run's directory")
    drop: float = option(0.0, "dropout before the classifier")
    drop_path: float = option(0.0, "stochastic depth")
    projection_dim: int = option(
        128, f"outputs of the projection head ({_objectives(lambda o: o.projection)})"
    )
    grad_checkpointing: bool = option(False, "recompute the backbone's activations in the backward pass")

    # Objective
    objective: str = option(
        "clce",
        "what to minimise: " + "; ".join(f"{o.name}, {o.summary}" for o in OBJECTIVES.values()),
        OBJECTIVES,
    )
    weight: float = option(0.9, "clce: lambda, the share of the contrastive half")
    temperature: float | None = option(
        None,
        "tau of the contrastive loss (default: "
        + ", ".join(f"{o.name} {o.temperature}" for o in OBJECTIVES.values() if o.loss)
        + ")",
    )
    beta: float | None = option(
        None,
        f"hardness of the negatives' weights in {_objectives(lambda o: 'beta' in o.options)} (default: 1)",
    )
    label_smoothing: float = option(0.0, "of the cross-entropy (with mixup: of its soft targets)")
    views: int | None = option(
        None, f"augmented views per image (default: 2 for {_objectives(lambda o: o.views == 2)}, else 1)"
    )
    mixup: float = option(0.0, "alpha of mixup in cross-entropy and clce")
    cutmix: float = option(0.0, "alpha of CutMix in cross-entropy and clce")
    mix_prob: float = option(1.0, "probability of mixing a batch")
    head_epochs: int | None = option(
        None, "two-stage objectives: how many of --epochs train the head (default: a quarter, at least 1)"
    )
    head_backbone: str = option(
        "frozen", "two-stage objectives: the backbone in the head stage", ("frozen", "trained")
    )

    # Optimisation
    epochs: int = option(20, "epochs altogether, all stages")
    batch_size: int = option(64, "images per step and process: what the contrastive loss compares")
    micro_batch_size: int | None = option(
        None, "images per forward pass (gradient caching); default: the batch"
    )
    opt: str = option("adamw", "timm's optimizer")
    lr: float = option(5e-4, "learning rate")
    head_lr: float | None = option(None, "learning rate of the head stage (default: --lr)")
    weight_decay: float = option(0.05, "weight decay")
    layer_decay: float | None = option(None, "layer-wise decay of the learning rate")
    sched: str = option("cosine", "timm's schedule, per update")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up, at the start of each stage")
    warmup_lr: float = option(1e-6, "where the warm-up starts")
    min_lr: float = option(1e-6, "where the schedule ends")
    clip_grad: float | None = option(None, "largest norm of the gradients")
    ema: float | None = option(None, "decay of averaged weights, which are then evaluated and kept")

    # Machine
    device: str | None = option(None, "cpu | cuda (default: cuda where there is one)")
    amp: str = option("none", "autocast", ("none", "bfloat16", "float16"))
    compile: bool = option(False, "torch.compile the model")
    distributed_loss: str = option(
        "none", "under torchrun: contrast with the other processes' images", ("none", "gather", "ring")
    )
    seed: int = option(0, "of weights, few-shot subset, order, augmentation and dropout")

    # Run
    output: str = option("runs/train", "directory of the run")
    resume: bool = option(False, "go on from the newest checkpoint in --output, if there is one")
    overwrite: bool = option(False, "delete a run that is already in --output")
    checkpoint_epochs: int = option(1, "epochs from one checkpoint to the next")
    checkpoint_steps: int | None = option(None, "also write a checkpoint every N steps")
    keep_checkpoints: int = option(2, "checkpoints kept")
    eval_every: int = option(1, "epochs from one validation to the next")
    eval_embeddings: str = option(
        "final", "judge the embeddings (neighbours, centroids, geometry)", ("never", "final", "epoch")
    )
    eval_images: int = option(10000, "most images per split that the embeddings are judged on")
    tensorboard: bool = option(True, "write TensorBoard events")
    progress: bool = option(True, "progress bar")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(TrainConfig)
        for field in dataclasses.fields(self):
            value = _convert(field.name, getattr(self, field.name), hints[field.name])
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise TrainingError(f"{flag(field.name)} must be one of {', '.join(choices)}, got {value!r}")
            setattr(self, field.name, value)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "keep_checkpoints",
            "checkpoint_epochs",
            "projection_dim",
            "eval_images",
            "eval_every",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        for name in (
            "shots",
            "micro_batch_size",
            "images_per_class",
            "image_size",
            "checkpoint_steps",
            "views",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "an integer >= 1")
        for name in ("weight", "drop", "drop_path", "label_smoothing", "random_erasing", "mix_prob"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number in [0, 1]")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a number in (0, 1)")
        _require(
            self.temperature is None or self.temperature > 0, "temperature", self.temperature, "a number > 0"
        )
        _require(self.beta is None or self.beta >= 0, "beta", self.beta, "a number >= 0")
        _require(self.lr > 0, "lr", self.lr, "a number > 0")
        for name in ("workers", "mixup", "cutmix", "weight_decay", "warmup_epochs"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        _require(self.hflip is None or 0 <= self.hflip <= 1, "hflip", self.hflip, "a number in [0, 1]")
        _require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            "layer_decay", self.layer_decay, "a number in (0, 1]",
        )  # fmt: skip
        _require(
            not self.scale or (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]),
            "scale", self.scale, "two numbers, the smaller first",
        )  # fmt: skip
        _require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        if self.images_per_class and self.batch_size % self.images_per_class:
            raise TrainingError(
                f"--batch-size {self.batch_size} must be a multiple of --images-per-class "
                f"{self.images_per_class}"
            )
        if OBJECTIVES[self.objective].two_stage and not 1 <= self.resolved_head_epochs < self.epochs:
            raise TrainingError(
                f"{self.objective} trains in two stages: --head-epochs must lie in [1, --epochs), "
                f"got {self.resolved_head_epochs} of {self.epochs}"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise TrainingError(f"mixup and CutMix need an even --batch-size, got {self.batch_size}")
        if (self.mixup or self.cutmix) and self.resolved_views != 1:
            single = _objectives(lambda o: o.views == 1)
            raise TrainingError(f"mixup and CutMix mix single views: use --views 1 with one of {single}")

    @property
    def data_is_folder(self) -> bool:
        """Whether ``data`` is a directory, not the name of a data set."""
        return self.data != "digits" and ":" not in self.data and not self.data.lower().startswith("hfds/")

    @property
    def resolved_views(self) -> int:
        return self.views or OBJECTIVES[self.objective].views

    @property
    def resolved_head_epochs(self) -> int:
        return self.head_epochs if self.head_epochs is not None else max(1, self.epochs // 4)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def dump(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, options: dict[str, Any], source: str = "options") -> TrainConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        options = {str(name).replace("-", "_"): value for name, value in options.items()}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TrainingError(
                f"{source}: unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**options)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a recipe or config.yaml."""
    try:
        options = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise TrainingError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"--config {path}: not YAML ({error})") from None
    if not isinstance(options, dict):
        raise TrainingError(f"--config {path}: must map option names to values, got {type(options).__name__}")
    return options


def add_options(parser: argparse.ArgumentParser, exclude: Sequence[str] = ()) -> None:
    """Every field of TrainConfig as an option without a default, so that a recipe is not overruled by it."""
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name in exclude:
            continue
        kind, is_list, _ = _kind(hints[field.name])
        help_text = field.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
            options["choices"] = field.metadata["choices"]
            options["metavar"] = None if options["choices"] else kind.__name__.upper()
            if is_list:
                options["nargs"] = "*"
            elif field.default is not None and "default:" not in help_text:
                help_text += f" (default: {field.default})"
        parser.add_argument(flag(field.name), help=help_text, **options)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(ok: bool, name: str, value: Any, accepted: str) -> None:
    if not ok:
        raise TrainingError(f"{flag(name)} must be {accepted}, got {value!r}")


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """(scalar type, is a list, may be None)"""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (inner,) = [t for t in typing.get_args(hint) if t is not type(None)]
        return (*_kind(inner)[:2], True)
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, False
    return hint, False, False


def _convert(name: str, value: Any, hint: Any) -> Any:
    kind, is_list, optional = _kind(hint)
    if value is None and optional:
        return None
    if value is None:
        raise TrainingError(f"{flag(name)} must be {_noun(kind)}, got nothing")
    if is_list:
        if not isinstance(value, (list, tuple)):
            raise TrainingError(f"{flag(name)} must be a list, got {value!r}")
        return [_convert(name, x, kind) for x in value]
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise TrainingError(f"{flag(name)} must be {_noun(kind)}, got {value!r}")
        return value
    # YAML 1.1 reads 1e-4 as a string and 3 as an integer where a number is meant.
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise TrainingError(f"{flag(name)} must be {_noun(kind)}, got {value!r}") from None
    if kind is int and converted != float(value):
        raise TrainingError(f"{flag(name)} must be an integer, got {value!r}")
    return converted


def _noun(kind: type) -> str:
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]
