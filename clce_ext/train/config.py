"""Every option of a training run, written once: command line, recipe file and config.yaml all read this."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import TrainingError
from .objectives import LOSS_OPTIONS, OBJECTIVES, Objective

DEFAULT_LR = 5e-4
# A new classifier on given weights has further to go than the backbone (docs/training.md says how far).
NEW_CLASSIFIER_RATE = 5
# The figures that --best-metric may choose by, and what gives the best of several.
METRICS = {"top1": max, "top5": max, "val_loss": min, "knn": max, "centroid": max}

# Types of options: numbers, of which _KINDS says more.
Count = Whole = int
Positive = NotNegative = Share = Fraction = Decay = Beta = float


def _objectives(having: Callable[[Objective], object]) -> str:
    return ", ".join(o.name for o in OBJECTIVES.values() if having(o))


_TEMPERATURES = ", ".join(f"{o.name} {o.temperature}" for o in OBJECTIVES.values() if o.loss)


def option(default: Any, help: str, choices: Sequence[str] = (), group: str = "", metavar: str = "") -> Any:
    """A field of TrainConfig. None is accepted wherever the field's type allows it.

    ``group`` is the heading of --help that begins with it, ``metavar`` what stands for its value there.
    """
    metadata = {"help": help, "choices": choices, "group": group, "metavar": metavar}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class TrainConfig:
    """Options of ``clce-train``. A recipe file holds the same names (``batch_size`` or ``batch-size``)."""

    data: str = option(
        "digits",
        "digits | letters | letters:novel | torchvision:NAME | hfds/NAME | tfds/NAME | wds/ | DIR with class "
        "folders in train/, val/ and test/",
        group="data",
        metavar="DATA",
    )
    data_dir: str | None = option(
        None,
        "where data sets of torchvision, Hugging Face and TensorFlow are kept; wds/: the shards' folder",
        metavar="DIR",
    )
    image_column: str | None = option(None, "hfds, wds, tfds: column of images (default: by its type)")
    label_column: str | None = option(
        None,
        "hfds, wds, tfds: column of labels (default: by its type or a usual name)",
    )
    fonts: str | None = option(
        None, "letters: a folder of fonts beside those that matplotlib brings", metavar="DIR"
    )
    letter_size: Count = option(8, "letters: side in pixels that they are drawn at")
    letter_images: Count = option(150, "letters: images of each in train; a fifth in val and test")
    download: bool = option(False, "let torchvision or TensorFlow fetch the data set")
    train_split: str | None = option(None, "name of the training split (default: train)")
    val_split: str | None = option(None, "name of the split that training watches (default: val, or test)")
    test_split: str | None = option(None, "name of the test split, which only judges (default: test)")
    val_fraction: Fraction | None = option(None, "share of each class held back from train to validate on")
    shots: Count | None = option(None, "train on this many images per class, drawn with --seed")
    hold_out_classes: list[str] = option([], "classes left out of training, for few-shot episodes")
    images_per_class: Count | None = option(
        None, "images of each class in a batch, so that they have positives (default: batches are shuffled)"
    )
    image_size: Count | None = option(None, "side in pixels (default: the model's)")
    max_image_pixels: Count = option(
        89_478_485, "refuse images of more pixels (default: 89478485, Pillow's limit)"
    )
    augment: bool = option(True, "augment training images; --no-augment only resizes them")
    scale: list[Positive] = option(
        [],
        "smallest and largest area of random crops, as shares of the image (default: 0.08 1; digits and "
        "letters 0.8 1)",
    )
    hflip: Share | None = option(
        None, "probability of a horizontal flip (default: 0.5, digits and letters 0)"
    )
    color_jitter: NotNegative | None = option(
        None, "strength of colour jitter (default: 0.4, digits and letters 0)"
    )
    auto_augment: str | None = option(None, "timm's policy, e.g. rand-m9-mstd0.5-inc1", metavar="POLICY")
    random_erasing: Share = option(0.0, "probability of erasing a rectangle")
    workers: Whole = option(0, "processes that load images")

    model: str = option("beit_tiny_digits", "any model of timm, by its name there", group="model")
    pretrained: bool = option(False, "start from timm's weights (needs the network or timm's cache)")
    checkpoint: str | None = option(
        None, "start from these weights: .safetensors, .pth or a run's directory", metavar="PATH"
    )
    global_pool: str | None = option(
        None, "what makes one embedding of patches: avg, token, ... (default: the model's)", metavar="KIND"
    )
    drop: Share = option(0.0, "dropout before the classifier")
    drop_path: Share = option(0.0, "stochastic depth: probability of dropping a block")
    batch_norm: str | None = option(
        None,
        "running statistics of BatchNorm (default: frozen with given weights, else train)",
        choices=("frozen", "train"),
    )
    projection_dim: Count = option(
        128, f"outputs of the projection head of {_objectives(lambda o: o.projection)}"
    )
    grad_checkpointing: bool = option(False, "recompute the backbone's activations in the backward pass")

    objective: str = option(
        "clce",
        "what to minimise: " + "; ".join(f"{o.name}, {o.summary}" for o in OBJECTIVES.values()),
        choices=tuple(OBJECTIVES),
        group="objective",
    )
    weight: Share = option(0.9, "clce: lambda, the share of the contrastive half")
    temperature: Positive | None = option(None, f"tau of the contrastive loss (default: {_TEMPERATURES})")
    beta: Beta | None = option(
        None, f"{_objectives(lambda o: 'beta' in o.options)}: hardness of negatives, 0 for none (default: 1)"
    )
    label_smoothing: Share = option(
        0.0, "smoothing of the labels in the cross-entropy (with mixup: of its soft targets)"
    )
    views: Count | None = option(
        None, f"augmented views of an image (default: 2 in {_objectives(lambda o: o.views == 2)}, else 1)"
    )
    mixup: NotNegative = option(0.0, "alpha of mixup in cross-entropy and clce")
    cutmix: NotNegative = option(0.0, "alpha of CutMix in cross-entropy and clce")
    mix_prob: Share = option(1.0, "probability of mixing")
    queue_size: Count | None = option(None, "also contrast with this many embeddings of steps before")
    head_epochs: int | None = option(
        None, "two-stage objectives: of --epochs, those that train the head (default: a quarter, at least 1)"
    )
    head_backbone: str = option(
        "frozen",
        "two-stage objectives: the backbone while the head is trained",
        choices=("frozen", "trained"),
    )

    epochs: Whole = option(
        20, "epochs of all stages together; 0 judges the given weights as they are", group="optimisation"
    )
    batch_size: Count = option(64, "images per step, of all processes together")
    micro_batch_size: Count | None = option(
        None,
        "images per forward and backward pass: less memory, the same contrast (default: the process's share "
        "of a batch)",
    )
    opt: str = option("adamw", "optimizer, by its name in timm")
    lr: Positive | None = option(None, f"learning rate (default: {DEFAULT_LR}, or by --lr-base)")
    lr_base: Positive | None = option(None, "learning rate of a batch of 256, scaled as timm does")
    head_lr: Positive | None = option(
        None,
        f"learning rate of the classifier, or of the head stage (default: that of --lr, with given weights "
        f"{NEW_CLASSIFIER_RATE} times that)",
    )
    weight_decay: NotNegative = option(0.05, "weight decay")
    layer_decay: Decay | None = option(
        None, "factor of the learning rate from each layer to the one before it, e.g. 0.75"
    )
    sched: str = option("cosine", "schedule of the learning rate, by its name in timm; per update")
    warmup_epochs: NotNegative = option(0.0, "epochs of linear warm-up of each stage, at most half of it")
    warmup_lr: NotNegative = option(1e-6, "learning rate at which the warm-up starts")
    min_lr: NotNegative = option(1e-6, "learning rate at which the schedule ends")
    clip_grad: Positive | None = option(None, "clip the gradients to this norm")
    ema: Fraction | None = option(None, "decay of averaged weights, which are evaluated and kept")

    timeout: Positive = option(
        1800.0, "under torchrun: seconds that processes wait for each other, then end", group="machine"
    )
    device: str | None = option(None, "cpu | cuda (default: cuda where there is one)", metavar="DEVICE")
    amp: str = option(
        "none", "mixed precision: autocast to this type", choices=("none", "bfloat16", "float16")
    )
    compile: bool = option(False, "torch.compile the model")
    distributed_loss: str | None = option(
        None,
        "under torchrun: contrast with other processes' images (default: gather)",
        choices=("none", "gather", "ring"),
    )
    seed: Whole = option(0, "seed of weights, few-shot subset, order, augmentation and dropout")

    plan: bool = option(False, "print what would run, and stop", group="run")
    output: str = option("runs/train", "directory of the run", metavar="DIR")
    resume: bool = option(False, "go on from the newest checkpoint in --output, if there is one")
    overwrite: bool = option(False, "delete a run that is already in --output")
    checkpoint_epochs: Count = option(1, "epochs from one checkpoint to the next")
    checkpoint_steps: Count | None = option(None, "also write a checkpoint every so many steps")
    keep_checkpoints: Count = option(2, "checkpoints kept")
    eval_every: Count = option(1, "epochs from one validation to the next")
    eval_embeddings: str = option(
        "final", "when to judge the embeddings: neighbours, geometry", choices=("never", "final", "epoch")
    )
    eval_images: Count = option(10000, "most images to judge embeddings on and to fit a probe to")
    best_metric: str | None = option(
        None,
        "keep the epoch of the last stage whose figure on the validation split is best (default: the last)",
        choices=tuple(METRICS),
    )
    patience: Count | None = option(
        None, "evaluations of the last stage without a better --best-metric that end the run"
    )
    tensorboard: bool = option(True, "write TensorBoard events")
    tracker: str | None = option(
        None, "also log to Weights & Biases or MLflow, which must be installed", choices=("wandb", "mlflow")
    )
    progress: bool = option(True, "progress bar")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            value = _converted(field.name, value, field.type)
            if choices and value not in (None, *choices):
                raise TrainingError(f"{flag(field.name)} must be one of {', '.join(choices)}, got {value}")
            setattr(self, field.name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Options that only make sense together."""
        objective, head_epochs = OBJECTIVES[self.objective], self.resolved_head_epochs
        if self.scale and (len(self.scale) != 2 or self.scale[0] > self.scale[1]):
            raise TrainingError(f"--scale must be two numbers, the smaller first, got {self.scale}")
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
        if (self.mixup or self.cutmix) and self.micro_batch_size == 1:
            raise TrainingError(
                "mixup and CutMix mix the images of a micro-batch: --micro-batch-size 1 has one"
            )

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
            said = ", ".join(_or_near(name, known) for name in unknown)
            raise TrainingError(f"{source}: unknown option {said}; known are {', '.join(known)}")
        return cls(**options)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a recipe or config.yaml, by the names of TrainConfig's fields."""
    try:
        options = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise TrainingError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())  # YAML's are of several lines
        raise TrainingError(f"--config {path}: not YAML ({reason})") from None
    if not isinstance(options, dict):
        raise TrainingError(f"--config {path}: must map option names to values, got {type(options).__name__}")
    return {str(name).replace("-", "_"): value for name, value in options.items()}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of this many options would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"unknown option {_or_near(name, self._option_string_actions)}")
        return parsed


def _or_near(name: str, known: Collection[str]) -> str:
    """The name of an option that there is not, and the one that was probably meant."""
    near = difflib.get_close_matches(name, known, 1)
    return name + (f" (did you mean {near[0]}?)" if near else "")


def command_parser(text: str, epilog: str, required: str = "") -> argparse.ArgumentParser:
    """Of a command whose module says "command: what it does"; ``required`` is what it cannot do without."""
    command, _, description = text.partition(": ")
    layout = argparse.RawDescriptionHelpFormatter
    # argparse's own usage lists all options, which --help does below it.
    usage = f"%(prog)s {required} [options]" if required else "%(prog)s [options]"
    return _Parser(prog=command, usage=usage, description=description, epilog=epilog, formatter_class=layout)


def add_options(
    parser: argparse._ActionsContainer,
    only: Collection[str] = (),
    exclude: Collection[str] = (),
    with_defaults: bool = True,
) -> None:
    """Fields of TrainConfig as options without a default, so that a recipe is not overruled by it.

    Their values stay text, which TrainConfig reads as it reads a recipe's. Without ``with_defaults`` no help
    names the default: where what is not given is taken from elsewhere.
    """
    container: argparse._ActionsContainer = parser
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] and not only:
            container = parser.add_argument_group(field.metadata["group"])
        if field.name in exclude or (only and field.name not in only):
            continue
        text, choices = field.metadata["help"].replace("%", "%%"), field.metadata["choices"]
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = field.type.removesuffix(" | None").removeprefix("list[").removesuffix("]")
            shown = field.metadata["metavar"] or _SHOWN.get(_KINDS[kind][1], "NAME")
            options["metavar"] = f"{{{','.join(choices)}}}" if choices else shown
            if field.type.startswith("list"):
                options["nargs"] = "*"
            elif with_defaults and field.default is not None and "default:" not in text:
                text += f" (default: {field.default})"
        container.add_argument(flag(field.name), help=text, **options)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# What the types of options stand for: in words, what makes a value of text, and which values are accepted.
_KINDS: dict[str, tuple[str, type, Callable[[Any], bool]]] = {
    "bool": ("true or false", bool, lambda value: True),
    "str": ("a string", str, lambda value: True),
    "float": ("a finite number", float, lambda value: True),
    "int": ("an integer", int, lambda value: True),
    "Count": ("an integer >= 1", int, lambda value: value >= 1),
    "Whole": ("an integer >= 0", int, lambda value: value >= 0),
    "Positive": ("a number > 0", float, lambda value: value > 0),
    "NotNegative": ("a number >= 0", float, lambda value: value >= 0),
    "Share": ("a number in [0, 1]", float, lambda value: 0 <= value <= 1),
    "Fraction": ("a number in (0, 1)", float, lambda value: 0 < value < 1),
    "Decay": ("a number in (0, 1]", float, lambda value: 0 < value <= 1),
    "Beta": ("a number in [0, 10000]", float, lambda value: 0 <= value <= 10000),
}
# What stands for a number in --help.
_SHOWN = {int: "N", float: "X"}


def _converted(name: str, value: Any, annotation: str) -> Any:
    """A field's value as its annotation, such as "Count | None" or "list[str]", wants it.

    YAML 1.1 reads 1e-4 as a string and 3 as an integer where a number is meant.
    """
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    if kind.startswith("list["):
        if not isinstance(value, (list, tuple)):
            raise TrainingError(f"{flag(name)} must be a list, got {value!r}")
        return [_converted(name, x, kind[5:-1]) for x in value]
    words, make, accepts = _KINDS[kind]
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        made = make(value)
        is_same = make in (bool, str) or (math.isfinite(made) and made == float(value))
        if value is not None and isinstance(value, bool) == (make is bool) and is_same and accepts(made):
            return made
    raise TrainingError(f"{flag(name)} must be {words}, got {'nothing' if value is None else value}")
