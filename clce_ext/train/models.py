"""timm's models with a projection head, and a BEiT small enough for two CPU cores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
from timm.data import resolve_model_data_config
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint import read_weights
from .config import TrainConfig
from .errors import TrainingError, first_line, listing

default_cfgs = generate_default_cfgs(
    {
        "beit_tiny_digits": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def beit_tiny_digits(pretrained: bool = False, **kwargs: Any) -> Beit:
    """BEiT with 16 patches of 8 x 8 pixels, 4 blocks of width 96: for scikit-learn's digits, from scratch.

    BEiT's fine-tuning defaults presume pretrained weights and a width of 768. From scratch and this narrow
    they leave all embeddings nearly parallel, where contrast has little to hold on to: so linear layers start
    wider here, layer scale starts at 1, and the head is not scaled down.
    """
    arguments = dict(
        img_size=32,
        patch_size=8,
        embed_dim=96,
        depth=4,
        num_heads=4,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
        init_values=1.0,
        head_init_scale=1.0,
    )
    model = build_model_with_cfg(
        Beit,
        "beit_tiny_digits",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **(arguments | kwargs),
    )
    if not pretrained:
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.08)
    return model


class FineTuner(nn.Module):
    """A timm model that gives what a stage of training needs.

    ``mode`` decides what ``forward`` returns for images [B, C, H, W] or views [B, V, C, H, W] (the outputs
    then are [B, V, ...]), normalised or as pixels in uint8:

    ==============  ====================================================================================
    ``"joint"``     (logits [B, classes], embeddings [B, D]); D is the width of what the classifier sees
    ``"logits"``    (logits,)
    ``"contrast"``  (projections [B, P],), or the embeddings where there is no projection head
    ``"head"``      (logits,) with the backbone frozen: evaluation mode, no gradient
    ==============  ====================================================================================

    With ``frozen_batch_norm`` BatchNorm normalises by its running statistics in training too, and leaves them
    as they are; its scales and shifts are trained all the same.
    """

    MODES = ("joint", "logits", "contrast", "head")

    def __init__(
        self, backbone: nn.Module, projection_dim: int | None = None, frozen_batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.frozen_batch_norm = frozen_batch_norm
        width = backbone.head_hidden_size if hasattr(backbone, "head_hidden_size") else backbone.num_features
        self.projection = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim))
            if projection_dim
            else None
        )
        self.mode = "joint"
        self.contrast_dim = projection_dim or width  # columns of what a contrastive loss compares
        # Loaders give pixels 0...255, a quarter of the size of normalised ones.
        resolved = resolve_model_data_config(backbone)
        for name in ("mean", "std"):
            value = 255 * torch.tensor(resolved[name]).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def set_mode(self, mode: str) -> None:
        """Chooses the outputs, and with them the parameters that require gradients."""
        assert mode in self.MODES, mode
        self.mode = mode
        classifier = {id(p) for p in self.backbone.get_classifier().parameters()}
        for p in self.backbone.parameters():
            p.requires_grad_(
                (mode != "head" or id(p) in classifier) and (mode != "contrast" or id(p) not in classifier)
            )
        if self.projection is not None:
            self.projection.requires_grad_(mode == "contrast")

    def train(self, mode: bool = True) -> FineTuner:
        super().train(mode)
        if self.mode == "head":
            self.backbone.eval()
        elif self.frozen_batch_norm:
            for layer in self.backbone.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """What the classifier sees: images [B, C, H, W], normalised or as pixels (uint8) -> [B, D]."""
        if images.dtype == torch.uint8:
            images = (images - self.mean) / self.std
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)

    def classify(self, embeddings: Tensor) -> Tensor:
        return self.backbone.get_classifier()(embeddings)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.dim() == 5:
            outputs = self._outputs(images.flatten(0, 1))
            return tuple(x.unflatten(0, images.shape[:2]) for x in outputs)
        return self._outputs(images)

    def _outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode != "head"):
            embeddings = self.embed(images)
        if self.mode == "contrast":
            return (self.projection(embeddings) if self.projection is not None else embeddings,)
        logits = self.classify(embeddings)
        return (logits, embeddings) if self.mode == "joint" else (logits,)


def create_model(config: TrainConfig, num_classes: int, with_projection: bool) -> FineTuner:
    """timm's model, its weights, and a projection head where an objective has one.

    Raises:
        TrainingError: unknown model, weights that cannot be fetched or do not fit, a model without one
            embedding per image.
    """
    if config.pretrained and config.checkpoint:
        raise TrainingError("--pretrained and --checkpoint both name weights: give one")
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if config.drop:
        arguments["drop_rate"] = config.drop
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    if config.image_size:
        arguments["img_size"] = config.image_size
    backbone = _create_backbone(config, arguments)
    has_classifier = config.pretrained and backbone.pretrained_cfg["num_classes"] == num_classes
    if config.checkpoint:
        has_classifier = load_backbone(backbone, config.checkpoint, config.model)
    if config.grad_checkpointing:
        backbone.set_grad_checkpointing()
    classifier = backbone.get_classifier()
    if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.Identity):
        raise TrainingError(f"--model {config.model}: has no single classifier layer to train")
    try:
        model = FineTuner(
            backbone,
            config.projection_dim if with_projection else None,
            frozen_batch_norm=config.resolved_batch_norm == "frozen",
        )
        agrees = _gives_its_own_logits(model, input_config(model, config)["input_size"])
    except Exception as error:
        raise TrainingError(
            f"--model {config.model}: does not fall into embeddings and a classifier "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not agrees:
        raise TrainingError(f"--model {config.model}: its logits are not its classifier's of one embedding")
    if config.has_weights and not has_classifier:
        _start_at_zero(classifier)
    return model


def _start_at_zero(classifier: nn.Module) -> None:
    """All classes equally likely: a new classifier's random preferences would first have to be unlearned, and
    their gradients would meanwhile pull at the given backbone."""
    layer = [m for m in classifier.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _create_backbone(config: TrainConfig, arguments: dict[str, Any]) -> nn.Module:
    name = config.model.partition(".")[0]
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise TrainingError(
            f"--model {config.model}: timm has no such model"
            + (f"; near it: {', '.join(near)}" if near else "")
        )
    try:
        return timm.create_model(config.model, pretrained=config.pretrained, **arguments)
    except TypeError as error:
        if "img_size" in str(error):  # convolutional models take any size
            arguments.pop("img_size")
            return _create_backbone(config, arguments)
        raise TrainingError(f"--model {config.model}: {error}") from error
    except Exception as error:
        if not config.pretrained:
            raise TrainingError(f"--model {config.model}: {type(error).__name__}: {error}") from error
        raise TrainingError(
            f"--pretrained: the weights of {config.model} could not be fetched from timm's hub "
            f"({type(error).__name__}: {first_line(error)}). On a machine without the network, save them "
            f"elsewhere (timm.create_model({config.model!r}, pretrained=True), then "
            "safetensors.torch.save_file of its state_dict()) and pass --checkpoint FILE"
        ) from error


@torch.no_grad()
def _gives_its_own_logits(model: FineTuner, input_size: tuple[int, int, int]) -> bool:
    """Whether classifying the embedding of an image gives what timm's model gives."""
    was_training = model.training
    model.eval()
    image = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0))
    same = torch.allclose(model.classify(model.embed(image)), model.backbone(image), rtol=1e-3, atol=1e-4)
    model.train(was_training)
    return same


def load_backbone(backbone: nn.Module, path: str | Path, name: str) -> bool:
    """Loads weights as timm does: position embeddings and relative-position tables are resized to the model's
    grid, and a classifier of another number of classes is left out.

    Returns:
        Whether the classifier was loaded too.

    Raises:
        TrainingError: unreadable file, or weights of another architecture.
    """
    state = read_weights(path)
    # timm keeps each architecture's conversions beside it under this name.
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    try:
        if convert is not None:
            state = convert(state, backbone)
        own = backbone.state_dict()
        classifier = _classifier_keys(backbone)
        for key in classifier:
            if key in state and state[key].shape != own[key].shape:
                del state[key]
        # BatchNorm's counters of batches matter to nothing here, and some files leave them out.
        needed = [k for k in own if k not in classifier and not k.endswith("num_batches_tracked")]
        missing = [k for k in needed if k not in state]
        unknown = [k for k in state if k not in own]
        misshapen = [k for k in own if k in state and state[k].shape != own[k].shape]
    except (AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise TrainingError(f"--checkpoint {path}: not weights of {name} ({first_line(error)})") from error
    if missing or unknown or misshapen:
        parts = [f"missing {listing(missing, 4)}"] if missing else []
        parts += [f"unknown {listing(unknown, 4)}"] if unknown else []
        parts += [
            f"{k} is {list(state[k].shape)}, the model's is {list(own[k].shape)}" for k in misshapen[:3]
        ]
        raise TrainingError(f"--checkpoint {path}: not weights of {name}: {'; '.join(parts)}")
    backbone.load_state_dict(state, strict=False)
    return all(key in state for key in classifier)


def _classifier_keys(backbone: nn.Module) -> list[str]:
    classifier = backbone.get_classifier()
    prefix = next(n for n, m in backbone.named_modules() if m is classifier)
    return [f"{prefix}.{n}" for n, _ in classifier.named_parameters()]


def parameter_groups(
    model: FineTuner,
    lr: float,
    weight_decay: float,
    layer_decay: float | None,
    classifier_lr: float | None = None,
) -> list[dict[str, Any]]:
    """timm's groups of the backbone (no weight decay on biases, norms and what the model exempts; layer-wise
    learning rates) and those of the projection head, of the parameters that require gradients.

    A classifier with a learning rate of its own forms groups of its own, marked ``"classifier": True``.
    """
    backbone = model.backbone
    exempt = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    if layer_decay is not None:
        groups = timm.optim.param_groups_layer_decay(
            backbone, weight_decay=weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
        )
    else:
        groups = timm.optim.param_groups_weight_decay(
            backbone, weight_decay=weight_decay, no_weight_decay_list=exempt
        )
    if model.projection is not None:
        groups += timm.optim.param_groups_weight_decay(model.projection, weight_decay=weight_decay)
    groups = [{"lr": lr, **group} for group in groups]
    if classifier_lr is not None and classifier_lr != lr:
        own = {id(p) for p in backbone.get_classifier().parameters()}
        classifier = [
            group
            | {
                "params": [p for p in group["params"] if id(p) in own],
                "lr": classifier_lr,
                "classifier": True,
            }
            for group in groups
        ]
        rest = [group | {"params": [p for p in group["params"] if id(p) not in own]} for group in groups]
        groups = rest + classifier
    return [group for group in groups if group["params"]]


def input_config(model: FineTuner, config: TrainConfig) -> dict[str, Any]:
    """input_size, mean, std, interpolation and crop_pct, as timm resolves them."""
    resolved = resolve_model_data_config(model.backbone)
    if config.image_size:
        resolved["input_size"] = (3, config.image_size, config.image_size)
    return resolved
