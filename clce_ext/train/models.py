"""timm's models with a projection head, and a BEiT small enough for two CPU cores."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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

from .checkpoint import read_classes, read_weights
from .config import TrainConfig
from .errors import TrainingError, first_line, in_one_line, listing

default_cfgs = generate_default_cfgs(
    {
        "beit_tiny_digits": {
            "num_classes": 10, "input_size": (3, 32, 32), "pool_size": None, "crop_pct": 1.0,
            "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj", "classifier": "head",
        }
    }
)  # fmt: skip


@register_model
def beit_tiny_digits(pretrained: bool = False, **kwargs: Any) -> Beit:
    """BEiT with 16 patches of 8 x 8 pixels, 4 blocks of width 96: for scikit-learn's digits, from scratch.

    BEiT's fine-tuning defaults presume pretrained weights and a width of 768. From scratch and this narrow
    they leave all embeddings nearly parallel, where contrast has little to hold on to: so linear layers start
    wider here, layer scale starts at 1, and the head is not scaled down.
    """
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
    biases = {"use_abs_pos_emb": True, "use_rel_pos_bias": True}
    scales = {"init_values": 1.0, "head_init_scale": 1.0}
    arguments = sizes | biases | scales | kwargs | {"pretrained_filter_fn": checkpoint_filter_fn}
    model = build_model_with_cfg(Beit, "beit_tiny_digits", pretrained, **arguments)
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear) and not pretrained:
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
    notes: Sequence[str] = ()  # what became of the given weights, in words
    # By which timm makes the backbone again, without the folder or the hub that it may have come from.
    architecture: str = ""
    arguments: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, backbone: nn.Module, projection_dim: int | None = None, frozen_batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.frozen_batch_norm = frozen_batch_norm
        width = getattr(backbone, "head_hidden_size", backbone.num_features) * len(classifiers(backbone))
        self.projection: nn.Module | None = None
        if projection_dim:
            layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim)
            self.projection = nn.Sequential(*layers)
        self.mode = "joint"
        self.contrast_dim = projection_dim or width  # columns of what a contrastive loss compares
        # Loaders give pixels 0...255, a quarter of the size of normalised ones.
        self.input = resolve_model_data_config(
            backbone
        )  # input_size, interpolation, crop_pct, mean, std, ...
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.input[name]).view(-1, 1, 1), persistent=False)

    def set_mode(self, mode: str) -> None:
        """Chooses the outputs, and with them the parameters that require gradients."""
        assert mode in self.MODES, mode
        self.mode = mode
        self.backbone.requires_grad_(mode != "head")
        for p in classifier_parameters(self.backbone):
            p.requires_grad_(mode != "contrast")
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
        """What the classifier sees: images [B, C, H, W], normalised or as pixels (uint8) -> [B, D].

        Of a distilled DeiT, its class token and its distillation token, one after the other.
        """
        if images.dtype == torch.uint8:
            images = (images / 255 - self.mean) / self.std
        count = len(classifiers(self.backbone))
        if count > 1:
            return self.backbone.forward_features(images)[:, :count].flatten(1)
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)

    def classify(self, embeddings: Tensor) -> Tensor:
        layers = classifiers(self.backbone)
        parts = embeddings.chunk(len(layers), dim=-1)
        return sum(layer(part) for layer, part in zip(layers, parts, strict=True)) / len(layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shape = images.shape[:-3]  # [B], or [B, V]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode != "head"):
            embeddings = self.embed(images.flatten(0, len(shape) - 1))
        if self.mode == "contrast":
            outputs = (embeddings if self.projection is None else self.projection(embeddings),)
        else:
            logits = self.classify(embeddings)
            outputs = (logits, embeddings) if self.mode == "joint" else (logits,)
        return tuple(x.unflatten(0, shape) for x in outputs)


def classifiers(backbone: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier layer, or a distilled DeiT's two, whose logits are averaged."""
    found = backbone.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def classifier_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    return [p for layer in classifiers(backbone) for p in layer.parameters()]


def create_model(
    config: TrainConfig, num_classes: int, with_projection: bool, class_names: Sequence[str] = ()
) -> FineTuner:
    """timm's model, its weights, and a projection head where an objective has one.

    A classifier that comes with the weights is kept where it is of as many classes, and of ``class_names``
    where both are known; ``notes`` says what became of it.

    Raises:
        TrainingError: unknown model, weights that cannot be fetched or do not fit, a model without one
            embedding per image.
    """
    if config.pretrained and config.checkpoint:
        raise TrainingError("--pretrained and --checkpoint both name weights: give one")
    arguments: dict[str, Any] = {"num_classes": num_classes, "drop_rate": config.drop}
    arguments |= {"drop_path_rate": config.drop_path, "img_size": config.image_size}
    arguments = {name: value for name, value in arguments.items() if value}
    backbone = _create_backbone(config, arguments)
    theirs = backbone.pretrained_cfg.get("num_classes") if config.pretrained else None
    if config.global_pool:
        with in_one_line("--global-pool: timm refuses: "):
            backbone.reset_classifier(num_classes, config.global_pool)
        theirs = None
    has_classifier, notes = theirs == num_classes, []
    if config.checkpoint:
        has_classifier, notes = load_backbone(backbone, config.checkpoint, config.model, class_names)
    elif config.pretrained:
        state = f"kept, of its {theirs} classes" if has_classifier else f"new, of {num_classes} classes"
        notes = [f"those of {config.model}", f"classifier {state}"]
    if sum(isinstance(layer, nn.Conv2d) for layer in backbone.modules()) > 1:
        # A convolutional network is faster with the channels of a pixel side by side; its images follow suit.
        backbone.to(memory_format=torch.channels_last)
    if config.grad_checkpointing:
        backbone.set_grad_checkpointing()
    if any(not isinstance(c, nn.Module) or isinstance(c, nn.Identity) for c in classifiers(backbone)):
        raise TrainingError(f"--model {config.model}: has no classifier layer to train")
    projection = config.projection_dim if with_projection else None
    frozen_batch_norm = config.has_weights if config.batch_norm is None else config.batch_norm == "frozen"
    with in_one_line(f"--model {config.model}: does not fall into embeddings and a classifier (", ")"):
        model = FineTuner(backbone, projection, frozen_batch_norm)
        if config.image_size:
            model.input["input_size"] = (3, config.image_size, config.image_size)
        agrees = _gives_its_own_logits(model)
    if not agrees:
        raise TrainingError(f"--model {config.model}: its logits are not its classifier's of one embedding")
    if config.has_weights and not has_classifier:
        # All classes equally likely: random preferences would first have to be unlearned, and their gradients
        # would meanwhile pull at the given backbone.
        for classifier in classifiers(backbone):
            layer = [m for m in classifier.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    model.notes, model.architecture, model.arguments = notes, config.model, arguments
    if _is_elsewhere(config):
        model.architecture = backbone.pretrained_cfg["architecture"]
        model.arguments = {**getattr(backbone, "_model_args", {}), **arguments}
    return model


def _is_elsewhere(config: TrainConfig) -> bool:
    """Whether timm finds the model in a folder or on the hub, not among its own."""
    return config.model.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def _create_backbone(config: TrainConfig, arguments: dict[str, Any]) -> nn.Module:
    name = config.model.partition(".")[0]
    if not _is_elsewhere(config) and not timm.is_model(name):
        near = _models_near(name)
        raise TrainingError(
            f"--model {config.model}: timm has no such model"
            + (f"; near it: {', '.join(near)}" if near else "")
            + ". hf-hub:OWNER/NAME and local-dir:DIR are accepted too"
        )
    tag = "" if _is_elsewhere(config) else config.model.partition(".")[2]
    if tag and config.model not in timm.models.get_arch_pretrained_cfgs(name):
        there = timm.list_pretrained(f"{name}.*")
        raise TrainingError(f"--model {config.model}: {name} has no weights {tag}; it has {listing(there)}")
    try:
        return timm.create_model(config.model, pretrained=config.pretrained, **arguments)
    except Exception as error:
        if isinstance(error, TypeError) and "img_size" in str(error):  # convolutional models take any size
            arguments.pop("img_size")
            return _create_backbone(config, arguments)
        if not config.pretrained or config.model.startswith("local-dir:"):
            raise TrainingError(
                f"--model {config.model}: {type(error).__name__}: {first_line(error)}"
            ) from error
        raise TrainingError(
            f"--pretrained: the weights of {config.model} could not be fetched from timm's hub "
            f"({type(error).__name__}: {first_line(error)}). Without the network, save its state_dict() "
            "elsewhere (safetensors.torch.save_file) and pass --checkpoint FILE"
        ) from error


def _models_near(name: str, most: int = 5) -> list[str]:
    """timm's names that may have been meant: first those that go on where ``name`` ends, then those that are
    spelt alike. Case, - and an owner before / do not count; nor does _ where names only go on."""
    name, known = name.rpartition("/")[2].lower().replace("-", "_"), timm.list_models()
    plain = name.replace("_", "")
    longer = [one for one in known if plain and one.replace("_", "").startswith(plain)]
    near = [*sorted(longer, key=len), *difflib.get_close_matches(name, known, most)]
    return list(dict.fromkeys(near))[:most] or timm.list_models(f"{name[:4]}*")[:most] * bool(name)


@torch.no_grad()
def _gives_its_own_logits(model: FineTuner) -> bool:
    """Whether classifying the embedding of an image gives what timm's model gives."""
    was_training = model.training
    model.eval()
    image = torch.rand(1, *model.input["input_size"], generator=torch.Generator().manual_seed(0))
    same = torch.allclose(model.classify(model.embed(image)), model.backbone(image), rtol=1e-3, atol=1e-4)
    model.train(was_training)
    return same


# What pre-training has beside the backbone: heads, a token in the place of masked patches, BEiT v2's further
# layers for the class token, the text's side of BEiT-3.
_OF_PRETRAINING = ("mask_token", "lm_head.", "mlm_head.", "mim_head.", "cls_pt_layers.", "text_embed.")
_SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"


def load_backbone(
    backbone: nn.Module, path: str | Path, name: str, class_names: Sequence[str] = ()
) -> tuple[bool, list[str]]:
    """Loads weights as timm does: position embeddings and relative-position tables are resized to the model's
    grid, and a classifier of other classes is left out. Checkpoints of masked-image modelling load as BEiT,
    BEiT v2 and BEiT-3 publish them.

    Returns:
        Whether the classifier was loaded too, and what became of the weights in words.

    Raises:
        TrainingError: unreadable file, or weights of another architecture.
    """
    own, of_classifier = backbone.state_dict(), {id(p) for p in classifier_parameters(backbone)}
    classifier = {name: p for name, p in backbone.named_parameters() if id(p) in of_classifier}
    # Optimizers, averages and a classifier of many classes may lie beside the weights.
    state = read_weights(path, largest=10 * sum(v.nbytes for v in own.values()) + 256 * 2**20)
    notes = [f"of {path}"]
    # timm keeps each architecture's conversions beside it under this name.
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    with in_one_line(f"--checkpoint {path}: not weights of {name} (", ")"):
        if _SHARED_BIAS in state and _SHARED_BIAS not in own:
            # BEiT pre-trains one table for all blocks; its fine-tuning begins with a copy of it in each.
            table = state.pop(_SHARED_BIAS)
            tables = [key for key in own if key.endswith("attn.relative_position_bias_table")]
            state |= {key: table.clone() for key in tables}
        if convert is not None:
            state = convert(state, backbone)
        if removed := [k for k in state if k not in own and k.startswith(_OF_PRETRAINING)]:
            notes.append(f"without {listing(sorted({k.partition('.')[0] for k in removed}))}")
        # A norm before the pooling becomes the one behind it where a token is pooled, which is the same; the
        # norm of a mean of tokens begins anew, as in the published fine-tuning.
        norms = {
            k: f"fc_norm.{k.rpartition('.')[2]}" for k in state if k.startswith(("norm.", "layer_norm."))
        }
        norms = {k: new for k, new in norms.items() if k not in own and new in own and new not in state}
        is_same = backbone.global_pool == "token" if norms else True
        state |= {new: state[k] if is_same else own[new] for k, new in norms.items()}
        if not is_same:
            notes.append("fc_norm new")
        is_kept, note = _classifier_fits(state, classifier, read_classes(path), class_names)
        for k in (*removed, *norms, *(() if is_kept else classifier)):
            state.pop(k, None)
        # BatchNorm's counters of batches matter to nothing here, and some files leave them out.
        kept = {k: v for k, v in own.items() if k in classifier or k.endswith("num_batches_tracked")}
        backbone.load_state_dict(kept | state)
    return is_kept, [*notes, note]


def _classifier_fits(
    state: dict[str, Tensor], own: dict[str, Tensor], saved: Sequence[str], wanted: Sequence[str]
) -> tuple[bool, str]:
    """Whether the weights have a classifier of the model's classes, and what becomes of it, in words; ``own``
    is the model's, and ``saved`` and ``wanted`` are the classes' names, where these are known."""
    if not all(k in state for k in own):
        return False, "classifier new: the weights have none"
    last = next(reversed(own))
    theirs, ours = len(state[last]), len(own[last])
    if any(state[k].shape != own[k].shape for k in own):
        return False, f"classifier new: the weights' is of {theirs} classes, not {ours}"
    if not (saved and wanted):
        said = "; if they are other classes, their order means nothing here"
        return True, f"classifier kept, of {theirs} classes{said}"
    if list(saved) != list(wanted):
        return False, f"classifier new: the weights' is of {theirs} other classes ({listing(saved, 3)})"
    return True, f"classifier kept, of {theirs} classes"


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
    options: dict[str, Any] = {"weight_decay": weight_decay}
    if hasattr(backbone, "no_weight_decay"):
        options["no_weight_decay_list"] = backbone.no_weight_decay()
    if layer_decay is None:
        groups = timm.optim.param_groups_weight_decay(backbone, **options)
    else:
        groups = timm.optim.param_groups_layer_decay(backbone, layer_decay=layer_decay, **options)
    if model.projection is not None:
        groups += timm.optim.param_groups_weight_decay(model.projection, weight_decay=weight_decay)
    apart = classifier_lr is not None and classifier_lr != lr
    own = {id(p) for p in classifier_parameters(backbone)} if apart else set()
    found = []
    for is_own, settings in ((False, {"lr": lr}), (True, {"lr": classifier_lr, "classifier": True})):
        for group in groups:
            params = [p for p in group["params"] if (id(p) in own) == is_own]
            if params:
                found.append(group | settings | {"params": params})
    return found
