"""Fine-tune a timm model on your images with CLCE: one file to copy and change.

    python examples/finetune.py train birds --model resnet50 --output birds.pt
    python examples/finetune.py predict birds.pt photo1.jpg photo2.jpg

``birds`` holds train/CLASS/*.jpg and val/CLASS/*.jpg. For several GPUs, resuming, reports: clce-train.
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import clce_ext

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Model(nn.Module):
    """A timm model that gives logits [B, classes] and embeddings [B, D], which its classifier sees."""

    def __init__(self, name: str, classes: int, **weights) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=classes, **weights)
        # All classes equally likely at first: random preferences would pull at the given weights.
        for parameter in self.backbone.get_classifier().parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        return self.backbone.get_classifier()(embeddings), embeddings

    def train(self, mode: bool = True) -> nn.Module:
        """BatchNorm's statistics rest: a few images do not suffice to measure them again."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self


def balanced_batches(labels: list[int], batch_size: int, per_class: int) -> list[list[int]]:
    """One epoch, with ``per_class`` images of each class in a batch: contrast needs several of a class."""
    groups = []
    for label in sorted(set(labels)):
        members = (torch.tensor(labels) == label).nonzero().flatten()
        turns = enumerate(members[torch.randperm(len(members))].split(per_class))
        groups += [(turn + torch.rand(()).item(), group) for turn, group in turns]
    images = torch.cat([group for _, group in sorted(groups, key=lambda pair: pair[0])])  # classes in turn
    return [batch.tolist() for batch in images.split(batch_size)]


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)  # before hours are spent
    source = {"pretrained_cfg_overlay": {"file": options.weights}} if options.weights else {}
    train_set, val_set = ImageFolder(f"{options.data}/train"), ImageFolder(f"{options.data}/val")
    assert train_set.classes == val_set.classes, "train and val must hold the same class folders"
    model = Model(options.model, len(train_set.classes), pretrained=True, **source).to(DEVICE)
    config = resolve_model_data_config(model.backbone)
    train_set.transform = create_transform(**config, is_training=True, scale=(0.35, 1.0))
    val_set.transform = create_transform(**config)
    reference_set = ImageFolder(f"{options.data}/train", val_set.transform)  # for nearest neighbours

    # The new classifier has further to go than the backbone.
    head = set(model.backbone.get_classifier().parameters())
    body = [p for p in model.parameters() if p not in head]
    groups = [{"params": body, "lr": options.lr}, {"params": list(head), "lr": 5 * options.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    steps = -(-len(train_set) // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # a warm-up, then half a cosine
        optimizer, [g["lr"] for g in groups], options.epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    # All of a batch is contrasted, and only a micro-batch's activations are held.
    step = clce_ext.GradCache(model, clce_ext.CLCELoss(options.weight), options.micro_batch_size)

    for epoch in range(options.epochs):
        model.train()
        batches = balanced_batches(train_set.targets, options.batch_size, options.per_class)
        loader = DataLoader(train_set, batch_sampler=batches, num_workers=options.workers)
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                loss = step(images, labels.to(DEVICE))  # fills .grad
            optimizer.step()
            schedule.step()
            total += loss.item()
        top1, knn = evaluate(model, reference_set, val_set, options.workers)
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}  top-1 {top1:.2%}  neighbours {knn:.2%}")
    torch.save((options.model, train_set.classes, model.state_dict()), options.output)


@torch.inference_mode()
def outputs(model: Model, images: ImageFolder, workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, classes], embeddings of length 1 [N, D], labels [N]."""
    model.eval()
    parts = [(*model(x.to(DEVICE)), y.to(DEVICE)) for x, y in DataLoader(images, 64, num_workers=workers)]
    logits, embeddings, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logits, nn.functional.normalize(embeddings), labels


def evaluate(model: Model, references: ImageFolder, images: ImageFolder, workers: int) -> tuple[float, float]:
    """Accuracy of the classifier, and of the 20 most similar training images' votes."""
    logits, embeddings, labels = outputs(model, images, workers)
    _, known, classes = outputs(model, references, workers)
    similarity, nearest = (embeddings @ known.T).topk(min(20, len(known)))
    votes = torch.zeros_like(logits).scatter_add_(1, classes[nearest], (similarity / 0.07).exp())
    return tuple((scores.argmax(dim=1) == labels).float().mean().item() for scores in (logits, votes))


@torch.inference_mode()
def predict(options: argparse.Namespace) -> None:
    name, classes, weights = torch.load(options.saved, map_location=DEVICE, weights_only=True)
    model = Model(name, len(classes)).to(DEVICE).eval()
    model.load_state_dict(weights)
    transform = create_transform(**resolve_model_data_config(model.backbone))
    for path in options.images:
        logits, _ = model(transform(Image.open(path).convert("RGB"))[None].to(DEVICE))
        probability, label = logits.softmax(dim=1).max(dim=1)
        print(f"{path}  {classes[label]}  {probability.item():.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train")
    command.set_defaults(run=train)
    command.add_argument("data", help="folder with train/CLASS/ and val/CLASS/")
    command.add_argument("--weights", help="file of weights that timm saved (default: timm's own)")
    defaults = {"model": "resnet50", "output": "finetuned.pt", "epochs": 20, "batch-size": 256}
    defaults |= {"per-class": 4, "micro-batch-size": 32, "lr": 1e-4, "weight": 0.9, "workers": 4}
    for name, value in defaults.items():
        command.add_argument(f"--{name}", type=type(value), default=value)
    command = commands.add_parser("predict")
    command.set_defaults(run=predict)
    command.add_argument("saved")
    command.add_argument("images", nargs="+")
    options = parser.parse_args()
    options.run(options)
