"""Lightning: the loss in a training step. Needs lightning.

Under DDP every rank's loss is of its own batch; ``CLCELoss(distributed="gather")`` makes all ranks' batches
one contrast (docs/scaling.md).
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clce_ext


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        self.criterion = clce_ext.CLCELoss(weight=0.9, temperature=0.5)
        self.history = []

    def training_step(self, batch, _):
        x, labels = batch
        embeddings = self.backbone(x)
        loss = self.criterion(self.head(embeddings), embeddings, labels)
        self.history.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(epochs: int = 4) -> tuple[float, float]:
    """The loss of the first and of the last step."""
    torch.manual_seed(0)
    labels = torch.randint(4, (512,))
    data = TensorDataset(torch.randn(4, 16)[labels] + torch.randn(512, 16), labels)
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    return model.history[0], model.history[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
