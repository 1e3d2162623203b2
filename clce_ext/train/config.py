"""Every option of a training run, written once: command line, recipe file and config.yaml all read this."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from .choice import METRICS
from .errors import TrainingError
from .objectives import LOSS_OPTIONS, OBJECTIVES, Objective

DEFAULT_LR = 5e-4
# A new classifier on given weights has further to go than the backbone (docs/training.md says how far).
NEW_CLASSIFIER_RATE = 5
_OF_PACKAGES = ("hfds/", "tfds/", "wds/")  # how names of data sets begin that look like folders and are none

# What an option may be: in words, and as a test.
_COUNT = "an integer >= 1", lambda value: value >= 1
_WHOLE = "an integer >= 0", lambda value: value >= 0
_POSITIVE = "a number > 0", lambda value: value > 0
_NOT_NEGATIVE = "a number >= 0", lambda value: value >= 0
_SHARE = "a number in [0, 1]", lambda value: 0 <= value <= 1
_FRACTION = "a number in (0, 1)", lambda value: 0 < value < 1
_DECAY = "a number in (0, 1]", lambda value: 0 < value <= 1
_BETA = "a number in [0, 10000]", lambda value: 0 <= value <= 10000
_RANGE = (
    "two numbers, the smaller first",
    lambda value: not value or (len(value) == 2 and 0 < value[0] <= value[1]),
)


def _objectives(having: Callable[[Objective], object]) -> str:
    return ", ".join(o.name for o in OBJECTIVES.values() if having(o))


def option(default: Any, help: str, accepted: Any = None, choices: Sequence[str] = ()) -> Any:
    """A field of TrainConfig. None is accepted wherever the field's type allows it."""
    if choices:
        accepted = f"one of {', '.join(choices)}", lambda value: value in choices
    metadata = {"help": help, "choices": choices, "accepted": accepted}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class TrainConfig:
    """Options of ``clce-train``. A recipe file holds the same names (``batch_size`` or ``batch-size``)."""

    # Data
    data: str = option(
        "digits",
        "digits | letters | letters:novel | torchvision:NAME | hfds/NAME | tfds/NAME | wds/ | DIR with "
        "train/, val/ and test/ class folders",
    )
    data_dir: str | None = option(
        None, "where data sets of torchvision, Hugging Face and TensorFlow are kept; wds/: the shards' folder"
    )
    image_column: str | None = option(None, "hfds, tfds: column of images (default: by its type)")
    label_column: str | None = option(
        None, "hfds, tfds: column of labels (default: by its type); wds: a field of .json (default: the .cls)"
    )
    fonts: str | None = option(None, "letters: a folder of fonts beside those that matplotlib brings")
    letter_size: int = option(8, "letters: side in pixels that they are drawn at", _COUNT)
    letter_images: int = option(150, "letters: images of each in train; a fifth in val and test", _COUNT)
    download: bool = option(False, "let torchvision or TensorFlow fetch the data set")
    train_split: str | None = option(None, "name of the training split (default: train)")
    val_split: str | None = option(None, "name of the split that training watches (default: val, or test)")
    test_split: str | None = option(None, "name of the test split, which only judges (default: test)")
    val_fraction: float | None = option(
        None, "validate on this share of each class's training images, which are not trained on", _FRACTION
    )
    shots: int | None = option(None, "train on K images per class, drawn with --seed", _COUNT)
    hold_out_classes: list[str] = option([], "classes left out of training, for few-shot episodes")  # noqa: RUF009
    images_per_class: int | None = option(
        None, "batches of K images of each of batch-size / K classes (default: shuffled)", _COUNT
    )
    image_size: int | None = option(None, "side in pixels (default: the model's)", _COUNT)
    max_image_pixels: int = option(89_478_485, "refuse larger images (default: Pillow's limit)", _COUNT)
    augment: bool = option(True, "augment training images; --no-augment only resizes them")
    scale: list[float] = option([], "area of crops (default: 0.08 1, digits and letters 0.8 1)", _RANGE)  # noqa: RUF009
    hflip: float | None = option(None, "probability of a flip (default: 0.5, digits and letters 0)", _SHARE)
    color_jitter: float | None = option(
        None, "strength of colour jitter (default: 0.4, digits and letters 0)"
    )
    auto_augment: str | None = option(None, "timm's policy, e.g. rand-m9-mstd0.5-inc1")
    random_erasing: float = option(0.0, "probability of erasing a rectangle", _SHARE)
    workers: int = option(0, "processes that load images", _NOT_NEGATIVE)

    # Model
    model: str = option("beit_tiny_digits", "a timm model: beit_*, beitv2_*, beit3_*, or any other")
    pretrained: bool = option(False, "start from timm's weights (needs the network or timm's cache)")
    checkpoint: str | None = option(None, "start from these weights: .safetensors, .pth or a run's directory")
    global_pool: str | None = option(
        None, "how patches become one embedding: avg, token, ... (default: the model's)"
    )
    drop: float = option(0.0, "dropout before the classifier", _SHARE)
    drop_path: float = option(0.0, "stochastic depth", _SHARE)
    batch_norm: str | None = option(
        None,
        "BatchNorm's statistics: frozen, those of the given weights, or train, each batch's (default: frozen "
        "with --pretrained or --checkpoint, else train)",
        choices=("frozen", "train"),
    )
    projection_dim: int = option(
        128, f"outputs of the projection head ({_objectives(lambda o: o.projection)})", _COUNT
    )
    grad_checkpointing: bool = option(False, "recompute the backbone's activations in the backward pass")

    # Objective
    objective: str = option(
        "clce",
        "what to minimise: " + "; ".join(f"{o.name}, {o.summary}" for o in OBJECTIVES.values()),
        choices=tuple(OBJECTIVES),
    )
    weight: float = option(0.9, "clce: lambda, the share of the contrastive half", _SHARE)
    temperature: float | None = option(
        None,
        "tau of the contrastive loss (default: "
        + ", ".join(f"{o.name} {o.temperature}" for o in OBJECTIVES.values() if o.loss)
        + ")",
        _POSITIVE,
    )
    beta: float | None = option(
        None, f"hardness of negatives in {_objectives(lambda o: 'beta' in o.options)} (default: 1)", _BETA
    )
    label_smoothing: float = option(0.0, "of the cross-entropy (with mixup: of its soft targets)", _SHARE)
    views: int | None = option(
        None,
        f"augmented views of an image (default: 2 for {_objectives(lambda o: o.views == 2)}, else 1)",
        _COUNT,
    )
    mixup: float = option(0.0, "alpha of mixup in cross-entropy and clce", _NOT_NEGATIVE)
    cutmix: float = option(0.0, "alpha of CutMix in cross-entropy and clce", _NOT_NEGATIVE)
    mix_prob: float = option(1.0, "probability of mixing", _SHARE)
    queue_size: int | None = option(None, "also contrast with the last N embeddings of steps before", _COUNT)
    head_epochs: int | None = option(
        None, "two-stage objectives: of --epochs, those that train the head (default: a quarter, at least 1)"
    )
    head_backbone: str = option(
        "frozen",
        "two-stage objectives: the backbone while the head is trained",
        choices=("frozen", "trained"),
    )

    # Optimisation
    epochs: int = option(20, "epochs of all stages together; 0 judges the given weights as they are", _WHOLE)
    batch_size: int = option(64, "images per step, of all processes together", _COUNT)
    micro_batch_size: int | None = option(
        None, "images per forward pass of a process (default: its share of the batch)", _COUNT
    )
    opt: str = option("adamw", "timm's optimizer")
    lr: float | None = option(None, f"learning rate (default: {DEFAULT_LR}, or by --lr-base)", _POSITIVE)
    lr_base: float | None = option(None, "learning rate of a batch of 256, scaled as timm does", _POSITIVE)
    head_lr: float | None = option(
        None,
        "learning rate of the classifier, or of the whole head stage where there is one (default: --lr, or "
        f"{NEW_CLASSIFIER_RATE} times that with given weights)",
        _POSITIVE,
    )
    weight_decay: float = option(0.05, "weight decay", _NOT_NEGATIVE)
    layer_decay: float | None = option(None, "layer-wise decay of the learning rate", _DECAY)
    sched: str = option("cosine", "timm's schedule, per update")
    warmup_epochs: float = option(
        0.0, "epochs of linear warm-up of each stage, at most half of it", _NOT_NEGATIVE
    )
    warmup_lr: float = option(1e-6, "where the warm-up starts")
    min_lr: float = option(1e-6, "where the schedule ends")
    clip_grad: float | None = option(None, "largest norm of the gradients")
    ema: float | None = option(None, "decay of averaged weights, which are evaluated and kept", _FRACTION)

    # Machine
    timeout: float = option(
        1800.0, "under torchrun: seconds that processes wait for each other, then end", _POSITIVE
    )
    device: str | None = option(None, "cpu | cuda (default: cuda where there is one)")
    amp: str = option("none", "autocast", choices=("none", "bfloat16", "float16"))
    compile: bool = option(False, "torch.compile the model")
    distributed_loss: str | None = option(
        None,
        "under torchrun: contrast with the other processes' images, or not (default: gather)",
        choices=("none", "gather", "ring"),
    )
    seed: int = option(0, "of weights, few-shot subset, order, augmentation and dropout", _WHOLE)

    # Run
    plan: bool = option(False, "print what would run, and stop")
    output: str = option("runs/train", "directory of the run")
    resume: bool = option(False, "go on from the newest checkpoint in --output, if there is one")
    overwrite: bool = option(False, "delete a run that is already in --output")
    checkpoint_epochs: int = option(1, "epochs from one checkpoint to the next", _COUNT)
    checkpoint_steps: int | None = option(None, "also write a checkpoint every N steps", _COUNT)
    keep_checkpoints: int = option(2, "checkpoints kept", _COUNT)
    eval_every: int = option(1, "epochs from one validation to the next", _COUNT)
    eval_embeddings: str = option(
        "final",
        "when to judge the embeddings (neighbours, centroids, geometry)",
        choices=("never", "final", "epoch"),
    )
    eval_images: int = option(10000, "most images to judge embeddings on and to fit a probe to", _COUNT)
    best_metric: str | None = option(
        None,
        "keep the weights of the last stage's epoch that is best by this figure on the validation split "
        "(default: those of the last epoch)",
        choices=tuple(METRICS),
    )
    patience: int | None = option(
        None, "end the last stage after N evaluations without a better --best-metric", _COUNT
    )
    tensorboard: bool = option(True, "write TensorBoard events")
    tracker: str | None = option(
        None, "also log to Weights & Biases or MLflow, if installed", choices=("wandb", "mlflow")
    )
    progress: bool = option(True, "progress bar")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _convert(field.name, getattr(self, field.name), field.type)
            if field.metadata["accepted"] and value is not None:
                words, accepts = field.metadata["accepted"]
                if not accepts(value):
                    raise TrainingError(f"{flag(field.name)} must be {words}, got {value!r}")
            setattr(self, field.name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Options that only make sense together."""
        objective, head_epochs = OBJECTIVES[self.objective], self.resolved_head_epochs
        if self.val_fraction and self.val_split:
            raise TrainingError("--val-fraction and --val-split both name a validation split: give one")
        if self.images_per_class and self.batch_size % self.images_per_class:
            raise TrainingError(
                f"--batch-size {self.batch_size} must be a multiple of --images-per-class "
                f"{self.images_per_class}"
            )
        if self.lr and self.lr_base:
            raise TrainingError("--lr and --lr-base both give the learning rate: give one")
        for name in LOSS_OPTIONS:
            if name not in objective.options and getattr(self, name) != getattr(TrainConfig, name):
                having = _objectives(lambda o, name=name: name in o.options)
                raise TrainingError(
                    f"{flag(name)} is an option of {having}; --objective {self.objective} has none"
                )
        if self.epochs and objective.two_stage and not 1 <= head_epochs < self.epochs:
            raise TrainingError(
                f"{self.objective} trains in two stages: --head-epochs must lie in [1, --epochs), "
                f"got {head_epochs} of {self.epochs}"
            )
        if self.patience and not self.best_metric:
            raise TrainingError("--patience needs --best-metric, the figure that has to become better")
        if self.best_metric in ("knn", "centroid") and self.eval_embeddings != "epoch":
            raise TrainingError(f"--best-metric {self.best_metric} needs --eval-embeddings epoch")
        if (self.mixup or self.cutmix) and self.resolved_views != 1:
            single = _objectives(lambda o: o.views == 1)
            raise TrainingError(f"mixup and CutMix mix single views: use --views 1 with one of {single}")

    @property
    def data_is_folder(self) -> bool:
        """Whether ``data`` is a directory, not the name of a data set."""
        return not (self.data_is_glyphs or ":" in self.data or self.data.lower().startswith(_OF_PACKAGES))

    @property
    def data_is_glyphs(self) -> bool:
        """Whether the images are of single characters, which crops and flips would make into others."""
        return self.data in ("digits", "letters", "letters:novel")

    @property
    def has_weights(self) -> bool:
        """Whether the backbone starts from given weights."""
        return self.pretrained or self.checkpoint is not None

    @property
    def resolved_lr(self) -> float:
        if self.lr_base is None:
            return self.lr or DEFAULT_LR
        ratio = self.batch_size / 256
        adaptive = "ada" in self.opt.lower() or "lamb" in self.opt.lower()
        return self.lr_base * (ratio**0.5 if adaptive else ratio)

    @property
    def resolved_head_lr(self) -> float:
        return self.head_lr or self.resolved_lr * (NEW_CLASSIFIER_RATE if self.has_weights else 1)

    @property
    def resolved_views(self) -> int:
        return self.views or OBJECTIVES[self.objective].views

    @property
    def resolved_head_epochs(self) -> int:
        return self.head_epochs if self.head_epochs is not None else max(1, self.epochs // 4)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any], source: str = "options") -> TrainConfig:
        known = sorted(field.name for field in dataclasses.fields(cls))
        if unknown := sorted(set(options) - set(known)):
            raise TrainingError(
                f"{source}: unknown option {', '.join(unknown)}; known are {', '.join(known)}"
            )
        return cls(**options)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a recipe or config.yaml, by the names of TrainConfig's fields."""
    try:
        options = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise TrainingError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"--config {path}: not YAML ({error})") from None
    if not isinstance(options, dict):
        raise TrainingError(f"--config {path}: must map option names to values, got {type(options).__name__}")
    return {str(name).replace("-", "_"): value for name, value in options.items()}


def command_parser(text: str, epilog: str) -> argparse.ArgumentParser:
    """Of a command whose module says "command: what it does"."""
    command, _, description = text.partition(": ")
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=command, description=description, epilog=epilog, formatter_class=layout
    )


def add_options(
    parser: argparse._ActionsContainer, only: Collection[str] = (), exclude: Collection[str] = ()
) -> None:
    """Fields of TrainConfig as options without a default, so that a recipe is not overruled by it.

    Their values stay text, which TrainConfig reads as it reads a recipe's.
    """
    for field in dataclasses.fields(TrainConfig):
        if field.name in exclude or (only and field.name not in only):
            continue
        text, choices = field.metadata["help"].replace("%", "%%"), field.metadata["choices"]
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = field.type.removesuffix(" | None").removeprefix("list[").removesuffix("]")
            options["metavar"] = f"{{{','.join(choices)}}}" if choices else kind.upper()
            if field.type.startswith("list"):
                options["nargs"] = "*"
            elif field.default is not None and "default:" not in text:
                text += f" (default: {field.default})"
        parser.add_argument(flag(field.name), help=text, **options)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_KINDS = {
    "bool": (bool, "true or false"), "int": (int, "an integer"), "float": (float, "a number"),
    "str": (str, "a string"),
}  # fmt: skip


def _convert(name: str, value: Any, annotation: str) -> Any:
    """A field's value as its annotation, such as "int | None" or "list[str]", wants it.

    YAML 1.1 reads 1e-4 as a string and 3 as an integer where a number is meant.
    """
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    if kind.startswith("list["):
        if not isinstance(value, (list, tuple)):
            raise TrainingError(f"{flag(name)} must be a list, got {value!r}")
        return [_convert(name, x, kind[5:-1]) for x in value]
    make, noun = _KINDS[kind]
    try:
        if value is None or isinstance(value, bool) != (make is bool):
            raise ValueError
        converted = make(value)
        if make is float and not math.isfinite(converted):
            noun = "a finite number"
            raise ValueError
        if make is int and converted != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        got = "nothing" if value is None else repr(value)
        raise TrainingError(f"{flag(name)} must be {noun}, got {got}") from None
    return converted
